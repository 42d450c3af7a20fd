"""Which part of the rule does the work: every part at each of its levels, crossed.

Momentum SGD throughout, in the basis and, where it is kept, outside of it. Each cell
of the grid is one choice of `FACTORS`, at `RANK` and `PERIOD`; after it `RANKS` and
`PERIODS` are crossed on two corners, that of the paper and the best projected one.

- outside: what becomes of the gradient outside of the basis. "whole": momentum in
  float32 (projection off); "5 bits": the same in five bits a number; "scaled": added
  times 10, no state; "dropped": the projection alone.
- filter: "whiten" shrinks the coordinates of strong directions, with exponent 1.
- side: of the kernel that carries the basis.
- sharpness: "spectral" is the paper's term at its weight of 0.1, "msam" is
  `subspace_msam` at its radius of 0.1.
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
from benchmarks import cli
from benchmarks.core import records, tune
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Program, Run, make_init, make_step, train
from benchmarks.optimizers import Contender
from benchmarks.report import tables
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Data, DataError, Workload

#: Factor -> levels; the first is what the others are held against.
FACTORS: Mapping[str, tuple[str, ...]] = {
    "outside": ("whole", "5 bits", "scaled", "dropped"),
    "filter": ("none", "whiten"),
    "side": ("input", "output"),
    "sharpness": ("none", "spectral", "msam"),
}
#: What it is run on by default: cheap on a processor.
USUAL = ("digits_cnn", "fashion_mnist_mlp")
RANK, PERIOD = 8, 100
RANKS, PERIODS = (2, 8, 32), (20, 100, 400)
MOMENTUM = 0.9
#: Tried for each cell, from `tune.SEED`, for a third of the length; where the best is
#: at an edge, the next one beyond, up to `_MOST` in all.
RATES, _MOST = (0.03, 0.1, 0.3), 5
#: Test samples at evaluations before the last one, which takes all.
_GLANCE = 128
_STORED = {"whole": 32, "5 bits": 5}


class Cell(NamedTuple):
    """One choice of a level of each factor, a rank and a period."""

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
            "factor": np.float32((self.outside == "scaled") / (1 - MOMENTUM)),
            "exponent": np.float32(self.filter == "whiten"),
            "beta": np.float32(0.1 * (self.sharpness == "spectral")),
            "radius": np.float32(0.1 * (self.sharpness == "msam")),
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
    """Momentum SGD with all of the parts; a number of 0, traced or not, takes one out.

    `bits` are those of the momentum outside of the basis; where none is kept there,
    the gradient outside is added times `factor`.
    """
    outside = dsbp_optax.scale_residual(factor)
    if bits is not None:
        outside = dsbp_optax.residual_momentum(MOMENTUM, bits)
    projection = dsbp_optax.scale_by_spectral_projection(
        optax.trace(MOMENTUM),
        rank=rank,
        basis=dsbp_optax.Basis(side=side),
        update_every=period,
        spectral_filter=dsbp_optax.whiten(exponent),
        residual=outside,
        sharpness=beta,
        project="always",
    )
    tx = optax.chain(projection, optax.scale_by_learning_rate(learning_rate))
    return dsbp_optax.subspace_msam(tx, radius)


@functools.lru_cache(maxsize=1)
def _compiled(workload: Workload, form: tuple[Any, ...]) -> tuple[Any, ...]:
    """Contender, init and jitted step of a form; the next one replaces it."""
    settings = dict(zip(("side", "bits", "rank"), form, strict=True))
    contender = Contender("ablation", "one cell", rule, RATES, RATES[1], settings)
    return contender, make_init(workload, contender), make_step(workload, contender)


def build(workload: Workload, cell: Cell) -> Program:
    """A cell as `train` wants it."""
    contender, init, step = _compiled(workload, cell.form)
    glance = dataclasses.replace(workload, curve_samples=_GLANCE)
    settings = cell.settings
    return Program(glance, contender, init, lambda *args: step(*args, settings), {})


def tuned(
    workload: Workload,
    data: Data,
    cell: Cell,
    steps: int,
    after_run: Callable[..., None],
) -> list[tuple[float, float | None]]:
    """Rates and their validation figures, the best first; None for a lost run."""
    program, wanted = build(workload, cell), list(RATES)
    found: dict[float, tuple[float, float, float | None]] = {}
    told = {"steps": math.ceil(tune.ROUNDS[0][0] * steps), "seed": tune.SEED}
    while wanted:
        rate = wanted.pop(0)
        run = train(program, data, data.validation, rate=rate, **told)
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
    last = run.curve[-1]
    return (None, None) if run.diverged else (last["value"], last["train_loss"])


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(*(record[name] for name in Cell._fields))


def best_corner(found: Sequence[Record]) -> Cell:
    """The projected cell of the grid with the best validation figure of its tuning.

    Where several are equal, the one with the least training loss.
    """

    def merit(one: Record) -> tuple[float, float]:
        losses = [math.inf if x is None else x for x in one["train_loss"]]
        return one["tried"][0][1] or 0.0, -float(np.mean(losses))

    projected = [one for one in found if one["outside"] != "whole"]
    return cell_of(max(projected, key=merit))


def corner_cells(corner: Cell) -> Iterator[Cell]:
    """Ranks and periods crossed on one corner, the corner itself left out."""
    for rank, period in itertools.product(RANKS, PERIODS):
        if not (cell := corner._replace(rank=rank, period=period)).on_grid:
            yield cell


class Plan(NamedTuple):
    """What to do for one workload."""

    workload: Workload
    file: Path
    seeds: int  # final runs of each cell, from 0
    steps: int
    deadline: float  # of `time.monotonic`; no cell is begun after it
    grid: tuple[Cell, ...] = GRID

    def found(self) -> list[Record]:
        """Cells that have a record; an error where they were made otherwise."""
        held = records.read(self.file)
        if any(
            (one["steps"], one["seeds"]) != (self.steps, self.seeds) for one in held
        ):
            raise DataError(
                f"{self.file}: got cells of {held[0]['steps']} steps and "
                f"{held[0]['seeds']} seeds, expected {self.steps} and {self.seeds}. "
                "Remedy: another --out, or the same --steps and --seeds."
            )
        return held

    def run(self, data: Data, after_run: Callable[..., None]) -> bool:
        """Carry out what is lacking, a record a cell; False when the time is up."""
        if not all(self._complete(data, cell, after_run) for cell in self.grid):
            return False
        known = [one for one in self.found() if cell_of(one).on_grid]
        rates = {cell_of(one): one["tried"] for one in known}
        return all(
            self._complete(data, cell, after_run, rates[corner])
            for corner in dict.fromkeys([best_corner(known), PAPER])
            for cell in corner_cells(corner)
        )

    def _complete(
        self, data: Data, cell: Cell, after_run: Callable[..., None], rates: Any = None
    ) -> bool:
        if cell in map(cell_of, self.found()):
            return True
        if time.monotonic() > self.deadline:
            return False
        workload, steps = self.workload, self.steps
        rates = rates or tuned(workload, data, cell, steps, after_run)
        program, ends = build(workload, cell), []
        for seed in range(self.seeds):
            told = {"rate": rates[0][0], "steps": steps, "seed": seed}
            ends.append(_ends(train(program, data, data.test, **told)))
            after_run()
        made = {
            "workload": workload.name,
            "steps": steps,
            "seeds": self.seeds,
            **cell._asdict(),
            "rate": rates[0][0],
            "tried": rates,
            "accuracy": [value for value, _ in ends],
            "train_loss": [loss for _, loss in ends],
        }
        records.append(self.file, "ablation", [made])
        return True


@cli.app.command("ablation")
def command(
    workload: cli.WorkloadNames = None,
    data_dir: cli.DataDir = None,
    out: cli.Out = RESULTS,
    hours: cli.Hours = 1.0,
    seeds: cli.Seeds = 3,
    steps: cli.Steps = None,
) -> None:
    """Each part of the rule at each of its levels, crossed; can be continued.

    Default workloads: digits_cnn, fashion_mnist_mlp, at their quick lengths.
    """
    deadline = time.monotonic() + 3600 * hours
    with cli.bars() as progress:
        for one in cli.several(WORKLOADS, workload or USUAL, "WORKLOAD"):
            file = out / "ablation" / f"{one.name}.jsonl"
            plan = Plan(one, file, seeds, steps or one.quick_steps, deadline)
            runs = len(GRID) * (len(RATES) + seeds)
            plan.run(one.load(data_dir), cli.bar(progress, one.name, runs))
            cli.show((one.name, tables.ablation_cells(plan.found())))
