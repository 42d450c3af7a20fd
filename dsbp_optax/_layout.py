"""Where a parameter is in the tree, and how its axes form matrices.

The only place that reshapes parameters. A kernel of any number of axes is read as
``(*batch, d, m)`` matrices: `rows` are the axes of the side that carries the basis,
`columns` those of the other side, `batch` those along which kernels are stacked.

Arrays kept in the optimizer state have the *kernel form*: the kernel's axes in the
kernel's order plus one trailing axis, and length 1 along every axis that the array
does not depend on. A Dense kernel ``(784, 512)`` has an input basis
``(784, 1, k)``; a scanned one ``(L, 784, 512)`` has ``(L, 784, 1, k)``. The shape
alone tells side and stacking, and the array is sharded, scanned and stacked along
whatever axes it shares with its kernel.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from dsbp_optax._types import Array, PyTree, Side

T = TypeVar("T")
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


#: Per-path choice: one value, a mapping from glob pattern to value, or a callable.
PerPath: TypeAlias = T | Mapping[str, T] | Callable[[str, Shape], T]
AxesRule: TypeAlias = Mapping[str, Axes] | Callable[[str, Shape], Axes | None]


class MatrixView(NamedTuple):
    """One kernel read as matrices: ``(*batch, d, m)``, or flipped ``(*batch, m, d)``.

    Which of the two is the kernel's own order, so that reading it moves no data.
    """

    shape: Shape
    batch: Shape
    rows: Shape
    columns: Shape

    @property
    def batch_shape(self) -> Shape:
        return _lengths(self.shape, self.batch)

    @property
    def flipped(self) -> bool:
        """Whether the columns come before the rows, if there are any, in the kernel."""
        return self.columns[:1] < self.rows[:1]

    @property
    def order(self) -> Shape:
        """The kernel's axes as the matrices have them."""
        if self.flipped:
            return self.batch + self.columns + self.rows
        return self.batch + self.rows + self.columns

    @property
    def matrix_shape(self) -> Shape:
        return (self.other, self.size) if self.flipped else (self.size, self.other)

    def coordinate_shape(self, rank: int) -> Shape:
        """``(*batch, k, m)``, or flipped ``(*batch, m, k)``."""
        pair = (self.other, rank) if self.flipped else (rank, self.other)
        return (*self.batch_shape, *pair)

    @property
    def size(self) -> int:
        """``d``, the length of the side that carries the basis."""
        return math.prod(_lengths(self.shape, self.rows))

    @property
    def other(self) -> int:
        """``m``, the length of the other side."""
        return math.prod(_lengths(self.shape, self.columns))


def matrix_view(shape: Shape, axes: Axes, side: Side) -> MatrixView:
    """The view of a kernel of `shape` whose rows are the given side."""
    if side == "input":
        return MatrixView(shape, axes.batch, axes.inputs, axes.outputs)
    return MatrixView(shape, axes.batch, axes.outputs, axes.inputs)


def view_of(shape: Shape, form: Shape, stacked: Shape) -> MatrixView:
    """The view that arrays in kernel form betray; axes of length 1 count as stacked.

    Args:
      shape: of the kernel.
      form: of its basis, in kernel form.
      stacked: of one number a matrix, in kernel form.
    """
    axes = range(len(shape))
    rows = [a for a in axes if form[a] > stacked[a]]
    columns = [a for a in axes if form[a] == 1 and shape[a] > 1]
    if not columns:  # One column: the last axis that can be it.
        columns = [max(a for a in axes if shape[a] == 1)]
    if not rows:  # One row, likewise.
        rows = [max(a for a in axes if shape[a] == 1 and a not in columns)]
    batch = tuple(a for a in axes if a not in rows and a not in columns)
    return MatrixView(shape, batch, tuple(rows), tuple(columns))


def to_matrices(kernel: Array, view: MatrixView) -> Array:
    """``kernel -> (*batch, d, m)``, flipped ``(*batch, m, d)``."""
    return kernel.transpose(view.order).reshape(*view.batch_shape, *view.matrix_shape)


def from_matrices(matrices: Array, view: MatrixView) -> Array:
    """The inverse of `to_matrices`."""
    split = matrices.reshape(_lengths(view.shape, view.order))
    return split.transpose(_inverse(view.order))


def to_kernel_form(array: Array, view: MatrixView) -> Array:
    """``(*batch, d or 1, c) -> kernel form``, see the module's docstring."""
    rows = _lengths(view.shape, view.rows)
    if array.shape[-2] != view.size:
        rows = (1,) * len(rows)
    ones = (1,) * len(view.columns)
    order = view.batch + view.rows + view.columns
    split = array.reshape(*view.batch_shape, *rows, *ones, array.shape[-1])
    return split.transpose(*_inverse(order), len(order))


def to_coordinates(values: Array, view: MatrixView) -> Array:
    """``kernel form -> (*batch, k, m)``, flipped ``(*batch, m, k)``."""
    order = (*view.batch, *view.columns, *view.rows, len(view.shape))
    rank = values.shape[-1]
    ordered = values.transpose(order).reshape(*view.batch_shape, view.other, rank)
    return ordered if view.flipped else jnp.swapaxes(ordered, -1, -2)


def from_coordinates(coordinates: Array, view: MatrixView) -> Array:
    """The inverse of `to_coordinates`."""
    ordered = coordinates if view.flipped else jnp.swapaxes(coordinates, -1, -2)
    order = (*view.batch, *view.columns, *view.rows)
    columns, ones = _lengths(view.shape, view.columns), (1,) * len(view.rows)
    split = ordered.reshape(*view.batch_shape, *columns, *ones, ordered.shape[-1])
    return split.transpose(*_inverse(order), len(order))


def from_kernel_form(array: Array, view: MatrixView) -> Array:
    """``kernel form -> (*batch, d or 1, c)``, the inverse of `to_kernel_form`."""
    order = view.batch + view.rows + view.columns
    ordered = array.transpose(*order, len(order))
    return ordered.reshape(*view.batch_shape, -1, array.shape[-1])


def flatten_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Any], Any]:
    """A flat dict path -> leaf, in tree order, and the tree's structure.

    `Coordinates` are leaves: they stand for an array.
    """

    def is_one(node: Any) -> bool:
        return isinstance(node, Coordinates) or bool(is_leaf and is_leaf(node))

    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_one)
    return {path_string(keys): leaf for keys, leaf in leaves}, treedef


def kernel_shape(path: str, leaf: Any, basis: Any) -> Shape:
    """The shape of the kernel whose gradient `leaf` is, or stands for."""
    if not isinstance(leaf, Coordinates):
        return jnp.shape(leaf)
    form, got = basis.shape[:-1], leaf.values.shape
    pairs = list(zip(form, got, strict=False))
    fits = all(d == n or 1 in (d, n) for d, n in pairs)
    if len(got) != basis.ndim or got[-1] != basis.shape[-1] or not fits:
        raise ValueError(
            f"the coordinates of '{path}' have shape {got}, which does not fit the "
            f"state's basis {basis.shape}. Remedy: take them with project_gradients "
            "from the state that update is given."
        )
    return tuple(d if n == 1 else n for d, n in pairs)


def path_string(keys: Sequence[Any]) -> str:
    """``"Dense_0/kernel"``; the box around a Linen or NNX value leaves no trace."""
    if keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return "/".join(_key_string(key) for key in keys)


def resolve(choice: PerPath[T], path: str, shape: Shape, default: T) -> T:
    """What a per-path choice says of one parameter: the first pattern that matches."""
    if callable(choice):
        return choice(path, shape)
    if isinstance(choice, Mapping):
        return next((v for k, v in choice.items() if matches(path, k)), default)
    return choice


def matches(path: str, pattern: str) -> bool:
    """Whether a glob `pattern` ("*/query/kernel") covers `path`."""
    return fnmatch.fnmatchcase(path, pattern)


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
    pair = f"{view.matrix_shape[0]} x {view.matrix_shape[1]}"
    if not view.batch:
        return f"one {pair} matrix"
    return f"{math.prod(view.batch_shape)} stacked {pair} matrices"


def entry(axes: Axes) -> str:
    """What a user writes for these axes."""
    batch = f", batch={axes.batch}" if axes.batch else ""
    return f"dsbp_optax.Axes(inputs={axes.inputs}, outputs={axes.outputs}{batch})"


def _key_string(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
    return str(key)


def _lengths(shape: Shape, axes: Sequence[int]) -> Shape:
    return tuple(shape[a] for a in axes)


def _inverse(order: Sequence[int]) -> Shape:
    return tuple(sorted(range(len(order)), key=lambda i: order[i]))


def kernel_form_shape(view: MatrixView, rows: bool, width: int) -> Shape:
    """The shape that `to_kernel_form` gives, without an array."""
    kept = view.batch + (view.rows if rows else ())
    lengths = tuple(n if a in kept else 1 for a, n in enumerate(view.shape))
    return (*lengths, width)


def astype(array: Any, dtype: Any) -> Array:
    """`array` as a jax array of `dtype`."""
    return jnp.asarray(array).astype(dtype)
