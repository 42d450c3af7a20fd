"""What becomes of the part of the gradient outside the subspace, ``E = G - V V^T G``.

Without a rule it is dropped: the paper's choice, and GaLore's.

The simplest rule is a function that returns a factor ``s`` (one number a matrix, or
one a column) of ``V u + s E``. A factor costs no pass over the gradient and lets one
product do the work: ``V (u - s P) + s G`` with ``P = V^T G``. Rules that keep state,
or that need ``E`` itself, are a `Residual`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from dsbp_optax._subspace import lift, squared_norm
from dsbp_optax._types import Array, PyTree, Scalar

#: (update u, coordinates P, |G|^2 (*batch, 1, 1)) -> s (*batch, 1, 1)
Factor: TypeAlias = Callable[[Array, Array, Array], Array]

#: Residual energy under this share of the gradient's is rounding, not signal.
_NOISE = 1e-6


class Outside(NamedTuple):
    """What a residual rule sees of one kernel's step.

    Attributes:
      update: ``u (*batch, k, m)``, flipped ``(*batch, m, k)``.
      coordinates: ``P``, shaped as `update`.
      energy: ``|G|^2 (*batch, 1, 1)``.
      matrix: ``G (*batch, d, m)``, flipped ``(*batch, m, d)``.
      basis: ``V (*batch, d, k)``.
      flipped: as in `dsbp_optax._subspace.project`.
    """

    update: Array
    coordinates: Array
    energy: Array
    matrix: Array
    basis: Array
    flipped: bool

    def residual(self) -> Array:
        """``E = G - V P``; costs one lift."""
        return self.matrix - lift(self.basis, self.coordinates, self.flipped)


class Contribution(NamedTuple):
    """What a rule adds to ``V u``: ``factor * E + addition``; None stands for zero.

    Attributes:
      factor: broadcast against the matrix, constant along its rows.
      addition: shaped as the matrix.
    """

    factor: Array | None = None
    addition: Array | None = None


class Residual(NamedTuple):
    """A rule with state for ``residual=``, such as `residual_momentum` gives.

    Attributes:
      init: zeros shaped as the matrix -> state of one kernel.
      update: (`Outside`, state) -> (`Contribution`, state).
      stateless: whether a cold layer may pass its gradient through in place of it.
    """

    init: Callable[[Array], PyTree]
    update: Callable[[Outside, PyTree], tuple[Contribution, PyTree]]
    stateless: bool = False


#: No rule: what is outside the subspace is dropped.
DROPPED = Residual(
    lambda matrix: (), lambda seen, state: (Contribution(), state), stateless=True
)


def as_residual(rule: Any) -> Residual:
    """`rule` in its general form; a function of three arguments has no state."""
    if isinstance(rule, Residual):
        return rule
    if rule is None:
        return DROPPED
    if not callable(rule):
        raise TypeError(
            f"residual: got {rule!r} of type {type(rule).__name__}, expected None, a "
            "rule such as dsbp_optax.normalize_residual(0.5), or a function (update, "
            "coordinates, energy) -> factor."
        )

    def update(seen: Outside, state: PyTree) -> tuple[Contribution, PyTree]:
        return Contribution(rule(seen.update, seen.coordinates, seen.energy)), state

    return Residual(lambda matrix: (), update, stateless=True)


def scale_residual(factor: Scalar) -> Factor:
    """The residual times a constant.

        s = factor

    ``1 / (1 - momentum)`` matches momentum's steady state.

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


def normalize_residual(fraction: Scalar = 0.5) -> Factor:
    """The residual, brought to `fraction` of the RMS of the subspace update.

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
