"""The tap: an identity on a layer's input whose derivative is a sketch.

A layer is linear in its kernel, ``y = L_x(K)``. With the basis ``V`` in place of the
kernel, ``Y = A^T (A V) = L_x^T(L_x(V))``: one pass of the layer's own map and its
transpose, for dense and convolutional layers alike, without unfolding patches.

A *rider* (the basis and some zeros) is differentiated beside the parameters, and the
sketch comes out as its cotangent. It is a sum over samples, so it is reduced over
devices and micro-batches like any gradient. Knows no framework.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from dsbp_optax.core import sharding
from dsbp_optax.core.layout import Axes, Shape
from dsbp_optax.linalg.types import Array, is_traced

T = TypeVar("T")

_HIGHEST = jax.lax.Precision.HIGHEST


class LinearMap(NamedTuple):
    """How a layer acts through its kernel.

    Attributes:
      apply: ``(x, kernel (*batch, *inputs, w)) -> (*batch, *samples, w)``, without
        bias, for any number ``w`` of outputs.
      inputs: number of input axes of the kernel, behind `batch` and before the outputs.
      batch: number of leading axes along which kernels are stacked in this layer.
      parameter: name of the kernel among the layer's parameters.
      axes: which axes of the kernel are which, where they do not lie in that order;
        wins over `inputs` and `batch`. `apply` has them in the order of these tuples.
      arrange: brings what the layer returns into the form ``(*batch, *samples,
        *outputs)`` by transposing it; None where it has that form.
      gives_kernel: whether the layer returns its kernel, for a product elsewhere.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import Axes
      >>> from dsbp_optax.capture import LinearMap
      >>> dense = LinearMap(lambda x, kernel: x @ kernel, inputs=1)
      >>> transposed = LinearMap(jnp.matmul, axes=Axes(inputs=(1,), outputs=(0,)))
    """

    apply: Callable[[Array, Array], Array]
    inputs: int = 1
    batch: int = 0
    parameter: str = "kernel"
    axes: Axes | None = None
    arrange: Callable[[Array], Array] | None = None
    gives_kernel: bool = False

    def axes_of(self, ndim: int) -> Axes:
        """The axes of a kernel of `ndim` axes."""
        if self.axes is not None:
            return Axes(*(tuple(a % ndim for a in group) for group in self.axes))
        every, split = tuple(range(ndim)), self.batch + self.inputs
        return Axes(every[self.batch : split], every[split:], every[: self.batch])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rider:
    """What is differentiated beside a kernel, in kernel form.

    The value of `count` says whether this step collects; its cotangent counts the
    samples. The cotangents of `basis` and `trace` are ``Y`` and ``|A|^2``, that of
    `coordinates`, where there are any, the kernel's gradient in the basis. `displaced`
    says that the coordinates S are not zero: the kernel stands for ``K + V S``.
    """

    basis: Array
    count: Array
    trace: Array
    coordinates: Array | None = None
    displaced: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def plain(self) -> Rider:
        """Of the statistic alone."""
        return dataclasses.replace(self, coordinates=None, displaced=False)


class Once:
    """Functions of layers' maps, each traced once for all layers alike.

    For one trace of a loss: no cache outlives it.
    """

    def __init__(self) -> None:
        self.known: dict[Any, tuple[Any, Any]] = {}

    def __call__(
        self, function: Callable[..., T], fixed: tuple[Any, ...], *args: Any
    ) -> T:
        """``function(*fixed, *args)``.

        Args:
          function: of anything that can be hashed, then of trees of arrays.
          fixed: the former.
          *args: the latter.
        """
        leaves, treedef = jax.tree.flatten(args)
        key = function, fixed, treedef, *map(jax.typeof, leaves)
        if key not in self.known:
            traced = functools.partial(function, *fixed)
            closed, shapes = jax.make_jaxpr(traced, return_shape=True)(*args)
            if is_traced(closed.consts):  # They belong to this layer alone.
                return traced(*args)
            self.known[key] = closed, jax.tree.structure(shapes)
        closed, structure = self.known[key]
        found: T = structure.unflatten(jaxpr_as_fun(closed)(*leaves))
        return found


def hash_of(owner: Any, *settings: Any) -> int:
    """Of what can be hashed; whoever has something else is like itself alone."""
    try:
        return hash(settings)
    except TypeError:
        return id(owner)


def parameter_path(key: str) -> str:
    """The parameter that a rider belongs to."""
    return key.split("#")[0]


def rider_side(rider: Rider, axes: Axes, kernel: Shape) -> str | None:
    """Which side of a layer's kernel the rider belongs to; None where it fits none."""

    def form(*kept: int) -> Shape:
        return tuple(n if a in kept else 1 for a, n in enumerate(kernel))

    if rider.count.shape[:-1] == form(*axes.batch):
        for side, own in (("input", axes.inputs), ("output", axes.outputs)):
            if rider.basis.shape[:-1] == form(*axes.batch, *own):
                return side
    return None


def core_form(rider: Rider, axes: Axes, side: str) -> Rider:
    """The rider as ``(*batch, *inputs or *outputs, k)``, coordinates the other way."""

    def core(x: Array, kept: Shape) -> Array:
        order = (*axes.batch, *axes.inputs, *axes.outputs, x.ndim - 1)
        lengths = (*(x.shape[a] for a in (*axes.batch, *kept)), x.shape[-1])
        moved = x if order == tuple(range(x.ndim)) else x.transpose(order)
        return moved.reshape(lengths)

    own = axes.inputs if side == "input" else axes.outputs
    found: Rider = jax.tree.map(lambda x: core(x, own), rider.plain)
    if rider.coordinates is None:
        return found
    coordinates = core(rider.coordinates, axes.outputs)
    return dataclasses.replace(
        found, coordinates=coordinates, displaced=rider.displaced
    )


def observe_input(
    once: Once,
    linear: LinearMap,
    axes: Axes,
    x: Array,
    rider: Rider,
    through: Array | None = None,
) -> Array:
    """`x`, or `through`, itself; the sketch of `x` becomes the cotangent of `rider`."""
    core = sharding.vary_like(core_form(rider, axes, "input"), x)
    passed = x if through is None else through
    return _tap(once, (linear.apply, len(axes.batch)), passed, x, core)


def observe_output(
    once: Once, linear: LinearMap, axes: Axes, y: Array, rider: Rider
) -> Array:
    """`y` itself, for riders on the output side; `y` includes the bias."""
    batch, sides = len(axes.batch), len(axes.outputs)

    def apply(y: Array, v: Array) -> Array:
        y = y if linear.arrange is None else linear.arrange(y)
        rows = y.reshape(*y.shape[: y.ndim - sides], -1)
        columns = v.reshape(*v.shape[:batch], -1, v.shape[-1])
        for _ in range(rows.ndim - batch - 2):
            columns = columns[..., None, :, :]
        return jnp.matmul(rows, columns, precision=_HIGHEST)

    core = sharding.vary_like(core_form(rider, axes, "output"), y)
    return _tap(once, (apply, batch), y, y, core)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(
    once: Once, layer: tuple[Any, int], passed: Array, observed: Array, rider: Rider
) -> Array:
    del once, layer, observed, rider
    return passed


def _tap_fwd(once: Once, layer: Any, passed: Any, observed: Any, rider: Any) -> Any:
    del once, layer
    return passed, (observed, rider)


def _tap_bwd(once: Once, layer: Any, saved: Any, cotangent: Array) -> Any:
    observed, rider = saved

    def sketch(observed: Array, rider: Rider) -> Rider:
        return once(sketch_if_asked, layer, observed, rider)

    return cotangent, None, sharding.in_place(sketch, rider, observed, rider)


_tap.defvjp(_tap_fwd, _tap_bwd)


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

    Of inputs in bfloat16 the products are taken in it, as those of the layer are: a
    copy of the input in float32 would be larger than what a small state saves.

    Args:
      apply: the layer's linear map.
      batch: leading stacked axes of kernel and output.
      x: the layer's input, of any dtype.
      rider: basis ``(*batch, *inputs, k)`` and two arrays of width 1.

    Returns:
      The cotangents in the place of what they are the cotangents of.
    """
    wide = rider.basis.dtype
    dtype = jnp.bfloat16 if x.dtype == jnp.bfloat16 else wide
    x, basis = jax.lax.stop_gradient(x).astype(dtype), rider.basis.astype(dtype)
    z = apply(x, basis)
    (product,) = jax.linear_transpose(lambda kernel: apply(x, kernel), basis)(z)
    squares = apply(x * x, jnp.ones_like(basis[..., :1]))
    trace = jnp.sum(squares, axis=tuple(range(batch, squares.ndim)), dtype=wide)
    samples = z.size // (z.shape[-1] * max(1, trace.size))
    # Under the user's `vmap` cotangents are summed over samples, constants are not.
    count = jnp.where(jnp.isnan(trace), samples, samples).astype(rider.count.dtype)
    shape = rider.count.shape
    return Rider(product.astype(wide), count.reshape(shape), trace.reshape(shape))
