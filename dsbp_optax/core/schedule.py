"""When a basis is refreshed and how much of it is used: the rules, on plain arrays.

now  = step % p < q                                     (a window of q steps)
p   <- 2 p  if move < low,  p / 2  if move > high       (adaptive interval)
r   <- clip(r, r_lax, r_strict)                         (adaptive rank)

Both adaptive rules have a dead band, so that noise changes nothing.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from dsbp_optax.linalg.types import Array, Scalar

#: Half width of the dead band of the adaptive rank, as a share of ``1 - share``.
_BAND = 0.25
#: Drift of a stationary stream in units of its jitter: 1.0 to 1.6 where measured.
_NOISE = 1.5


@dataclasses.dataclass(frozen=True)
class AutoInterval:
    """An interval between refreshes that follows the drift of the bases.

        drift  = 1 - |V_after^T V_before|_F^2 / k     of a window, mean of all bases
        jitter = the same of its last step alone
        move   = drift - 1.5 jitter

    the mean squared sine of the principal angles, in [0, 1]. Mini-batches move a basis
    even where nothing changes, and a shorter interval would not help; so what two
    consecutive ones differ by is taken off. (Not with whole matrices or with one
    power iteration, where a window is a single step.) Below `low` the interval
    doubles, above `high` it halves, between the two it stays. It starts at `shortest`;
    the first window, of cold bases, decides nothing.

    Attributes:
      shortest: least interval in steps.
      longest: greatest interval in steps.
      low: move under which the interval doubles.
      high: move over which it halves.

    Example:
      >>> import dsbp_optax
      >>> every = dsbp_optax.AutoInterval(longest=400)
      >>> tx = dsbp_optax.dsbp_sgd(0.1, update_every=every)
    """

    shortest: int = 25
    longest: int = 800
    low: float = 0.05
    high: float = 0.2

    def __post_init__(self) -> None:
        lengths = (self.shortest, self.longest)
        if not all(_is_count(x) for x in lengths) or self.shortest > self.longest:
            raise ValueError(
                f"AutoInterval: got shortest={self.shortest!r}, longest="
                f"{self.longest!r}, expected integers with 1 <= shortest <= longest."
            )
        if not (_is_real(self.low, self.high) and 0 <= self.low < self.high <= 1):
            raise ValueError(
                f"AutoInterval: got low={self.low!r}, high={self.high!r}, expected "
                "numbers with 0 <= low < high <= 1: a dead band keeps noise from "
                "changing the interval."
            )


@dataclasses.dataclass(frozen=True)
class AutoRank:
    """A rank that follows the spectrum of each matrix, within fixed bounds.

    The smallest r whose eigenvalues explain `share` of the trace of the layer's
    second moment, all there is to explain: unlike a share of the eigenvalues that
    are tracked, it does not depend on `most`. Where `most` directions explain less
    than that, all are used. The rank grows when it leaves more than ``1.25 (1 -
    share)`` unexplained, and shrinks when fewer directions leave less than ``0.75
    (1 - share)``; in between it stays. Decided at the end of each window.

    Arrays have room for `most` directions, which all go on being refined; those
    beyond the rank are not used, and their moments are zero. Activations of a rank
    below `most` are no failure.

    Attributes:
      most: greatest rank, which sets the shapes.
      least: smallest rank.
      share: of the trace, in (0, 1). The second moment is not centered: one direction,
        the mean, often holds most of it.

    Example:
      >>> import dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(
      ...     0.1, rank={"*/query/kernel": 8, "*": dsbp_optax.AutoRank(most=16)})
    """

    most: int = 32
    least: int = 4
    share: float = 0.9

    def __post_init__(self) -> None:
        ranks = (self.least, self.most)
        if not all(_is_count(x) for x in ranks) or self.least > self.most:
            raise ValueError(
                f"AutoRank: got least={self.least!r}, most={self.most!r}, expected "
                "integers with 1 <= least <= most: they set array shapes and bounds."
            )
        if not (_is_real(self.share) and 0 < self.share < 1):
            raise ValueError(
                f"AutoRank: got share={self.share!r}, expected a number above 0 and "
                "below 1."
            )


@dataclasses.dataclass(frozen=True)
class RankFraction:
    """A rank in proportion to the narrower side of each kernel, up to a limit.

        k = clip(floor(fraction min(d, m)), 1, most)

    A basis costs ``k d`` numbers where the kernel has ``d m``, so that a fixed rank
    weighs most where kernels are narrow; a fraction bounds its share. Kernels that keep
    one basis take the largest of their ranks.

    Attributes:
      fraction: of the narrower side, in (0, 1].
      most: greatest rank.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=dsbp_optax.RankFraction(1 / 16))
      >>> state = tx.init({"kernel": jnp.ones((288, 64))})
      >>> dsbp_optax.by_path(state)["kernel"].basis.shape
      (288, 4)
    """

    fraction: float = 1 / 16
    most: int = 8

    def __post_init__(self) -> None:
        if not (_is_real(self.fraction) and 0 < self.fraction <= 1):
            raise ValueError(
                f"RankFraction: got fraction={self.fraction!r}, expected a number "
                "above 0 and at most 1. Remedy: a fixed rank is a plain integer."
            )
        if not _is_count(self.most):
            raise ValueError(
                f"RankFraction: got most={self.most!r}, expected an integer of at "
                "least 1."
            )

    def of(self, size: int, other: int) -> int:
        """The rank of a matrix of these two sides."""
        return max(1, min(int(self.fraction * min(size, other)), self.most))


Auto: TypeAlias = Literal["auto"]
Rank: TypeAlias = int | AutoRank | RankFraction | Auto
Every: TypeAlias = Scalar | AutoInterval | Auto


class Turn(NamedTuple):
    """Where a step stands in a window of refreshes; bools ``()``.

    Attributes:
      now: whether it refreshes.
      first: whether the window begins with it.
      last: whether the window ends with it.
    """

    now: Array
    first: Array
    last: Array


def auto_rank(rank: Any) -> AutoRank | None:
    """The rule that `rank` asks for; None for one that is fixed."""
    if isinstance(rank, str) and rank == "auto":
        return AutoRank()
    return rank if isinstance(rank, AutoRank) else None


def auto_interval(every: Any) -> AutoInterval | None:
    """The rule that `update_every` asks for; None for one that is fixed."""
    if isinstance(every, str) and every == "auto":
        return AutoInterval()
    return every if isinstance(every, AutoInterval) else None


def turn(phase: Array, every: Any, window: Any) -> Turn:
    """The turn of a step that is `phase` steps behind the start of its window.

    Args:
      phase: int32 ``()``.
      every: p, steps from one window's start to the next one's.
      window: q, its length.
    """
    end = jnp.minimum(window, every) - 1
    return Turn((phase >= 0) & (phase < window), phase == 0, phase == end)


def drift(rotation: Array, rank: Any) -> Array:
    """``1 - |R|_F^2 / r`` of the r leading directions, in [0, 1].

    Args:
      rotation: ``R = V_new^T V_old (k, k)``.
      rank: r, at most k.
    """
    used = jnp.arange(rotation.shape[-1]) < rank
    inside = jnp.where(used[:, None] & used, rotation, 0)
    return jnp.clip(1 - jnp.sum(inside * inside) / rank, 0, 1)


def next_interval(
    rule: AutoInterval, interval: Array, drift: Array, jitter: Array
) -> Array:
    """The interval after a window in which bases moved so much."""
    move = jnp.maximum(drift - _NOISE * jitter, 0)
    longer = jnp.minimum(2 * interval, rule.longest)
    shorter = jnp.maximum(interval // 2, rule.shortest)
    kept = jnp.where(move > rule.high, shorter, interval)
    return jnp.where(move < rule.low, longer, kept)


def needed_rank(eigenvalues: Array, trace: Array, missing: Any) -> Array:
    """Smallest r that leaves at most `missing` of the trace unexplained.

    Args:
      eigenvalues: ``(k,)``, descending.
      trace: ``()``.
      missing: share of the trace.

    Returns:
      int32 ``()`` in 1..k; k where no r does.
    """
    outside = trace - jnp.cumsum(eigenvalues)
    # Strictly: a trace of zero needs no direction.
    short = jnp.sum(outside > missing * trace, dtype=jnp.int32)
    return jnp.minimum(short + 1, eigenvalues.shape[-1])


def next_rank(
    least: int, share: float, rank: Array, eigenvalues: Array, trace: Array
) -> Array:
    """The rank after a window: unchanged inside the dead band.

    Args:
      least: smallest rank.
      share: of the trace that is to be explained.
      rank: int32 ``()``, the one in use.
      eigenvalues: ``(k,)``, descending.
      trace: ``()``.
    """
    missing, most = 1 - share, eigenvalues.shape[-1]
    lax = needed_rank(eigenvalues, trace, (1 + _BAND) * missing)
    strict = needed_rank(eigenvalues, trace, (1 - _BAND) * missing)
    return jnp.clip(jnp.clip(rank, lax, strict), min(least, most), most)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_real(*values: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
