"""Training in several processes that talk to each other, against training in one.

The processes are jax's own: `jax.distributed` on the loopback interface, collectives by
gloo. Every process draws the same global batch and puts its own rows of it on its
devices; gradients and statistics are reduced over all of them.
"""

import functools
import multiprocessing
import socket
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
from benchmarks.optimizers import CONTENDERS
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import DataError


class Place(NamedTuple):
    """One process among several."""

    address: str = ""  # of the coordinator
    processes: int = 1
    number: int = 0  # which one this is
    devices: int = 1  # of each


def join(place: Place, missed: int = 100) -> None:
    """Make this process one of several; before anything else is asked of jax.

    After `missed` seconds a process that has gone is missed, and this one ends.
    """
    jax.config.update("jax_num_cpu_devices", place.devices)
    if place.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        told = place.address, place.processes, place.number
        jax.distributed.initialize(*told, heartbeat_timeout_seconds=missed)


class Layout:
    """Where arrays lie on all devices of all processes."""

    def __init__(self) -> None:
        axes = {"axis_types": (AxisType.Auto,)}
        mesh = jax.make_mesh((jax.device_count(),), ("data",), **axes)
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("data"))

    def spread(self, batch: Any) -> Any:
        """A batch that every process holds, its rows on their devices."""

        def own(rows: np.ndarray) -> jax.Array:
            each = len(rows) // jax.process_count()
            mine = slice(each * jax.process_index(), each * (jax.process_index() + 1))
            return jax.make_array_from_process_local_data(self.split, rows[mine])

        return jax.tree.map(own, batch)


def losses(
    workload: str,
    optimizer: str,
    data_dir: Path | None,
    rate: float,
    steps: int,
    place: Place,
) -> list[float]:
    """The loss of every step, trained on all devices of all processes."""
    join(place)
    chosen, contender, layout = WORKLOADS[workload], CONTENDERS[optimizer], Layout()
    if chosen.batch_size % jax.device_count():
        raise DataError(
            f"{workload}: got {jax.device_count()} devices, expected a divisor of its "
            f"batch of {chosen.batch_size}. Remedy: another number of processes or "
            "devices."
        )
    data, rng = chosen.load(data_dir), np.random.default_rng(0)
    batches = map(layout.spread, chosen.sampler(data.train, chosen.batch_size, rng))
    params = jax.device_put(chosen.init(0, data.pretrained), layout.everywhere)
    step, found, opt_state = make_step(chosen, contender), [], None
    for _, batch in zip(range(steps), batches, strict=False):
        if opt_state is None:
            opt_state = make_init(chosen, contender)(params, batch)
        numbers = np.float32(rate), np.float32(steps)
        params, opt_state, loss = step(params, opt_state, batch, *numbers)
        found.append(float(loss))
    return found


def run(told: Sequence[Any], processes: int, devices: int, seconds: float) -> Any:
    """What `losses` gives in every process of a group, which must agree.

    A process that fails, or the end of the time, ends the others.
    """
    address, work = f"127.0.0.1:{free_port()}", functools.partial(losses, *told)
    places = [Place(address, processes, n, devices) for n in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        asked = pool.imap_unordered(work, places)
        try:
            found = [asked.next(seconds) for _ in places]
        except multiprocessing.TimeoutError as error:
            raise DataError(
                f"{processes} processes: no end after {seconds:.0f} s. Remedy: a "
                "longer --timeout, or fewer --steps."
            ) from error
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
    return float(np.max(np.abs(np.asarray(found) / np.asarray(expected) - 1)))


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
) -> None:
    """Several processes on this machine against one, on the same global batches."""
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    contender = cli.lookup(CONTENDERS, optimizer, "--optimizer")
    rate, _ = campaign.rate_for(chosen, contender)
    told = workload, optimizer, data_dir, rate, steps
    with cli.bars(True):
        together = run(told, processes, devices, timeout)
        alone = run(told, 1, 1, timeout)
    record = {"workload": workload, "optimizer": optimizer, "processes": processes}
    record |= {"devices": devices, "gap": largest_gap(together, alone)}
    record |= {"losses": {"together": together, "alone": alone}}
    cli.save(json, "distributed", [record])
    cli.console.print(
        f"{processes} processes of {devices} devices: loss {together[0]:.4f} -> "
        f"{together[-1]:.4f}; from one process on one device it differs by "
        f"{record['gap']:.1e} of itself at most"
    )
