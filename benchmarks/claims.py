"""What the paper claims, each claim held against the records.

A new claim is one function of the `Evidence`, named in `CLAIMS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import cells, compare, fewshot, markdown, minima, results_fewshot
from benchmarks.compare import Entry
from benchmarks.comparison import DATA_SETS, Known
from benchmarks.experiment import Record
from benchmarks.finetuning import ALIKE, PEER, WIDE
from benchmarks.finetuning_tasks import TASKS
from benchmarks.found import Found
from benchmarks.results_ablation import FOLDER

CONFIRMED, REFUTED = "confirmed", "**not confirmed**"
UNTESTABLE, UNMEASURED = "not testable here", "not measured"

_PAPER, _SAM = "dsbp", "sam"
_HEAD = """## The paper's claims

The claims of [arXiv 2505.23369](https://arxiv.org/abs/2505.23369), each with what was
measured here of `dsbp`, its literal rule, or, where it is said, of rules near it. A
difference counts as one where its 95 % interval, paired by seed, lies on one side of
zero."""


class Line(NamedTuple):
    """One claim.

    Attributes:
      claim: in words.
      figure: what was measured, or why nothing can be.
      verdict: one of the four words of this module.
    """

    claim: str
    figure: str
    verdict: str


class Evidence(NamedTuple):
    """What there is to judge by.

    Attributes:
      found: every record.
      pictures: final runs on the paper's data sets.
      finetuned: workload -> final runs of fine-tuning.
      looked_at: workload -> final records of `benchmarks.minima`.
    """

    found: Sequence[Found]
    pictures: Known
    finetuned: Mapping[str, Sequence[Entry]]
    looked_at: Mapping[str, Sequence[Record]]


def section(evidence: Evidence) -> str:
    """The table of all claims."""
    rows = [line for judge in CLAIMS for line in judge(evidence)]
    return f"{_HEAD}\n\n{markdown.table(('claim', 'here', ''), rows)}"


def cost(evidence: Evidence) -> Iterator[Line]:
    """A gradient for O(k d): as published, and in coordinates."""
    claim = "a layer's gradient costs O(k d) instead of O(d d')"
    yield Line(
        f"{claim}: as published, the whole gradient projected",
        "a projection of a gradient that was computed; there is nothing to save",
        REFUTED,
    )
    claim = f"{claim}: with gradients taken in coordinates"
    counted = [
        one.record["figures"]
        for one in evidence.found
        if "dense layers" in (one.record.get("figures") or ())
    ]
    if not counted:
        yield Line(claim, "-", UNMEASURED)
        return
    shares = {name: _flops_share(rows) for name, rows in counted[-1].items()}
    told = ", ".join(f"{share:.2f} ({name})" for name, share in shares.items())
    measured = (
        f"of the FLOPs of forward and backward pass {told}: of three products of a "
        "dense layer the kernel's own is gone, the other two remain"
    )
    gone = shares["dense layers"] < _TWO_OF_THREE
    yield Line(claim, measured, CONFIRMED if gone else REFUTED)


#: What two of three equal products come to, with a little for coordinates.
_TWO_OF_THREE = 0.68


def _flops_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the gradient in coordinates, to the whole one."""
    flops = {row["way"]: row["flops"] for row in rows if row["program"] == "gradient"}
    return float(flops["coordinates"] / flops["adamw"])


def flatness(evidence: Evidence) -> Iterator[Line]:
    """Flat minima: the ten largest eigenvalues of the Hessian."""
    name = DATA_SETS["Fashion-MNIST"]
    claim = "flatter minima: lower top-10 Hessian eigenvalues than SGD's and SAM's"
    values = {
        key: np.mean([run["hessian_eigenvalues"] for run in runs], axis=0)
        for key in (_PAPER, "sgd", _SAM)
        if (runs := _with(evidence.looked_at.get(name, ()), key, "hessian_eigenvalues"))
    }
    if len(values) < 3:
        yield Line(claim, "-", UNMEASURED)
        return
    lower = all((values[_PAPER] < values[key]).all() for key in ("sgd", _SAM))
    words = [f"{key} {row[0]:.3g} to {row[-1]:.3g}" for key, row in values.items()]
    measured = f"first to tenth, on Fashion-MNIST: {', '.join(words)}"
    yield Line(claim, measured, CONFIRMED if lower else REFUTED)


def bounded(evidence: Evidence) -> Iterator[Line]:
    """The PAC-Bayes bound, and its KL term along training."""
    claim = "the KL term of a PAC-Bayes bound stays bounded along training"
    runs = _with(evidence.looked_at.get(DATA_SETS["Fashion-MNIST"], ()), _PAPER, "kl")
    curve = minima.mean_curve(runs, "kl")
    if curve is None:
        yield Line(claim, "-", UNMEASURED)
    else:
        growth = curve[-1] / curve[len(curve) // 2 - 1]
        measured = (
            f"{curve[-1]:,.0f} nats at the end, {growth:.2f} times those at half of "
            "the way: it stands still with the rate"
        )
        yield Line(claim, measured, CONFIRMED if growth < 1.5 else REFUTED)
    claim = "a PAC-Bayes bound limits the error"
    bounds = [run for some in evidence.looked_at.values() for run in some]
    bounds = [run for run in bounds if "bound" in run]
    if not bounds:
        yield Line(claim, "-", UNMEASURED)
        return
    least = min(bounds, key=lambda run: float(run["bound"]))
    measured = (
        f"at best {100 * least['bound']:.0f} % "
        f"({least['optimizer']}, {least['workload']}) where the test error is "
        f"{100 * (1 - least[least['metric']]):.0f} %"
    )
    yield Line(claim, measured, CONFIRMED if least["bound"] < _GUESSING else REFUTED)


#: Error of a guess among ten classes.
_GUESSING = 0.9


def equation(evidence: Evidence) -> Iterator[Line]:
    """The stochastic differential equation."""
    del evidence
    claim = "a third-order stochastic differential equation describes training"
    reason = "no observable is named by which it could be told from another"
    yield Line(claim, reason, UNTESTABLE)


def accuracy(evidence: Evidence) -> Iterator[Line]:
    """Better than SAM on each data set."""
    for title, workload in DATA_SETS.items():
        claim = f"more accurate than SAM on {title}"
        known = evidence.pictures[workload]
        if title == "Tiny ImageNet" and not known:
            reason = "the data has to be got by hand and was not; the loader is there"
            yield Line(claim, reason, UNTESTABLE)
            continue
        entry, peer = known.get(_PAPER), known.get(_SAM)
        yield _judged(claim, entry, peer, _best_of_ours(known, peer))


def _best_of_ours(known: Mapping[str, Entry], peer: Entry | None) -> str:
    """The best of this package that is not the paper's rule, against a peer."""
    others = [one for one in known.values() if one.ours and one.name != _PAPER]
    if not others:
        return ""
    best = max(others, key=lambda one: one.metric.score(one.mean))
    return f"; the best of ours, {best.name}: {cells.difference(best, peer)}"


def lora(evidence: Evidence) -> Iterator[Line]:
    """Better than LoRA, where there is something to adapt."""
    yield Line(
        "more accurate than LoRA, trained on pictures from the start",
        "LoRA adapts pretrained weights: compared by fine-tuning, the next lines",
        UNTESTABLE,
    )
    for workload in TASKS:
        named = {one.name: one for one in evidence.finetuned.get(workload, ())}
        peer = named.get(PEER)
        for name in (*ALIKE, WIDE):
            alike = "as much state" if name == WIDE else "as many trained numbers"
            claim = f"better than LoRA: {workload}, {name} in coordinates, {alike}"
            yield _judged(claim, named.get(name), peer)


def maml(evidence: Evidence) -> Iterator[Line]:
    """Better than MAML, on episodes."""
    for shots in fewshot.SHOTS:
        claim = f"better than MAML ({shots} shot(s)), as spectral inner steps"
        files = [one.record for one in results_fewshot.learners(evidence.found)]
        here = [record for record in files if record["shots"] == shots]
        known = {entry.name: entry for entry in fewshot.entries(here)}
        entry, peer = known.get("maml_spectral"), known.get("maml")
        yield _judged(claim, entry, peer)


def _judged(
    claim: str, entry: Entry | None, peer: Entry | None, more: str = ""
) -> Line:
    """By whether the whole interval of the difference lies on the better side."""
    gap = compare.difference(entry, peer) if entry and peer else None
    if entry is None or gap is None:
        return Line(claim, "-", UNMEASURED)
    _, low, high = gap
    better = low > 0 if entry.metric.higher else high < 0
    measured = f"{entry.metric.label}: {cells.difference(entry, peer)}{more}"
    return Line(claim, measured, CONFIRMED if better else REFUTED)


def failures(evidence: Evidence) -> Iterator[Line]:
    """Stale bases and too few directions cost accuracy."""
    found = (one for one in evidence.found if one.path.parts[0] == FOLDER)
    grids = [one.record for one in found]
    for record in grids:
        literal = [
            cell
            for cell in record["cells"]
            if all(cell[key] == level for key, level in _LITERAL.items())
        ]
        ends = (
            ("few directions cost accuracy", "rank", max, min),
            ("stale bases cost accuracy", "period", min, max),
        )
        for claim, axis, good, bad in ends:
            levels = {cell[axis] for cell in literal}
            if len(levels) > 1:
                where = f"{claim} ({record['workload']}, with momentum, rate tuned)"
                yield _along(where, literal, axis, good(levels), bad(levels))


#: The paper's rule among the levels of the ablation.
_LITERAL = {
    "outside": "dropped",
    "filter": "none",
    "side": "output",
    "sharpness": "spectral",
}


def _along(
    claim: str, cells: Sequence[Mapping[str, Any]], axis: str, good: int, bad: int
) -> Line:
    """From end to end of one axis, averaged over the other, paired by seed."""
    by_seed = [
        100 * np.mean([_accuracies(cell) for cell in cells if cell[axis] == level], 0)
        for level in (good, bad)
    ]
    gap = compare.mean_interval(list(by_seed[0] - by_seed[1]))
    if gap is None:
        return Line(claim, "-", UNMEASURED)
    mean, low, high = gap
    ends = ", ".join(
        f"{axis} {level}: {values.mean():.1f} %"
        for level, values in zip((good, bad), by_seed, strict=True)
    )
    measured = f"{ends}; {mean:+.1f} [{low:+.1f}, {high:+.1f}] points"
    return Line(claim, measured, CONFIRMED if low > 0 else REFUTED)


def _accuracies(cell: Mapping[str, Any]) -> np.ndarray:
    """By seed; a lost run knows nothing."""
    return np.asarray([0.0 if x is None else x for x in cell["accuracy"]])


def extensions(evidence: Evidence) -> Iterator[Line]:
    """What is known by name only."""
    del evidence
    yield Line(
        "five extensions: spectral inference, architecture, meta learning, transfer, "
        "Lie algebra",
        "known by name only; our reading of the third is the line on MAML",
        UNTESTABLE,
    )


def _with(found: Sequence[Record], optimizer: str, key: str) -> list[Record]:
    """Runs of an optimizer that have a figure, at the end or along the way."""
    return [
        run
        for run in found
        if run["optimizer"] == optimizer
        and not run["diverged"]
        and (key in run or key in run["curve"][-1])
    ]


CLAIMS: tuple[Callable[[Evidence], Iterator[Line]], ...] = (
    *(cost, accuracy, lora, maml, flatness, bounded, equation, failures, extensions),
)
