"""Convolution as a sum of shifted matrix products, for sketches.

    y = sum_o  x[shifted by o] K[o]

The same numbers as `jax.lax.conv_general_dilated`, without unfolding patches. Its
transpose with respect to the kernel is again a sum of matrix products, which matters
on CPU: there XLA runs the transposed convolution inside a conditional some sixty times
slower than outside of it.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_optax.linalg.types import Array


def shifted_convolution(
    x: Array,
    kernel: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    precision: Any = None,
    **_: Any,
) -> Array:
    """Convolve, channels last, without groups.

    Args:
      x: ``(n, *space, c)``.
      kernel: ``(*window, c, w)``.
      window_strides: one for each spatial axis.
      padding: "SAME", "VALID" or pairs, as `jax.lax.conv_general_dilated` takes it.
      lhs_dilation: of the input, one for each spatial axis.
      rhs_dilation: of the kernel, likewise.
      dimension_numbers: ignored: the layers of Flax have their channels last.
      precision: of the products.
      **_: further keywords of `jax.lax.conv_general_dilated`.

    Returns:
      ``(n, *space', w)``.

    Cost: that of the convolution; one slice of the input for each window position.
    """
    del dimension_numbers
    window, space = kernel.shape[:-2], x.shape[1:-1]
    ones = (1,) * len(window)
    stretch, spread = lhs_dilation or ones, rhs_dilation or ones
    reach = [(k - 1) * s + 1 for k, s in zip(window, spread, strict=True)]
    if isinstance(padding, str):
        long = [(n - 1) * s + 1 for n, s in zip(space, stretch, strict=True)]
        padding = jax.lax.padtype_to_pads(long, reach, window_strides, padding)
    edges = [(*p, s - 1) for p, s in zip(padding, stretch, strict=True)]
    x = jax.lax.pad(x, jnp.zeros([], x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    lengths = [
        (n - r) // s + 1
        for n, r, s in zip(x.shape[1:-1], reach, window_strides, strict=True)
    ]
    products = []
    for offset in itertools.product(*map(range, window)):
        start = [o * s for o, s in zip(offset, spread, strict=True)]
        stop = [
            a + (n - 1) * s + 1
            for a, n, s in zip(start, lengths, window_strides, strict=True)
        ]
        shifted = jax.lax.slice(
            x,
            (0, *start, 0),
            (x.shape[0], *stop, x.shape[-1]),
            (1, *window_strides, 1),
        )
        products.append(jnp.matmul(shifted, kernel[offset], precision=precision))
    return sum(products[1:], products[0])
