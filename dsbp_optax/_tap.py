"""Collecting sketches inside a differentiated function; knows no framework.

An identity on a layer's input or output, with a derivative of its own, returns the
sketch as the cotangent of the layer's rider.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _eigenbasis, _sharding, _spectral
from dsbp_optax._basis import power_iteration
from dsbp_optax._coordinate_tap import take_coordinates
from dsbp_optax._eigenbasis import Layer, Refresh
from dsbp_optax._layout import MatrixView
from dsbp_optax._rider import (
    LinearMap,
    Rider,
    core_form,
    parameter_path,
    rider_side,
    sketch_if_asked,
)
from dsbp_optax._statistics import Sketch
from dsbp_optax._types import Array, PyTree

_HIGHEST = jax.lax.Precision.HIGHEST


def make_riders(opt_state: PyTree) -> dict[str, Rider]:
    """A rider for each projected kernel of each spectral state in `opt_state`.

    Keys are parameter paths, with the suffix of the transformation they serve.
    """
    if opt_state is None or isinstance(opt_state, optax.GradientTransformation):
        got = "nothing" if opt_state is None else "the optimizer itself"
        raise TypeError(
            f"opt_state: got {got}, expected the optimizer's state, by keyword. "
            "Remedy: value_and_grad(loss_fn)(params, batch, opt_state=opt_state), "
            "where opt_state = tx.init(params) at first."
        )
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
                layer.basis, count.astype(layer.basis.dtype), empty.trace
            )
    return riders


def to_sketches(cotangents: Mapping[str, Rider], tapped: set[str]) -> dict[str, Sketch]:
    """Statistics by path out of the riders' cotangents, of those that were tapped."""
    return {
        key: Sketch(c.basis, c.count, c.trace)
        for key, c in cotangents.items()
        if key in tapped
    }


def observe_input(linear: LinearMap, x: Array, rider: Rider) -> Array:
    """`x` itself; its sketch becomes the cotangent of `rider`."""
    return _tap(linear.apply, linear.batch, x, x, core_form(rider, linear, "input"))


def observe_output(linear: LinearMap, y: Array, rider: Rider) -> Array:
    """`y` itself, for riders on the output side; `y` includes the bias."""
    core = core_form(rider, linear, "output")
    outputs = core.basis.shape[linear.batch : -1]

    def apply(y: Array, v: Array) -> Array:
        rows = y.reshape(*y.shape[: y.ndim - len(outputs)], -1)
        columns = v.reshape(*v.shape[: linear.batch], -1, v.shape[-1])
        spread = rows.ndim - linear.batch - 2
        for _ in range(spread):
            columns = columns[..., None, :, :]
        return jnp.matmul(rows, columns, precision=_HIGHEST)

    return _tap(apply, linear.batch, y, y, core)


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


def no_rule(key: str) -> str:
    """Says that a kernel falls back to the basis of its gradient."""
    return (
        f"'{key}': no rule says how its layer acts through this kernel; its basis "
        "comes from the gradient. Remedy: pass rules={LayerType: rule}, "
        "rule(layer) -> LinearMap, to value_and_grad."
    )


def another(key: str) -> str:
    """Says that what a layer was called with could not be told to be this kernel."""
    return (
        f"'{key}': a layer of this name and shape was called with an array that cannot "
        "be told to be this parameter (one function that is compiled or checkpointed "
        "once for two sets of parameters, values that were taken apart); its basis "
        "comes from the gradient. Remedy: call the model's own apply on the "
        "differentiated parameters, cast or scaled at most, anew for each set."
    )


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
        return sketch_if_asked(apply, batch, observed, rider)

    return cotangent, None, _sharding.in_place(sketch, rider, observed, rider)


_tap.defvjp(_tap_fwd, _tap_bwd)


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
            "a lifted class (nn.vmap(MLP), nn.scan(Block)), or the model is of another "
            "framework than the adapter. Remedy: call the model's own apply (not a "
            "jitted one) in the loss, put a lifted class inside a module of your own, "
            "take dsbp_optax.linen for Linen and dsbp_optax.nnx for NNX (neither: pass "
            "Activations to update), or pass strict=False to let such kernels use the "
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
    refresh = Refresh(1, 1, power_iteration, 0.0)
    for _ in range(iterations):
        sketches = collect(opt_state)
        absorb = functools.partial(_absorb, sketches=sketches, refresh=refresh)
        opt_state = _spectral.map_states(absorb, opt_state)
    return opt_state


def _absorb(
    state: _spectral.SpectralState, sketches: Mapping[str, Sketch], refresh: Refresh
) -> _spectral.SpectralState:
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
