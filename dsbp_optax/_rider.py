"""What rides beside a kernel through a differentiated function.

A layer is linear in its kernel, ``y = L_x(K)``. With the basis ``V`` in place of the
kernel, ``Y = A^T (A V) = L_x^T(L_x(V))``: one pass of the layer's own map and its
transpose, for dense and convolutional layers alike, without unfolding patches.

A *rider* (the basis and some zeros) is differentiated beside the parameters, and what
is known of the layer comes out as its cotangent. That are sums over samples, so they
are reduced over devices and micro-batches like any gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_optax._types import Array


class LinearMap(NamedTuple):
    """How a layer acts through its kernel.

    Attributes:
      apply: ``(x, kernel (*batch, *inputs, w)) -> (*batch, *samples, w)``, without
        bias, for any number ``w`` of outputs.
      inputs: number of input axes of the kernel.
      batch: number of leading axes along which kernels are stacked in this layer.
      parameter: name of the kernel among the layer's parameters.
    """

    apply: Callable[[Array, Array], Array]
    inputs: int
    batch: int = 0
    parameter: str = "kernel"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rider:
    """What is differentiated beside a kernel, in kernel form.

    The value of `count` says whether this step collects; its cotangent counts the
    samples. The cotangents of the others are ``Y`` and ``|A|^2``,
    that of `coordinates`, where there are any, the kernel's gradient in the basis.
    `displaced` says that the coordinates S are not zero: the kernel stands for
    ``K + V S``.
    """

    basis: Array
    count: Array
    trace: Array
    coordinates: Array | None = None
    displaced: bool = dataclasses.field(default=False, metadata={"static": True})


def parameter_path(key: str) -> str:
    """The parameter that a rider belongs to."""
    return key.split("#")[0]


def rider_side(path: str, rider: Rider, linear: LinearMap, kernel: Any) -> str:
    """Which side of the layer the rider belongs to, or an error if it fits neither."""
    shape = tuple(kernel)
    inner, front = linear.batch + linear.inputs, shape[: linear.batch]
    rank, ones = rider.basis.shape[-1], (1,)
    ins = (*shape[:inner], *ones * (len(shape) - inner), rank)
    outs = (*front, *ones * linear.inputs, *shape[inner:], rank)
    if rider.basis.shape == ins:
        return "input"
    if rider.basis.shape == outs:
        return "output"
    raise ValueError(
        f"'{path}': its basis has shape {rider.basis.shape}, expected {ins} (input "
        f"side) or {outs} (output side) for the layer's kernel {shape}: the "
        "optimizer misread the kernel's axes. Remedy: pass axes={'"
        f"{path}': dsbp_optax.Axes(inputs=..., outputs=..., batch=...)}} to it."
    )


def core_form(rider: Rider, linear: LinearMap, side: str) -> Rider:
    """The rider without the axes that are 1 for being on the other side."""
    split = linear.batch + linear.inputs

    def core(x: Array, inputs: bool) -> Array:
        front = x.shape[: linear.batch]
        kept = x.shape[linear.batch : split] if inputs else x.shape[split:-1]
        return x.reshape(*front, *kept, x.shape[-1])

    statistic = dataclasses.replace(rider, coordinates=None)
    found: Rider = jax.tree.map(lambda x: core(x, side == "input"), statistic)
    if rider.coordinates is None:
        return found
    return dataclasses.replace(found, coordinates=core(rider.coordinates, False))


def sketch_if_asked(
    apply: Callable[[Array, Array], Array], batch: int, x: Array, rider: Rider
) -> Rider:
    """`sketch_layer` on steps that collect, zeros on others."""

    def sketch(x: Array, rider: Rider) -> Rider:
        return sketch_layer(apply, batch, x, rider)

    def nothing(x: Array, rider: Rider) -> Rider:
        del x
        zeros: Rider = jax.tree.map(jnp.zeros_like, rider)
        return zeros

    collect = rider.count.reshape(-1)[0] > 0
    found: Rider = jax.lax.cond(collect, sketch, nothing, x, rider)
    return found


def sketch_layer(
    apply: Callable[[Array, Array], Array], batch: int, x: Array, rider: Rider
) -> Rider:
    """``Y = L_x^T(L_x(V))``, the number of samples and ``|A|^2``.

    Args:
      apply: the layer's linear map.
      batch: leading stacked axes of kernel and output.
      x: the layer's input, of any dtype.
      rider: basis ``(*batch, *inputs, k)`` and two arrays of width 1.

    Returns:
      The cotangents in the place of what they are the cotangents of.
    """
    basis = rider.basis
    x = jax.lax.stop_gradient(x).astype(basis.dtype)
    z = apply(x, basis)
    (product,) = jax.linear_transpose(lambda kernel: apply(x, kernel), basis)(z)
    squares = apply(x * x, jnp.ones_like(basis[..., :1]))
    trace = jnp.sum(squares, axis=tuple(range(batch, squares.ndim)))
    samples = z.size // (z.shape[-1] * max(1, trace.size))
    # Under the user's `vmap` cotangents are summed over samples, constants are not.
    count = jnp.where(jnp.isnan(trace), samples, samples).astype(rider.count.dtype)
    return Rider(
        basis=product,
        count=count.reshape(rider.count.shape),
        trace=trace.reshape(rider.trace.shape),
    )
