"""The optimizers inside a projection: one for kernels, one for the rest."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_optax import _layout, _plan, _precision, _spectral, _transport
from dsbp_optax._layout import MatrixView
from dsbp_optax._rule import Rule
from dsbp_optax._types import Array, PyTree, compute_dtype, state_bytes

#: Bytes of inner state above which a skipped step is a branch.
_LARGE_STATE = 2**22


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
    finite: Array,
    gradients: Pair,
    held: Pair,
    stored: Pair,
    params: PyTree | None,
    store: Callable[[PyTree], PyTree],
    extra: Mapping[str, Any],
) -> tuple[dict[str, Array], Pair]:
    """The step of both optimizers, or none where gradients are not finite.

    A large state goes through `lax.cond`, since a `where` would copy it; a small one
    through `where`, since a branch would hold up the rest of the step. Outside of a
    trace Python decides, so that nothing is compiled anew.

    Args:
      rule: the rule.
      finite: whether to take the step.
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

    def take(gradients: Pair, held: Pair) -> tuple[dict[str, Array], Pair]:
        steps, inner = rule.inner.update(gradients.kernels, held.kernels, None, **extra)
        others, rest = gradients.others, held.others
        if rule.fallback is not None and others:
            others, rest = rule.fallback.update(others, rest, params, **extra)
        changes = _spectral.cast_like({**steps, **others}, merged)
        return changes, _spectral.cast_like(Pair(store(inner), rest), stored)

    def skip(gradients: Pair, held: Pair) -> tuple[dict[str, Array], Pair]:
        del gradients
        nothing = jax.tree.map(jnp.zeros_like, merged)
        return nothing, _spectral.cast_like(held, stored)

    if not isinstance(finite, jax.core.Tracer):
        return (take if finite else skip)(gradients, held)
    if state_bytes(stored) > _LARGE_STATE:
        done: tuple[dict[str, Array], Pair]
        done = jax.lax.cond(finite, take, skip, gradients, held)
        return done
    steps, new = take(gradients, held)
    return steps, _spectral.select(finite, new, _spectral.cast_like(held, stored))


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
