"""A campaign: tune every contender on every workload, then train it from many seeds.

Each run leaves one line in the file of its workload; what has a line is not run again.
So a campaign can be stopped and continued at any time: what comes next, and the tuned
rates, are functions of the records alone.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from benchmarks.core import records, tune
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Order, Program, build, carry_out, key_of
from benchmarks.optimizers import Contender
from benchmarks.tasks.base import Data, DataError, Workload

#: Name of the study, and folder of its files.
STUDY = "campaign"


@dataclass(frozen=True)
class Lane:
    """One contender on one workload."""

    out: Path  # folder of all records
    workload: Workload
    contender: Contender
    seeds: int = 0  # number of final runs
    quick: bool = False  # whether lengths are the short ones
    study: str = STUDY
    make: Callable[[Workload, Contender], Program] = build

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.workload.name}/{self.contender.name}"

    @property
    def file(self) -> Path:
        """``<out>/<study>/<workload>.jsonl``."""
        return self.out / self.study / f"{self.workload.name}.jsonl"

    @property
    def steps(self) -> int:
        """Length of a final run."""
        return self.workload.quick_steps if self.quick else self.workload.steps

    def records(self) -> list[Record]:
        """What was run so far; an error where it was made with the other lengths."""
        found = records.read(self.file, study=self.study, optimizer=self.contender.name)
        if any(record["quick"] != self.quick for record in found):
            raise DataError(
                f"{self.file}: got runs of {self.name} with quick = {not self.quick}, "
                f"expected {self.quick}. Remedy: another --out, or the same --quick."
            )
        return found

    def next_order(self) -> Order | None:
        """The next run; None when all are done."""
        found = self.records()
        step = tuned(self, found)
        if isinstance(step, tune.Trial):
            share, _ = tune.ROUNDS[step.round]
            steps, number = math.ceil(share * self.steps), step.round + 1
            source = self.quick, number, "tried"
            return Order("tune", step.rate, tune.SEED, steps, *source)
        made = {key_of(record) for record in found}
        for seed in range(self.seeds):
            order = Order("final", step.rate, seed, self.steps, self.quick)
            if order.key not in made:
                return order
        return None

    def expected_seconds(self, order: Order) -> float:
        """What a run will take, judged by the last one."""
        found = self.records()
        if not found:
            return 0.0
        last = max(found, key=lambda record: str(record["date"]))
        return float(last["seconds"]) * order.steps / last["curve"][-1]["step"]


def tuned(lane: Lane, found: Sequence[Record]) -> tune.Trial | tune.Choice:
    """The next trial, or the tuned rate; final runs have no part in it."""
    metric, shift = lane.workload.metric, lane.workload.grid_shift
    scores = {
        tune.Trial(record["round"] - 1, record["learning_rate"]): metric.score(
            record[metric.validation]
        )
        for record in found
        if record["phase"] == "tune"
    }
    grid = [tune.shifted(rate, shift) for rate in lane.contender.grid]
    return tune.next_trial(grid, scores)


def rate_for(
    workload: Workload, contender: Contender, out: Path = RESULTS, study: str = STUDY
) -> tuple[float, str]:
    """The learning rate to use when none is given, and where it comes from."""
    lane = Lane(out, workload, contender, study=study)
    found = records.read(lane.file, study=study, optimizer=contender.name)
    step = tuned(lane, found)
    if isinstance(step, tune.Choice):
        return step.rate, f"tuned on {workload.name}"
    rate = tune.shifted(contender.default_rate, workload.grid_shift)
    return rate, f"default, not tuned on {workload.name}"


def finals(
    workload: Workload, contender: Contender, out: Path = RESULTS, study: str = STUDY
) -> list[Record]:
    """Final runs at the tuned rate, by seed; those at rates replaced are left out."""
    lane = Lane(out, workload, contender, study=study)
    wanted = {"optimizer": contender.name, "phase": "final"}
    rate, _ = rate_for(workload, contender, out, study)
    found = records.read(lane.file, study=study, learning_rate=rate, **wanted)
    return sorted(found, key=lambda record: int(record["seed"]))


def run(
    lanes: Sequence[Lane], data_dir: Path | None, deadline: float, progress: Progress
) -> bool:
    """Carry out what lanes still lack; False when the time (`time.monotonic`) is up."""
    load = functools.lru_cache(maxsize=1)(lambda workload: workload.load(data_dir))
    return all(_finish(lane, load, deadline, progress) for lane in lanes)


def _finish(
    lane: Lane, load: Callable[[Workload], Data], deadline: float, progress: Progress
) -> bool:
    program: Program | None = None
    while (order := lane.next_order()) is not None:
        if time.monotonic() + lane.expected_seconds(order) > deadline:
            return False
        data = load(lane.workload)
        task = progress.add_task(f"{lane.name}: compile", total=order.steps)
        program = program or lane.make(lane.workload, lane.contender)
        progress.update(task, description=f"{lane.name}: {words(order)}")
        advance = functools.partial(progress.advance, task)
        record, _ = carry_out(program, data, order, advance)
        records.append(lane.file, lane.study, [record])
        progress.remove_task(task)
    return True


def remaining(lanes: Sequence[Lane]) -> list[str]:
    """One line for each lane that is not done: what comes next in it."""
    pairs = ((lane.name, lane.next_order()) for lane in lanes)
    return [f"{name}: next {words(order)}" for name, order in pairs if order]


def words(order: Order) -> str:
    """A run in words."""
    phase = f"tuning round {order.round}" if order.round else f"seed {order.seed}"
    return f"{phase}, rate {order.rate:g}"
