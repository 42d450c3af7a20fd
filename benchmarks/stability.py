"""Is an optimizer of ours as stable as the plain one it stands in for?

Both train at every rate of the plain one's grid from many seeds. Where the plain one
stays finite, so must ours, without a step that its guard against numbers that are not
finite had to skip; and its training loss must fall as far.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import dsbp_optax
from benchmarks import timing, tune
from benchmarks.data import Data
from benchmarks.optimizers import Contender, plain_of
from benchmarks.train import Program, build, train
from benchmarks.workloads import Workload

Row = dict[str, Any]


def compare(
    workload: Workload,
    data: Data,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    steps: int,
    after_run: Callable[[], None] = lambda: None,
) -> list[Row]:
    """One row for each optimizer and rate of its plain one's grid.

    Args:
      workload: what to train.
      data: of the workload; only training samples are used for the figures.
      contenders: those that take a plain one's place.
      seeds: of parameters and data order, the same for both.
      steps: length of each run.
      after_run: called after each.
    """
    rows = []
    for contender in contenders:
        plain = plain_of(contender)
        programs = build(workload, contender), build(workload, plain)
        for rate in plain.grid:
            rate = tune.shifted(rate, workload.grid_shift)
            ours, theirs = (
                [_end(program, data, rate, steps, seed, after_run) for seed in seeds]
                for program in programs
            )
            rows.append(_row(contender, rate, ours, theirs))
    return rows


def count(contenders: Sequence[Contender], seeds: int) -> int:
    """Number of runs that `compare` makes."""
    return sum(2 * seeds * len(plain_of(one).grid) for one in contenders)


class End(NamedTuple):
    """How a run ended: its training loss, infinite if not finite, and skipped steps."""

    loss: float
    skipped: int


def _end(
    program: Program,
    data: Data,
    rate: float,
    steps: int,
    seed: int,
    after_run: Callable[[], None],
) -> End:
    run = train(program, data, data.validation, rate=rate, steps=steps, seed=seed)
    after_run()
    figures = dsbp_optax.diagnostics.metrics(run.opt_state)
    loss = np.inf if run.diverged else run.curve[-1]["train_loss"]
    return End(float(loss), int(figures.get("dsbp/skipped", 0)))


def _row(
    contender: Contender, rate: float, ours: Sequence[End], theirs: Sequence[End]
) -> Row:
    mine, plain = (np.asarray([end.loss for end in ends]) for ends in (ours, theirs))
    finite = bool(np.isfinite(plain).all() and np.isfinite(mine).all())
    return {
        "contender": contender.name,
        "against": contender.plain,
        "learning_rate": rate,
        "seeds": len(ours),
        "diverged": int(np.sum(~np.isfinite(mine))),
        "diverged_against": int(np.sum(~np.isfinite(plain))),
        "skipped": sum(end.skipped for end in ours),
        "losses": mine.tolist(),
        "losses_against": plain.tolist(),
        "ratio": timing.ratio_of_means(mine, plain)._asdict() if finite else None,
    }
