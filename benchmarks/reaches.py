"""What was reached for, and what was reached: each held against the records."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import compare, markdown
from benchmarks.compare import Entry

_VISION = ("fashion_mnist_cnn", "cifar10_resnet")
_GPT = "shakespeare_gpt"
_MEAN_STEP, _DEAREST_STEP, _TIME, _LOSS = 1.05, 1.2, 0.6, 1.05

Entries = Mapping[str, Sequence[Entry]]
Speeds = Mapping[str, Sequence[Mapping[str, Any]]]


class Line(NamedTuple):
    """One reach, held against one optimizer.

    Attributes:
      workload: of the campaign.
      reach: in words.
      optimizer: of this package.
      measured: in words.
      met: None where it was not measured.
    """

    workload: str
    reach: str
    optimizer: str
    measured: str
    met: bool | None


class Quality(NamedTuple):
    """At most so much worse than a peer, with at most so much of its state.

    Attributes:
      peer: name; None for the best one.
      words: for people.
      state: largest share of the peer's state for kernels.
      gap: largest difference of the scores that are people's numbers, worse is more.
      bound: whether the end of the 95 % interval is meant, not the mean.
    """

    peer: str | None
    words: str
    state: float
    gap: float
    bound: bool = False


_QUALITY = {
    _GPT: (
        Quality("adamw", "0.05 below AdamW, at 20 % of its moments", 0.2, -0.05),
        Quality("muon", "within 0.02 of Muon, at a third of its state", 1 / 3, 0.02),
        Quality("galore", "0.2 below GaLore", np.inf, -0.2),
    ),
    **dict.fromkeys(
        _VISION,
        (
            Quality(
                *(
                    None,
                    "within 0.3 points (95 % bound) of the best peer, at 25 % of state",
                ),
                *(0.25, 0.3, True),
            ),
        ),
    ),
}


def lines(
    entries: Entries, speeds: Speeds, stability: Sequence[Mapping[str, Any]]
) -> list[Line]:
    """All reaches.

    Args:
      entries: of each workload of the campaign.
      speeds: rows of `speed.whole_steps`, by workload.
      stability: records of `stability`, the newest last.
    """
    found = []
    for workload, reaches in _QUALITY.items():
        known = entries.get(workload, ())
        for reach in reaches:
            found += _each(workload, reach.words, known, _quality(reach, known))
    for workload in _VISION:
        known = entries.get(workload, ())
        words = f"to 0.2 points below the best peer in {_TIME} of its time"
        found += _each(workload, words, known, _time(known))
    for workload in _QUALITY:
        found += _steps(workload, speeds.get(workload, ()))
    return found + _stability(stability)


def table(found: Sequence[Line]) -> str:
    """As Markdown; misses stay in."""
    verdicts = {True: "met", False: "**missed**", None: "not measured"}
    rows = [(*line[:4], verdicts[line.met]) for line in found]
    return markdown.table(("workload", "reach", "optimizer", "measured", ""), rows)


def _each(
    workload: str,
    words: str,
    known: Sequence[Entry],
    judge: Callable[[Entry], tuple[str, bool | None]],
) -> list[Line]:
    ours = [entry for entry in known if entry.ours]
    if not ours:
        return [Line(workload, words, "-", "-", None)]
    return [Line(workload, words, entry.name, *judge(entry)) for entry in ours]


def _quality(
    reach: Quality, known: Sequence[Entry]
) -> Callable[[Entry], tuple[str, bool | None]]:
    named = next((entry for entry in known if entry.name == reach.peer), None)
    peer = named if reach.peer else compare.best_peer(known)

    def judge(entry: Entry) -> tuple[str, bool | None]:
        gap = compare.difference(entry, peer) if peer else None
        if gap is None or peer is None:
            return "-", None
        metric = entry.metric
        mean, low, high = (metric.factor * value for value in gap)
        sign = -1 if metric.higher else 1
        worst = (low if metric.higher else high) if reach.bound else mean
        share = state_share(entry, peer)
        digits = metric.digits
        words = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        met = bool(sign * worst <= reach.gap) and share <= reach.state
        return f"{words}, {100 * share:.1f} % of {peer.name}'s", met

    return judge


def state_share(entry: Entry, peer: Entry) -> float:
    """State of the kernels against the peer's; NaN where either is unknown."""
    mine, theirs = (e.median("projected_state_bytes") for e in (entry, peer))
    return mine / theirs if mine is not None and theirs else float("nan")


def _time(known: Sequence[Entry]) -> Callable[[Entry], tuple[str, bool | None]]:
    peer = compare.best_peer(known)

    def judge(entry: Entry) -> tuple[str, bool | None]:
        if peer is None or not np.isfinite(peer.mean):
            return "-", None
        goal = compare.target(entry.metric, peer)
        mine, theirs = (compare.seconds_to(e, goal) for e in (entry, peer))
        if mine is None or theirs is None:
            who = entry.name if mine is None else peer.name
            return f"not reached by {who}", False
        return f"{mine / theirs:.2f} of {peer.name}'s time", mine / theirs <= _TIME

    return judge


def _steps(workload: str, rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Of the rows that have a plain optimizer to be held against."""
    words = (
        f"mean step at most {_MEAN_STEP}, dearest {_DEAREST_STEP} of the plain one's"
    )
    known, found = {row["contender"]: row for row in rows}, []
    for name, row in known.items():
        plain = known.get(row["against"])
        if plain is None or plain is row:
            continue
        mean = row["ratio"]["value"]
        dearest = (row["refresh_seconds"] or row["step_seconds"]) / plain[
            "step_seconds"
        ]
        met = mean <= _MEAN_STEP and dearest <= _DEAREST_STEP
        measured = f"{mean:.3f}, {dearest:.3f} of {row['against']}'s"
        found.append(Line(workload, words, name, measured, met))
    return found or [Line(workload, words, "-", "-", None)]


def _stability(found: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The newest record of each optimizer on each workload."""
    words = f"no run lost; loss at most {_LOSS} of the plain one's at every rate"
    newest: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in found:
        names = dict.fromkeys(row["contender"] for row in record["rows"])
        for name in names:
            rows = [row for row in record["rows"] if row["contender"] == name]
            newest[record["workload"], name] = rows
    return [
        Line(workload, words, name, *_stable(rows))
        for (workload, name), rows in newest.items()
    ]


def _stable(rows: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    lost, runs = sum(row["diverged"] for row in rows), sum(row["seeds"] for row in rows)
    ratios = [row["ratio"]["value"] for row in rows if row["ratio"]]
    above = [row for row in rows if row["ratio"] and row["ratio"]["value"] > _LOSS]
    rates = ", ".join(f"{row['learning_rate']:g}" for row in above)
    words = f"{lost} of {runs} runs lost; ratio at most {max(ratios, default=0):.2f}"
    return words + f" (above at {rates})" * bool(above), not lost and not above
