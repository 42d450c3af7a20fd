"""Is an optimizer of ours as stable as the plain one it stands in for?

Both train at every rate of the plain one's grid from many seeds. Where the plain one
stays finite, so must ours, without a step that its guard against numbers that are not
finite had to skip; and its training loss must fall as far.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

import dsbp_optax
from benchmarks import cli
from benchmarks.core import statistics, tune
from benchmarks.core.records import Record
from benchmarks.core.train import Program, build, train
from benchmarks.optimizers import CONTENDERS, plain_of
from benchmarks.report import tables
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Data


class End(NamedTuple):
    """How a run ended: its training loss, infinite if not finite, and skipped steps."""

    loss: float
    skipped: int


def end_of(program: Program, data: Data, rate: float, steps: int, seed: int) -> End:
    """Train once; only training samples count for the figures."""
    run = train(program, data, data.validation, rate=rate, steps=steps, seed=seed)
    figures = dsbp_optax.diagnostics.metrics(run.opt_state)
    loss = np.inf if run.diverged else run.curve[-1]["train_loss"]
    return End(float(loss), int(figures.get("dsbp/skipped", 0)))


def row(names: Sequence[str], rate: float, ends: Sequence[Sequence[End]]) -> Record:
    """Ours against the plain one at one rate, paired by seed."""
    mine, plain = (np.asarray([end.loss for end in some]) for some in ends)
    finite = bool(np.isfinite(plain).all() and np.isfinite(mine).all())
    return {
        **dict(zip(("contender", "against"), names, strict=True)),
        "learning_rate": rate,
        "seeds": len(mine),
        "diverged": int(np.sum(~np.isfinite(mine))),
        "diverged_against": int(np.sum(~np.isfinite(plain))),
        "skipped": sum(end.skipped for end in ends[0]),
        "losses": mine,
        "losses_against": plain,
        "ratio": statistics.ratio_of_means(mine, plain)._asdict() if finite else None,
    }


@cli.app.command("stability")
def command(
    workload: cli.WorkloadName = "digits_cnn",
    optimizer: cli.OptimizerNames = None,
    data_dir: cli.DataDir = None,
    steps: cli.Steps = None,
    seeds: cli.Seeds = 20,
    json: cli.Save = None,
    quick: cli.Quick = False,
) -> None:
    """Ours against the plain optimizers at every rate of theirs, from many seeds."""
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    ours = {name: c for name, c in CONTENDERS.items() if c.plain}
    steps = steps or (chosen.quick_steps if quick else chosen.steps)
    rows = []
    with cli.bars() as progress:
        data = chosen.load(data_dir)
        for contender in cli.several(ours, optimizer, "--optimizer"):
            pair = contender, plain_of(contender)
            advance: Callable[..., None] = cli.bar(
                progress, contender.name, len(pair[1].grid)
            )
            programs = [build(chosen, one) for one in pair]
            for plain_rate in pair[1].grid:
                rate = tune.shifted(plain_rate, chosen.grid_shift)
                ends = [
                    [end_of(program, data, rate, steps, seed) for seed in range(seeds)]
                    for program in programs
                ]
                rows.append(row([one.name for one in pair], rate, ends))
                advance()
    cli.save(json, "stability", [{"workload": workload, "steps": steps, "rows": rows}])
    cli.show((f"{workload}: training loss", tables.stability(rows)))
