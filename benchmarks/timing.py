"""Fair clocks: warm, blocked, interleaved; ratios with bootstrap intervals."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Ratio(NamedTuple):
    """A ratio and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` returns, once it is computed, and the seconds it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
    """`function`, jitted, compiled for `args`, and the seconds that took.

    The seconds hold tracing, lowering and compilation.
    """
    start = time.perf_counter()
    program = function.lower(*args).compile()
    return program, time.perf_counter() - start


def cost(program: Any) -> dict[str, float | None]:
    """What the compiler says of a program; None where it says nothing.

    Returns:
      ``temporary_bytes``: beyond arguments and results. ``flops``: of one call, every
      branch of a conditional counted as if taken.
    """
    memory, costs = program.memory_analysis(), program.cost_analysis()
    if isinstance(costs, list):
        costs = costs[0] if costs else None
    return {
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        "flops": (costs or {}).get("flops"),
    }


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 3,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Seconds of each call, in rounds A B C, A B C, so that drift hits all alike.

    Args:
      calls: name -> function without arguments.
      rounds: rounds that are timed.
      warmup: rounds before them that are not.
      after_round: called at the end of each timed round.

    Returns:
      Name -> ``(rounds,)``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            _, elapsed = timed(call)
            if number >= warmup:
                seconds[name].append(elapsed)
        if number >= warmup:
            after_round()
    return {name: np.asarray(values) for name, values in seconds.items()}


def stratified_median(seconds: np.ndarray, strata: np.ndarray) -> float:
    """Medians of the strata, weighted by their shares: a robust mean of a period."""
    labels, counts = np.unique(strata, return_counts=True)
    medians = [np.median(seconds[strata == label]) for label in labels]
    return float(np.average(medians, weights=counts))


def ratio_of_medians(
    numerator: np.ndarray,
    denominator: np.ndarray,
    strata: np.ndarray | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """Ratio of medians with a 95 % percentile bootstrap over rounds.

    Rounds are resampled as a whole, since the contenders of a round share its noise.

    Args:
      numerator: ``(rounds,)`` seconds.
      denominator: ``(rounds,)`` seconds of the same rounds.
      strata: ``(rounds,)`` labels; medians are then taken, and rounds drawn, within
        each label (refresh steps, other steps). None for one stratum.
      resamples: bootstrap samples.
      seed: of the resampling.
    """
    if strata is None:
        strata = np.zeros(len(numerator), int)
    groups = [np.flatnonzero(strata == label) for label in np.unique(strata)]
    rng = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for number in range(resamples):
        drawn = np.concatenate([rng.choice(g, len(g)) for g in groups])
        ratios[number] = stratified_median(
            numerator[drawn], strata[drawn]
        ) / stratified_median(denominator[drawn], strata[drawn])
    value = stratified_median(numerator, strata) / stratified_median(
        denominator, strata
    )
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(value), float(low), float(high))


def ratio_of_groups(
    numerator: np.ndarray,
    denominator: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """Ratio of medians of two groups of steps, resampled each on its own.

    Args:
      numerator: ``(a,)`` seconds.
      denominator: ``(b,)`` seconds.
      resamples: bootstrap samples.
      seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    medians = [
        np.median(rng.choice(group, (resamples, len(group))), axis=1)
        for group in (numerator, denominator)
    ]
    low, high = np.quantile(medians[0] / medians[1], (0.025, 0.975))
    value = np.median(numerator) / np.median(denominator)
    return Ratio(float(value), float(low), float(high))


def ratio_of_means(
    numerator: np.ndarray,
    denominator: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """Ratio of means with a 95 % percentile bootstrap over pairs.

    Args:
      numerator: ``(n,)``.
      denominator: ``(n,)``, of the same seeds.
      resamples: bootstrap samples.
      seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(numerator), (resamples, len(numerator)))
    ratios = numerator[drawn].mean(1) / denominator[drawn].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    value = numerator.mean() / denominator.mean()
    return Ratio(float(value), float(low), float(high))
