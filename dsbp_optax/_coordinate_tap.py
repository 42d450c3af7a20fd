"""The gradient of a kernel in coordinates, taken inside the differentiated function.

An identity on the layer's output, whose derivative keeps ``A V`` and the sketch of the
forward pass, and of the layer's input nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_optax import _sharding
from dsbp_optax._rider import LinearMap, Rider, core_form, sketch_if_asked
from dsbp_optax._types import Array


def take_coordinates(linear: LinearMap, x: Array, y: Array, rider: Rider) -> Array:
    """``y + L_x(V) S``; the cotangent of `rider` holds ``V^T G`` and the sketch.

    S is zero unless the rider is displaced, and `y` then as it was. Differentiated with
    respect to S: what is kept for the backward pass is ``L_x(V)``, of k columns, and
    the sketch, in the place of ``x``.
    """
    core = core_form(rider, linear, "input")
    if rider.displaced:
        y = _displaced(linear, x, y, core)
        core = dataclasses.replace(core, displaced=False)
    return _take(linear.apply, linear.batch, y, x, core)


def _displaced(linear: LinearMap, x: Array, y: Array, core: Rider) -> Array:
    """``y + L_x(V) S``, a function of x, which is not to be kept for it."""
    step = jax.lax.stop_gradient(core.coordinates)
    basis = jax.lax.stop_gradient(core.basis)

    def lifted(x: Array, basis: Array, step: Array) -> Array:
        z = linear.apply(x.astype(basis.dtype), basis)
        front, rank = z.shape[: linear.batch], z.shape[-1]
        samples = z.reshape(*front, -1, rank)
        moves = step.reshape(*front, -1, rank)
        found = jnp.einsum("...nk,...mk->...nm", samples, moves)
        return found.reshape(y.shape)

    return y + _sharding.in_place(lifted, y, x, basis, step).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take(
    apply: Callable[[Array, Array], Array],
    batch: int,
    y: Array,
    x: Array,
    rider: Rider,
) -> Array:
    del apply, batch, x, rider
    return y


def _take_fwd(apply: Any, batch: int, y: Array, x: Array, rider: Rider) -> Any:
    """Keeps ``A V`` and the sketch, and of the input nothing."""
    seen = dataclasses.replace(rider, coordinates=None)

    def keep(x: Array, seen: Rider) -> tuple[Array, Rider]:
        x = jax.lax.stop_gradient(x).astype(seen.basis.dtype)
        return apply(x, seen.basis), sketch_if_asked(apply, batch, x, seen)

    samples = jax.eval_shape(apply, x, seen.basis).ndim - 1
    likes = _sharding.leading(x, samples, samples + 1), seen
    return y, _sharding.in_place(keep, likes, x, seen)


def _take_bwd(apply: Any, batch: int, saved: Any, cotangent: Array) -> Any:
    del apply
    z, seen = saved

    def product(z: Array, cotangent: Array) -> Array:
        front, rank = z.shape[:batch], z.shape[-1]
        outputs = cotangent.shape[z.ndim - 1 :]
        samples = z.reshape(*front, -1, rank)
        deltas = cotangent.astype(z.dtype).reshape(*samples.shape[:-1], -1)
        found = jnp.einsum("...nm,...nk->...km", deltas, samples)
        # Compilers fold a transpose into the product; on a CPU "mk" takes 5 times "km".
        found = jnp.swapaxes(jax.lax.optimization_barrier(found), -1, -2)
        return found.reshape(*front, *outputs, rank)

    place = _sharding.of_coordinates(z, cotangent, batch)
    coordinates = _sharding.in_place(product, place, z, cotangent)
    return cotangent, None, dataclasses.replace(seen, coordinates=coordinates)


_take.defvjp(_take_fwd, _take_bwd)
