"""The gradient of a kernel in coordinates, without the gradient itself.

A kernel that enters the loss through its layer alone needs no gradient of its own: it
is held constant, and an identity on the layer's output, whose derivative keeps ``A V``
of the forward pass and of the layer's input nothing, gives ``V^T G``. A kernel that
enters elsewhere too (a penalty, a tied head) has a gradient that the layer does not
see, and must not be held. Knows no framework.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from dsbp_optax.capture import origin
from dsbp_optax.capture.tap import LinearMap, Rider, core_form, sketch_if_asked
from dsbp_optax.core import checks, sharding
from dsbp_optax.core.layout import Axes, Coordinates
from dsbp_optax.linalg.types import Array

#: Path -> S of kernels that stand for ``K + V S``.
Displacement: TypeAlias = Mapping[str, Coordinates] | None


def find_held(
    loss: Callable[[dict[str, Any], set[str]], Array], leaves: Mapping[str, Any]
) -> tuple[set[str], set[str]]:
    """The kernels that layers can hold, and those of them used elsewhere too.

    Args:
      loss: (parameters by path, a set to note kernels in) -> loss; the layers of noted
        kernels return zeros that depend on their input alone.
      leaves: path -> parameter.
    """
    noted: set[str] = set()
    with origin.apart():  # A probed layer gives zeros, which no cache may keep.
        closed = jax.make_jaxpr(
            lambda values: loss(dict(zip(leaves, values, strict=True)), noted)
        )(list(leaves.values()))
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    elsewhere = {path for path, flag in zip(leaves, used, strict=True) if flag} & noted
    return noted - elsewhere, elsewhere


def release(
    riders: Mapping[str, Rider], held: Collection[str], owners: Collection[str]
) -> dict[str, Rider]:
    """Riders for kernels some of which are not held, and take no coordinates then.

    Args:
      riders: of `state.coordinate_riders`.
      held: paths that are held.
      owners: keys of the riders that collect statistics; the rest is dropped.
    """
    moved = [key for key, r in riders.items() if r.displaced and key not in held]
    if moved:
        raise ValueError(
            f"displacement of {checks.some(moved)}: these kernels are not held "
            "constant, so nothing takes the step. Remedy: pass what subspace_sam gives "
            "its grad_fn, for the same loss."
        )
    free = {k: r.plain for k, r in riders.items() if k in owners and k not in held}
    return {**{key: r for key, r in riders.items() if key in held}, **free}


def join(
    leaves: Collection[str],
    gradients: Mapping[str, Any],
    cotangents: Mapping[str, Rider],
    held: Collection[str],
) -> list[Any]:
    """The gradient of each parameter, in the order of `leaves`."""
    taken = {path: cotangents[path].coordinates for path in held}
    return [
        gradients[path] if (values := taken.get(path)) is None else Coordinates(values)
        for path in leaves
    ]


def take_coordinates(
    linear: LinearMap, axes: Axes, x: Array, y: Array, rider: Rider
) -> Array:
    """``y + L_x(V) S``; the cotangent of `rider` holds ``V^T G`` and the sketch.

    S is zero unless the rider is displaced, and `y` then as it was. Differentiated with
    respect to S: what is kept for the backward pass is ``L_x(V)``, of k columns, and
    the sketch, in the place of ``x``.
    """
    core = sharding.vary_like(core_form(rider, axes, "input"), x)
    batch = len(axes.batch)
    if rider.displaced:
        y = _displaced(linear, batch, x, y, core)
    return _take(linear, batch, y, x, core.plain, core.coordinates)


def _displaced(linear: LinearMap, batch: int, x: Array, y: Array, core: Rider) -> Array:
    """``y + L_x(V) S``, a function of x, which is not to be kept for it."""
    step = jax.lax.stop_gradient(core.coordinates)
    basis = jax.lax.stop_gradient(core.basis)
    arrange = linear.arrange or (lambda y: y)

    def lifted(x: Array, basis: Array, step: Array) -> Array:
        z = linear.apply(x.astype(basis.dtype), basis)
        front, rank = z.shape[:batch], z.shape[-1]
        moves = step.reshape(*front, -1, rank)
        found = jnp.einsum("...nk,...mk->...nm", z.reshape(*front, -1, rank), moves)
        like = jax.ShapeDtypeStruct(y.shape, found.dtype)
        arranged = found.reshape(jax.eval_shape(arrange, like).shape)
        back: Array = jax.linear_transpose(arrange, like)(arranged)[0]
        return back

    return y + sharding.in_place(lifted, y, x, basis, step).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take(
    linear: LinearMap, batch: int, y: Array, x: Array, seen: Rider, coordinates: Array
) -> Array:
    del linear, batch, x, seen, coordinates
    return y


def _take_fwd(
    linear: LinearMap, batch: int, y: Array, x: Array, seen: Rider, coordinates: Array
) -> Any:
    """Keeps ``A V`` and the sketch, and of the input nothing."""
    del coordinates

    def keep(x: Array, seen: Rider) -> tuple[Array, Rider]:
        x = jax.lax.stop_gradient(x).astype(seen.basis.dtype)
        return linear.apply(x, seen.basis), sketch_if_asked(
            linear.apply, batch, x, seen
        )

    samples = jax.eval_shape(linear.apply, x, seen.basis).ndim - 1
    likes = sharding.leading(x, min(samples, x.ndim), samples + 1), seen
    return y, sharding.in_place(keep, likes, x, seen)


def _take_bwd(linear: LinearMap, batch: int, saved: Any, cotangent: Array) -> Any:
    z, seen = saved
    arranged = cotangent if linear.arrange is None else linear.arrange(cotangent)

    def product(z: Array, deltas: Array) -> Array:
        front, rank = z.shape[:batch], z.shape[-1]
        outputs = deltas.shape[z.ndim - 1 :]
        samples = z.reshape(*front, -1, rank)
        deltas = deltas.astype(z.dtype).reshape(*samples.shape[:-1], -1)
        found = jnp.einsum("...nm,...nk->...km", deltas, samples)
        # Compilers fold a transpose into the product; on a CPU "mk" takes 5 times "km".
        found = jnp.swapaxes(jax.lax.optimization_barrier(found), -1, -2)
        return found.reshape(*front, *outputs, rank)

    place = sharding.of_coordinates(z, arranged, batch)
    return cotangent, None, seen, sharding.in_place(product, place, z, arranged)


_take.defvjp(_take_fwd, _take_bwd)
