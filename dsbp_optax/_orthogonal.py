"""Orthogonalised updates: the nearest semi-orthogonal matrix, by Newton-Schulz.

Works on either orientation of a matrix, of the whole kernel or of the coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax._types import Array, PyTree, compute_dtype

#: (matrix (*batch, a, b), fan in, fan out) -> matrix of the same shape
Direction: TypeAlias = Callable[[Array, int, int], Array]
Scale: TypeAlias = Literal["muon", "adam"]

#: Of the quintic that takes singular values into about [0.7, 1.2] in five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)
#: RMS of a typical update of Adam.
_ADAM_RMS = 0.2


def newton_schulz(matrix: Array, steps: int = 5) -> Array:
    """``U W^T`` of ``M = U S W^T``, singular values within about [0.7, 1.2].

    Args:
      matrix: ``(*batch, a, b)``.
      steps: of the iteration.

    Returns:
      Shaped as `matrix` and of its dtype, computed in float32 at least; zero for a
      zero matrix.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.astype(compute_dtype(matrix.dtype))
    x = jnp.swapaxes(x, -1, -2) if tall else x
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = jnp.einsum("...ij,...kj->...ik", x, x)
        x = a * x + jnp.matmul(b * gram + c * jnp.matmul(gram, gram), x)
    return (jnp.swapaxes(x, -1, -2) if tall else x).astype(matrix.dtype)


def orthogonalize(steps: int = 5, scale: Scale = "muon") -> Direction:
    """The update of each kernel made semi-orthogonal, as Muon does.

    Args:
      steps: of the Newton-Schulz iteration.
      scale: "muon" multiplies by ``sqrt(max(1, fan out / fan in))``, so that the
        learning rate is that of `optax.contrib.muon`; "adam" gives each entry an RMS
        of 0.2, so that it is that of `optax.adamw`.

    Returns:
      ``(matrix, fan in, fan out) -> matrix``, for
      ``scale_by_spectral_projection(direction=...)``.

    Raises:
      ValueError: for an unknown scale, or steps below 1.

    Cost: ``steps`` times ``2 s^2 (2 l + s)`` FLOPs for an ``s x l`` matrix, s the
    smaller side; no state.

    Reference: Jordan et al., Muon (2024); the RMS of Adam: Liu et al., 2502.16982.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.trace(0.95), residual=dsbp_optax.scale_residual(1.0),
      ...     direction=dsbp_optax.orthogonalize())
    """
    if scale not in ("muon", "adam"):
        raise ValueError(f"scale: got {scale!r}, expected 'muon' or 'adam'.")
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1.")

    def direction(matrix: Array, fan_in: int, fan_out: int) -> Array:
        factor = math.sqrt(max(1.0, fan_out / fan_in))
        if scale == "adam":
            factor = _ADAM_RMS * math.sqrt(max(fan_in, fan_out))
        return factor * newton_schulz(matrix, steps)

    return direction


def scale_by_orthogonalization(steps: int = 5) -> optax.GradientTransformation:
    """Orthogonalises every matrix of a tree: Muon's step without its momentum.

    As part of an ``inner`` it acts on the ``k x m`` coordinates alone, at ``k / d`` of
    the cost on the whole kernel.

    Args:
      steps: of the Newton-Schulz iteration.

    Returns:
      A transformation without state. Leaves of fewer than two axes are divided by
      their RMS; leading axes of larger ones are stacked matrices.

    Cost: see `orthogonalize`.

    Example:
      >>> import optax, dsbp_optax
      >>> inner = optax.chain(
      ...     optax.trace(0.95), dsbp_optax.scale_by_orthogonalization())
      >>> tx = dsbp_optax.scale_by_spectral_projection(inner, rank=8)
    """

    def one(update: Array) -> Array:
        if jnp.ndim(update) >= 2:
            return newton_schulz(update, steps)
        wide = update.astype(compute_dtype(update.dtype))
        rms = jnp.sqrt(jnp.mean(wide * wide))
        return (wide / jnp.where(rms > 0, rms, 1)).astype(update.dtype)

    def update_fn(updates: PyTree, params: PyTree | None = None) -> PyTree:
        del params
        return jax.tree.map(one, updates)

    return optax.stateless(update_fn)
