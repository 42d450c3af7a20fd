"""The one place that skips a step: a gradient not finite, or too large to square."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from dsbp_optax.linalg.subspace import squared_norm
from dsbp_optax.linalg.types import Array, PyTree, compute_dtype

T = TypeVar("T")
S = TypeVar("S")

#: Times a gradient may grow in a moment before squares are no longer finite.
_ROOM = 2.0**10
#: Whether who traces has made the test of all gradients; loops over many runs do, since
#: a branch on the gradients of each would, vectorised, compute both of its sides.
TESTED: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "dsbp_optax gradients are known to be finite", default=False
)


def gate(
    take: Callable[[S], T], skip: Callable[[S], T], updates: PyTree, operands: S
) -> T:
    """``take(operands)`` if `updates` can be squared, see `all_finite`, else ``skip``.

    A branch round the whole step: where each array is selected by itself, XLA copies
    the test of all gradients into each of hundreds of fusions.
    """
    finite = True if TESTED.get() else all_finite(updates)
    return branch(finite, take, skip, operands)


def branch(
    condition: Array | bool, yes: Callable[[S], T], no: Callable[[S], T], operands: S
) -> T:
    """`jax.lax.cond`; outside of a trace Python decides, and nothing is compiled."""
    if not isinstance(condition, jax.core.Tracer):
        return (yes if condition else no)(operands)
    done: T = jax.lax.cond(condition, yes, no, operands)
    return done


def all_finite(tree: PyTree) -> Array:
    """Whether every number of every leaf is finite, and can be squared and added up.

    By the sum of squares, which reduces several times faster than a test of each: the
    moments that a gradient goes into are squared themselves. One test of the whole sum:
    a test of each array is an equation for each in the program.
    """
    squares = [
        squared_norm(x.astype(compute_dtype(x.dtype)))
        for x in map(jnp.asarray, jax.tree.leaves(tree))
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    if not squares:
        return jnp.asarray(True)
    bounds = (float(jnp.finfo(x.dtype).max) for x in squares)
    return functools.reduce(jnp.add, squares) < min(bounds) / _ROOM**2
