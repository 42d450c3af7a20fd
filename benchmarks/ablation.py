"""Which part of the rule does the work: every part at each of its levels, crossed.

Momentum SGD throughout, in the basis and, where it is kept, outside of it. Each cell
of the grid is one choice of `FACTORS`, at `RANK` and `PERIOD`; after it `RANKS` and
`PERIODS` are crossed on two corners, that of the paper and the best projected one.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

import dsbp_optax
from benchmarks import records, tune
from benchmarks.data import Data, DataError
from benchmarks.optimizers import Contender
from benchmarks.train import Program, Run, make_init, make_step, train
from benchmarks.workloads import Workload

Record = dict[str, Any]

#: Where the records lie, unless told otherwise.
RESULTS = Path(__file__).parent / "results" / "ablation"

#: What it is run on by default: cheap on a processor.
USUAL = ("digits_cnn", "fashion_mnist_mlp")

#: Factor -> levels; the first is what the others are held against.
FACTORS: Mapping[str, tuple[str, ...]] = {
    "outside": ("whole", "5 bits", "scaled", "dropped"),
    "filter": ("none", "whiten"),
    "side": ("input", "output"),
    "sharpness": ("none", "spectral", "msam"),
}
WORDS = """- `outside`: what becomes of the gradient outside of the basis. "whole":
  momentum in float32, so that nothing is projected away (projection off); "5 bits": the
  same momentum in five bits a number; "scaled": added times 10, no state; "dropped":
  the projection alone.
- `filter`: "whiten" shrinks the coordinates of strong directions, with exponent 1.
- `side`: of the kernel that carries the basis.
- `sharpness`: "spectral" is the paper's term at its weight of 0.1 (that of
  `add_spectral_sharpness`), "msam" is `subspace_msam` at its radius of 0.1."""

RANK, PERIOD = 8, 100
RANKS, PERIODS = (2, 8, 32), (20, 100, 400)
MOMENTUM = 0.9
#: Tried for each cell, from `tune.SEED`, for a third of the length; where the best is
#: at an edge, the next one beyond, up to `_MOST` in all.
RATES, _MOST = (0.03, 0.1, 0.3), 5
#: Test samples at evaluations before the last one, which takes all.
_GLANCE = 128

_STORED = {"whole": 32, "5 bits": 5}
_FACTOR = 1 / (1 - MOMENTUM)
_BETA, _RADIUS = 0.1, 0.1


class Cell(NamedTuple):
    """One choice of a level of each factor.

    Attributes:
      outside: as in `FACTORS`, like `filter`, `side` and `sharpness`.
      filter: see `outside`.
      side: see `outside`.
      sharpness: see `outside`.
      rank: k.
      period: p, steps from refresh to refresh.
    """

    outside: str
    filter: str
    side: str
    sharpness: str
    rank: int = RANK
    period: int = PERIOD

    @property
    def on_grid(self) -> bool:
        """Whether it belongs to the crossed factors."""
        return (self.rank, self.period) == (RANK, PERIOD)

    @property
    def form(self) -> tuple[Any, ...]:
        """What a program is compiled for; cells of one form share it."""
        return self.side, _STORED.get(self.outside), self.rank

    @property
    def settings(self) -> dict[str, Any]:
        """What is told to the program when it runs."""
        return {
            "factor": np.float32(_FACTOR if self.outside == "scaled" else 0),
            "exponent": np.float32(self.filter == "whiten"),
            "beta": np.float32(_BETA if self.sharpness == "spectral" else 0),
            "radius": np.float32(_RADIUS if self.sharpness == "msam" else 0),
            "period": np.int32(self.period),
        }


#: arXiv 2505.23369, with momentum.
PAPER = Cell("dropped", "none", "output", "spectral")
_CROSSED = (Cell(*levels) for levels in itertools.product(*FACTORS.values()))
#: Every cell of the crossed factors, those of one form together.
GRID = tuple(sorted(_CROSSED, key=lambda cell: str(cell.form)))


def rule(
    learning_rate: optax.ScalarOrSchedule,
    *,
    side: str = "input",
    bits: int | None = None,
    rank: int = RANK,
    factor: Any = 0.0,
    exponent: Any = 0.0,
    beta: Any = 0.0,
    radius: Any = 0.0,
    period: Any = PERIOD,
) -> optax.GradientTransformationExtraArgs:
    """Momentum SGD with all of the parts; a number of 0 takes its part out.

    Args:
      learning_rate: eta, a number or a schedule.
      side: of the kernels that carries the basis.
      bits: of the momentum outside of the basis; None keeps none.
      rank: k.
      factor: of the gradient outside of the basis, where no momentum is kept there;
        may be traced, like all numbers below.
      exponent: of the whitening.
      beta: weight of the paper's sharpness term.
      radius: of the step uphill along the momentum.
      period: steps from refresh to refresh.
    """
    scaled = dsbp_optax.scale_residual(factor)
    kept = None if bits is None else dsbp_optax.residual_momentum(MOMENTUM, bits)
    projection = dsbp_optax.scale_by_spectral_projection(
        optax.trace(MOMENTUM),
        rank=rank,
        basis=dsbp_optax.Basis(side=side),
        update_every=period,
        spectral_filter=dsbp_optax.whiten(exponent),
        residual=scaled if kept is None else kept,
        sharpness=beta,
        project="always",
    )
    tx = optax.chain(projection, optax.scale_by_learning_rate(learning_rate))
    return dsbp_optax.subspace_msam(tx, radius)


@functools.lru_cache(maxsize=1)
def _compiled(workload: Workload, form: tuple[Any, ...]) -> tuple[Any, ...]:
    """Contender, init and jitted step of a form; the next one replaces it."""
    side, bits, rank = form
    settings = {"side": side, "bits": bits, "rank": rank}
    contender = Contender("ablation", "one cell", rule, RATES, RATES[1], settings)
    return contender, make_init(workload, contender), make_step(workload, contender)


def build(workload: Workload, cell: Cell) -> Program:
    """A cell as `benchmarks.train.train` wants it."""
    contender, init, step = _compiled(workload, cell.form)
    glance = dataclasses.replace(workload, curve_samples=_GLANCE)
    settings = cell.settings
    return Program(glance, contender, init, lambda *args: step(*args, settings), {})


def tuned(
    workload: Workload,
    data: Data,
    cell: Cell,
    steps: int,
    after_run: Callable[[], None] = lambda: None,
) -> list[tuple[float, float | None]]:
    """Rates and their validation figures, the best first; None for a lost run."""
    program = build(workload, cell)
    found: dict[float, tuple[float, float, float | None]] = {}
    steps, wanted = math.ceil(tune.ROUNDS[0][0] * steps), list(RATES)
    while wanted:
        rate = wanted.pop(0)
        run = train(
            *(program, data, data.validation),
            rate=rate,
            steps=steps,
            seed=tune.SEED,
        )
        value, loss = _ends(run)
        found[rate] = workload.metric.score(value), -(loss or np.inf), value
        after_run()
        if not wanted and len(found) < _MOST:
            further = tune.beyond(max(found, key=found.__getitem__), {*found})
            wanted += [] if further is None else [further]
    best = sorted(found, key=found.__getitem__, reverse=True)
    return [(rate, found[rate][2]) for rate in best]


def _ends(run: Run) -> tuple[float | None, float | None]:
    """The last metric and the mean loss of the last twelfth; None if it was lost."""
    if run.diverged:
        return None, None
    return float(run.curve[-1]["value"]), float(run.curve[-1]["train_loss"])


def carry_out(
    workload: Workload,
    data: Data,
    cell: Cell,
    rates: Sequence[tuple[float, float | None]],
    seeds: int,
    steps: int,
    after_run: Callable[[], None] = lambda: None,
) -> Record:
    """Train a cell from every seed, at the first of its rates."""
    program, ends = build(workload, cell), []
    for seed in range(seeds):
        rate = rates[0][0]
        run = train(program, data, data.test, rate=rate, steps=steps, seed=seed)
        ends.append(_ends(run))
        after_run()
    surroundings = records.environment()
    return {
        **cell._asdict(),
        "rate": rates[0][0],
        "tried": [list(pair) for pair in rates],
        "accuracy": [value for value, _ in ends],
        "train_loss": [loss for _, loss in ends],
        "date": surroundings["date"],
        "commit": (surroundings["git"] or {}).get("commit", "unknown")[:7],
    }


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(*(record[name] for name in Cell._fields))


def best_corner(found: Sequence[Record]) -> Cell:
    """The projected cell of the grid with the best validation figure of its tuning.

    Where several are equal, the one with the least training loss.
    """
    projected = [one for one in found if cell_of(one).on_grid]
    projected = [one for one in projected if one["outside"] != "whole"]

    def merit(one: Record) -> tuple[float, float]:
        losses = [math.inf if x is None else x for x in one["train_loss"]]
        return one["tried"][0][1] or 0.0, -float(np.mean(losses))

    return cell_of(max(projected, key=merit))


def corner_cells(corner: Cell) -> Iterator[Cell]:
    """Ranks and periods crossed on one corner, the corner itself left out."""
    for rank, period in itertools.product(RANKS, PERIODS):
        cell = corner._replace(rank=rank, period=period)
        if not cell.on_grid:
            yield cell


class Plan(NamedTuple):
    """What to do for one workload.

    Attributes:
      workload: what to train.
      path: of its record.
      seeds: final runs of each cell, from 0.
      steps: length of each.
      deadline: on the clock of `time.monotonic`; no cell is begun after it.
      grid: cells that are crossed.
    """

    workload: Workload
    path: Path
    seeds: int
    steps: int
    deadline: float
    grid: tuple[Cell, ...] = GRID

    @property
    def runs(self) -> int:
        """About how many: tuning may add some."""
        return len(self.grid) * (len(RATES) + self.seeds) + self.seeds * 2 * (
            len(RANKS) * len(PERIODS) - 1
        )

    def found(self) -> list[Record]:
        """Cells that have a record.

        Raises:
          DataError: when they were made with another length or other seeds.
        """
        if not self.path.exists():
            return []
        held = records.read(self.path)
        for key, expected in (("steps", self.steps), ("seeds", self.seeds)):
            if held.get(key) != expected:
                raise DataError(
                    f"{self.path}: got {key} = {held.get(key)}, expected {expected}. "
                    f"Remedy: another --out, or the same --{key}."
                )
        return list(held["cells"])

    def keep(self, found: Sequence[Record]) -> None:
        """Write what is known."""
        name = self.workload.name
        head = {"workload": name, "steps": self.steps, "seeds": self.seeds}
        records.write(self.path, {**records.environment(), **head, "cells": found})


def run(plan: Plan, data: Data, after_run: Callable[[], None] = lambda: None) -> bool:
    """Carry out what a plan still lacks, a record after each cell.

    Returns:
      Whether all is done; False when the time is up.
    """
    for cell in plan.grid:
        if not _carry_out_missing(plan, data, cell, after_run):
            return False
    known = [one for one in plan.found() if cell_of(one).on_grid]
    rates = {cell_of(one): one["tried"] for one in known}
    for corner in dict.fromkeys([best_corner(known), PAPER]):
        for cell in corner_cells(corner):
            if not _carry_out_missing(plan, data, cell, after_run, rates[corner]):
                return False
    return True


def _carry_out_missing(
    plan: Plan,
    data: Data,
    cell: Cell,
    after_run: Callable[[], None],
    rates: Sequence[tuple[float, float | None]] | None = None,
) -> bool:
    found = plan.found()
    if cell in map(cell_of, found):
        return True
    if time.monotonic() > plan.deadline:
        return False
    workload, steps = plan.workload, plan.steps
    rates = rates or tuned(workload, data, cell, steps, after_run)
    made = carry_out(workload, data, cell, rates, plan.seeds, steps, after_run)
    plan.keep([*found, made])
    return True
