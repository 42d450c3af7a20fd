"""The loss on a plane through the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import checks
from dsbp_optax.instruments import batches as batches_
from dsbp_optax.linalg.types import Array, PyTree


class Surface(NamedTuple):
    """Losses at ``params + x first + y second``, both directions of unit norm.

    Attributes:
      offsets: ``(points,)``, the values of x and of y.
      losses: ``(points, points)``, a row a value of y.
    """

    offsets: Array
    losses: Array


def loss_surface(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batches: PyTree,
    first: PyTree,
    second: PyTree,
    *,
    radius: float = 1.0,
    points: int = 21,
) -> Surface:
    """The loss on the plane through two directions, made orthonormal.

    Good directions are the two leading eigenvectors of the Hessian, see
    `top_eigenvalues`, or those to two other trained models.

    Args:
      loss_fn: ``(params, batch) -> scalar``.
      params: the middle.
      batches: see `stack_batches` and `stream_batches`.
      first: a direction, shaped as `params`.
      second: another, not parallel to the first.
      radius: largest offset.
      points: a side.

    Returns:
      `Surface`.

    Raises:
      ValueError: for fewer than three points a side.

    Cost: ``points^2`` losses over the data.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> found = diagnostics.loss_surface(
      ...     lambda w, x: jnp.sum(w * w), jnp.zeros(2), jnp.zeros(1),
      ...     jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]), points=3)
      >>> print(found.losses)
      [[2. 1. 2.]
       [1. 0. 1.]
       [2. 1. 2.]]
    """
    checks.check_integer("points", points, 3)
    one = _unit(first)
    overlap = optax.tree.vdot(one, second)
    two = _unit(optax.tree.add_scale(second, -overlap, one))
    offsets = jnp.linspace(-radius, radius, points)

    mean_loss = batches_.averaged(loss_fn, batches)

    def loss(place: Array) -> Array:
        there = optax.tree.add_scale(params, place[0], one)
        there = optax.tree.add_scale(there, place[1], two)
        value: Array = mean_loss(there)
        return value

    grid = jnp.stack(jnp.meshgrid(offsets, offsets), axis=-1)
    with batches_.loops_for(mean_loss):
        losses = jax.lax.map(loss, grid.reshape(-1, 2))
    return Surface(offsets, losses.reshape(points, points))


def _unit(tree: PyTree) -> PyTree:
    norm = optax.tree.norm(tree)
    return optax.tree.scale(1 / jnp.where(norm > 0, norm, 1), tree)
