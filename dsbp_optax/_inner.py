"""The optimizers inside a projection: one for kernels, one for the rest."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_optax import _layout, _plan, _precision, _spectral, _transport
from dsbp_optax._layout import MatrixView
from dsbp_optax._rule import Rule
from dsbp_optax._types import Array, PyTree, compute_dtype


class Pair(NamedTuple):
    """Gradients or states of the two: of kernels, and of the other parameters."""

    kernels: PyTree
    others: PyTree


def divide(
    rule: Rule,
    leaves: Mapping[str, Array],
    tree: PyTree,
    views: Mapping[str, MatrixView],
) -> Pair:
    """Leaves for the inner optimizer, and for the fallback where there is one.

    Args:
      rule: the rule.
      leaves: path -> leaf of `tree`.
      tree: parameters or updates.
      views: of the kernels that are projected.
    """
    if rule.fallback is None:
        return Pair(dict(leaves), {})
    kernels = _plan.kernels(tree, rule.choices, views)
    own = {path: x for path, x in leaves.items() if path in kernels}
    return Pair(own, {path: x for path, x in leaves.items() if path not in kernels})


def inner_update(
    rule: Rule,
    gradients: Pair,
    held: Pair,
    stored: Pair,
    params: PyTree | None,
    store: Callable[[PyTree], PyTree],
    extra: Mapping[str, Any],
) -> tuple[dict[str, Array], Pair]:
    """The step of both optimizers.

    Args:
      rule: the rule.
      gradients: path -> gradient, coordinates for projected kernels.
      held: states in the coordinates of this step.
      stored: the states as they came, for their dtypes.
      params: parameters, for the fallback, or None.
      store: rounds the moments of kernels to their stored dtype.
      extra: arguments of ``update``.

    Returns:
      Path -> change, and the states to store.
    """
    merged = {**gradients.kernels, **gradients.others}
    if params is not None and gradients.others:
        leaves, _ = _layout.flatten_with_paths(params)
        params = {path: leaves[path] for path in gradients.others}
    steps, inner = rule.inner.update(gradients.kernels, held.kernels, None, **extra)
    others, rest = gradients.others, held.others
    if rule.fallback is not None and others:
        others, rest = rule.fallback.update(others, rest, params, **extra)
    changes = _spectral.cast_like({**steps, **others}, merged)
    return changes, _spectral.cast_like(Pair(store(inner), rest), stored)


def widened(updates: PyTree) -> Callable[[Array, str], Array]:
    """Moments in the dtype of the linear algebra on their kernels."""
    leaves, _ = _layout.flatten_with_paths(updates)

    def one(moment: Array, name: str) -> Array:
        leaf = leaves.get(name.rpartition("#")[0], moment)  # missing: an error later
        return moment.astype(compute_dtype(jnp.result_type(leaf)))

    return one


def store_moments(
    rule: Rule, paths: frozenset[str], step: Array
) -> Callable[[PyTree], PyTree]:
    """How moments of projected kernels are stored; a key for each array and step."""
    if rule.moment_dtype is None:
        return lambda inner: inner
    root = jax.random.fold_in(jax.random.key(0), step)

    def one(moment: Array, name: str) -> Array:
        key = jax.random.fold_in(root, zlib.crc32(name.encode()))
        return _precision.store(moment, rule.moment_dtype, key)

    return lambda inner: map_moments(rule, inner, paths, one)


def map_moments(
    rule: Rule,
    inner: PyTree,
    paths: frozenset[str],
    function: Callable[[Array, str], Array],
) -> PyTree:
    """`function` of (moment, "path#field") for kernels, if a dtype was chosen."""
    if rule.moment_dtype is None:
        return inner
    fields, moments = _transport.split(inner, paths, rule.transport)
    done = [
        {
            path: function(moment, f"{path}#{field.name}")
            for path, moment in held.items()
        }
        for field, held in zip(fields, moments, strict=True)
    ]
    return _transport.restore(inner, done, paths, rule.transport)
