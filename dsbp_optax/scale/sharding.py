"""Where the arrays of a state lie on a mesh.

Every array of a state is sharded along the axes that it shares with its kernels, and
never along the rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsbp_optax.core import checks, paths, stacks
from dsbp_optax.core.layout import Shape
from dsbp_optax.core.plan import Kernel
from dsbp_optax.core.sharding import padded
from dsbp_optax.core.stacks import Stack
from dsbp_optax.core.state import SpectralState
from dsbp_optax.linalg.types import PyTree


def state_shardings(opt_state: PyTree, params: PyTree) -> PyTree:
    """Shardings of an optimizer state that follow those of the parameters.

    Bases and moments are sharded along the axes that they share with their kernels,
    never along the rank; a stack lies as most of its kernels do. What has the shape of
    a parameter is sharded like it, all else is replicated.

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
      (None, 'data', None)
    """
    leaves, _ = paths.flatten(params)
    given = {path: getattr(leaf, "sharding", None) for path, leaf in leaves.items()}
    known = {p: s for p, s in given.items() if isinstance(s, NamedSharding)}
    if not known:
        raise ValueError(
            f"state_shardings: got parameters ({checks.some(leaves)}) without a "
            "NamedSharding, expected one each. Remedy: jax.device_put(params, "
            "shardings) first, or pass jax.ShapeDtypeStruct(..., sharding=...)."
        )
    mesh = next(iter(known.values())).mesh
    specs = {
        path: padded(known[path].spec if path in known else (), len(leaf.shape))
        for path, leaf in leaves.items()
    }
    for path, leaf in leaves.items():
        _check_divides(path, tuple(leaf.shape), specs[path], mesh)

    def like_parameter(keys: Any, leaf: Any) -> NamedSharding:
        path = _owner(keys, leaves)
        if path is None or tuple(leaf.shape) != tuple(leaves[path].shape):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*specs[path]))

    def visit(keys: Any, node: Any) -> Any:
        if not isinstance(node, SpectralState):
            return like_parameter(keys, node)
        places = jax.tree_util.tree_map_with_path(
            lambda more, leaf: like_parameter((*keys, *more), leaf), node
        )
        if not isinstance(node.basis, Mapping):
            return places

        def place(stack: Stack, leaf: Any) -> NamedSharding:
            votes = (_spec(leaf, one, specs[one.path], mesh) for one in stack.kernels)
            ((spec, _),) = Counter(votes).most_common(1)
            return NamedSharding(mesh, PartitionSpec(*spec))

        def each(held: Any, some: Sequence[Stack]) -> Any:
            return {
                one.name: jax.tree.map(lambda x, s=one: place(s, x), held[one.name])
                for one in some
            }

        statistics = {
            path: jax.tree.map(
                lambda x, p=path: _kernel_form(x, leaves[p], specs[p]), y
            )
            for path, y in node.statistics.items()
        }
        return places._replace(
            fallback=jax.tree_util.tree_map_with_path(
                lambda more, part: visit((*keys, *more), part),
                node.fallback,
                is_leaf=lambda x: isinstance(x, SpectralState),
            ),
            basis=each(node.basis, node.bases),
            spectrum=each(node.spectrum, node.bases),
            inner=each(node.inner, stacks.of_kernels(node.kernels)),
            statistics=jax.tree.map(
                lambda spec: NamedSharding(mesh, spec),
                statistics,
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            ),
        )

    return jax.tree_util.tree_map_with_path(
        visit, opt_state, is_leaf=lambda x: isinstance(x, SpectralState)
    )


def _spec(leaf: Any, one: Kernel, spec: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
    """Of an array ``(n, ...)`` of a stack: along what is as long as in the kernel.

    The state of a rule round another holds axes of length 1 in front of its matrices.
    """
    view, shape = one.view, leaf.shape
    first = _merged(spec, view.batch) if view.batch else None
    ones, rest = tuple(shape[1:-2]), tuple(shape[1:])[-2:]
    if len(rest) != 2 or any(n != 1 for n in ones):
        return (first, *(None for _ in shape[1:]))
    rows, columns = _merged(spec, view.rows), _merged(spec, view.columns)
    pair: tuple[Any, ...]
    if rest == (view.size, one.rank):  # a basis
        pair = (rows, None)
    elif rest == (one.rank, view.other):  # coordinates
        pair = (None, columns)
    else:
        packed = leaf.dtype == np.uint8 and rest[0] % _parts(rows, mesh) == 0
        along = rest[0] == view.size or (packed and view.size % rest[0] == 0)
        pair = (rows if along else None, columns if rest[1] == view.other else None)
    return (first, *(None for _ in ones), *pair)


def _kernel_form(array: Any, kernel: Any, spec: tuple[Any, ...]) -> PartitionSpec:
    pairs = zip(array.shape[:-1], kernel.shape, spec, strict=True)
    return PartitionSpec(*(s if n == d and n > 1 else None for n, d, s in pairs), None)


def _merged(spec: tuple[Any, ...], axes: Shape) -> Any:
    """Of several axes read as one: that of the first, if the others are whole."""
    first, *others = (spec[axis] for axis in axes)
    return None if any(s is not None for s in others) else first


def _owner(keys: Sequence[Any], known: Mapping[str, Any]) -> str | None:
    """The parameter that a leaf of a state belongs to: named, or by its place."""
    named = [getattr(key, "key", None) for key in keys]
    fits = [name for name in named if isinstance(name, str) and name in known]
    for whole in {paths.path_string(keys, alone) for alone in (True, False)}:
        fits += [path for path in known if f"/{whole}".endswith(f"/{path}")]
    return max(fits, key=len, default=None)


def _check_divides(path: str, shape: Shape, spec: tuple[Any, ...], mesh: Any) -> None:
    """Raise for an axis that cannot be split into equal parts."""
    for axis, (length, names) in enumerate(zip(shape, spec, strict=True)):
        parts = _parts(names, mesh)
        if length % parts:
            whole = PartitionSpec(*spec[:axis], None, *spec[axis + 1 :])
            raise ValueError(
                f"state_shardings: got '{path}' of shape {shape} with axis {axis} over "
                f"{_names(names)} of the mesh {dict(mesh.shape)}, expected a length "
                f"that the {parts} devices divide. Remedy: leave that axis whole, "
                f"{whole}, or make it {length + -length % parts} long."
            )


def _names(names: Any) -> tuple[str, ...]:
    return () if names is None else names if isinstance(names, tuple) else (names,)


def _parts(names: Any, mesh: Any) -> int:
    """Over how many devices an axis of these names is split."""
    return math.prod(mesh.shape[name] for name in _names(names))
