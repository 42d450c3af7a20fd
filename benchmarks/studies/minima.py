"""What kind of minimum an optimizer finds: train, then look closely; resumable.

A look is a function of a trained run: curvature, attacks, corruptions, a bound. Each
run leaves one record; one that has all looks asked for is not made again.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer

from benchmarks import cli
from benchmarks.core import campaign, records
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Order, Program, build, carry_out
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.report import tables
from benchmarks.studies import bounds, robustness
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Data, Params, Workload
from dsbp_optax import diagnostics

#: Of the curvature: training samples, eigenvalues, and the radius of the m-sharpness,
#: where m is the batch size.
SAMPLES, COUNT, RADIUS = 512, 10, 0.05


class Trained(NamedTuple):
    """A trained network, as the looks see it."""

    workload: Workload
    data: Data
    params: Params  # as they are evaluated
    start: Params  # at initialisation


def curvature(one: Trained) -> dict[str, Any]:
    """Eigenvalues of the Hessian of the training loss, its trace, the m-sharpness."""
    size, train = one.workload.batch_size, one.data.train
    count = max(min(SAMPLES, len(train)) // size, 1)

    def read() -> Iterator[Any]:
        for start in range(0, count * size, size):
            yield train.take(np.arange(start, start + size))

    batches, loss = diagnostics.stream_batches(read), one.workload.loss
    product = diagnostics.hessian_product(loss, one.params, batches)
    top = diagnostics.top_eigenvalues(product, one.params, COUNT)
    trace = diagnostics.trace(product, one.params, jax.random.key(0), samples=16)
    rise = diagnostics.m_sharpness(loss, one.params, batches, RADIUS)
    return {
        "hessian_eigenvalues": np.asarray(top.values),
        "hessian_residuals": np.asarray(top.residuals),
        "hessian_trace": float(trace.mean),
        "hessian_trace_error": float(trace.standard_error),
        "m_sharpness": float(rise),
    }


LOOKS: dict[str, Callable[[Trained], Mapping[str, Any]]] = {
    "curvature": curvature,
    "attacks": lambda one: {
        "attacks": robustness.attacked(one.workload, one.params, one.data.test),
        "attack_radii": robustness.RADII,
    },
    "corruptions": lambda one: {
        "corruptions": robustness.corrupted(one.workload, one.params, one.data.test)
    },
    "bound": lambda one: bounds.bound(
        one.workload, one.params, one.start, one.data.train
    ),
}


def look(program: Program, data: Data, order: Order, looks: list[str]) -> Record:
    """Train once, the KL term along the way, and look at what was found."""
    workload = program.workload
    start = jax.device_get(workload.init(order.seed, data.pretrained))
    record, run = carry_out(
        *(program, data, order),
        observe=lambda params, state: bounds.divergence(params, start, state),
    )
    record["looks"] = [] if run.diverged else looks
    for name in record["looks"]:
        record |= LOOKS[name](Trained(workload, data, run.params, start))
    return record


def with_radius(contender: Contender, radius: float | None) -> Contender:
    """The contender with another radius of its ascent; None leaves it as it is."""
    if radius is None or "rho" not in contender.settings:
        return contender
    settings = {**contender.settings, "rho": radius}
    return dataclasses.replace(contender, settings=settings)


def _known(found: list[Record], contender: Contender, order: Order) -> Record | None:
    """The last record of a run."""
    radius = contender.settings.get("rho")
    told = contender.name, order.rate, order.seed, radius
    for one in reversed(found):
        held = one["optimizer"], one["learning_rate"], one["seed"]
        if (*held, one["hyperparameters"].get("rho")) == told:
            return one
    return None


@cli.app.command("minima")
def command(
    workload: cli.WorkloadName,
    optimizer: cli.OptimizerNames = None,
    look_: Annotated[
        list[str] | None,
        typer.Option(
            "--look", help="repeat it; curvature, attacks, corruptions, bound"
        ),
    ] = None,
    learning_rate: cli.Rate = None,
    rho: Annotated[
        float | None, typer.Option(min=0, help="radius, of those that have one")
    ] = None,
    data_dir: cli.DataDir = None,
    steps: cli.Steps = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each")] = 3,
    first: Annotated[int, typer.Option(min=0, help="from 100: to tune")] = 0,
    hours: cli.Hours = 1.0,
    out: cli.Out = RESULTS,
    quick: cli.Quick = False,
    quiet: cli.Quiet = False,
) -> None:
    """Train, the KL term along the way, then look at the minimum; can be continued."""
    deadline = time.monotonic() + 3600 * hours
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    looks = [name for name in look_ or () if cli.lookup(LOOKS, name, "--look")]
    file = out / "minima" / f"{workload}.jsonl"
    length = steps or (chosen.quick_steps if quick else chosen.steps)
    contenders = cli.several(CONTENDERS, optimizer, "--optimizer")
    with cli.bars(quiet) as progress:
        data = chosen.load(data_dir)
        advance = cli.bar(progress, "runs", seeds * len(contenders))
        for plain in contenders:
            contender, program = with_radius(plain, rho), None
            rate, source = learning_rate, "given"
            if rate is None:
                rate, source = campaign.rate_for(chosen, plain, out)
            for seed in range(first, first + seeds):
                order = Order("final", rate, seed, length, quick, source=source)
                made = _known(records.read(file), contender, order)
                lacking = made is None or not (
                    made["diverged"] or {*looks} <= {*made["looks"]}
                )
                if lacking and time.monotonic() < deadline:
                    program = program or build(chosen, contender)
                    record = look(program, data, order, looks)
                    records.append(file, "minima", [record])
                advance()
    found = tables.latest_looks(records.read(file))
    cli.show(quiet, *tables.minima(chosen, found).items())
