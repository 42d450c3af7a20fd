"""What becomes of the update of a kernel as a matrix."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.linalg.newton_schulz import newton_schulz
from dsbp_optax.linalg.types import Array, Direction, PyTree, compute_dtype

Scale: TypeAlias = Literal["muon", "adam"]

#: RMS of a typical update of Adam.
_ADAM_RMS = 0.2


def orthogonalize(
    steps: int = 5, scale: Scale = "muon", dtype: Any = None
) -> Direction:
    """The update of each kernel made semi-orthogonal, as Muon does.

    Args:
      steps: of the Newton-Schulz iteration.
      scale: "muon" multiplies by ``sqrt(max(1, fan out / fan in))``, so that the
        learning rate is that of `optax.contrib.muon`; "adam" gives each entry an RMS
        of 0.2, so that it is that of `optax.adamw`.
      dtype: of the iteration, such as "bfloat16"; None is float32 at least.

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
        return factor * newton_schulz(matrix, steps, dtype)

    return direction


def scale_by_orthogonalization(steps: int = 5) -> optax.GradientTransformation:
    """Orthogonalise every matrix of a tree: Muon's step without its momentum.

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
