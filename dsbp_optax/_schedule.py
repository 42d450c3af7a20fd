"""When a basis is refreshed and how much of it is used: the rules, on plain arrays.

now  = start <= step < start + q                       (a window of q steps)
p   <- 2 p  if move < low,  p / 2  if move > high       (adaptive interval)
r   <- clip(r, r_lax, r_strict)                         (adaptive rank)

Both adaptive rules have a dead band, so that noise changes nothing.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from dsbp_optax._types import Array, Scalar

#: Half width of the dead band of the adaptive rank, as a share of ``1 - share``.
_BAND = 0.25
#: Drift of a stationary stream in units of its jitter: 1.0 to 1.6 where measured.
_NOISE = 1.5


@dataclasses.dataclass(frozen=True)
class AutoInterval:
    """An interval between refreshes that follows the drift of each layer's basis.

        drift  = 1 - |V_after^T V_before|_F^2 / k     of a window
        jitter = the same of its last step alone
        move   = drift - 1.5 jitter

    the mean squared sine of the principal angles, in [0, 1]. Mini-batches move a basis
    even where nothing changes, and a shorter interval would not help; so what two
    consecutive ones differ by is taken off. (Not with whole matrices or with one
    power iteration, where a window is a single step.) Below `low` the layer's
    interval doubles, above `high` it halves, between the two it stays. It starts at
    `shortest`; the first window of a cold basis decides nothing.

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
    """A rank that follows the spectrum of each layer, within fixed bounds.

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
      share: of the trace, in (0, 1). The second moment is not centered: one
        direction, the mean, often holds most of it.

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

    A basis costs ``k (d + m)`` numbers where the kernel has ``d m``, so that a fixed
    rank weighs most where kernels are narrow; a fraction bounds its share of a
    kernel by twice that. Kernels that keep one basis take the largest of their
    ranks.

    Attributes:
      fraction: of the narrower side, in (0, 1].
      most: greatest rank.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=dsbp_optax.RankFraction(1 / 16))
      >>> tx.init({"kernel": jnp.ones((288, 64))})[0].basis["kernel"].shape
      (288, 1, 4)
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
    """Where in its window a layer stands; bools ``()``.

    Attributes:
      now: whether this step refreshes it.
      last: whether its window ends with this step.
    """

    now: Array
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


def fixed_turn(step: Array, every: Any, window: Any) -> Turn:
    """The turn of a layer whose windows begin at 0 and then every p steps.

    Args:
      step: int32 ``()``.
      every: p, an integer.
      window: q, the length of a window.
    """
    phase = step % every
    return Turn(phase < window, phase == jnp.minimum(window, every) - 1)


def auto_turn(step: Array, start: Array, window: Any) -> Turn:
    """The turn of a layer whose window begins at `start` and lasts `window` steps."""
    now = step >= start
    return Turn(now, now & (step >= start + window - 1))


def drift(rotation: Array, rank: Any) -> Array:
    """``1 - |R|_F^2 / r`` of the r leading directions, in [0, 1].

    Args:
      rotation: ``R = V_new^T V_old (*batch, k, k)``.
      rank: r, at most k.

    Returns:
      ``(*batch,)``.
    """
    used = jnp.arange(rotation.shape[-1]) < rank
    inside = jnp.where(used[:, None] & used, rotation, 0)
    return jnp.clip(1 - jnp.sum(inside * inside, axis=(-2, -1)) / rank, 0, 1)


def next_interval(rule: AutoInterval, interval: Array, move: Array) -> Array:
    """The interval after a window in which the basis moved by `move`."""
    longer = jnp.minimum(2 * interval, rule.longest)
    shorter = jnp.maximum(interval // 2, rule.shortest)
    kept = jnp.where(move > rule.high, shorter, interval)
    return jnp.where(move < rule.low, longer, kept)


def move(drift: Array, jitter: Array) -> Array:
    """What of a window's drift is not the noise of mini-batches."""
    return jnp.maximum(drift - _NOISE * jitter, 0)


def needed_rank(eigenvalues: Array, trace: Array, missing: float) -> Array:
    """Smallest r that leaves at most `missing` of the trace unexplained.

    Args:
      eigenvalues: ``(..., k)``, descending.
      trace: ``(..., 1)``.
      missing: share of the trace.

    Returns:
      int32 ``(...)`` in 1..k; k where no r does.
    """
    outside = trace - jnp.cumsum(eigenvalues, axis=-1)
    # Strictly: a trace of zero needs no direction.
    short = jnp.sum(outside > missing * trace, axis=-1, dtype=jnp.int32)
    return jnp.minimum(short + 1, eigenvalues.shape[-1])


def next_rank(rule: AutoRank, rank: Array, eigenvalues: Array, trace: Array) -> Array:
    """The rank after a window: unchanged inside the dead band.

    Args:
      rule: bounds and share.
      rank: int32 ``()``, the one in use.
      eigenvalues: ``(..., k)``, descending, of each matrix of a stack.
      trace: ``(..., 1)``.

    Returns:
      int32 ``()``: what the most demanding matrix needs.
    """
    missing, most = 1 - rule.share, eigenvalues.shape[-1]
    lax = needed_rank(eigenvalues, trace, (1 + _BAND) * missing)
    strict = needed_rank(eigenvalues, trace, (1 - _BAND) * missing)
    chosen = jnp.clip(rank, jnp.max(lax), jnp.max(strict))
    return jnp.clip(chosen, min(rule.least, most), most)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_real(*values: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
