"""Collecting sketches inside a differentiated function; knows no framework.

A layer is linear in its kernel, ``y = L_x(K)``. With the basis ``V`` in place of the
kernel, ``Y = A^T (A V) = L_x^T(L_x(V))``: one pass of the layer's own map and its
transpose, for dense and convolutional layers alike, without unfolding patches.

A *rider* (the basis and three zeros) is differentiated beside the parameters. An
identity on the layer's input, with a derivative of its own, returns ``Y``, the count,
the trace and the total as the rider's cotangents. They are sums over samples, so the
statistics are reduced over devices and micro-batches like any gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_optax import _eigenbasis, _spectral
from dsbp_optax._basis import power_iteration
from dsbp_optax._eigenbasis import Layer, Refresh
from dsbp_optax._layout import MatrixView
from dsbp_optax._statistics import Sketch
from dsbp_optax._types import Array, PyTree

_HIGHEST = jax.lax.Precision.HIGHEST


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
    samples. The cotangents of the others are ``Y``, ``|A|^2`` and the sum of samples,
    that of `coordinates`, where there are any, the kernel's gradient in the basis.
    """

    basis: Array
    count: Array
    trace: Array
    total: Array
    coordinates: Array | None = None


def make_riders(opt_state: PyTree) -> dict[str, Rider]:
    """A rider for each projected kernel of each spectral state in `opt_state`.

    Keys are parameter paths, with the suffix of the transformation they serve.
    """
    riders = {}
    for state in _spectral.find_states(opt_state):
        for path, layer in _spectral.split_layers(state).items():
            key = path + _spectral.STATES[type(state)]
            if key in riders:
                raise ValueError(
                    f"two spectral transformations of one kind hold a basis for "
                    f"'{path}'. Remedy: give each its own parameters with "
                    "optax.masked or optax.partition."
                )
            empty = _spectral.empty_sketch(layer.basis, layer.spectrum)
            collect = _spectral.collects(state, path)
            count = jnp.broadcast_to(collect, empty.count.shape)
            riders[key] = Rider(
                layer.basis, count.astype(layer.basis.dtype), empty.trace, empty.total
            )
    return riders


def to_sketches(cotangents: Mapping[str, Rider], tapped: set[str]) -> dict[str, Sketch]:
    """Statistics by path out of the riders' cotangents, of those that were tapped."""
    return {
        key: Sketch(c.basis, c.count, c.trace, c.total)
        for key, c in cotangents.items()
        if key in tapped
    }


def observe_input(linear: LinearMap, x: Array, rider: Rider) -> Array:
    """`x` itself; its sketch becomes the cotangent of `rider`."""
    return _tap(linear.apply, linear.batch, x, x, _core_form(rider, linear, "input"))


def observe_output(linear: LinearMap, y: Array, rider: Rider) -> Array:
    """`y` itself, for riders on the output side; `y` includes the bias."""
    core = _core_form(rider, linear, "output")
    outputs = core.basis.shape[linear.batch : -1]

    def apply(y: Array, v: Array) -> Array:
        rows = y.reshape(*y.shape[: y.ndim - len(outputs)], -1)
        columns = v.reshape(*v.shape[: linear.batch], -1, v.shape[-1])
        spread = rows.ndim - linear.batch - 2
        for _ in range(spread):
            columns = columns[..., None, :, :]
        return jnp.matmul(rows, columns, precision=_HIGHEST)

    return _tap(apply, linear.batch, y, y, core)


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


def observe(
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    linear: LinearMap,
    kernel: tuple[int, ...],
    riders: Mapping[str, Rider],
    probe: set[str] | None = None,
) -> Any:
    """The layer's own result, its input or output observed on the way.

    Args:
      call: the layer's call.
      args: its arguments; the first one is the input.
      kwargs: its keywords; the first one is the input where `args` is empty.
      linear: how the layer acts.
      kernel: the shape of its kernel.
      riders: the riders on this kernel, by key.
      probe: takes note of kernels that need no gradient of their own; the result is
        then of the right shape only, and hangs on the input alone.
    """
    outputs, held = [], {}
    for key, rider in riders.items():
        if rider_side(key, rider, linear, kernel) == "output":
            outputs.append(dataclasses.replace(rider, coordinates=None))
        elif rider.coordinates is not None:
            held[key] = rider
        elif args:
            args = (observe_input(linear, args[0], rider), *args[1:])
        else:
            name, x = next(iter(kwargs.items()))
            kwargs = {**kwargs, name: observe_input(linear, x, rider)}
    y = call(*args, **kwargs)
    for rider in outputs:
        y = observe_output(linear, y, rider)
    for rider in held.values():
        y = take_coordinates(linear, first_argument(args, kwargs), y, rider)
    if probe is None or not held:
        return y
    probe.update(held)
    return jnp.zeros_like(y) + 0 * jnp.sum(first_argument(args, kwargs)).astype(y.dtype)


def first_argument(args: Any, kwargs: Any) -> Any:
    """The input of a layer: the first argument, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def take_coordinates(linear: LinearMap, x: Array, y: Array, rider: Rider) -> Array:
    """`y` itself; the cotangent of `rider` holds ``V^T G`` and the sketch.

    As if the layer were ``y = L_x(K) + L_x(V) S`` at ``S = 0``, differentiated with
    respect to ``S``: what is kept for the backward pass is ``L_x(V)``, of k columns,
    and the sketch, in the place of ``x``.
    """
    core = _core_form(rider, linear, "input")
    return _take(linear.apply, linear.batch, y, x, core)


def find_rule(
    rules: Mapping[type, Any], kind: type
) -> Callable[[Any], LinearMap | None]:
    """The rule of a layer type: its own, or that of a class whose call it inherits."""
    for parent in kind.__mro__:
        if parent in rules:
            rule: Callable[[Any], LinearMap | None] = rules[parent]
            return rule
        if "__call__" in vars(parent):
            break
    return lambda layer: None


def check_rules(rules: Mapping[Any, Any] | None) -> dict[type, Any]:
    """Rules of the user's own, or an error that says which is not one."""
    for kind, rule in (rules or {}).items():
        if not isinstance(kind, type) or not callable(rule):
            raise TypeError(
                f"rules: got {kind!r}: {rule!r}, expected a layer class and a function "
                "(layer) -> LinearMap or None."
            )
    return dict(rules or {})


def parameter_path(key: str) -> str:
    """The parameter that a rider belongs to."""
    return key.split("#")[0]


def no_rule(key: str) -> str:
    """Says that a kernel falls back to the basis of its gradient."""
    return (
        f"'{key}': no rule says how its layer acts through this kernel; its basis "
        "comes from the gradient. Remedy: pass rules={LayerType: rule}, "
        "rule(layer) -> LinearMap, to value_and_grad."
    )


def _core_form(rider: Rider, linear: LinearMap, side: str) -> Rider:
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(
    apply: Callable[[Array, Array], Array],
    batch: int,
    passed: Array,
    observed: Array,
    rider: Rider,
) -> Array:
    del apply, batch, observed, rider
    return passed


def _tap_fwd(
    apply: Any, batch: int, passed: Array, observed: Array, rider: Rider
) -> Any:
    del apply, batch
    return passed, (observed, rider)


def _tap_bwd(apply: Any, batch: int, saved: Any, cotangent: Array) -> Any:
    observed, rider = saved

    def sketch(observed: Array, rider: Rider) -> Rider:
        return sketch_layer(apply, batch, observed, rider)

    def nothing(observed: Array, rider: Rider) -> Rider:
        del observed
        zeros: Rider = jax.tree.map(jnp.zeros_like, rider)
        return zeros

    collect = rider.count.reshape(-1)[0] > 0
    return cotangent, None, jax.lax.cond(collect, sketch, nothing, observed, rider)


_tap.defvjp(_tap_fwd, _tap_bwd)


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
    z = apply(jax.lax.stop_gradient(x).astype(rider.basis.dtype), rider.basis)
    seen = dataclasses.replace(rider, coordinates=None)

    def sketch(x: Array, seen: Rider) -> Rider:
        return sketch_layer(apply, batch, x, seen)

    def nothing(x: Array, seen: Rider) -> Rider:
        del x
        zeros: Rider = jax.tree.map(jnp.zeros_like, seen)
        return zeros

    collect = rider.count.reshape(-1)[0] > 0
    return y, (z, jax.lax.cond(collect, sketch, nothing, x, seen))


def _take_bwd(apply: Any, batch: int, saved: Any, cotangent: Array) -> Any:
    del apply
    z, seen = saved
    front, rank, outputs = z.shape[:batch], z.shape[-1], cotangent.shape[z.ndim - 1 :]
    samples = z.reshape(*front, -1, rank)
    deltas = cotangent.astype(z.dtype).reshape(*samples.shape[:-1], -1)
    product = jnp.einsum("...nm,...nk->...mk", deltas, samples)
    coordinates = product.reshape(*front, *outputs, rank)
    return cotangent, None, dataclasses.replace(seen, coordinates=coordinates)


_take.defvjp(_take_fwd, _take_bwd)


def sketch_layer(
    apply: Callable[[Array, Array], Array], batch: int, x: Array, rider: Rider
) -> Rider:
    """``Y = L_x^T(L_x(V))``, the number of samples, ``|A|^2`` and the sum of samples.

    Args:
      apply: the layer's linear map.
      batch: leading stacked axes of kernel and output.
      x: the layer's input, of any dtype.
      rider: basis ``(*batch, *inputs, k)`` and three arrays of width 1.

    Returns:
      The cotangents in the place of what they are the cotangents of.
    """
    basis = rider.basis
    x = jax.lax.stop_gradient(x).astype(basis.dtype)
    z = apply(x, basis)
    one = jnp.ones((*z.shape[:-1], 1), basis.dtype)
    wide = jnp.concatenate([basis, basis[..., :1]], axis=-1)
    transpose = jax.linear_transpose(lambda kernel: apply(x, kernel), wide)
    (both,) = transpose(jnp.concatenate([z, one], axis=-1))
    squares = apply(x * x, jnp.ones_like(basis[..., :1]))
    trace = jnp.sum(squares, axis=tuple(range(batch, squares.ndim)))
    samples = z.size // (z.shape[-1] * max(1, trace.size))
    return Rider(
        basis=both[..., :-1],
        count=jnp.full_like(rider.count, samples),
        trace=trace.reshape(rider.trace.shape),
        total=both[..., -1:],
    )


def check_tapped(
    riders: Mapping[str, Any], tapped: set[str], seen: set[str]
) -> list[str]:
    """Riders whose layer ran but cannot be tapped; raises for layers that never ran.

    Args:
      riders: all riders of this step, by key.
      tapped: keys of the riders that were used.
      seen: paths of all parameters whose layer was called.
    """
    missing = sorted(set(riders) - tapped)
    lost = [key for key in missing if parameter_path(key) not in seen]
    if lost:
        raise ValueError(
            "no activations were seen for "
            + ", ".join(f"'{key}'" for key in lost)
            + ": the layer was not called inside the loss, or it was called through a "
            "function that was jit-compiled before, or the outermost module is itself "
            "a lifted class (nn.vmap(MLP), nn.scan(Block)). Remedy: call the model's "
            "own apply (not a jitted one) in the loss, put a lifted class inside a "
            "module of your own, or pass strict=False to let such kernels use the "
            "basis of their gradient."
        )
    return missing


def warm_start(
    collect: Callable[[PyTree], Mapping[str, Sketch]],
    opt_state: PyTree,
    iterations: int,
) -> PyTree:
    """`iterations` power steps of every basis on one batch, before training.

    Args:
      collect: ``opt_state -> sketches`` on the batch.
      opt_state: a fresh optimizer state.
      iterations: number of steps.
    """
    for _ in range(iterations):
        absorb = functools.partial(_absorb, sketches=collect(opt_state))
        opt_state = _spectral.map_states(absorb, opt_state)
    return opt_state


def _absorb(
    state: _spectral.SpectralState, sketches: Mapping[str, Sketch]
) -> _spectral.SpectralState:
    refresh = Refresh(1, 1, power_iteration, False, 0.0)
    basis, spectrum = dict(state.basis), dict(state.spectrum)
    for path, layer in _spectral.split_layers(state).items():
        sketch = sketches.get(path + _spectral.STATES[type(state)])
        if sketch is not None:
            view = _view_of(layer)
            gradient = jnp.zeros((*view.batch_shape, view.size, 1), layer.basis.dtype)
            new, _ = _eigenbasis.refresh_layer(layer, sketch, gradient, view, refresh)
            basis[path] = new.basis.astype(state.basis[path].dtype)
            spectrum[path] = new.spectrum
    return state._replace(basis=basis, spectrum=spectrum)


def _view_of(layer: Layer) -> MatrixView:
    """The view that a state's own shapes tell, columns collapsed."""
    shape, stacked = layer.basis.shape[:-1], layer.spectrum.trace.shape[:-1]
    batch = tuple(a for a, n in enumerate(stacked) if n > 1)
    rows = tuple(a for a, n in enumerate(shape) if n > 1 and a not in batch)
    columns = tuple(a for a in range(len(shape)) if a not in batch + rows)
    return MatrixView(shape, batch, rows, columns)
