"""Many contenders, alike tuned, on many workloads: `python -m benchmarks.scoreboard`.

What to run next is a function of the records that exist, so that a run that was killed
goes on where it stopped. Rates of kernels and of the rest and weight decay are tuned
on validation data, with seeds of their own; final runs alone see test data.
"""

import argparse
import functools
import itertools
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import boards, records, sweep
from benchmarks.boards import BOARDS, Board
from benchmarks.data import DataError
from benchmarks.metrics import mean_interval
from benchmarks.peers import CONTENDERS, Contender
from benchmarks.sweep import Run

#: Seeds of tuning runs and of final runs.
TUNING, FINAL = (1000, 1001), tuple(range(2000, 2016))
#: Pairs of rates that meet all weight decays; places by which a grid is moved.
_BEST, _PLACES = 2, 2
#: The fields of a run that are tuned.
_TUNED = Run._fields[:3]
RESULTS = Path(__file__).parent / "results" / "scoreboard"

Row = dict[str, Any]
Scores = Mapping[Run, float]


class Stage(NamedTuple):
    """What is to be run next.

    Attributes:
      phase: "rates", "further" (rates beyond an edge), "decay" or "final".
      runs: those without a score.
    """

    phase: str
    runs: list[Run]


def next_stage(
    contender: Contender, scores: Scores, brief: bool = False
) -> Stage | None:
    """The first stage that lacks runs; None where all are there.

    Args:
      contender: its grids.
      scores: of the runs that were made; less is better, infinite is a failure.
      brief: whether the rates of the grids are all that is tuned.
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


def _stages(contender: Contender, scores: Scores, brief: bool) -> Any:
    """Stages and all of their runs, as far as the scores tell."""

    def known(runs: Sequence[Run]) -> bool:
        return all(run in scores for run in runs)

    def pairs(*grids: Sequence[float]) -> list[Run]:
        return [
            Run(*rates, 0.0, TUNING[0], contender.variant)
            for rates in itertools.product(*grids)
        ]

    grids = contender.rates, contender.aux_rates
    runs = pairs(*grids)
    yield "rates", runs
    if not known(runs):
        return
    best = min(runs, key=lambda run: (scores[run], run))
    if brief:
        yield "final", [best._replace(seed=seed) for seed in FINAL]
        return
    further = pairs(*map(moved, grids, best[:2]))
    if further != runs:
        yield "further", further
        if not known(further):
            return
    ranked = sorted({*runs, *further}, key=lambda run: (scores[run], run))[:_BEST]
    settings = [
        run._replace(decay=decay) for run in ranked for decay in contender.decays
    ]
    runs = [run._replace(seed=seed) for run in settings for seed in TUNING]
    yield "decay", runs
    if not known(runs):
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


def scores_of(rows: Sequence[Row], judge: str) -> dict[Run, float]:
    """Validation figures of one contender's records; nothing of the test part."""
    found = {}
    for row in rows:
        value = row[f"validation_{judge}"]
        run = Run(*(row[name] for name in Run._fields))
        found[run] = math.inf if value is None else value
    return found


def rows_of(board: Board, out: Path, contender: str | None = None) -> list[Row]:
    """Records of a workload, of one contender or of all."""
    rows = records.read_lines(out / f"{board.name}.jsonl")
    return [row for row in rows if contender in (None, row["contender"])]


class Campaign:
    """Carries stages out, within a time.

    Args:
      out: folder of the records.
      data: corpus -> its parts on the device.
      runs: most runs at once.
      seconds: no stage begins that would end later, as far as earlier ones tell.
      commit: of the code, where the checkout does not tell.
    """

    def __init__(
        self,
        out: Path,
        data: Callable[[Board], Sequence[sweep.Part]],
        runs: int = 16,
        seconds: float = math.inf,
        commit: str | None = None,
    ) -> None:
        self.out, self.data, self.runs, self.commit = out, data, runs, commit
        self.end = time.monotonic() + seconds
        self._programs: dict[Any, Future[sweep.Program]] = {}
        self._compiler = ThreadPoolExecutor(1)

    def complete(self, board: Board, contender: Contender) -> bool:
        """Run what is missing; whether nothing is left."""
        while True:
            rows = rows_of(board, self.out, contender.name)
            scores = scores_of(rows, board.judge)
            stage = next_stage(contender, scores, board.brief)
            if stage is None:
                return True
            if time.monotonic() + _expected(rows) > self.end:
                return False
            program = self.compile(board, contender).result()
            group = stage.runs[: program.runs]
            self._carry_out(board, contender, program, Stage(stage.phase, group))

    def compile(self, board: Board, contender: Contender) -> Future[sweep.Program]:
        """Compile in the background, one after the other, what is to be run."""
        runs = min(self.runs, board.runs)
        data = self.data(board)
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
        final = stage.phase == "final"
        data = self.data(board)
        rows = sweep.train(program, stage.runs, board.steps, data, test=final)
        told = {"workload": board.name, "contender": contender.name}
        where = _provenance(self.commit)
        rows = [{**told, "phase": stage.phase, **row, **where} for row in rows]
        records.append(self.out / f"{board.name}.jsonl", rows)
        judge = f"validation_{board.judge}"
        best = min(rows, key=lambda row: (math.isnan(row[judge]), row[judge]))
        print(
            f"{board.name} {contender.name} {stage.phase}: {len(rows)} runs, "
            f"{rows[0]['seconds']:.2f} s each, compiled in "
            f"{rows[0]['compile_seconds']:.0f} s; best validation "
            f"{best[judge]:.4f} at {best['rate']:g} {best['aux_rate']:g} "
            f"{best['decay']:g}",
            flush=True,
        )


def _expected(rows: Sequence[Row]) -> float:
    """Seconds that a group takes, going by the last one; evaluations are extra."""
    if not rows:
        return 0.0
    return 1.3 * rows[-1]["seconds"] * rows[-1]["runs_at_once"]


def _provenance(commit: str | None) -> Row:
    found = records.environment()
    git = found.pop("git")
    if commit is not None or git is None:  # Of a copy the copied commit tells.
        return {**found, "commit": commit, "clean": None}
    return {**found, "commit": git["commit"], "clean": not git["modified"]}


def report(board: Board, out: Path) -> str:
    """The table of a workload, in Markdown; a star marks settings at an edge."""
    rows = rows_of(board, out)
    names = [name for name in CONTENDERS if any(r["contender"] == name for r in rows)]
    groups = {n: [r for r in rows if r["contender"] == n] for n in names}
    finals = {
        name: {r["seed"]: r for r in group if r["phase"] == "final"}
        for name, group in groups.items()
    }
    key = f"test_{board.judge}"
    means = {n: _mean([r[key] for r in f.values()]) for n, f in finals.items() if f}
    lines = [
        f"### {board.name}\n",
        f"| contender | test {board.judge} | to muon | to muon in six bits | state | "
        "steps to Muon's end | rate, auxiliary, decay | tuning runs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    muon = finals.get("muon", {})
    for name in sorted(means, key=lambda n: (math.isnan(means[n]), means[n])):
        found = finals[name]
        row = next(iter(found.values()))
        settings = ", ".join(_setting(row, field, groups[name]) for field in _TUNED)
        share = _share(row, muon)
        lines.append(
            f"| {name} | {means[name]:.4f} "
            f"| {gap(found, muon, key)} | {gap(found, finals.get('muon_6bit'), key)} "
            f"| {share} | {_steps_to(found, muon)} | {settings} "
            f"| {sum(r['phase'] != 'final' for r in groups[name])} |"
        )
    return "\n".join(lines)


def _setting(row: Row, field: str, rows: Sequence[Row]) -> str:
    """A setting; with a star where it is the first or last that was tried."""
    tried = {other[field] for other in rows}
    inside = min(tried) < row[field] < max(tried) or row[field] == 0
    return f"{row[field]:g}{'' if inside else '*'}"


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([np.nan if v is None else v for v in values]))


def gap(found: Mapping[int, Row], other: Mapping[int, Row] | None, key: str) -> str:
    """The difference, paired by seed, and its 95 % t interval."""
    if not other or found is other:
        return ""
    pairs = [(found[seed][key], other[seed][key]) for seed in found if seed in other]
    if any(None in pair for pair in pairs):
        return "diverged"
    interval = mean_interval([a - b for a, b in pairs])
    if interval is None:
        return ""
    mean, low, high = interval
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _share(row: Row, muon: Mapping[int, Row]) -> str:
    if not muon:
        return ""
    whole = next(iter(muon.values()))["kernel_state_bytes"]
    return f"{100 * row['kernel_state_bytes'] / whole:.1f} %"


def _steps_to(found: Mapping[int, Row], muon: Mapping[int, Row]) -> str:
    """Steps to Muon's last validation loss, between evaluations by a straight line."""
    if not muon:
        return ""
    goal = _mean([row["validation_loss"] for row in muon.values()])
    curves = [[p["loss"] for p in row["curve"]] for row in found.values()]
    losses = np.asarray(curves, float).mean(0)
    steps = [p["step"] for p in next(iter(found.values()))["curve"]]
    below = np.flatnonzero(losses <= goal)
    if not below.size:
        return "-"
    at = below[0]
    if at == 0:
        return f"{steps[0]}"
    share = (losses[at - 1] - goal) / (losses[at - 1] - losses[at])
    return f"{steps[at - 1] + share * (steps[at] - steps[at - 1]):.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoreboard")
    add = parser.add_argument
    add("jobs", nargs="*", metavar="WORKLOAD:CONTENDER,...", help="in this order")
    add("--minutes", type=float, default=math.inf, help="begin no stage beyond these")
    add("--only", nargs="+", choices=CONTENDERS, metavar="CONTENDER")
    add("--workload", nargs="+", choices=BOARDS, metavar="W")
    add("--data", type=Path, default=Path("data"), help="folder of the texts")
    add("--runs", type=int, default=16, help="at once, in one program")
    add("--out", type=Path, help=f"folder of the records; default {RESULTS.name}")
    add("--cache", type=Path, help="folder of compiled programs")
    add("--commit", help="of the code, where there is no checkout")
    add("--dry", action="store_true", help="tiny sizes and random data; needs --out")
    add("--report", action="store_true", help="print the tables and run nothing")
    add("--list", action="store_true", help="print contenders and workloads")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    told = parser.parse_args(arguments)
    if told.dry and told.out is None:
        parser.error("--dry: got no --out. Remedy: a folder for records of no worth.")
    out = told.out or RESULTS
    chosen = [BOARDS[name] for name in BOARDS if name in (told.workload or BOARDS)]
    entrants = [CONTENDERS[n] for n in CONTENDERS if n in (told.only or CONTENDERS)]
    if told.list:
        print("\n".join(f"{c.name:16} {c.summary}" for c in entrants))
        print("\n".join(f"{b.name:16} {b.steps} steps on {b.corpus}" for b in chosen))
        return
    if told.report:
        known = [b for b in chosen if (out / f"{b.name}.jsonl").exists()]
        print("\n\n".join(report(board, out) for board in known))
        return
    if told.cache:
        jax.config.update("jax_compilation_cache_dir", str(told.cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if told.dry:
        chosen = [boards.dry(board) for board in chosen]

    @functools.cache
    def load(corpus: str) -> tuple[sweep.Part, ...]:
        return jax.device_put(boards.load(corpus, told.data))

    @functools.cache
    def data(board: Board) -> tuple[sweep.Part, ...]:
        if told.dry:
            return jax.device_put(boards.random_parts(board.task))
        return load(board.corpus)

    jobs = list(itertools.product(chosen, entrants))
    if told.jobs:
        jobs = [job for text in told.jobs for job in _jobs(parser, text)]
        if told.dry:
            jobs = [(boards.dry(board), contender) for board, contender in jobs]
    campaign = Campaign(out, data, told.runs, 60 * told.minutes, told.commit)
    missing: list[str] = []
    for board, contender in jobs:
        rows = rows_of(board, out, contender.name)
        scores = scores_of(rows, board.judge)
        try:
            if next_stage(contender, scores, board.brief) is not None:
                campaign.compile(board, contender)
        except DataError as error:
            missing.append(board.name)
            print(f"{board.name}: {error}", flush=True)
    for board, contender in jobs:
        if board.name in missing:
            continue
        try:
            if not campaign.complete(board, contender):
                print(f"{board.name} {contender.name}: no time left", flush=True)
        except (ValueError, TypeError, RuntimeError):  # the others go on
            print(f"{board.name} {contender.name} failed", flush=True)
            traceback.print_exc(limit=-4)
    campaign.close()


def _jobs(parser: Any, text: str) -> list[tuple[Board, Contender]]:
    """``workload:contender,contender`` as pairs."""
    board, _, names = text.partition(":")
    wrong = [n for n in names.split(",") if n not in CONTENDERS]
    if board not in BOARDS or wrong:
        parser.error(f"got {text!r}, expected one of {[*BOARDS]}:{[*CONTENDERS]}.")
    return [(BOARDS[board], CONTENDERS[name]) for name in names.split(",")]


if __name__ == "__main__":
    main()
