"""What flat minima were reached for: curvature and accuracy of the sharpness modes."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from benchmarks import compare, minima
from benchmarks.compare import Entry
from benchmarks.experiment import Record
from benchmarks.reaches import Line
from benchmarks.workloads import WORKLOADS

_WORKLOADS = ("fashion_mnist_cnn", "cifar10_resnet")
_MODES = ("dsbp_sgd_msam", "dsbp_sgd_sam")
_OF_SAM, _OF_SGD, _SHARE, _POINTS = 1.2, 0.5, 0.8, 0.3


def lines(found: Mapping[str, Sequence[Record]]) -> Iterator[Line]:
    """Of every mode on every workload.

    Args:
      found: workload -> final records of `benchmarks.minima`.
    """
    for name in _WORKLOADS:
        entries = minima.entries(WORKLOADS[name], found.get(name, ()))
        for mode in _MODES:
            yield _flat(name, mode, entries)
            yield _accurate(name, mode, entries)


def _flat(name: str, mode: str, entries: Mapping[str, Entry]) -> Line:
    words = f"lambda max at most {_OF_SAM} of SAM's and {_OF_SGD} of SGD's"
    tops = [_top(entries.get(key)) for key in (mode, "sam", "sgd")]
    mine, peer, plain = tops
    if mine is None or peer is None or plain is None:
        return Line(name, words, mode, "-", None)
    measured = f"{mine:.2f}: {mine / peer:.2f} of SAM's, {mine / plain:.2f} of SGD's"
    met = mine <= _OF_SAM * peer and mine <= _OF_SGD * plain
    return Line(name, words, mode, measured, met)


def _top(entry: Entry | None) -> float | None:
    if entry is None:
        return None
    key = "hessian_eigenvalues"
    values = [run[key][0] for run in entry.records if key in run]
    return float(np.mean(values)) if values else None


def _accurate(name: str, mode: str, entries: Mapping[str, Entry]) -> Line:
    """Four fifths of SAM's gain where it has one, else no worse than SGD."""
    words = f"{_SHARE} of SAM's gain; without one within {_POINTS} points of SGD"
    known = [entries.get(key) for key in (mode, "sam", "sgd")]
    mine, peer, plain = known
    if mine is None or peer is None or plain is None:
        return Line(name, words, mode, "-", None)
    gain, gap = compare.difference(peer, plain), compare.difference(mine, plain)
    if gain is None or gap is None:
        return Line(name, words, mode, "-", None)
    (mean, low, _), (ours, worst, best) = (
        tuple(mine.metric.factor * value for value in three) for three in (gain, gap)
    )
    told = f"{ours:+.2f} [{worst:+.2f}, {best:+.2f}] to SGD"
    if low > 0:
        return Line(
            *(name, words, mode, f"{told}, SAM {mean:+.2f}"), ours >= _SHARE * mean
        )
    return Line(
        *(name, words, mode, f"no SAM gain here ({mean:+.2f}); {told}"),
        worst >= -_POINTS,
    )
