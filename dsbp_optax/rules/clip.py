"""Clipping that asks whether a gradient grew faster than training explains."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import checks
from dsbp_optax.linalg.types import Array, PyTree, Scalar

#: Unit in which every float32 can be squared, and billions of them added up.
_FAR = 2.0**80


class ClipByNormGrowthState(NamedTuple):
    """State of `clip_by_norm_growth`; the mean norm is ``total / weight``.

    Attributes:
      total: decayed sum of the norms so far, each as clipped; ``()`` float32.
      weight: decayed sum of ones, 0 before the first; ``()`` float32.
    """

    total: Array
    weight: Array


def clip_by_norm_growth(
    factor: Scalar = 2.0, decay: Scalar = 0.99
) -> optax.GradientTransformation:
    """Clip the norm of the whole gradient at `factor` times its running mean.

        g <- g min(1, factor a / |g|),   a <- decay a + (1 - decay) |g|

    A step too long raises the loss, and with it the next gradient: left alone that
    runs away within a few steps. Here ``a`` averages norms that were clipped before:
    in step n it grows by a share of at most ``(factor - 1) / n``, and of
    ``(factor - 1) (1 - decay)`` in the long run. The first gradient sets the scale;
    norms that are zero (nothing is trained yet) or not finite are passed on and not
    remembered.

    Args:
      factor: largest ratio of a norm to the mean of those before; may be traced.
      decay: of the mean, which is corrected for its bias; may be traced.

    Returns:
      A transformation of gradients, to be chained before an optimizer.

    Raises:
      ValueError, TypeError: for a factor below 1 or a decay outside [0, 1).

    Cost: two reductions over the gradient, two numbers of state.

    Reference: the limiter of Fira, arXiv 2410.01623, bounds the growth from each step
    to the next instead.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_optax
      >>> tx = optax.chain(dsbp_optax.clip_by_norm_growth(), optax.sgd(0.1))
      >>> updates, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    """
    checks.check_number("factor", factor, 1.0)
    checks.check_number("decay", decay, 0.0, 1.0)

    def init(params: PyTree) -> ClipByNormGrowthState:
        del params
        return ClipByNormGrowthState(*(jnp.zeros([], jnp.float32) for _ in range(2)))

    def update(
        updates: PyTree, state: ClipByNormGrowthState, params: PyTree | None = None
    ) -> tuple[PyTree, ClipByNormGrowthState]:
        del params
        norm = _global_norm(updates)
        known, counts = state.weight > 0, jnp.isfinite(norm) & (norm > 0)
        mean = state.total / jnp.where(known, state.weight, 1)
        bound = jnp.where(known, jnp.asarray(factor, jnp.float32) * mean, jnp.inf)
        clipped = jnp.minimum(norm, bound)
        share = jnp.where(counts, clipped / jnp.where(counts, norm, 1), 1)
        rate = jnp.asarray(decay, jnp.float32)
        new = ClipByNormGrowthState(
            rate * state.total + (1 - rate) * clipped, rate * state.weight + (1 - rate)
        )
        kept = jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, state)
        return jax.tree.map(lambda g: g * share.astype(g.dtype), updates), kept

    return optax.GradientTransformation(init, update)


def _global_norm(tree: PyTree) -> Array:
    """``()`` float32, whatever the dtypes of the leaves.

    Where squares are not finite, in a unit that makes them so.
    """
    near, far = (_sum_of_squares(tree, unit) for unit in (1.0, _FAR))
    fits = jnp.isfinite(near)
    # The root that is not taken stays away from 0, where its derivative is infinite.
    near, far = jnp.where(fits, near, 1), jnp.where(fits, 1, far)
    return jnp.where(fits, jnp.sqrt(near), _FAR * jnp.sqrt(far))


def _sum_of_squares(tree: PyTree, unit: float) -> Array:
    """In units of `unit`, a power of two."""
    squares = [
        jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32) / unit))
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.asarray(sum(squares), jnp.float32)
