"""Arrays on meshes whose axes are explicit: results lie where what they replace lay.

There a product over a sharded axis is ambiguous: what this package computes runs with
automatic axes, its results in the places of what they replace. Inside of a
`jax.shard_map` types say over which axes values differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsbp_optax.core import paths
from dsbp_optax.core.layout import Coordinates, Shape
from dsbp_optax.linalg.types import Array, PyTree

T = TypeVar("T")


def in_place(function: Callable[..., T], likes: PyTree, *args: Any) -> T:
    """``function(*args)``, its results sharded like `likes` on an explicit mesh.

    Args:
      function: of arrays; closes over none.
      likes: a tree of arrays, or of their shardings, shaped as the results.
      *args: trees of arrays.
    """
    mesh, axes = _explicit((likes, args))
    if not axes:
        return function(*args)

    def place(like: Any) -> NamedSharding:
        found = like if isinstance(like, NamedSharding) else jax.typeof(like).sharding
        # What was made outside of the mesh lies on none.
        return found if found.mesh.axis_names else NamedSharding(mesh, PartitionSpec())

    automatic: Callable[..., T] = jax.sharding.auto_axes(
        function, axes=axes, out_sharding=jax.tree.map(place, likes)
    )
    return automatic(*args)


def leading(array: Array, kept: int, length: int) -> NamedSharding:
    """That of the first `kept` axes of `array`, for an array of `length` axes."""
    place = jax.typeof(array).sharding
    spec = padded(place.spec, array.ndim)[:kept]
    return NamedSharding(place.mesh, PartitionSpec(*padded(spec, length)))


def of_coordinates(samples: Array, outputs: Array, batch: int) -> NamedSharding:
    """For ``V^T G (*batch, *outputs, k)``: along the stack and the layer's outputs.

    Args:
      samples: ``A V (*batch, *samples, k)``.
      outputs: cotangent ``(*batch, *samples, *outputs)`` of what the layer gave.
      batch: leading stacked axes.
    """
    place = jax.typeof(outputs).sharding
    spec = padded(place.spec, outputs.ndim)
    kept = (*spec[:batch], *spec[samples.ndim - 1 :], None)
    return NamedSharding(place.mesh, PartitionSpec(*kept))


def beside(kernel: Any, shape: Shape) -> NamedSharding | None:
    """For an array in kernel form, where the kernel lies on an explicit mesh."""
    if not _explicit(kernel)[1]:
        return None
    place, own = jax.typeof(kernel).sharding, tuple(jnp.shape(kernel))
    pairs = zip(shape[:-1], own, padded(place.spec, len(own)), strict=True)
    spec = (*(s if n == d and n > 1 else None for n, d, s in pairs), None)
    return NamedSharding(place.mesh, PartitionSpec(*spec))


def vary_like(tree: T, like: Array) -> T:
    """`tree`, its values alike, but told apart by the axes of a `jax.shard_map` that
    `like` is told apart by: its cotangents are summed over these.
    """

    def one(x: Array) -> Array:
        axes = tuple(sorted(_varying(like) - _varying(x)))
        if not axes:
            return x
        cast: Any = getattr(jax.lax, "pvary", None)  # of older versions
        if cast is None:
            cast = functools.partial(jax.lax.pcast, to="varying")
        varying: Array = cast(x, axes)
        return varying

    found: T = jax.tree.map(one, tree)
    return found


def _varying(x: Array) -> frozenset[str]:
    """Names of the axes; none where `jax.shard_map` does not keep track of them."""
    kind = jax.typeof(x)
    kept = getattr(kind, "manual_axis_type", None)  # of newer versions
    return frozenset(kept.varying if kept is not None else getattr(kind, "vma", ()))


def put(array: Array, place: NamedSharding | None) -> Array:
    """`array` there, as its type on an explicit mesh says; None leaves it."""
    moved: Array = array if place is None else jax.sharding.reshard(array, place)
    return moved


def update_in_place(update: Callable[..., Any]) -> Callable[..., Any]:
    """``update`` of a transformation whose results lie where what came in lay.

    Args:
      update: ``(updates, state, params, **extra) -> (updates, state)``.
    """

    def wrapped(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> Any:
        if not _explicit(updates)[1]:
            return update(updates, state, params, **extra)
        arrays = {k: v for k, v in extra.items() if _all_arrays(v)}
        others = {k: v for k, v in extra.items() if k not in arrays}

        def plain(updates: Any, state: Any, params: Any, arrays: Any) -> Any:
            return update(updates, state, params, **arrays, **others)

        likes = _whole(updates, params), state
        return in_place(plain, likes, updates, state, params, arrays)

    return wrapped


def _all_arrays(tree: PyTree) -> bool:
    return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(tree))


def _whole(updates: PyTree, params: PyTree | None) -> PyTree:
    """`updates` with the parameters in the place of coordinates."""
    leaves, treedef = paths.flatten(updates)
    known = {} if params is None else paths.flatten(params)[0]
    return treedef.unflatten(
        known.get(path, jnp.zeros(())) if isinstance(leaf, Coordinates) else leaf
        for path, leaf in leaves.items()
    )


def _explicit(tree: PyTree) -> tuple[Any, tuple[str, ...]]:
    """The mesh that the arrays of `tree` lie on and its explicit axes, if any."""
    for leaf in jax.tree.leaves(tree):
        place = leaf if isinstance(leaf, NamedSharding) else jax.typeof(leaf).sharding
        mesh = getattr(place, "mesh", None)
        if mesh is not None and mesh.axis_names:
            kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
            names = tuple(n for n, kind in kinds if kind == AxisType.Explicit)
            if names:
                return mesh, names
    return None, ()


def padded(spec: Any, length: int) -> tuple[Any, ...]:
    """A spec with an entry for each axis."""
    return (*spec, *(None,) * (length - len(spec)))
