"""Layers that are an einsum of their input and their kernel."""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp

from dsbp_optax.capture.tap import LinearMap
from dsbp_optax.core.layout import Axes
from dsbp_optax.linalg.types import Array


@functools.lru_cache
def einsum_map(equation: str, parameter: str = "kernel") -> LinearMap | None:
    """How ``einsum(equation, x, kernel)`` acts through its kernel.

    Args:
      equation: of two operands, such as ``"BTD,NDH->BTNH"``.
      parameter: name of the kernel.

    Returns:
      A `LinearMap` that knows the kernel's axes; None where it is no sum over samples
      of outer products (indices that one operand alone is summed over).

    Example:
      >>> from dsbp_optax.capture import einsum_map
      >>> einsum_map("BTD,NDH->BTNH").axes
      Axes(inputs=(1,), outputs=(0, 2), batch=())
    """
    operands, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    x, _, kernel = operands.partition(",")
    batch = [c for c in kernel if c in x and c in result]
    inputs = [c for c in kernel if c in x and c not in result]
    outputs = [c for c in kernel if c not in x and c in result]
    samples = [c for c in x if c not in kernel]
    known = len({*batch, *inputs, *outputs}) == len(kernel) and inputs and outputs
    if not known or "." in kernel or any(c not in result for c in samples):
        return None
    wide = next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in operands)

    def write(*parts: list[str]) -> str:
        return "".join(itertools.chain(*parts)).replace(".", "...")

    form = f"{write([*x])},{write(batch, inputs)}{wide}->{write(batch, samples)}{wide}"
    natural = write(batch, samples, outputs)

    def apply(x: Array, kernel: Array) -> Array:
        found: Array = jnp.einsum(form, x, kernel)
        return found

    def arrange(y: Array) -> Array:
        found: Array = jnp.einsum(f"{write([*result])}->{natural}", y)
        return found

    sides = (tuple(map(kernel.index, group)) for group in (inputs, outputs, batch))
    same = write([*result]) == natural
    return LinearMap(
        apply, parameter=parameter, axes=Axes(*sides), arrange=None if same else arrange
    )
