"""The one place where gradients that are not finite are dealt with."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _sharding, _spectral
from dsbp_optax._types import PyTree

T = TypeVar("T")

#: Whether who traces has made the test of all gradients; loops over many runs do, since
#: a branch on the gradients of each would, vectorised, compute both of its sides.
TESTED: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "dsbp_optax gradients are known to be finite", default=False
)


def gate(
    take: Callable[[T], tuple[PyTree, T]],
    skip: Callable[[T], tuple[PyTree, T]],
    updates: PyTree,
    state: T,
) -> tuple[PyTree, T]:
    """The step if every number of `updates` is finite, else one that changes nothing.

    A branch round the whole step: where each array is selected by itself, XLA copies
    the test of all gradients into each of hundreds of fusions. Outside of a trace
    Python decides.

    Args:
      take: state -> updates, new state.
      skip: state -> new state; its updates are zero.
      updates: incoming gradients.
      state: before the step.
    """
    finite = True if TESTED.get() else _spectral.all_finite(updates)

    def taken(state: T) -> tuple[PyTree, T]:
        changes, new = take(state)
        return changes, _spectral.cast_like(new, state)

    def skipped(state: T) -> tuple[PyTree, T]:
        changes, new = skip(state)
        return changes, _spectral.cast_like(new, state)

    if not isinstance(finite, jax.core.Tracer):
        return (taken if finite else skipped)(state)
    done: tuple[PyTree, T] = jax.lax.cond(finite, taken, skipped, state)
    return done


def gated(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose state stays as it is on a step that is not finite.

    Spectral states inside count such steps as skipped; statistics that were put into
    them are forgotten. On meshes with explicit axes results lie where their like lay.
    """

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if not jax.tree.leaves(updates):
            return updates, state

        def take(state: Any) -> tuple[PyTree, Any]:
            changes, new = tx.update(updates, state, params, **extra)
            return _spectral.cast_like(changes, updates), new

        def skip(state: Any) -> tuple[PyTree, Any]:
            nothing = jax.tree.map(jnp.zeros_like, updates)
            return nothing, _spectral.map_states(_skipped, state)

        return gate(take, skip, updates, state)

    return optax.GradientTransformationExtraArgs(
        tx.init, _sharding.update_in_place(update)
    )


def _skipped(state: Any) -> Any:
    nothing = jax.tree.map(jnp.zeros_like, state.statistics)
    return state._replace(skipped=state.skipped + 1, statistics=nothing)
