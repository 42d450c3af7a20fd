"""The nearest semi-orthogonal matrix, by Newton-Schulz."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsbp_optax.linalg.types import Array, compute_dtype

#: Of the quintic that takes singular values into about [0.7, 1.2] in five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrix: Array, steps: int = 5, dtype: Any = None) -> Array:
    """``U W^T`` of ``M = U S W^T``, singular values within about [0.7, 1.2].

    Its products have the default precision of the hardware: an error is no larger than
    what the iteration leaves.

    Args:
      matrix: ``(*batch, a, b)``.
      steps: of the iteration.
      dtype: of the iteration; None is that of `matrix`, float32 at least.

    Returns:
      Shaped as `matrix` and of its dtype; zero for a zero matrix.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.astype(compute_dtype(matrix.dtype))
    x = jnp.swapaxes(x, -1, -2) if tall else x
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1)
    x = jax.lax.fori_loop(0, steps, _step, x if dtype is None else x.astype(dtype))
    return (jnp.swapaxes(x, -1, -2) if tall else x).astype(matrix.dtype)


def _step(_: int, x: Array) -> Array:
    a, b, c = _QUINTIC
    gram = jnp.einsum("...ij,...kj->...ik", x, x)
    return a * x + jnp.matmul(b * gram + c * jnp.matmul(gram, gram), x)
