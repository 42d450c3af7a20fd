"""Few-shot episodes on Omniglot-small: tune every learner alike, then judge it.

Training characters are turned by 0, 90, 180 and 270 degrees, a class each. Rates are
chosen by episodes of the validation alphabet; results are of episodes of the test
alphabets, the same for all learners and seeds. Each learner leaves one file of records;
what is in it is not run again.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records, tune
from benchmarks.compare import Entry
from benchmarks.data import (
    Alphabets,
    DataError,
    Episode,
    episodes,
    halved,
    load_omniglot_small,
    stacked,
    with_rotations,
)
from benchmarks.experiment import Record
from benchmarks.fitting import QUERIES, TASKS, WAYS, Fit, Plan
from benchmarks.learners import LEARNERS, Learner
from benchmarks.metrics import ACCURACY

RESULTS = Path(__file__).parent / "results" / "fewshot"
#: Rates are tuned at the first number of shots, and taken over by the others.
SHOTS = (1, 5)
STEPS = 300
VALIDATION_EPISODES, TEST_EPISODES = 200, 600
#: The round of tuning in which inner rates are tried.
_INNER_ROUND = len(tune.ROUNDS) + 1


def load(data_dir: Path | None) -> Alphabets:
    """Drawings of 14 by 14 pixels; those to train on in all four turns."""
    parts = Alphabets(*map(halved, load_omniglot_small(data_dir)))
    return parts._replace(train=with_rotations(parts.train))


def judging_episodes(alphabets: Alphabets, shots: int, final: bool) -> Episode:
    """The fixed episodes that judge: of test alphabets, or of the validation one."""
    part = alphabets.test if final else alphabets.validation
    rng = np.random.default_rng([0, 2 if final else 1])
    drawn = episodes(part, WAYS, shots, QUERIES, rng)
    return stacked(drawn, TEST_EPISODES if final else VALIDATION_EPISODES)


@dataclass(frozen=True)
class Run:
    """One run as it is asked for.

    Attributes:
      phase: "tune" or "final".
      round: of the tuning, from 1; 0 for final runs.
      plan: what is trained.
    """

    phase: str
    round: int
    plan: Plan


@dataclass
class Lane:
    """One learner at one number of shots.

    Attributes:
      out: folder of all records.
      learner: which.
      shots: labelled drawings of each character.
      seeds: number of final runs.
      steps: outer steps of a final run.
      found: records of the runs that were made.
    """

    out: Path
    learner: Learner
    shots: int
    seeds: int
    steps: int = STEPS
    found: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Reads what was made.

        Raises:
          DataError: when it was made with another length.
        """
        if not self.path.exists():
            return
        self.found = records.read(self.path)["records"]
        others = {record["full_steps"] for record in self.found} - {self.steps}
        if others:
            raise DataError(
                f"{self.path}: got runs of {min(others)} steps, expected {self.steps}. "
                "Remedy: another --out, or the same --steps."
            )

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.learner.name}, {self.shots} shot(s)"

    @property
    def path(self) -> Path:
        """``<out>/<shots>_shot/<learner>.json``."""
        return self.out / f"{self.shots}_shot" / f"{self.learner.name}.json"

    def add(self, record: Record) -> None:
        """Keep a record."""
        self.found.append(record)
        head = {"learner": self.learner.name, "shots": self.shots}
        records.write(self.path, {**head, "records": self.found})

    def tuning_lane(self) -> "Lane":
        """Whose rates are taken: those of the first shots, of the rule itself."""
        learner = LEARNERS[self.learner.takes or self.learner.name]
        return Lane(self.out, learner, SHOTS[0], self.seeds, self.steps)


def tuned(lane: Lane) -> Run | tuple[float, float]:
    """The next run of the tuning, or the outer and the inner rate.

    First the outer rate is tuned, by successive halving at the first inner rate; then
    the other inner rates are tried at that outer rate and full length.
    """
    tried = [record for record in lane.found if record["phase"] == "tune"]
    scores = {
        tune.Trial(one["round"] - 1, one["learning_rate"]): _score(one)
        for one in tried
        if one["round"] < _INNER_ROUND
    }
    first, *others = lane.learner.inner_rates
    if not lane.learner.grid:
        return 0.0, first
    step = tune.next_trial(lane.learner.grid, scores)
    if isinstance(step, tune.Trial):
        share, _ = tune.ROUNDS[step.round]
        plan = Plan(step.rate, first, math.ceil(share * lane.steps), tune.SEED)
        return Run("tune", step.round + 1, plan)
    known = {first: scores[tune.Trial(len(tune.ROUNDS) - 1, step.rate)]}
    inner = [one for one in tried if one["round"] == _INNER_ROUND]
    known |= {one["inner_rate"]: _score(one) for one in inner}
    for rate in others:
        if rate not in known:
            plan = Plan(step.rate, rate, lane.steps, tune.SEED)
            return Run("tune", _INNER_ROUND, plan)
    return step.rate, max(known, key=lambda rate: known[rate])


def next_run(lane: Lane) -> Run | None:
    """The next run of a lane; None when all are made.

    Raises:
      DataError: when it waits for the rates of another lane.
    """
    owner = lane.tuning_lane()
    mine = owner.path == lane.path
    step = tuned(lane if mine else owner)
    if isinstance(step, Run):
        if mine:
            return step
        raise DataError(
            f"{lane.name}: got no tuned rates of {owner.name}, expected its records. "
            f"Remedy: fewshot --learner {owner.learner.name} first."
        )
    made = {one["seed"] for one in lane.found if one["phase"] == "final"}
    seed = next((seed for seed in range(lane.seeds) if seed not in made), None)
    if seed is None:
        return None
    return Run("final", 0, Plan(*step, lane.steps, seed))


def _score(record: Record) -> float:
    return ACCURACY.score(record[ACCURACY.tuning_key])


def carry_out(lane: Lane, alphabets: Alphabets, fit: Fit, run: Run) -> Record:
    """Train once, judge and describe."""
    final = run.phase == "final"
    key = ACCURACY.final_key if final else ACCURACY.tuning_key
    fitted = fit(alphabets.train, run.plan)
    diverged = not np.isfinite(fitted.loss)
    tasks = judging_episodes(alphabets, lane.shots, final)
    found = fitted.judge(tasks, run.plan.inner_rate)
    spread = float(found.std(ddof=1) / np.sqrt(len(found)))
    return {
        "phase": run.phase,
        "round": run.round,
        "learning_rate": run.plan.rate,
        "inner_rate": run.plan.inner_rate,
        "seed": run.plan.seed,
        "steps": run.plan.steps,
        "full_steps": lane.steps,
        "tasks": TASKS,
        "metric": key,
        key: None if diverged else float(found.mean()),
        "standard_error_of_episodes": spread,
        "episodes": len(found),
        "train_loss": fitted.loss,
        "diverged": diverged,
        "seconds": fitted.seconds,
        "state_bytes": fitted.state_bytes,
        **records.environment(),
    }


def lanes(
    learners: Sequence[Learner], out: Path, seeds: int, steps: int
) -> Iterator[Lane]:
    """Each learner at every number of shots, in an order in which rates are known."""
    for learner in learners:
        for shots in SHOTS:
            yield Lane(out, learner, shots, seeds, steps)


def entries(found: Sequence[Record]) -> list[Entry]:
    """Final runs of each learner that has some, in the order of `LEARNERS`.

    Args:
      found: files of one number of shots.
    """
    finals = {
        one["learner"]: [run for run in one["records"] if run["phase"] == "final"]
        for one in found
    }
    known = [*LEARNERS, *sorted(finals.keys() - LEARNERS.keys())]
    return [Entry(n, ACCURACY, finals[n]) for n in known if finals.get(n)]


def read(out: Path, shots: int) -> list[Record]:
    """The files of one number of shots."""
    folder = out / f"{shots}_shot"
    return [records.read(path) for path in sorted(folder.glob("*.json"))]


def carry_on(
    lane: Lane,
    alphabets: Callable[[], Alphabets],
    deadline: float,
    after_run: Callable[[], Any] = lambda: None,
) -> bool:
    """Make the runs that a lane still lacks.

    Returns:
      Whether it is done; False when the time (of `time.monotonic`) is up.
    """
    make = functools.cache(lane.learner.make)
    while (run := next_run(lane)) is not None:
        if time.monotonic() > deadline:
            return False
        lane.add(carry_out(lane, alphabets(), make(lane.shots), run))
        after_run()
    return True
