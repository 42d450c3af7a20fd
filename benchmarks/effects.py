"""Main effects and pairwise interactions of crossed factors, by least squares.

    y = m + sum_f a_f(level of f) + sum_{f<g} b_fg(levels of f and g),  for each seed

What is reported are differences that the fit predicts, averaged over the levels of the
other factors: of a level to the first one of its factor, and, of two factors, how much
the one difference changes with the other. Intervals are those of Student's t over the
seeds: where every combination was run, such averages need no noise but theirs, and
levels that are unsteady do not blur the others.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Levels = Mapping[str, str]
Factors = Mapping[str, Sequence[str]]


class Effect(NamedTuple):
    """A difference and its 95 % interval.

    Attributes:
      name: the level, or both levels.
      value: of the difference.
      low: lower end.
      high: upper end.
    """

    name: str
    value: float
    low: float
    high: float

    @property
    def is_pair(self) -> bool:
        """Whether it is an interaction."""
        return " x " in self.name

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.low > 0 or self.high < 0


def effects(
    factors: Factors, cells: Sequence[Levels], values: np.ndarray
) -> list[Effect]:
    """All of them, main effects first.

    Args:
      factors: name -> levels; differences are to the first one.
      cells: factor -> level, of each cell.
      values: ``(cells, seeds)``.

    Raises:
      ValueError: when the cells cannot tell the effects apart, or there is one seed.
    """
    design = np.stack([_row(factors, cell) for cell in cells])
    rank, seeds = np.linalg.matrix_rank(design), values.shape[1]
    if rank < design.shape[1] or seeds < 2:
        raise ValueError(
            f"effects: got {len(cells)} cells of {seeds} seed(s), which tell {rank} "
            f"numbers apart, expected {design.shape[1]} from at least 2 seeds. Remedy: "
            "make the runs that are missing."
        )
    names, weights = zip(*contrasts(factors), strict=True)
    fits = np.linalg.lstsq(design, values)[0]
    found = np.stack(weights) @ fits
    error = found.std(1, ddof=1) / np.sqrt(seeds)
    reach = stats.t.ppf(0.975, seeds - 1) * error
    means = found.mean(1)
    rows = zip(names, means, means - reach, means + reach, strict=True)
    return [Effect(name, *map(float, row)) for name, *row in rows]


def contrasts(factors: Factors) -> list[tuple[str, np.ndarray]]:
    """Names and weights of the coefficients, of every difference."""
    found = []
    for name, levels in factors.items():
        base = _mean_row(factors, {name: levels[0]})
        for level in levels[1:]:
            row = _mean_row(factors, {name: level})
            found.append((_label(name, level), row - base))
    for (one, some), (other, more) in itertools.combinations(factors.items(), 2):
        for a, b in itertools.product(some[1:], more[1:]):
            both, first, second, neither = (
                _mean_row(factors, {one: x, other: y})
                for x, y in ((a, b), (a, more[0]), (some[0], b), (some[0], more[0]))
            )
            label = f"{_label(one, a)} x {_label(other, b)}"
            found.append((label, both - first - second + neither))
    return found


def _label(name: str, level: str) -> str:
    return f"{name}: {level}"


def _row(factors: Factors, cell: Levels) -> np.ndarray:
    """One, the levels, and the products of the levels of every two factors."""
    codes = [
        np.array([cell[name] == level for level in levels[1:]], float)
        for name, levels in factors.items()
    ]
    pairs = itertools.combinations(codes, 2)
    return np.concatenate([[1.0], *codes, *(np.outer(a, b).ravel() for a, b in pairs)])


def _mean_row(factors: Factors, given: Levels) -> np.ndarray:
    """Averaged over all levels of the factors that are not given."""
    choices = [
        [given[name]] if name in given else levels for name, levels in factors.items()
    ]
    crossed = itertools.product(*choices)
    rows = [
        _row(factors, dict(zip(factors, levels, strict=True))) for levels in crossed
    ]
    return np.mean(rows, axis=0)
