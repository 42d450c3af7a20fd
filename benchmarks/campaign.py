"""A campaign: tune every contender on every workload, then train it from many seeds.

Each run leaves one small record; what has a record is not run again. So a campaign
can be stopped and continued at any time, and the tuned rates are read from the
records. What comes next is a function of the records alone.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from benchmarks import records, tune
from benchmarks.data import Data, DataError
from benchmarks.experiment import Order, Record, carry_out
from benchmarks.optimizers import Contender
from benchmarks.train import Program, build
from benchmarks.workloads import Workload

#: Where the records lie, unless told otherwise.
RESULTS = Path(__file__).parent / "results" / "campaign"


@dataclass(frozen=True)
class Lane:
    """One contender on one workload.

    Attributes:
      out: folder of the campaign.
      workload: what to train.
      contender: with what.
      seeds: number of final runs.
      quick: whether to use the short lengths.
    """

    out: Path
    workload: Workload
    contender: Contender
    seeds: int = 0
    quick: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.workload.name}/{self.contender.name}"

    @property
    def folder(self) -> Path:
        """Where the records lie."""
        return self.out / self.workload.name / self.contender.name

    @property
    def steps(self) -> int:
        """Length of a final run."""
        return self.workload.quick_steps if self.quick else self.workload.steps

    def path(self, order: Order) -> Path:
        """``<out>/<workload>/<optimizer>/<phase>-<rate>-<seed>.json``."""
        phase = f"tune{order.round}" if order.round else order.phase
        return self.folder / f"{phase}-{order.rate:g}-{order.seed}.json"

    def records(self) -> list[Record]:
        """What was run so far.

        Raises:
          DataError: when one is unreadable, or was made with the other lengths.
        """
        found = []
        for path in sorted(self.folder.glob("*.json")):
            record = records.read(path)
            quick = record.get("quick")
            if quick != self.quick:
                raise DataError(
                    f"{path}: got quick = {quick}, expected {self.quick}. Remedy: "
                    "another --out, or the same --quick."
                )
            found.append(record)
        return found


def tuned(lane: Lane, found: Sequence[Record]) -> tune.Trial | tune.Choice:
    """The next trial, or the tuned rate; final runs have no part in it."""
    metric = lane.workload.metric
    scores = {
        tune.Trial(record["round"] - 1, record["learning_rate"]): metric.score(
            record[metric.tuning_key]
        )
        for record in found
        if record["phase"] == "tune"
    }
    shift = lane.workload.grid_shift
    grid = [tune.shifted(rate, shift) for rate in lane.contender.grid]
    return tune.next_trial(grid, scores)


def next_order(lane: Lane) -> Order | None:
    """The next run of a lane; None when all are done."""
    found = lane.records()
    step = tuned(lane, found)
    if isinstance(step, tune.Trial):
        share, _ = tune.ROUNDS[step.round]
        steps = math.ceil(share * lane.steps)
        return Order(
            "tune", step.rate, tune.SEED, steps, lane.quick, step.round + 1, "tried"
        )
    for seed in range(lane.seeds):
        order = Order("final", step.rate, seed, lane.steps, lane.quick)
        if not lane.path(order).exists():
            return order
    return None


def learning_rate_for(
    workload: Workload, contender: Contender, out: Path
) -> tuple[float, str]:
    """The learning rate to use when none is given, and where it comes from."""
    folder = out / workload.name / contender.name
    first = next(iter(sorted(folder.glob("tune*.json"))), None)
    if first is not None:
        quick = bool(records.read(first).get("quick"))
        lane = Lane(out, workload, contender, quick=quick)
        step = tuned(lane, lane.records())
        if isinstance(step, tune.Choice):
            return step.rate, f"tuned on {workload.name}"
    rate = tune.shifted(contender.default_rate, workload.grid_shift)
    return rate, f"default, not tuned on {workload.name}"


class Runner:
    """Carries out lanes one after the other until the time is up.

    Args:
      data_dir: folder of the data files.
      deadline: on the clock of `time.monotonic`.
      progress: bars to advance.
      make: ``(workload, contender) -> program``.
    """

    def __init__(
        self,
        data_dir: Path | None,
        deadline: float,
        progress: Progress,
        make: Callable[..., Program] = build,
    ):
        self.data_dir, self.deadline, self.progress = data_dir, deadline, progress
        self.make = make
        self._data: tuple[str, Data] | None = None

    def run(self, lane: Lane) -> bool:
        """Carry out what a lane still lacks.

        Returns:
          Whether it is done; False when the time is up.
        """
        program: Program | None = None
        while (order := next_order(lane)) is not None:
            if time.monotonic() + _expected(lane, order) > self.deadline:
                return False
            data = self._load(lane.workload)
            task = self.progress.add_task(f"{lane.name}: compile", total=order.steps)
            program = program or self.make(lane.workload, lane.contender)
            self.progress.update(task, description=f"{lane.name}: {_words(order)}")
            advance = functools.partial(self.progress.advance, task)
            record = carry_out(program, data, order, advance)
            records.write(lane.path(order), record)
            self.progress.remove_task(task)
        return True

    def _load(self, workload: Workload) -> Data:
        if self._data is None or self._data[0] != workload.name:
            self._data = workload.name, workload.load(self.data_dir)
        return self._data[1]


def remaining(lanes: Sequence[Lane]) -> list[str]:
    """One line for each lane that is not done: what comes next in it."""
    lines = []
    for lane in lanes:
        order = next_order(lane)
        if order is not None:
            lines.append(f"{lane.name}: next {_words(order)}")
    return lines


def _expected(lane: Lane, order: Order) -> float:
    """Seconds that a run will take, judged by the lane's last one."""
    found = lane.records()
    if not found:
        return 0.0
    last = max(found, key=lambda record: record["date"])
    return float(last["seconds"]) * order.steps / last["curve"][-1]["step"]


def _words(order: Order) -> str:
    phase = f"tuning round {order.round}" if order.round else f"seed {order.seed}"
    return f"{phase}, rate {order.rate:g}"
