"""How many directions a basis has: a number, or a share of a kernel's width."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax

from dsbp_optax.core import checks


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


Rank: TypeAlias = int | RankFraction


def check_rank(rank: Any, path: str = "") -> int | None:
    """A positive Python integer, of a fraction its limit, or None, or an error."""
    if rank is None:
        return None
    if isinstance(rank, RankFraction):
        return rank.most
    where = f" of '{path}'" if path else ""
    if isinstance(rank, jax.Array):
        raise TypeError(
            f"rank{where}: got an array or traced value, expected a Python integer, "
            "since it sets array shapes. Remedy: optax.inject_hyperparams(f, "
            "static_args=('rank',))."
        )
    if isinstance(rank, float) and 0 < rank < 1:
        raise TypeError(
            f"rank{where}: got {rank} of type float, expected an integer of at least "
            f"1. Remedy: for a share of the width dsbp_optax.RankFraction({rank})."
        )
    return int(checks.check_integer("rank", rank, 1, where))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_real(*values: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
