"""Training in several processes that talk to each other, against training in one.

The processes are jax's own: `jax.distributed` on the loopback interface, collectives by
gloo. Every process draws the same global batch and puts its own rows of it on its
devices; gradients and statistics are reduced over all of them.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.data import DataError
from benchmarks.optimizers import Contender
from benchmarks.train import make_init, make_step
from benchmarks.workloads import Workload

_POLL = 0.2
#: Holds the fields of a child's `Place`.
VARIABLE = "DSBP_PLACE"


class Place(NamedTuple):
    """One process among several.

    Attributes:
      address: of the coordinator; empty for a process that is alone.
      processes: how many there are.
      number: which one this is.
      devices: of each.
    """

    address: str
    processes: int
    number: int
    devices: int


def join(place: Place, missed: int | None = None) -> None:
    """Make this process one of several; before anything else is asked of jax.

    Args:
      place: of this process.
      missed: seconds after which a process that has gone is missed, and this one ends;
        None for jax's own.
    """
    jax.config.update("jax_num_cpu_devices", place.devices)
    if place.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            place.address,
            num_processes=place.processes,
            process_id=place.number,
            **({} if missed is None else {"heartbeat_timeout_seconds": missed}),
        )


def losses(
    workload: Workload,
    contender: Contender,
    data_dir: Path | None,
    rate: float,
    steps: int,
) -> list[float]:
    """The loss of every step, trained on all devices of all processes.

    Raises:
      DataError: when the devices do not divide a batch.
    """
    count = jax.device_count()
    if workload.batch_size % count:
        raise DataError(
            f"{workload.name}: got {count} devices, expected a divisor of its batch of "
            f"{workload.batch_size}. Remedy: another number of processes or devices."
        )
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    rng = np.random.default_rng(0)
    data = workload.load(data_dir)
    batches = workload.sampler(data.train, workload.batch_size, rng)
    rows = workload.batch_size // jax.process_count()
    mine = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))

    def place(batch: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(split, x[mine]), batch
        )

    params = jax.device_put(workload.init(0, data.pretrained), everywhere)
    step, found = make_step(workload, contender), []
    numbers = np.float32(rate), np.float32(steps)
    opt_state = None
    for _ in range(steps):
        batch = place(next(batches))
        if opt_state is None:
            opt_state = make_init(workload, contender)(params, batch)
        params, opt_state, loss = step(params, opt_state, batch, *numbers)
        found.append(float(loss))
    return found


def run(command: list[str], place: Place, seconds: float) -> list[float]:
    """Start all processes of a group and wait for their losses, which must agree.

    Args:
      command: a child's command line, see `distributed` in
        `benchmarks.commands.scale`; it gets the fields of its `Place` in the
        environment and prints losses as JSON.
      place: of the group; its number counts for nothing.
      seconds: after which the group is given up.

    Raises:
      DataError: when a process fails or the time is up; the others are ended.
    """
    address = f"127.0.0.1:{free_port()}"
    children = []
    for number in range(place.processes):
        own = place._replace(address=address, number=number)
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with its child
        environment = {**os.environ, VARIABLE: json.dumps(own)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        children.append(_Child(process, log))
    try:
        found = [_finish(child, children, seconds) for child in children]
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
            child.log.close()
    if any(other != found[0] for other in found):
        raise DataError(f"processes: got different losses, {found}, expected the same.")
    return found[0]


class _Child(NamedTuple):
    process: "subprocess.Popen[bytes]"
    log: IO[str]

    def said(self) -> str:
        """All that it printed."""
        self.log.seek(0)
        return self.log.read().strip()


def _finish(child: _Child, children: list[_Child], seconds: float) -> list[float]:
    """The losses that a child prints last; all are watched meanwhile."""
    deadline = time.monotonic() + seconds
    while child.process.poll() is None or child.process.returncode:
        failed = next((c for c in children if c.process.poll()), None)
        if failed is not None:
            raise DataError(f"one process of {len(children)} failed: {failed.said()}")
        if time.monotonic() > deadline:
            raise DataError(
                f"{len(children)} processes: no end after {seconds:.0f} s. Remedy: a "
                "longer --timeout, or fewer --steps."
            )
        time.sleep(_POLL)
    found: list[float] = json.loads(child.said().splitlines()[-1])
    return found


def free_port() -> int:
    """A port of the loopback interface that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def largest_gap(found: list[float], expected: list[float]) -> float:
    """Largest difference of two curves, relative to the second."""
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def child_place() -> Place | None:
    """Where this process stands, if it is a child of `run`."""
    held = os.environ.get(VARIABLE)
    return None if held is None else Place(*json.loads(held))


def command(arguments: list[str]) -> list[str]:
    """The command line of a child."""
    return [sys.executable, "-m", "benchmarks", *arguments]
