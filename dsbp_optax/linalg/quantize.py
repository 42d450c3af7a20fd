"""Arrays of a few bits a number: uniform levels, a scale a row and one a column.

The levels are those of least error for a normal distribution of unit variance. Rows
are divided by their RMS; the scale of a column is that of least squared error. Both
scales are kept in bfloat16, whose rounding is far below a level's width.
`benchmarks/FINDINGS.md` tells what other scales gave.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsbp_optax.linalg.types import Array

#: Bits -> width of a level in units of the standard deviation (Max, 1960).
STEPS: Mapping[int, float] = {
    1: 1.596,
    2: 0.9957,
    3: 0.5860,
    4: 0.3352,
    5: 0.1881,
    6: 0.1041,
    7: 0.05688,
    8: 0.0308,
}


class Quantized(NamedTuple):
    """A matrix in a few bits a number; how many, those who read it must know.

    Attributes:
      codes: uint8, a plane ``(*batch, a w / 8, b)`` for each w of 8, 4, 2 and 1 that
        the bits are a sum of; a byte holds neighbouring rows, so that rows which are
        split over devices stay where they are.
      scale: ``(*batch, 1, b)`` bfloat16, what a unit of the levels stands for in a
        column.
      rows: ``(*batch, a, 1)`` bfloat16, RMS of each row.
    """

    codes: tuple[Array, ...]
    scale: Array
    rows: Array


def quantize(matrix: Array, bits: int) -> Quantized:
    """``(*batch, a, b)`` in `bits` a number.

    Args:
      matrix: what to encode.
      bits: a key of `STEPS`.
    """
    levels, step = 2**bits, STEPS[bits]
    rows = _rms(matrix, -1).astype(jnp.bfloat16)
    scaled = matrix / jnp.where(rows > 0, rows, 1).astype(matrix.dtype)
    columns = _rms(scaled, -2)
    unit = scaled / jnp.where(columns > 0, columns, 1) / step
    index = jnp.clip(jnp.floor(unit) + levels // 2, 0, levels - 1)
    decoded = (index - (levels - 1) / 2) * step
    overlap = jnp.sum(scaled * decoded, axis=-2, keepdims=True)
    scale = overlap / jnp.sum(decoded * decoded, axis=-2, keepdims=True)
    codes = _pack(index.astype(jnp.uint8), bits)
    return Quantized(codes, (scale * step).astype(jnp.bfloat16), rows)


def dequantize(held: Quantized, bits: int) -> Array:
    """The matrix ``(*batch, a, b)``, float32.

    Args:
      held: what `quantize` made.
      bits: as there.
    """
    index = _unpack(held.codes, held.rows.shape[-2], bits)
    centre = (2**bits - 1) / 2
    levels = index.astype(jnp.float32) - centre
    scaled: Array = levels * held.scale.astype(jnp.float32)
    return scaled * held.rows.astype(jnp.float32)


def empty(matrix: Array, bits: int) -> Quantized:
    """Zeros, shaped as `matrix`."""
    *shape, a, b = matrix.shape
    return Quantized(
        _pack(jnp.zeros(matrix.shape, jnp.uint8), bits),
        jnp.zeros((*shape, 1, b), jnp.bfloat16),
        jnp.zeros((*shape, a, 1), jnp.bfloat16),
    )


def _rms(matrix: Array, axis: int) -> Array:
    return jnp.sqrt(jnp.mean(matrix * matrix, axis=axis, keepdims=True))


def _planes(bits: int) -> list[tuple[int, int]]:
    """Width and lowest bit of each plane that divides a byte."""
    found, lowest = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, lowest))
            lowest += width
    return found


def _pack(index: Array, bits: int) -> tuple[Array, ...]:
    """``(*batch, a, b)`` codes below ``2^bits`` in bytes, plane by plane."""
    *batch, a, b = index.shape
    packed = []
    for width, lowest in _planes(bits):
        plane = (index >> lowest) & jnp.uint8(2**width - 1)
        rows, places = -(-a // (8 // width)), _places(width, len(batch) + 3)
        padding = [*[(0, 0)] * len(batch), (0, rows * places.size - a), (0, 0)]
        blocks = jnp.pad(plane, padding).reshape(*batch, rows, places.size, b)
        packed.append(jnp.sum(blocks << places, axis=-2, dtype=jnp.uint8))
    return tuple(packed)


def _unpack(codes: tuple[Array, ...], rows: int, bits: int) -> Array:
    """The inverse of `_pack` for a matrix of so many rows."""
    index = jnp.zeros((), jnp.uint8)
    for plane, (width, lowest) in zip(codes, _planes(bits), strict=True):
        *batch, _, b = plane.shape
        wide = plane[..., None, :]
        parts = (wide >> _places(width, wide.ndim)) & jnp.uint8(2**width - 1)
        index = index | (parts.reshape(*batch, -1, b)[..., :rows, :] << lowest)
    return index


def _places(width: int, rank: int) -> np.ndarray:
    """``(..., 8 / width, 1)``: the lowest bit of each of the rows in a byte."""
    places = np.arange(0, 8, width, dtype=np.uint8)
    return places.reshape(*[1] * (rank - 2), -1, 1)
