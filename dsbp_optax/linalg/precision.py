"""Storage in half precision without losing small changes."""

from typing import Any

import jax
import jax.numpy as jnp

from dsbp_optax.linalg.types import Array


def store(values: Array, dtype: Any, key: Array) -> Array:
    """`values` in `dtype`, rounded stochastically to bfloat16, else to nearest.

    Stochastic rounding is unbiased: an average whose steps are below half a unit in
    the last place moves on the mean, where rounding to nearest would stand still.

    Args:
      values: float32 or wider.
      dtype: to store them in.
      key: a random key of this step and array.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return values.astype(dtype)
    exact = values.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(exact, jnp.uint32)
    noise = jax.random.bits(key, exact.shape, jnp.uint16).astype(jnp.uint32)
    raised = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(raised, jnp.float32)
    rounded = jnp.where(jnp.isfinite(rounded), rounded, exact)
    return rounded.astype(jnp.bfloat16)
