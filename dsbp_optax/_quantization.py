"""Arrays of a few bits a number: uniform levels, a scale a row and one a column.

The levels are those of least error for a normal distribution of unit variance. Rows
are divided by their RMS; the scale of a column is that of least squared error.
`benchmarks/FINDINGS.md` tells what other scales gave.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dsbp_optax._types import Array

#: Bits -> width of a level in units of the standard deviation (Max, 1960).
STEPS: Mapping[int, float] = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.0308}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "rows"],
    meta_fields=["bits"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix in a few bits a number.

    Attributes:
      codes: ``(*batch, ceil(rows bits / 8), b)`` uint8; the bytes of a column hold its
        rows in ``8 / bits`` interleaved blocks.
      scale: ``(*batch, 1, b)``, what a unit of the levels stands for in a column.
      rows: ``(*batch, a, 1)``, RMS of each row.
      bits: 1, 2, 4 or 8.
    """

    codes: Array
    scale: Array
    rows: Array
    bits: int


def quantize(matrix: Array, bits: int) -> Quantized:
    """``(*batch, a, b)`` in `bits` a number.

    Args:
      matrix: what to encode.
      bits: 1, 2, 4 or 8.
    """
    levels, step = 2**bits, STEPS[bits]
    rows = _rms(matrix, -1)
    scaled = matrix / jnp.where(rows > 0, rows, 1)
    columns = _rms(scaled, -2)
    unit = scaled / jnp.where(columns > 0, columns, 1) / step
    index = jnp.clip(jnp.floor(unit) + levels // 2, 0, levels - 1)
    decoded = (index - (levels - 1) / 2) * step
    overlap = jnp.sum(scaled * decoded, axis=-2, keepdims=True)
    scale = overlap / jnp.sum(decoded * decoded, axis=-2, keepdims=True)
    codes = _pack(index.astype(jnp.uint8), bits)
    return Quantized(codes, scale * step, rows, bits)


def dequantize(held: Quantized) -> Array:
    """The matrix ``(*batch, a, b)``, in the dtype of the scale."""
    index = _unpack(held.codes, held.bits)[..., : held.rows.shape[-2], :]
    centre = (2**held.bits - 1) / 2
    levels: Array = index.astype(held.scale.dtype) - centre
    return levels * held.scale * held.rows


def empty(matrix: Array, bits: int) -> Quantized:
    """Zeros, shaped as `matrix`."""
    *shape, a, b = matrix.shape
    return Quantized(
        jnp.zeros((*shape, -(-a * bits // 8), b), jnp.uint8),
        jnp.zeros((*shape, 1, b), matrix.dtype),
        jnp.zeros((*shape, a, 1), matrix.dtype),
        bits,
    )


def _rms(matrix: Array, axis: int) -> Array:
    return jnp.sqrt(jnp.mean(matrix * matrix, axis=axis, keepdims=True))


def _pack(index: Array, bits: int) -> Array:
    count = 8 // bits
    rows = -(-index.shape[-2] // count)
    width = [(0, 0)] * index.ndim
    width[-2] = (0, rows * count - index.shape[-2])
    blocks = jnp.split(jnp.pad(index, width), count, axis=-2)
    shifted = [block << (bits * i) for i, block in enumerate(blocks)]
    packed: Array = functools.reduce(jnp.bitwise_or, shifted)
    return packed


def _unpack(codes: Array, bits: int) -> Array:
    mask = jnp.uint8(2**bits - 1)
    parts = [(codes >> (bits * i)) & mask for i in range(8 // bits)]
    return jnp.concatenate(parts, axis=-2)
