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
      feedback: state -> matrix added to the gradient before its projection, or None.
      stateless: whether a cold layer may pass its gradient through in place of it.
    """

    init: Callable[[Array], PyTree]
    update: Callable[[Outside, PyTree], tuple[Contribution, PyTree]]
    feedback: Callable[[PyTree], Array] | None = None
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


def scale_residual_by_column(growth: Scalar = 1.01) -> Residual:
    """The residual, each column scaled as the subspace update was, growth limited.

        s_j = |u_j| / |P_j|

    Scales each column of the residual as the inner optimizer scaled that column's
    coordinates; the norm of the result grows by at most `growth` a step.

    Args:
      growth: largest ratio of the residual's norms in consecutive steps; may be
        traced.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Cost: one number of state and one reduction over the gradient for each kernel.

    Reference: Fira, arXiv 2410.01623.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.scale_by_adam(), residual=dsbp_optax.scale_residual_by_column())
    """

    def update(seen: Outside, last: Array) -> tuple[Contribution, Array]:
        rows = -1 if seen.flipped else -2

        def energies(matrix: Array) -> Array:
            return jnp.sum(matrix * matrix, axis=rows, keepdims=True)

        inside, whole = energies(seen.coordinates), energies(seen.matrix)
        ratio = energies(seen.update) / jnp.where(inside > 0, inside, 1)
        factor = jnp.sqrt(jnp.where(inside > 0, ratio, 0))
        outside = jnp.maximum(whole - inside, 0) * factor**2
        norm = jnp.sqrt(jnp.sum(outside, axis=(-2, -1), keepdims=True))
        bound = jnp.where(last > 0, growth * last, norm)
        limited = jnp.minimum(norm, bound)
        factor = factor * limited / jnp.where(norm > 0, norm, 1)
        return Contribution(factor), limited

    return Residual(lambda matrix: squared_norm(matrix), update)


def sign_residual(fraction: Scalar = 0.5) -> Residual:
    """The sign of the residual, at `fraction` of the subspace update's RMS.

    Args:
      fraction: RMS of the residual's part, as a share of the lifted update's; may be
        traced.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Cost: one more lift, ``2 d k m`` FLOPs; no state.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.scale_by_adam(), residual=dsbp_optax.sign_residual(0.5))
    """

    def update(seen: Outside, state: PyTree) -> tuple[Contribution, PyTree]:
        size = seen.matrix.shape[-1] * seen.matrix.shape[-2]
        rms = jnp.sqrt(squared_norm(seen.update) / size)
        share = jnp.asarray(fraction, rms.dtype)
        return Contribution(addition=share * rms * jnp.sign(seen.residual())), state

    return Residual(lambda matrix: (), update)


def error_feedback() -> Residual:
    """What a step left out is added to the gradient of the next, before projection.

        G <- G + e,   e <- G - V V^T G

    Nothing is lost, it comes late: once the basis turns towards it.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Cost: ``d m`` numbers of state for each kernel, which undoes the saving.

    Reference: LDAdam, arXiv 2410.16103.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.scale_by_adam(), residual=dsbp_optax.error_feedback())
    """

    def update(seen: Outside, state: PyTree) -> tuple[Contribution, PyTree]:
        del state
        return Contribution(), seen.residual()

    return Residual(lambda matrix: matrix, update, lambda state: state)


def pass_through(update: Array, coordinates: Array, energy: Array) -> Array:
    """The factor with which a whole gradient takes the place of a cold subspace.

        s = |u| / |P|

    1 without an inner optimizer; with one, the scale that it gives its input.
    """
    inside = squared_norm(coordinates)
    ratio = squared_norm(update) / jnp.where(inside > 0, inside, 1)
    return jnp.where((inside > 0) & jnp.isfinite(ratio), jnp.sqrt(ratio), 1)
