"""What becomes of the part of the gradient outside the subspace, ``E = G - V V^T G``.

Without a rule it is dropped: the paper's choice, and GaLore's.

The simplest rule is a function that returns a factor ``s`` (one number a matrix) of
``V u + s E``. A factor costs no pass over the gradient and lets one product do the
work: ``V (u - s P) + s G`` with ``P = V^T G``. Rules that keep state, or that need
``E`` itself, are a `Residual`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax.numpy as jnp

from dsbp_optax.core.transform import Rule
from dsbp_optax.linalg.subspace import lift, squared_norm
from dsbp_optax.linalg.types import Array, PyTree, Scalar
from dsbp_optax.rules import moments

#: (update u (k, m), coordinates P (k, m), |G|^2 ()) -> s ()
Factor: TypeAlias = Callable[[Array, Array, Array], Array]

#: Residual energy under this share of the gradient's is rounding, not signal.
_NOISE = 1e-6


class Outside(NamedTuple):
    """What a residual rule sees of one kernel's step.

    Attributes:
      update: ``u (k, m)``.
      coordinates: ``P (k, m)``.
      energy: ``|G|^2 ()``.
      matrix: ``G (d, m)``.
      basis: ``V (d, k)``.
    """

    update: Array
    coordinates: Array
    energy: Array
    matrix: Array
    basis: Array

    def residual(self) -> Array:
        """``E = G - V P``; costs one lift."""
        return self.matrix - lift(self.basis, self.coordinates)


class Contribution(NamedTuple):
    """What a rule adds to ``V u``: ``factor * E + addition``; None stands for zero.

    Attributes:
      factor: ``()``.
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


def residual_momentum(
    decay: Scalar = 0.9, bits: int = 4, *, nesterov: bool = False
) -> Residual:
    """Momentum of the residual, kept in a few bits a number.

        r <- decay r + (G - V V^T G)

    Beside ``inner=optax.trace(decay, nesterov)`` the sum is the momentum of the whole
    gradient: exact where the gradient's energy is, coarse where little is left. Where a
    refresh turns the basis, what the new one does not hold of the coordinates is lost.

    Args:
      decay: of the momentum, that of the inner optimizer; may be traced.
      bits: 1 to 8 bits a number; 32 keeps the floats.
      nesterov: as in `optax.trace`.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Raises:
      ValueError: for other numbers of bits.

    Cost: ``bits d m / 8 + 2 (d + m)`` bytes of state for each kernel; one
    more lift, ``2 d k m`` FLOPs.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.trace(0.9), residual=dsbp_optax.residual_momentum(0.9))
    """
    return _moments_of_residual(moments.quantized_momentum(decay, bits, nesterov))


def residual_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    bits: int = 4,
    *,
    nesterov: bool = False,
) -> Residual:
    """Adam of the residual ``E``: coarse first moment, factored second moment.

        m <- b1 m + (1 - b1) E,   v = rows columns^T / mean(rows) of averaged E^2
        addition = m / (sqrt(v) + eps),  both moments corrected for their bias

    Beside ``inner=optax.scale_by_adam(b1, b2, eps)`` every part of the update has the
    size that Adam gives it: exact moments where the gradient's energy is, coarse ones
    where little is left.

    Args:
      b1: decay of the first moment; may be traced, like all of the numbers.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      bits: 1 to 8 bits a number of the first moment; 32 keeps the floats.
      nesterov: as in `optax.scale_by_adam`.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Raises:
      ValueError: for other numbers of bits.

    Cost: ``bits d m / 8 + 6 (d + m)`` bytes of state for each kernel; one
    more lift, ``2 d k m`` FLOPs, and two reductions over the residual.

    Reference: the factors are those of Adafactor, arXiv 1804.04235.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.scale_by_adam(), residual=dsbp_optax.residual_adam())
    """
    return _moments_of_residual(moments.quantized_adam(b1, b2, eps, bits, nesterov))


def _moments_of_residual(rule: Rule) -> Residual:
    """What a rule makes of ``E`` is added to the update."""

    def update(seen: Outside, held: PyTree) -> tuple[Contribution, PyTree]:
        addition, held = rule.update(seen.residual(), cast(Any, None), held)
        return Contribution(addition=addition), held

    return Residual(lambda matrix: rule.init(matrix, 0), update)


def pass_through(update: Array, coordinates: Array, energy: Array) -> Array:
    """The factor with which a whole gradient takes the place of a cold subspace.

        s = |u| / |P|

    1 without an inner optimizer; with one, the scale that it gives its input.
    """
    inside = squared_norm(coordinates)
    ratio = squared_norm(update) / jnp.where(inside > 0, inside, 1)
    return jnp.where((inside > 0) & jnp.isfinite(ratio), jnp.sqrt(ratio), 1)
