"""Many contenders, alike tuned, on many workloads, as groups of runs.

What to run next is a function of the records that exist, so that a run that was killed
goes on where it stopped. Rates of kernels and of the rest and weight decay are tuned
on validation data, with seeds of their own; final runs alone see test data.
"""

import dataclasses
import functools
import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer

from benchmarks import cli
from benchmarks.core import records, sweep
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.sweep import Part, Run, Task
from benchmarks.peers import CONTENDERS, Contender
from benchmarks.tasks import gpt, vision
from benchmarks.tasks.base import DataError

#: Seeds of tuning runs and of final runs.
TUNING, FINAL = (1000, 1001), tuple(range(2000, 2016))
#: Pairs of rates that meet all weight decays; places by which a grid is moved.
_BEST, _PLACES = 2, 2
#: Text is padded to multiples of these, so that corpora share a program.
_TRAIN, _HELD = 2**24, 2**20

Scores = Mapping[Run, float]

# -------------------------------------------------------------------------- boards


@dataclass(frozen=True)
class Board:
    """One workload of the scoreboard."""

    name: str
    task: Task
    steps: int
    corpus: str = "shakespeare"  # or "sotu", or "fashion_mnist"
    judge: str = "loss"  # or "error": what chooses settings and makes the table
    runs: int = 16  # most runs at once, where memory is short
    brief: bool = False  # whether the two rates alone are tuned, without weight decay
    # board whose settings are taken, of controls those of their rule: final runs alone
    settings: str | None = None
    times: float = 1.0  # the kernels' rate of those settings
    # rates of the rest, tried first by all, where the contenders' own lie too low
    aux_rates: tuple[float, ...] | None = None

    @property
    def summary(self) -> str:
        """For people."""
        told = f"{self.steps} steps on {self.corpus}"
        if self.settings:
            told += f", at the settings of {self.settings}"
        return told if self.times == 1 else f"{told}, {self.times:g} times the rate"

    def tries(self, contender: Contender) -> Contender:
        """The contender with the grids of this board."""
        if self.aux_rates is None:
            return contender
        return dataclasses.replace(contender, aux_rates=self.aux_rates)

    def file(self, out: Path) -> Path:
        """Of its records."""
        return out / "scoreboard" / f"{self.name}.jsonl"

    def rows(self, out: Path, contender: str | None = None) -> list[Record]:
        """Its records, of one contender or of all."""
        named = {} if contender is None else {"optimizer": contender}
        return records.read(self.file(out), **named)


def _gpt(
    name: str,
    batch: int,
    steps: int = 600,
    corpus: str = "shakespeare",
    runs: int = 16,
    brief: bool = True,
    aux_rates: tuple[float, ...] | None = None,
    **model: int,
) -> Board:
    net = gpt.Gpt(**model)
    task = Task(net, batch, net.context, 1.0)
    return Board(
        *(name, task, steps, corpus), runs=runs, brief=brief, aux_rates=aux_rates
    )


def _with_settings(board: Board, end: str, times: float = 1.0) -> tuple[Board, Board]:
    """A board, and the same at its settings, kernels at so many times the rate."""
    taken = {"settings": board.name, "times": times}
    return board, dataclasses.replace(board, name=f"{board.name}_{end}", **taken)


#: Rates of the rest for runs that end early.
_HIGH_AUX = (0.012, 0.024, 0.048, 0.096)
_FASHION = Task(vision.FashionCnn(), 128, windows=4992, mapped=True)
#: The most telling first.
BOARDS: Mapping[str, Board] = {
    board.name: board
    for board in (
        *_with_settings(_gpt("gpt_d128_b24", 24, brief=False), "double_rate", 2.0),
        *_with_settings(_gpt("sotu_d128_b24", 24, corpus="sotu"), "controls"),
        *_with_settings(
            _gpt("gpt_d128_b24_short", 24, 150, brief=False, aux_rates=_HIGH_AUX),
            "controls",
        ),
        _gpt("gpt_d128_b24_long", 24, steps=2400),
        *_with_settings(_gpt("gpt_d128_b96", 96), "further"),
        _gpt("gpt_wide", 24, width=256, layers=6, heads=8, context=128),
        _gpt("gpt_d256_b24", 24, width=256, heads=8),
        _gpt("gpt_d128_b384", 384, runs=8),
        _gpt("gpt_d256_b96", 96, width=256, heads=8),
        _gpt("gpt_d128_b8", 8),
        _gpt("gpt_d64_b24", 24, width=64),
        _gpt("gpt_d64_b8", 8, width=64),
        _gpt("gpt_d64_b96", 96, width=64),
        _gpt("gpt_d256_b8", 8, width=256, heads=8),
        _gpt("gpt_d256_b384", 384, width=256, heads=8, runs=4),
        Board("fashion_cnn", _FASHION, 2150, "fashion_mnist", "error"),
    )
}


def dry(board: Board) -> Board:
    """The same with tiny sizes."""
    small: dict[str, Any] = {"batch": 4, "windows": 16, "chunk": 2}
    small["model"] = vision.DigitsCnn()
    if board.task.context:
        small |= {"model": gpt.Gpt(65, 16, 1, 2, 8), "context": 8}
    return dataclasses.replace(
        board, task=dataclasses.replace(board.task, **small), steps=24
    )


def load(corpus: str, folder: Path | None) -> tuple[Part, ...]:
    """Training, validation and test part, as arrays of the host.

    `folder` holds ``shakespeare.txt`` and ``sotu.txt``, or what loaders look for.
    """
    if corpus == "fashion_mnist":
        found = vision.load_fashion_mnist(folder)
        return tuple(
            Part(np.round(255 * x).astype(np.uint8), y, np.int32(len(y)))
            for x, y in (found.train, found.validation, found.test)
        )
    path = None if folder is None else folder / f"{corpus}.txt"
    if path is not None and path.exists():
        text = path.read_text("utf-8")
    elif corpus == "shakespeare":
        text = gpt.locate_shakespeare(folder).read_text("utf-8")
    else:
        text = "\n".join(gpt.addresses(folder))
    tokens = gpt.encode(text).astype(np.uint8)
    parts = np.split(tokens, [int(share * len(tokens)) for share in (0.9, 0.95)])
    sizes = _TRAIN, _HELD, _HELD
    return tuple(padded(*pair) for pair in zip(parts, sizes, strict=True))


def padded(tokens: np.ndarray, size: int) -> Part:
    """A part of text, filled with zeros that do not count."""
    length = len(tokens)
    return Part(np.pad(tokens, (0, -length % size)), (), np.int32(length))


def random_parts(task: Task) -> tuple[Part, ...]:
    """Random data of the right shapes."""
    rng = np.random.default_rng(0)
    if task.context:
        tokens = rng.integers(0, 65, (3, 512), np.uint8)
        return tuple(Part(each, (), np.int32(len(each))) for each in tokens)
    images = rng.integers(0, 256, (3, 64, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 10, (3, 64), np.int32)
    return tuple(Part(*each, np.int32(64)) for each in zip(images, labels, strict=True))


# -------------------------------------------------------------------------- tuning


class Stage(NamedTuple):
    """What is to be run next: those of its runs that lack a score."""

    phase: str  # "rates", "further" (beyond an edge), "decay" or "final"
    runs: list[Run]


def next_stage(
    contender: Contender, scores: Scores, brief: bool = False
) -> Stage | None:
    """The first stage that lacks runs; None where all are there.

    Of scores less is better, and infinite is a failure.
    """
    for phase, runs in _stages(contender, scores, brief):
        missing = [run for run in runs if run not in scores]
        if missing:
            return Stage(phase, missing)
    return None


def choice(contender: Contender, scores: Scores, brief: bool = False) -> Run | None:
    """The settings of the final runs; None while they are not known."""
    *_, (phase, runs) = _stages(contender, scores, brief)
    return runs[0] if phase == "final" else None


def _stages(
    contender: Contender, scores: Scores, brief: bool
) -> Iterator[tuple[str, list[Run]]]:
    """Stages and all of their runs, as far as the scores tell."""

    def pairs(*grids: Sequence[float]) -> list[Run]:
        return [
            Run(*rates, 0.0, TUNING[0], contender.variant)
            for rates in itertools.product(*grids)
        ]

    grids = contender.rates, contender.aux_rates
    runs = pairs(*grids)
    yield "rates", runs
    if not {*runs} <= scores.keys():
        return
    best = min(runs, key=lambda run: (scores[run], run))
    further = pairs(*map(moved, grids, best[:2]))
    if further != runs:
        yield "further", further
        if not {*further} <= scores.keys():
            return
    ranked = sorted({*runs, *further}, key=lambda run: (scores[run], run))[:_BEST]
    if brief:
        yield "final", [ranked[0]._replace(seed=seed) for seed in FINAL]
        return
    settings = [
        run._replace(decay=decay) for run in ranked for decay in contender.decays
    ]
    runs = [run._replace(seed=seed) for run in settings for seed in TUNING]
    yield "decay", runs
    if not {*runs} <= scores.keys():
        return

    def mean(run: Run) -> float:
        return sum(scores[run._replace(seed=seed)] for seed in TUNING) / len(TUNING)

    best = min(settings, key=lambda run: (mean(run), run))
    yield "final", [best._replace(seed=seed) for seed in FINAL]


def moved(grid: Sequence[float], best: float) -> tuple[float, ...]:
    """The grid, two places further out where the best lies at its edge."""
    places = {grid[0]: -_PLACES, grid[-1]: _PLACES}.get(best, 0)
    ratio = grid[1] / grid[0]
    return tuple(float(f"{rate * ratio**places:.6g}") for rate in grid)


def scores_of(rows: Sequence[Record], judge: str) -> dict[Run, float]:
    """Validation figures of one contender's records; nothing of the test part."""
    values = (row[f"validation_{judge}"] for row in rows)
    runs = (Run(*(row[name] for name in Run._fields)) for row in rows)
    return {r: math.inf if v is None else v for r, v in zip(runs, values, strict=True)}


# ------------------------------------------------------------------------ campaign


class Campaign:
    """Carries stages out, within a time.

    `data` gives the parts of a board, on the device. No stage begins that would end
    after so many seconds, as far as earlier ones tell.
    """

    def __init__(
        self,
        out: Path,
        data: Callable[[Board], Sequence[Part]],
        runs: int = 16,
        seconds: float = math.inf,
        commit: str | None = None,
    ) -> None:
        self.out, self.data, self.runs, self.commit = out, data, runs, commit
        self.end = time.monotonic() + seconds
        self._programs: dict[Any, Future[sweep.Program]] = {}
        self._compiler = ThreadPoolExecutor(1)

    def missing(self, board: Board, contender: Contender) -> Stage | None:
        """What is to be run next."""
        scores = scores_of(board.rows(self.out, contender.name), board.judge)
        if board.settings is None:
            return next_stage(board.tries(contender), scores, board.brief)
        rule = CONTENDERS[contender.rule or contender.name]
        tuned = BOARDS[board.settings]
        known = scores_of(tuned.rows(self.out, rule.name), tuned.judge)
        if (best := choice(tuned.tries(rule), known, tuned.brief)) is None:
            raise DataError(
                f"{tuned.file(self.out)}: got no tuned {rule.name}, expected the "
                f"settings of {board.name}. Remedy: scoreboard "
                f"{tuned.name}:{rule.name} first."
            )
        rate = best.rate * board.times
        best = best._replace(rate=rate, variant=contender.variant)
        final = (best._replace(seed=seed) for seed in FINAL)
        lacking = [run for run in final if run not in scores]
        return Stage("final", lacking) if lacking else None

    def complete(self, board: Board, contender: Contender) -> bool:
        """Run what is missing; whether nothing is left."""
        while (stage := self.missing(board, contender)) is not None:
            rows = board.rows(self.out, contender.name)
            last = rows[-1] if rows else {"seconds": 0.0, "runs_at_once": 0}
            expected = 1.3 * last["seconds"] * last["runs_at_once"]
            if time.monotonic() + expected > self.end:
                return False
            program = self.compile(board, contender).result()
            runs = stage.runs[: program.runs]
            self._carry_out(board, contender, program, Stage(stage.phase, runs))
        return True

    def compile(self, board: Board, contender: Contender) -> Future[sweep.Program]:
        """Compile in the background, one after the other, what is to be run."""
        runs, data = min(self.runs, board.runs), self.data(board)
        shapes = str(jax.tree.map(np.shape, data))
        key = board.task, contender.program or contender.name, runs, shapes
        if key not in self._programs:
            task = sweep.build, board.task, contender, runs, data
            self._programs[key] = self._compiler.submit(*task)
        return self._programs[key]

    def close(self) -> None:
        """Compile nothing more."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _carry_out(
        self, board: Board, contender: Contender, program: sweep.Program, stage: Stage
    ) -> None:
        test = stage.phase == "final"
        found = sweep.train(program, stage.runs, board.steps, self.data(board), test)
        told = {"workload": board.name, "optimizer": contender.name}
        where = records.provenance(self.commit)
        rows = [{**told, "phase": stage.phase, **row, **where} for row in found]
        records.append(board.file(self.out), "scoreboard", rows)
        judge = f"validation_{board.judge}"
        best = min(rows, key=lambda row: (math.isnan(row[judge]), row[judge]))
        settings = " ".join(f"{best[name]:g}" for name in Run._fields[:3])
        cli.console.print(
            f"{board.name} {contender.name} {stage.phase}: {len(rows)} runs, "
            f"{rows[0]['seconds']:.2f} s each, compiled in "
            f"{rows[0]['compile_seconds']:.0f} s; best validation {best[judge]:.4f} at "
            f"{settings}"
        )


@cli.app.command("scoreboard")
def command(
    jobs: Annotated[
        list[str] | None, typer.Argument(help="workload:contender,..., in this order")
    ] = None,
    minutes: Annotated[float, typer.Option(help="begin no stage beyond")] = math.inf,
    workload: Annotated[list[str] | None, typer.Option(help="repeat it")] = None,
    optimizer: cli.OptimizerNames = None,
    data_dir: cli.DataDir = Path("data"),
    runs: Annotated[int, typer.Option(min=1, help="at once, in one program")] = 16,
    out: cli.Out = RESULTS,
    commit: Annotated[str | None, typer.Option(help="where no checkout tells")] = None,
    dry_run: Annotated[bool, typer.Option("--dry", help="tiny, random data")] = False,
    show_all: Annotated[bool, typer.Option("--list", help="which there are")] = False,
) -> None:
    """Many contenders, alike tuned, with controls; made for one accelerator."""
    boards = cli.several(BOARDS, workload, "--workload")
    entrants = cli.several(CONTENDERS, optimizer, "--optimizer")
    pairs = list(itertools.product(boards, entrants))
    if jobs:
        pairs = [pair for text in jobs for pair in _pairs(text)]
    if show_all:
        for one in entrants:
            cli.console.print(f"{one.name:24} {one.summary}")
        for board in boards:
            cli.console.print(f"{board.name:24} {board.summary}")
        return
    if dry_run and out == RESULTS:
        raise typer.BadParameter("got no --out, expected a folder of no worth.")
    if dry_run:
        pairs = [(dry(board), contender) for board, contender in pairs]

    @functools.cache
    def parts(corpus: str) -> tuple[Part, ...]:
        return jax.device_put(load(corpus, data_dir))

    @functools.cache
    def data(board: Board) -> tuple[Part, ...]:
        if dry_run:
            return jax.device_put(random_parts(board.task))
        return parts(board.corpus)

    carry_out(Campaign(out, data, runs, 60 * minutes, commit), pairs)


def carry_out(campaign: Campaign, pairs: Sequence[tuple[Board, Contender]]) -> None:
    """All pairs in their order, later ones compiled meanwhile; a failure stops none."""
    lacking = set()
    for board, contender in pairs:
        try:
            if campaign.missing(board, contender) is not None:
                campaign.compile(board, contender)
        except DataError as error:
            lacking.add(board.name)
            cli.console.print(f"{board.name}: {error}")
    for board, contender in pairs:
        name = f"{board.name} {contender.name}"
        try:
            if board.name not in lacking and not campaign.complete(board, contender):
                cli.console.print(f"{name}: no time left")
        except (ValueError, TypeError, RuntimeError):
            cli.console.print(f"{name} failed")
            traceback.print_exc(limit=-4)
    campaign.close()


def _pairs(text: str) -> list[tuple[Board, Contender]]:
    """``workload:contender,contender`` as pairs."""
    name, _, names = text.partition(":")
    board = cli.lookup(BOARDS, name, "JOBS")
    return [(board, one) for one in cli.several(CONTENDERS, names.split(","), "JOBS")]
