"""A campaign in several processes, each on one core: small models run better so."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.campaign import Lane
from benchmarks.data import DataError

_POLL = 0.5


def run_lanes(
    lanes: Sequence[Lane],
    workers: int,
    data_dir: Path | None,
    deadline: float,
    progress: Progress,
) -> list[str]:
    """Give each lane to the next free worker until the time is up.

    Args:
      lanes: what to do.
      workers: number of processes.
      data_dir: folder of the data files.
      deadline: on the clock of `time.monotonic`.
      progress: a bar of lanes to advance.

    Returns:
      Names of the lanes whose process failed; its own output says why.

    Raises:
      DataError: when there are more workers than cores.
    """
    cores = _cores(workers)
    waiting, failed = list(lanes), []
    busy: dict[int, tuple[Lane, subprocess.Popen[bytes]]] = {}
    task = progress.add_task("lanes", total=len(lanes))
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or busy:
            for core in cores:
                if core not in busy and waiting and time.monotonic() < deadline:
                    lane = waiting.pop(0)
                    busy[core] = lane, _start(lane, core, data_dir, deadline)
            for core, (lane, process) in list(busy.items()):
                if process.poll() is not None:
                    failed += [lane.name] if process.returncode else []
                    del busy[core]
                    progress.advance(task)
            if not busy and time.monotonic() >= deadline:
                break
            time.sleep(_POLL)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for _, process in busy.values():
            process.terminate()
    return failed


def _cores(workers: int) -> list[int]:
    if not hasattr(os, "sched_getaffinity"):
        return list(range(workers))
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise DataError(
            f"--workers: got {workers}, expected at most {len(cores)}, one a core. "
            "Remedy: fewer workers."
        )
    return cores[:workers]


def _start(
    lane: Lane, core: int, data_dir: Path | None, deadline: float
) -> "subprocess.Popen[bytes]":
    hours = max(0.0, deadline - time.monotonic()) / 3600
    options: dict[str, Any] = {
        "--optimizer": lane.contender.name,
        "--out": lane.out,
        "--seeds": lane.seeds,
        "--hours": f"{hours:.6f}",
    }
    if data_dir is not None:
        options["--data-dir"] = data_dir
    flags = ["--quiet", *(["--quick"] if lane.quick else [])]
    pairs = [str(word) for pair in options.items() for word in pair]
    command = ["campaign", lane.workload.name, *pairs, *flags]
    # Before the child starts: XLA sizes its thread pool by the cores it may use.
    pin = [sys.executable, "-c", _PINNED, str(core), *command]
    return subprocess.Popen(pin)


_PINNED = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[2:]])
"""
