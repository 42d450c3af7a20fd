"""Final records of one contender: means, differences, times to a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.core import campaign, records
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.statistics import Interval, mean_interval
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.tasks.base import Metric, Workload


@dataclass(frozen=True)
class Entry:
    """All final runs of one contender at one learning rate."""

    name: str
    metric: Metric
    records: Sequence[Record]  # one a seed
    # Its row of steps in turns; None to use the runs' own times, which other work on
    # the machine may have disturbed.
    speed: Record | None = None

    @property
    def ours(self) -> bool:
        """Whether the contender is of this package."""
        return self.name in CONTENDERS and CONTENDERS[self.name].ours

    @property
    def finals(self) -> dict[int, float]:
        """Seed -> the metric on the test part; NaN where the run diverged."""
        values = {record["seed"]: record[self.metric.test] for record in self.records}
        return {s: np.nan if v is None else v for s, v in values.items()}

    @property
    def mean(self) -> float:
        """Of the finals."""
        return float(np.mean(list(self.finals.values())))

    @property
    def diverged(self) -> int:
        """Number of runs that diverged."""
        return sum(record["diverged"] for record in self.records)

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps ``(e,)`` of the evaluations, and the metric ``(seeds, e)``.

        After a divergence the metric is NaN.
        """
        longest = max((record["curve"] for record in self.records), key=len)
        values = np.full((len(self.records), len(longest)), np.nan)
        for row, record in zip(values, self.records, strict=True):
            known = [p["value"] for p in record["curve"]]
            row[: len(known)] = np.asarray(known, float)
            if record["diverged"]:
                row[len(known) - 1 :] = np.nan
        return np.asarray([point["step"] for point in longest]), values

    def median(self, key: str) -> float | None:
        """Of a figure over the runs that have it."""
        values = [r[key] for r in self.records if r.get(key) is not None]
        return float(np.median(values)) if values else None

    @property
    def milliseconds(self) -> dict[str, float | None]:
        """Medians of a "step", a "refresh" step, and the "mean" over a period."""
        if self.speed is None:
            keys = {"step": "step_ms", "refresh": "refresh_step_ms"}
            keys["mean"] = "mean_step_ms"
            return {name: self.median(key) for name, key in keys.items()}
        keys = {"step": "step_seconds", "refresh": "refresh_seconds", "mean": "seconds"}
        found = {name: self.speed[key] for name, key in keys.items()}
        return {n: None if v is None else 1e3 * v for n, v in found.items()}

    @property
    def step_seconds(self) -> float:
        """The mean step: refresh steps weigh by their share."""
        return (self.milliseconds["mean"] or np.nan) / 1e3


def entries(
    metric: Metric, found: Sequence[Record], speeds: Sequence[Record] = ()
) -> list[Entry]:
    """Final records grouped by contender, in the order in which these occur.

    Speeds count only where every contender has one, so that like is compared with
    like.
    """
    groups: dict[str, list[Record]] = {}
    for record in found:
        groups.setdefault(record["optimizer"], []).append(record)
    rows: Mapping[str, Record] = {row["contender"]: row for row in speeds}
    known = rows if groups.keys() <= rows.keys() else {}
    return [Entry(name, metric, runs, known.get(name)) for name, runs in groups.items()]


def campaign_entries(
    workload: Workload,
    out: Path = RESULTS,
    contenders: Sequence[Contender] = tuple(CONTENDERS.values()),
    study: str = campaign.STUDY,
) -> list[Entry]:
    """Of a campaign, at tuned rates, in the order of its contenders."""
    file = campaign.Lane(out, workload, contenders[0], study=study).file
    runs = [r for c in contenders for r in campaign.finals(workload, c, out, study)]
    speeds = [row for one in records.read(file, study="speed") for row in one["rows"]]
    return entries(workload.metric, runs, speeds)


def control_entries(workload: Workload, rule: str, out: Path = RESULTS) -> list[Entry]:
    """Of a rule, and of the controls that are it without one of its parts."""
    found = records.read(out / "controls" / f"{workload.name}.jsonl")
    own = campaign.finals(workload, CONTENDERS[rule], out)
    others = [one for one in found if one["optimizer"].startswith(f"{rule}, ")]
    return entries(workload.metric, own + others)


def best_peer(found: Sequence[Entry]) -> Entry | None:
    """The best by mean among the contenders of other packages."""
    peers = [entry for entry in found if not entry.ours]
    return max(peers, key=lambda e: e.metric.score(e.mean), default=None)


def difference(entry: Entry | None, other: Entry | None) -> Interval | None:
    """Mean difference, paired by seed, in people's numbers.

    None with fewer than two common seeds; NaN where one of the runs diverged.
    """
    if entry is None or other is None:
        return None
    seeds = sorted(entry.finals.keys() & other.finals.keys())
    gap = mean_interval([entry.finals[s] - other.finals[s] for s in seeds])
    return None if gap is None else gap.scaled(entry.metric.factor)


def target(metric: Metric, peer: Entry) -> float:
    """The best peer's final mean less the tolerance."""
    return peer.mean - metric.tolerance * (1 if metric.higher else -1)


def steps_to(entry: Entry, goal: float) -> int | None:
    """First evaluation at which the mean over seeds meets the goal, and at the next.

    None where it never does at two evaluations on end.
    """
    steps, values = entry.curves()
    scores = [entry.metric.score(value) for value in values.mean(0)]
    met = [score >= entry.metric.score(goal) for score in scores]
    for number in range(len(met) - 1):
        if met[number] and met[number + 1]:
            return int(steps[number])
    return None


def seconds_to(entry: Entry, goal: float) -> float | None:
    """The training time to that evaluation; None where the goal is not met."""
    steps = steps_to(entry, goal)
    return None if steps is None else steps * entry.step_seconds


def value_after(entry: Entry, seconds: float) -> float | None:
    """The mean over seeds at the last evaluation within so much training time.

    None before the first one. A contender that ends sooner keeps its final value.
    """
    steps, values = entry.curves()
    within = np.flatnonzero(steps * entry.step_seconds <= seconds * (1 + 1e-9))
    return float(values.mean(0)[within[-1]]) if within.size else None
