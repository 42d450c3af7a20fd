"""Training in several processes that talk to each other, against training in one.

The processes are jax's own: `jax.distributed` on the loopback interface, collectives by
gloo. Every process draws the same global batch and puts its own rows of it on its
devices; gradients and statistics are reduced over all of them.
"""

import json as json_module
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import cli
from benchmarks.core import campaign
from benchmarks.core.train import make_init, make_step
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import DataError, Workload

#: Holds the fields of a child's `Place`.
VARIABLE = "DSBP_PLACE"


class Place(NamedTuple):
    """One process among several."""

    address: str  # of the coordinator
    processes: int
    number: int  # which one this is
    devices: int  # of each


def join(place: Place, missed: int | None = None) -> None:
    """Make this process one of several; before anything else is asked of jax.

    After `missed` seconds a process that has gone is missed, and this one ends.
    """
    jax.config.update("jax_num_cpu_devices", place.devices)
    if place.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        told = {} if missed is None else {"heartbeat_timeout_seconds": missed}
        jax.distributed.initialize(
            *(place.address, place.processes, place.number), **told
        )


def losses(
    workload: Workload,
    contender: Contender,
    data_dir: Path | None,
    rate: float,
    steps: int,
) -> list[float]:
    """The loss of every step, trained on all devices of all processes."""
    count = jax.device_count()
    if workload.batch_size % count:
        raise DataError(
            f"{workload.name}: got {count} devices, expected a divisor of its batch of "
            f"{workload.batch_size}. Remedy: another number of processes or devices."
        )
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    data = workload.load(data_dir)
    rng = np.random.default_rng(0)
    batches = workload.sampler(data.train, workload.batch_size, rng)
    rows = workload.batch_size // jax.process_count()
    mine = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))
    params = jax.device_put(workload.init(0, data.pretrained), everywhere)
    step, found, opt_state = make_step(workload, contender), [], None
    numbers = np.float32(rate), np.float32(steps)
    for _ in range(steps):
        batch = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(split, x[mine]),
            next(batches),
        )
        if opt_state is None:
            opt_state = make_init(workload, contender)(params, batch)
        params, opt_state, loss = step(params, opt_state, batch, *numbers)
        found.append(float(loss))
    return found


def run(arguments: Sequence[str], place: Place, seconds: float) -> Any:
    """Start all processes of a group; what they print as JSON, which must agree.

    A process that fails, or the end of the time, ends the others.
    """
    own = place._replace(address=f"127.0.0.1:{free_port()}")
    command = [sys.executable, "-m", "benchmarks", *arguments]
    children, pipe = [], subprocess.PIPE
    for number in range(place.processes):
        told = json_module.dumps(own._replace(number=number))
        environment = {**os.environ, VARIABLE: told}
        children.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=pipe,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    found = []
    try:
        for child in children:
            said, _ = child.communicate(timeout=seconds)
            if child.returncode:
                raise DataError(f"one process of {place.processes} failed: {said}")
            found.append(json_module.loads(said.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{place.processes} processes: no end after {seconds:.0f} s. Remedy: a "
            "longer --timeout, or fewer --steps."
        ) from error
    finally:
        for child in children:
            child.kill()
            child.wait()
    if any(other != found[0] for other in found):
        raise DataError(f"processes: got different losses, {found}, expected the same.")
    return found[0]


def free_port() -> int:
    """A port of the loopback interface that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def largest_gap(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest difference of two curves, relative to the second."""
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


@cli.app.command("distributed")
def command(
    workload: cli.WorkloadName = "shakespeare_gpt",
    optimizer: cli.OptimizerName = "dsbp_muon",
    processes: Annotated[int, typer.Option(min=1, help="that train together")] = 2,
    devices: Annotated[int, typer.Option(min=1, help="of each process")] = 2,
    data_dir: cli.DataDir = None,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    timeout: Annotated[float, typer.Option(help="seconds for each run")] = 900.0,
    json: cli.Save = None,
    quiet: cli.Quiet = False,
) -> None:
    """Several processes on this machine against one, on the same global batches."""
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    contender = cli.lookup(CONTENDERS, optimizer, "--optimizer")
    rate, _ = campaign.rate_for(chosen, contender)
    with cli.bars(True):
        if (held := os.environ.get(VARIABLE)) is not None:
            join(Place(*json_module.loads(held)))
            print(json_module.dumps(losses(chosen, contender, data_dir, rate, steps)))
            return
        told = [
            "distributed",
            workload,
            "--optimizer",
            optimizer,
            "--steps",
            str(steps),
        ]
        told += [] if data_dir is None else ["--data-dir", str(data_dir)]
        together = run(told, Place("", processes, 0, devices), timeout)
        alone = run(told, Place("", 1, 0, 1), timeout)
    record = {"workload": workload, "optimizer": optimizer, "processes": processes}
    gap = largest_gap(together, alone)
    record |= {"devices": devices, "gap": gap}
    record |= {"losses": {"together": together, "alone": alone}}
    cli.save(json, "distributed", [record])
    if not quiet:
        cli.console.print(
            f"{processes} processes of {devices} devices: loss {together[0]:.4f} -> "
            f"{together[-1]:.4f}; from one process on one device it differs by "
            f"{gap:.1e} of itself at most"
        )
