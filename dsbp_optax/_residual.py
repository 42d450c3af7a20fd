"""What becomes of the part of the gradient outside the subspace.

Without a rule it is dropped: the paper's choice, and GaLore's.

A rule returns the factor ``s`` of ``V u + s (G - V V^T G)``. A factor is enough for
everything shipped here, costs no pass over the gradient, and lets one product do
the work: ``V (u - s P) + s G`` with ``P = V^T G``.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from dsbp_optax._subspace import squared_norm
from dsbp_optax._types import Array, Scalar

#: (update u, coordinates P, |G|^2 (*batch, 1, 1)) -> s (*batch, 1, 1)
Residual: TypeAlias = Callable[[Array, Array, Array], Array]

#: Residual energy under this share of the gradient's is rounding, not signal.
_NOISE = 1e-6


def scale_residual(factor: Scalar) -> Residual:
    """``s`` constant; ``1 / (1 - momentum)`` matches momentum's steady state.

    Args:
      factor: ``s``, a number; may be traced.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Cost: nothing beyond the step itself.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.trace(0.9), residual=dsbp_optax.scale_residual(10.0))
    """

    def constant(update: Array, coordinates: Array, energy: Array) -> Array:
        del update, coordinates
        return jnp.full_like(energy, 1) * jnp.asarray(factor, energy.dtype)

    return constant


def normalize_residual(fraction: Scalar = 0.5) -> Residual:
    """``s`` such that the residual's RMS is `fraction` of the subspace update's.

        s = fraction |u| / |G - V V^T G|

    Invariant to the scale of the gradient, as Adam is, and without any state. A
    residual below rounding (1e-6 of the gradient's energy) is dropped.

    Args:
      fraction: RMS of the residual's part, as a share of the subspace update's; may
        be traced.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Cost: one reduction over the gradient.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.scale_by_adam(), residual=dsbp_optax.normalize_residual(0.5))
    """

    def factor(update: Array, coordinates: Array, energy: Array) -> Array:
        outside = energy - squared_norm(coordinates)
        significant = outside > _NOISE * energy
        ratio = squared_norm(update) / jnp.where(significant, outside, 1)
        share = jnp.asarray(fraction, energy.dtype)
        return jnp.where(significant, share * jnp.sqrt(ratio), 0)

    return factor


def pass_through(update: Array, coordinates: Array, energy: Array) -> Array:
    """The factor with which a whole gradient takes the place of a cold subspace.

        s = |u| / |P|

    1 without an inner optimizer; with one, the scale that it gives its input.
    """
    inside = squared_norm(coordinates)
    ratio = squared_norm(update) / jnp.where(inside > 0, inside, 1)
    return jnp.where((inside > 0) & jnp.isfinite(ratio), jnp.sqrt(ratio), 1)
