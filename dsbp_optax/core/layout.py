"""How the axes of a parameter form matrices: the only place that reshapes kernels.

A kernel of any number of axes is read as ``(n, d, m)`` matrices: `rows` are the
axes of the side that carries the basis, `columns` those of the other side, `batch`
those along which independent kernels are stacked; there is one matrix without any.

What an adapter carries beside a kernel has the *kernel form*: the kernel's axes in the
kernel's order plus one trailing axis, of length 1 along every axis that the array does
not depend on. A Dense kernel ``(784, 512)`` has an input basis ``(784, 1, k)``, a
scanned one ``(L, 784, 512)`` has ``(L, 784, 1, k)``: it is scanned, stacked and sharded
along whatever axes it shares with its kernel.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dsbp_optax.linalg.types import Array, Side

Shape: TypeAlias = tuple[int, ...]


class Axes(NamedTuple):
    """Which axes of a kernel face the layer's input and which its output.

    Attributes:
      inputs: axes summed over in ``y = x W``.
      outputs: axes that appear in the layer's output.
      batch: axes along which independent kernels are stacked (scanned layers,
        experts); absent for an ordinary kernel.

    Example:
      >>> from dsbp_optax import Axes
      >>> Axes(inputs=(0,), outputs=(1, 2))   # attention query (embed, heads, depth)
      Axes(inputs=(0,), outputs=(1, 2), batch=())
    """

    inputs: Shape
    outputs: Shape
    batch: Shape = ()


AxesRule: TypeAlias = Mapping[str, Axes] | Callable[[str, Shape], Axes | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The gradient of a kernel in the basis of an optimizer state, ``V^T G``.

    Takes the kernel's place in a tree of gradients. Such trees add up and scale like
    those of whole gradients, as long as the state, hence the basis, is the same; made
    by `dsbp_optax.project_gradients`, consumed by ``update``.

    Attributes:
      values: float32, kernel form: the kernel's axes with length 1 in the place of
        those that face the layer's input, and one trailing axis of length k. A Dense
        kernel ``(d, m)`` has ``(1, m, k)``.
    """

    values: Array

    @property
    def dtype(self) -> Any:
        """The dtype of the coordinates, and of the update that comes from them."""
        return self.values.dtype


class MatrixView(NamedTuple):
    """One kernel read as ``(n, d, m)`` matrices.

    Attributes:
      shape: of the kernel.
      batch: stacking axes.
      rows: axes of the side that carries the basis.
      columns: axes of the other side.
    """

    shape: Shape
    batch: Shape
    rows: Shape
    columns: Shape

    @property
    def batch_shape(self) -> Shape:
        """Lengths of the stacking axes."""
        return _lengths(self.shape, self.batch)

    @property
    def order(self) -> Shape:
        """The kernel's axes as the matrices have them."""
        return self.batch + self.rows + self.columns

    @property
    def matrices(self) -> int:
        """How many matrices there are."""
        return math.prod(self.batch_shape)

    @property
    def size(self) -> int:
        """``d``, the length of the side that carries the basis."""
        return math.prod(_lengths(self.shape, self.rows))

    @property
    def other(self) -> int:
        """``m``, the length of the other side."""
        return math.prod(_lengths(self.shape, self.columns))

    def form(self, rows: bool, width: int) -> Shape:
        """The kernel form of ``(n, d, width)``, or without `rows` of a number."""
        kept = self.batch + (self.rows if rows else ())
        lengths = tuple(n if a in kept else 1 for a, n in enumerate(self.shape))
        return (*lengths, width)

    def coordinate_form(self, rank: int) -> Shape:
        """The kernel form of coordinates ``(n, k, m)``."""
        lengths = (1 if a in self.rows else n for a, n in enumerate(self.shape))
        return (*lengths, rank)


def matrix_view(shape: Shape, axes: Axes, side: Side) -> MatrixView:
    """The view of a kernel of `shape` whose rows are the given side."""
    if side == "input":
        return MatrixView(shape, axes.batch, axes.inputs, axes.outputs)
    return MatrixView(shape, axes.batch, axes.outputs, axes.inputs)


def to_matrices(kernels: Array, view: MatrixView) -> Array:
    """``(j, *kernel) -> (j n, d, m)``, for j kernels that are read alike."""
    order = (0, *(axis + 1 for axis in view.order))
    return kernels.transpose(order).reshape(-1, view.size, view.other)


def from_matrices(matrices: Array, view: MatrixView) -> Array:
    """The inverse of `to_matrices`."""
    split = matrices.reshape(-1, *_lengths(view.shape, view.order))
    return split.transpose(0, *(axis + 1 for axis in _inverse(view.order)))


def to_kernel_form(array: Array, view: MatrixView) -> Array:
    """``(n, d or 1, c) -> kernel form``, see the module's docstring."""
    rows = _lengths(view.shape, view.rows)
    if array.shape[-2] != view.size:
        rows = (1,) * len(rows)
    ones = (1,) * len(view.columns)
    split = array.reshape(*view.batch_shape, *rows, *ones, array.shape[-1])
    return split.transpose(*_inverse(view.order), len(view.shape))


def from_kernel_form(array: Array, view: MatrixView) -> Array:
    """``kernel form -> (n, d or 1, c)``, the inverse of `to_kernel_form`."""
    ordered = array.transpose(*view.order, len(view.shape))
    return ordered.reshape(view.matrices, -1, array.shape[-1])


def to_coordinates(values: Array, view: MatrixView) -> Array:
    """``kernel form -> (n, k, m)``."""
    order = (*view.batch, *view.columns, *view.rows, len(view.shape))
    ordered = values.transpose(order).reshape(
        view.matrices, view.other, values.shape[-1]
    )
    return jnp.swapaxes(ordered, -1, -2)


def from_coordinates(coordinates: Array, view: MatrixView) -> Array:
    """The inverse of `to_coordinates`."""
    ordered = jnp.swapaxes(coordinates, -1, -2)
    order = (*view.batch, *view.columns, *view.rows)
    columns, ones = _lengths(view.shape, view.columns), (1,) * len(view.rows)
    split = ordered.reshape(*view.batch_shape, *columns, *ones, ordered.shape[-1])
    return split.transpose(*_inverse(order), len(order))


def check_axes(path: str, shape: Shape, axes: Any) -> Axes:
    """`axes` with non-negative entries, each axis named once, or an error."""
    ndim = len(shape)
    try:
        groups = [tuple(map(operator.index, group)) for group in Axes(*axes)]
    except TypeError:
        groups = []
    groups = [tuple(a + ndim if a < 0 else a for a in group) for group in groups]
    named = sorted(a for group in groups for a in group)
    if named != list(range(ndim)) or not groups[0] or not groups[1]:
        raise ValueError(
            f"axes of '{path}': got {axes} for shape {shape}, expected tuples that "
            f"name every axis 0..{ndim - 1} exactly once, with at least one input and "
            "one output. Remedy: dsbp_optax.Axes(inputs=(...), outputs=(...), "
            "batch=(...))."
        )
    inputs, outputs, batch = (tuple(sorted(group)) for group in groups)
    return Axes(inputs, outputs, batch)


def in_words(view: MatrixView) -> str:
    """How the axes of a kernel were read."""
    pair = f"{view.size} x {view.other}"
    if not view.batch:
        return f"one {pair} matrix"
    return f"{view.matrices} stacked {pair} matrices"


def entry(axes: Axes) -> str:
    """What a user writes for these axes."""
    batch = f", batch={axes.batch}" if axes.batch else ""
    return f"dsbp_optax.Axes(inputs={axes.inputs}, outputs={axes.outputs}{batch})"


def _lengths(shape: Shape, axes: Sequence[int]) -> Shape:
    return tuple(shape[a] for a in axes)


def _inverse(order: Sequence[int]) -> Shape:
    return tuple(sorted(range(len(order)), key=lambda i: order[i]))
