"""Where the arrays of a state lie on a mesh, and how they stay there.

Every array of a state is sharded along the axes that it shares with its kernel, and
never along the rank. On meshes whose axes are *explicit* a product over a sharded axis
is ambiguous: what this package computes there runs with automatic axes, its results in
the places of what they replace.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsbp_optax import _checks, _infer, _layout, _spectral
from dsbp_optax._layout import Coordinates, MatrixView, Shape
from dsbp_optax._spectral import ActivationMetricState
from dsbp_optax._types import Array, PyTree

T = TypeVar("T")

#: Field of states that holds coordinates of projected kernels.
_INSIDE = ("inner",)


def state_shardings(opt_state: PyTree, params: PyTree) -> PyTree:
    """Shardings of an optimizer state that follow those of the parameters.

    Bases and moments are sharded along the axes that they share with their kernel,
    never along the rank; what has the shape of a parameter is sharded like it, all
    else is replicated.

    Args:
      opt_state: any nest of optax states, or its shapes.
      params: the parameters, or `jax.ShapeDtypeStruct`s, with a
        `jax.sharding.NamedSharding` each.

    Returns:
      A tree of `jax.sharding.NamedSharding`, shaped as `opt_state`, for
      `jax.device_put` and the ``in_shardings`` and ``out_shardings`` of `jax.jit`.

    Raises:
      ValueError: when no parameter has a `NamedSharding`, or a mesh does not divide
        the axes that it splits.

    Cost: none; shapes only.

    Example:
      >>> import jax, jax.numpy as jnp, dsbp_optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> kernel = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("data")))
      >>> tx = dsbp_optax.dsbp_adamw(1e-3)
      >>> shapes = jax.eval_shape(tx.init, {"kernel": kernel})
      >>> places = dsbp_optax.state_shardings(shapes, {"kernel": kernel})
      >>> state = jax.jit(tx.init, out_shardings=places)({"kernel": kernel})
      >>> tuple(state[0].basis["kernel"].sharding.spec)
      ('data', None, None)
    """
    leaves, _ = _layout.flatten_with_paths(params)
    given = {path: getattr(leaf, "sharding", None) for path, leaf in leaves.items()}
    known = {p: s for p, s in given.items() if isinstance(s, NamedSharding)}
    if not known:
        raise ValueError(
            f"state_shardings: got parameters ({_checks.some(leaves)}) without a "
            "NamedSharding, expected one each. Remedy: jax.device_put(params, "
            "shardings) first, or pass jax.ShapeDtypeStruct(..., sharding=...)."
        )
    mesh = next(iter(known.values())).mesh
    specs = {
        path: _padded(known[path].spec if path in known else (), len(leaf.shape))
        for path, leaf in leaves.items()
    }
    for path, leaf in leaves.items():
        _check_divides(path, tuple(leaf.shape), specs[path], mesh)
    views = _views(opt_state, leaves)

    def place(keys: Any, leaf: Any, coordinates: Sequence[str]) -> NamedSharding:
        path = _owner(keys, leaves)
        if path is None:
            return NamedSharding(mesh, PartitionSpec())
        kernel, view = tuple(leaves[path].shape), views.get(path)
        names = {getattr(key, "name", getattr(key, "key", None)) for key in keys}
        inside = not names.isdisjoint(coordinates)
        plain = _infer.plain_view(path, kernel) if len(kernel) > 1 else None
        spec = _spec(tuple(leaf.shape), kernel, specs[path], view, inside, plain)
        return NamedSharding(mesh, PartitionSpec(*spec))

    def visit(keys: Any, node: Any) -> Any:
        if not isinstance(node, ActivationMetricState):
            return place(keys, node, _INSIDE)
        return jax.tree_util.tree_map_with_path(  # Moments inside are those of kernels.
            lambda more, leaf: place((*keys, *more), leaf, ()), node
        )

    return jax.tree_util.tree_map_with_path(
        visit, opt_state, is_leaf=lambda x: isinstance(x, ActivationMetricState)
    )


def _check_divides(path: str, shape: Shape, spec: tuple[Any, ...], mesh: Any) -> None:
    """Raise for an axis that cannot be split into equal parts."""
    for axis, (length, names) in enumerate(zip(shape, spec, strict=True)):
        split = () if names is None else names if isinstance(names, tuple) else (names,)
        parts = math.prod(mesh.shape[name] for name in split)
        if length % parts:
            whole = PartitionSpec(*spec[:axis], None, *spec[axis + 1 :])
            raise ValueError(
                f"state_shardings: got '{path}' of shape {shape} with axis {axis} over "
                f"{split} of the mesh {dict(mesh.shape)}, expected a length that the "
                f"{parts} devices divide. Remedy: leave that axis whole, {whole}, or "
                f"make it {length + -length % parts} long."
            )


def _padded(spec: Any, length: int) -> tuple[Any, ...]:
    return (*spec, *(None,) * (length - len(spec)))


def _owner(keys: Sequence[Any], paths: Mapping[str, Any]) -> str | None:
    """The parameter that a leaf of a state belongs to: named, or by its place."""
    for key in keys:
        name = getattr(key, "key", None)
        if isinstance(name, str) and name in paths:
            return name
    whole = _layout.path_string(keys)
    fits = [path for path in paths if whole == path or whole.endswith(f"/{path}")]
    return max(fits, key=len, default=None)


def _views(opt_state: PyTree, leaves: Mapping[str, Any]) -> dict[str, MatrixView]:
    """Views of the projected kernels, as their bases betray them."""
    found = {}
    for state in _spectral.find_states(opt_state):
        for path, owner in _spectral.owners_of(state).items():
            if path in leaves:
                form = state.basis[owner].shape[:-1]
                stacked = state.spectrum[owner].trace.shape[:-1]
                found[path] = _layout.view_of(leaves[path].shape, form, stacked)
    return found


def _spec(
    shape: Shape,
    kernel: Shape,
    spec: tuple[Any, ...],
    view: MatrixView | None,
    inside: bool = False,
    plain: MatrixView | None = None,
) -> tuple[Any, ...]:
    """Of an array that belongs to a kernel of this shape and sharding.

    Args:
      shape: of the array.
      kernel: shape of the kernel.
      spec: of the kernel.
      view: of the kernel, where it is projected.
      inside: whether it holds coordinates, whose rank may be as long as an axis.
      plain: of the kernel, as moments in few bits are kept that know no basis.
    """
    view = view and _of_axes(view, len(shape) - 2)
    if view is not None and inside and _holds_coordinates(shape, view):
        pair = (None, _merged(spec, view.columns))
        return (*(spec[a] for a in view.batch), *(pair[::-1] if view.flipped else pair))
    if shape == kernel:
        return spec
    if len(shape) == len(kernel) + 1:  # kernel form
        pairs = zip(shape[:-1], kernel, spec, strict=True)
        return (*(s if n == d and n > 1 else None for n, d, s in pairs), None)
    nothing = (None,) * len(shape)
    found = (
        _of_matrices(shape, spec, _of_axes(one, len(shape) - 2))
        for one in (view, plain)
        if one is not None
    )
    return next((one for one in found if one != nothing), nothing)


def _of_matrices(
    shape: Shape, spec: tuple[Any, ...], view: MatrixView
) -> tuple[Any, ...]:
    """Of ``(*batch, rows, columns)``, along what is as long as in the kernel."""
    if len(shape) != len(view.batch) + 2:
        return (None,) * len(shape)
    sides = (view.columns, view.rows) if view.flipped else (view.rows, view.columns)
    whole = (*view.batch_shape, *view.matrix_shape)
    merged = (*(spec[axis] for axis in view.batch), *(_merged(spec, s) for s in sides))
    triples = zip(shape, whole, merged, strict=True)
    return tuple(s if n == d else None for n, d, s in triples)


def _of_axes(view: MatrixView, stacked: int) -> MatrixView:
    """The view of arrays with so many stacked axes, those of length 1 left out.

    `view_of` cannot tell stacked axes of length 1 from those of a 1 x 1 convolution.
    """
    longer = tuple(axis for axis in view.batch if view.shape[axis] > 1)
    return view._replace(batch=longer) if len(longer) == stacked else view


def _holds_coordinates(shape: Shape, view: MatrixView) -> bool:
    rank = shape[-1 if view.flipped else -2] if len(shape) > 1 else 0
    return shape == view.coordinate_shape(rank)


def _merged(spec: tuple[Any, ...], axes: Shape) -> Any:
    """Of several axes read as one: that of the first, if the others are whole."""
    first, *others = (spec[axis] for axis in axes)
    return None if any(s is not None for s in others) else first


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
    spec = _padded(place.spec, array.ndim)[:kept]
    return NamedSharding(place.mesh, PartitionSpec(*_padded(spec, length)))


def of_coordinates(samples: Array, outputs: Array, batch: int) -> NamedSharding:
    """For ``V^T G (*batch, *outputs, k)``: along the stack and the layer's outputs.

    Args:
      samples: ``A V (*batch, *samples, k)``.
      outputs: cotangent ``(*batch, *samples, *outputs)`` of what the layer gave.
      batch: leading stacked axes.
    """
    place = jax.typeof(outputs).sharding
    spec = _padded(place.spec, outputs.ndim)
    kept = (*spec[:batch], *spec[samples.ndim - 1 :], None)
    return NamedSharding(place.mesh, PartitionSpec(*kept))


def beside(kernel: Any, shape: Shape) -> NamedSharding | None:
    """For an array in kernel form, where the kernel lies on an explicit mesh."""
    if not _explicit(kernel)[1]:
        return None
    place, own = jax.typeof(kernel).sharding, tuple(jnp.shape(kernel))
    spec = _spec(shape, own, _padded(place.spec, len(own)), None)
    return NamedSharding(place.mesh, PartitionSpec(*spec))


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
    leaves, treedef = _layout.flatten_with_paths(updates)
    known = {} if params is None else _layout.flatten_with_paths(params)[0]
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
