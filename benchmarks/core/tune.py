"""Successive halving over learning rates, as a pure function of what is known.

Every contender starts with the same number of rates. While the best of a round lies
at the edge of all that were tried, one more rate beyond that edge is tried.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: Seed of every tuning run; final runs count up from 0.
SEED = 100

#: Share of the full length, and how many rates it leaves.
ROUNDS = ((1 / 3, 2), (1.0, 1))

#: Most rates beyond the grid, over all rounds.
EXTENSIONS = 6


class Trial(NamedTuple):
    """A run that is still to be made: the round, from 0, and the learning rate."""

    round: int
    rate: float


class Choice(NamedTuple):
    """The end of tuning."""

    rate: float


Scores = Mapping[Trial, float]


def next_trial(grid: Sequence[float], scores: Scores) -> Trial | Choice:
    """What to run next, or the rate to use."""
    entrants = list(grid)
    for number, (_, survivors) in enumerate(ROUNDS):
        # Rates beyond the grid enter in the round that asked for them.
        extra = [t.rate for t in scores if t.round == number and t.rate not in entrants]
        tried = {t.rate for t in scores if t.round <= number} | {*entrants}
        entrants += extra
        for rate in entrants:
            if Trial(number, rate) not in scores:
                return Trial(number, rate)
        entrants.sort(key=lambda rate: (-scores[Trial(number, rate)], rate))
        further = beyond(entrants[0], tried | {*grid})
        if further is not None and len(tried | {*grid}) < len(grid) + EXTENSIONS:
            return Trial(number, further)
        entrants = entrants[:survivors]
    return Choice(entrants[0])


def beyond(rate: float, tried: set[float]) -> float | None:
    """The next rate outwards if `rate` is at an edge of those tried, else None."""
    if rate == max(tried):
        return shifted(rate, 1)
    return shifted(rate, -1) if rate == min(tried) else None


def shifted(rate: float, half_decades: int) -> float:
    """A rate of the series 1, 3, 10, 30, ... so many places further on."""
    place = round(2 * math.log10(rate)) + half_decades
    return float(f"{3 if place % 2 else 1}e{place // 2}")
