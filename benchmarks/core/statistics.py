"""Means, intervals and effects: what runs of several seeds say."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_RESAMPLES = 2000


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """In other units."""
        return Interval(*(factor * x for x in self))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The mean and its t interval; None with fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import stats  # Steps of training are measured without it.

    mean, error = float(np.mean(values)), stats.sem(values)
    reach = float(stats.t.ppf(0.975, len(values) - 1) * error)
    return Interval(mean, mean - reach, mean + reach)


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation; None with fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def stratified_median(seconds: np.ndarray, strata: np.ndarray) -> float:
    """Medians of the strata, weighted by their shares: a robust mean of a period."""
    labels, counts = np.unique(strata, return_counts=True)
    medians = [np.median(seconds[strata == label]) for label in labels]
    return float(np.average(medians, weights=counts))


def ratio_of_medians(
    one: np.ndarray, other: np.ndarray, strata: np.ndarray | None = None
) -> Interval:
    """Of paired rounds, which share their noise and are drawn within their strata."""
    kinds = np.zeros(len(one), int) if strata is None else strata

    def ratio(*chosen: np.ndarray) -> float:
        rounds = np.concatenate(chosen).astype(int)
        parts = (stratified_median(x[rounds], kinds[rounds]) for x in (one, other))
        return next(parts) / next(parts)

    return _bootstrap([np.flatnonzero(kinds == k) for k in np.unique(kinds)], ratio)


def ratio_of_groups(one: np.ndarray, other: np.ndarray) -> Interval:
    """Of the medians of two groups, each drawn on its own."""
    return _bootstrap([one, other], lambda a, b: float(np.median(a) / np.median(b)))


def ratio_of_means(one: np.ndarray, other: np.ndarray) -> Interval:
    """Of paired values."""

    def ratio(chosen: np.ndarray) -> float:
        return float(one[chosen.astype(int)].mean() / other[chosen.astype(int)].mean())

    return _bootstrap([np.arange(len(one))], ratio)


def _bootstrap(groups: Sequence[np.ndarray], statistic: Any) -> Interval:
    """Percentile bootstrap; a group of one stands for itself."""
    from scipy import stats

    value = statistic(*groups)
    found = stats.bootstrap(
        [np.repeat(x, 2) if len(x) == 1 else x for x in groups],
        statistic,
        n_resamples=_RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Interval(value, *map(float, found.confidence_interval))


def effects(
    table: Any, factors: Mapping[str, Sequence[str]], values: str
) -> dict[str, Interval]:
    """Main effects and pairwise interactions of crossed factors, by marginal means.

    A main effect is the difference of a level to the first of its factor, averaged over
    all levels of the others; an interaction how much one difference changes with the
    other. Intervals are over the seeds. In a complete grid this is the least-squares
    fit of a linear model with all such terms.
    """
    by_seed = table.pivot_table(values, list(factors), "seed")
    if len(by_seed) < np.prod([*map(len, factors.values())]):
        raise ValueError(
            f"effects: got {len(by_seed)} cells, expected every combination of levels. "
            "Remedy: make the runs that are missing."
        )

    def mean(**levels: str) -> Any:
        return by_seed.xs(tuple(levels.values()), level=[*levels]).mean()

    found = {}
    for name, (base, *levels) in factors.items():
        for level in levels:
            gap = mean(**{name: level}) - mean(**{name: base})
            found[f"{name}: {level}"] = mean_interval(gap)
    for (f, (f0, *fs)), (g, (g0, *gs)) in itertools.combinations(factors.items(), 2):
        for a, b in itertools.product(fs, gs):
            gap = mean(**{f: a, g: b}) - mean(**{f: a, g: g0})
            gap -= mean(**{f: f0, g: b}) - mean(**{f: f0, g: g0})
            found[f"{f}: {a} x {g}: {b}"] = mean_interval(gap)
    if None in found.values():
        raise ValueError("effects: got one seed, expected at least 2.")
    return {name: one for name, one in found.items() if one is not None}
