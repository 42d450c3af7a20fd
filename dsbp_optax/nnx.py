"""Activation statistics out of unedited Flax NNX models.

value_and_grad = dsbp_optax.nnx.value_and_grad(loss_fn, has_aux=True)
(loss, aux), grads, statistics = value_and_grad(model, batch, opt_state=optimizer)
optimizer.update(model, grads, statistics=statistics)
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from dsbp_optax import _held, _inputs, _layout, _origin, _recorder, _rider, _tap
from dsbp_optax._held import Displacement
from dsbp_optax._nnx_layers import RULES, LayerRule
from dsbp_optax._reading import Misread
from dsbp_optax._recorder import Facts, Recorder
from dsbp_optax._rider import LinearMap, Rider
from dsbp_optax._share import Groups
from dsbp_optax._types import Array, PyTree

__all__ = [
    "LayerRule",
    "LinearMap",
    "Probe",
    "find_shared_inputs",
    "make_grad_fn",
    "subspace_value_and_grad",
    "value_and_grad",
    "warm_start",
]

#: Where a watched layer holds the path of its kernel.
_PATH = "dsbp_path"
#: What follows the kernel's name where an observed layer holds it once more; behind it
#: in the alphabet, so that the kernel keeps its path.
_SAME = "_dsbp"


class Probe(nnx.Variable[Any]):
    """Carries a basis into a layer and its sketch out; only inside `value_and_grad`.

    A model that scans over stacked layers with `nnx.StateAxes` must give it the axis
    of the parameters::

        nnx.StateAxes({(nnx.Param, dsbp_optax.nnx.Probe): 0, ...: None})
    """


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: Any = nnx.Param,
    rules: Mapping[type, LayerRule] | None = None,
    strict: bool = True,
) -> Callable[..., Any]:
    """`flax.nnx.value_and_grad` that also returns the layers' activation statistics.

    Args:
      loss_fn: ``(model, *args, **kwargs) -> loss`` or ``(loss, aux)``.
      has_aux: as in `flax.nnx.value_and_grad`.
      wrt: filter of the variables to differentiate, as in `flax.nnx.Optimizer`.
      rules: layer type -> rule, for layers of your own; wins over the shipped ones.
      strict: whether it is an error when the layer of a projected kernel is never
        called, or has another input than the kernel whose basis it shares.

    Returns:
      ``(model, *args, opt_state, **kwargs) -> (value, grads, statistics)``, where
      ``opt_state`` may also be the `flax.nnx.Optimizer`. Value, gradients and changes
      to the model (batch statistics, rng counts) are those of
      `flax.nnx.value_and_grad`. ``statistics`` maps parameter paths to `Sketch`; on
      steps that refresh nothing it is zero and costs nothing.

    Raises:
      ValueError: at trace time, when a layer was not called, or does not have the input
        of the basis that it shares.

    Warns:
      UserWarning: at trace time, of kernels that the optimizer reads otherwise than
        their layers use them, with the `axes` that mend it, and of those that cannot be
        observed; their bases come from gradients.

    Cost: on q of every p steps, ``4 n d k`` FLOPs a layer.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(16, 8, rngs=nnx.Rngs(0)), jnp.ones((4, 16))
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> step = dsbp_optax.nnx.value_and_grad(lambda model, x: (model(x) ** 2).mean())
      >>> loss, grads, statistics = step(model, x, opt_state=optimizer)
      >>> _ = optimizer.update(model, grads, statistics=statistics)
    """
    every_rule = {**RULES, **_tap.check_rules(rules)}

    def wrapped(model: Any, *args: Any, opt_state: PyTree = None, **kwargs: Any) -> Any:
        _check_model(model, wrt)
        state = _state_of(opt_state)
        riders, shared = _tap.make_riders(state), _inputs.shared_in(state)
        call = _Call(loss_fn, model, args, kwargs, wrt, every_rule, riders)

        def attempt(facts: Facts) -> Any:
            recorder = call.recorder(_inputs.members_of(shared), facts)
            fitting = facts.fitting(riders)
            differentiate = _differentiate(loss_fn, has_aux, wrt, fitting, recorder)
            return recorder, *differentiate(model, *args, **kwargs)

        recorder, value, grads, cotangents = call.settle(attempt)
        recorder.finish(recorder.facts.fitting(riders), strict, shared)
        return value, grads, _tap.to_sketches(cotangents, recorder.tapped)

    return wrapped


def subspace_value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: Any = nnx.Param,
    rules: Mapping[type, LayerRule] | None = None,
    strict: bool = True,
) -> Callable[..., Any]:
    """`value_and_grad` that never forms the gradient of a projected kernel.

    Projected kernels are held constant. Their layers keep ``A V`` (``n x k``) for the
    backward pass in the place of their inputs ``A``, and give the coordinates
    ``V^T G`` (``k x m``) in the place of the gradient ``G``. For optimizers without a
    residual rule, ``residual=None``; others refuse coordinates.

    Args:
      loss_fn: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.
      wrt: as for `value_and_grad`.
      rules: as for `value_and_grad`.
      strict: as for `value_and_grad`, and whether it is an error when the loss
        depends on a projected kernel elsewhere than through its layer.

    Returns:
      ``(model, *args, opt_state, displacement=None, **kwargs) -> (value, grads,
      statistics)``, with `dsbp_optax.Coordinates` in the place of the gradients of
      projected kernels: to rounding what `dsbp_optax.project_gradients` makes of whole
      ones. Kernels whose layer has no rule, and bases on the output side, get whole
      gradients. A displacement is as in `dsbp_optax.linen`.

    Raises:
      ValueError: at trace time, as `value_and_grad`; when the loss has a penalty on,
        or another use of, a projected kernel; when the state holds no projection.

    Cost: for a layer ``4 n d m`` FLOPs and ``n k`` numbers kept, where the whole
    gradient takes ``6 n d m`` and ``n d``; the loss is traced once more.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(16, 8, rngs=nnx.Rngs(0)), jnp.ones((4, 16))
      >>> tx = dsbp_optax.subspace_adamw(1e-3, rank=2)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> step = dsbp_optax.nnx.subspace_value_and_grad(
      ...     lambda model, x: (model(x) ** 2).mean())
      >>> loss, grads, statistics = step(model, x, opt_state=optimizer)
      >>> _ = optimizer.update(model, grads, statistics=statistics)
    """
    every_rule = {**RULES, **_tap.check_rules(rules)}

    def wrapped(
        model: Any,
        *args: Any,
        opt_state: PyTree = None,
        displacement: Displacement = None,
        **kwargs: Any,
    ) -> Any:
        _check_model(model, wrt)
        state = _state_of(opt_state)
        leaves, treedef = _layout.flatten_with_paths(nnx.state(model, wrt))
        owners, shared = _tap.make_riders(state), _inputs.shared_in(state)
        riders = _held.add_coordinates(owners, state, leaves, displacement)

        call = _Call(loss_fn, model, args, kwargs, wrt, every_rule, riders)

        def attempt(facts: Facts) -> Any:
            fitting = facts.fitting(riders)
            held = _held.find_held(call.probed(has_aux, fitting, facts), leaves, strict)
            recorder = call.recorder(_inputs.members_of(shared), facts)
            free = nnx.All(wrt, lambda path, _: "/".join(map(str, path)) not in held)
            taken = _held.release(fitting, held, facts.fitting(owners))
            differentiate = _differentiate(loss_fn, has_aux, free, taken, recorder)
            return recorder, held, *differentiate(model, *args, **kwargs)

        recorder, held, value, rest, cotangents = call.settle(attempt)
        recorder.finish(recorder.facts.fitting(owners), strict, shared)
        grads, _ = _layout.flatten_with_paths(rest)
        joined = treedef.unflatten(_held.join(leaves, grads, cotangents, held))
        return value, joined, _tap.to_sketches(cotangents, recorder.tapped & {*owners})

    return wrapped


def _differentiate(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    wrt: Any,
    riders: Mapping[str, Rider],
    recorder: _Recorder,
) -> Callable[..., Any]:
    """``(model, ...) -> (value, gradients, cotangents of the riders)``."""
    differentiate = nnx.value_and_grad(
        loss_fn, argnums=nnx.DiffState(0, nnx.Any(wrt, Probe)), has_aux=has_aux
    )

    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        copy = _observed_copy(model, riders, recorder)
        with _recording(recorder):
            value, both = differentiate(copy, *args, **kwargs)
        nnx.update(model, nnx.state(copy, nnx.Not(Probe)))
        probes, grads = nnx.split_state(both, Probe, ...)
        return value, grads, _cotangents(probes)

    return call


class _Call:
    """One call of a loss, which is traced as often as it takes to know its layers."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        model: Any,
        args: Any,
        kwargs: Any,
        wrt: Any,
        rules: Mapping[type, LayerRule],
        riders: Mapping[str, Rider],
    ) -> None:
        self.loss_fn, self.model, self.wrt = loss_fn, model, wrt
        self.args, self.kwargs = args, kwargs
        self.rules, self.riders = rules, riders
        self.kernels, _ = _layout.flatten_with_paths(_pure(nnx.state(model, wrt)))

    def recorder(
        self, watched: Collection[str], facts: Facts, probe: set[str] | None = None
    ) -> _Recorder:
        found = _Recorder(self.rules, watched, probe, facts)
        found.whole, found.kernels = self.riders, self.kernels
        return found

    def probed(
        self, has_aux: bool, riders: Mapping[str, Rider], facts: Facts
    ) -> Callable[[dict[str, Any], set[str]], Array]:
        """``(parameters by path, a set to note held kernels in) -> loss``."""
        copy = _observed_copy(self.model, riders, self.recorder((), facts))
        graphdef, *parts = nnx.split(copy, self.wrt, ...)
        treedef, rest = _layout.flatten_with_paths(parts[0])[1], _pure(parts[1])

        def loss(leaves: dict[str, Any], held: set[str]) -> Array:
            merged = nnx.merge(graphdef, treedef.unflatten(leaves.values()), rest)
            with _recording(self.recorder((), facts, held)):
                found = self.loss_fn(merged, *self.args, **self.kwargs)
            value: Array = found[0] if has_aux else found
            return value

        return loss

    def watch(self, paths: Collection[str], facts: Facts) -> _Recorder:
        """What happens to these kernels, by a trace on shapes, without riders."""
        recorder = self.recorder(paths, facts)
        copy = nnx.clone(self.model)
        recorder.watch(copy)
        graphdef, values = nnx.split(copy)

        def traced(values: PyTree, args: Any, kwargs: Any) -> None:
            self.loss_fn(nnx.merge(graphdef, values), *args, **kwargs)

        with _recording(recorder), _origin.apart():
            _inputs.trace(traced, values, self.args, self.kwargs)
        return recorder

    def settle(self, attempt: Callable[[Facts], Any]) -> Any:
        """`_recorder.settle` of this call, whose layers are known by being objects."""
        return _recorder.settle(attempt, dict, self._misread)

    def _misread(self, facts: Facts) -> dict[str, Misread]:
        """Of kernels with riders, found without them: they would not fit."""
        paths = {_rider.parameter_path(key) for key in self.riders}
        return self.watch(paths, facts).misread


def _observed_copy(model: Any, riders: Mapping[str, Rider], recorder: _Recorder) -> Any:
    """A copy whose layers are watched and carry riders."""
    copy = nnx.clone(model)
    recorder.watch(copy)
    for key, rider in riders.items():
        _attach(copy, key, rider, recorder)
    return copy


@contextlib.contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    """Layers that are called meanwhile report to `recorder`."""
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)


def _check_model(model: Any, wrt: Any) -> None:
    """There must be something to differentiate: Linen's parameters hold no Variable."""
    if not jax.tree.leaves(nnx.state(model, wrt)):
        raise TypeError(
            f"model: got {type(model).__name__} without variables to differentiate, "
            "expected an nnx.Module. Remedy: for Flax Linen dsbp_optax.linen."
        )


def _state_of(opt_state: PyTree) -> PyTree:
    """The pure optimizer state, of an `flax.nnx.Optimizer` too."""
    held = opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state
    return _pure(held)


def warm_start(
    loss_fn: Callable[..., Any],
    model: Any,
    *args: Any,
    opt_state: PyTree,
    power_iterations: int = 5,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    rules: Mapping[type, LayerRule] | None = None,
    strict: bool = True,
    **kwargs: Any,
) -> PyTree:
    """All power iterations but the last on the first batch, as the paper does.

    The first training step on the same batch makes the last one, before its
    projection. Optional: without it the first steps do one iteration each.

    Args:
      loss_fn: as for `value_and_grad`.
      model: the model; it is not changed.
      *args: the first batch.
      opt_state: an optimizer state, or a `flax.nnx.Optimizer`, which is updated.
      power_iterations: q of the optimizer.
      has_aux: as for `value_and_grad`.
      wrt: as for `value_and_grad`.
      rules: as for `value_and_grad`.
      strict: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      The optimizer state with warm bases.
    """
    step = value_and_grad(loss_fn, has_aux, wrt=wrt, rules=rules, strict=strict)
    graphdef, values = nnx.split(model)

    @jax.jit
    def collect(opt_state: PyTree, values: PyTree) -> Any:
        copy = nnx.merge(graphdef, values)
        return step(copy, *args, opt_state=opt_state, **kwargs)[-1]

    owner = opt_state if isinstance(opt_state, nnx.Optimizer) else None
    state = _pure(opt_state if owner is None else owner.opt_state)
    warm = _tap.warm_start(
        lambda state: collect(state, values), state, power_iterations - 1
    )
    if owner is not None:
        nnx.update(owner.opt_state, nnx.state(warm))
    return warm


def make_grad_fn(
    loss_fn: Callable[..., Any],
    model: Any,
    *args: Any,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    opt_state: PyTree | None = None,
    rules: Mapping[type, LayerRule] | None = None,
    **kwargs: Any,
) -> Callable[[PyTree, Any], PyTree]:
    """The ``grad_fn`` that `subspace_sam` and `optax.contrib.sam` ask for.

    Args:
      loss_fn: as for `value_and_grad`.
      model: the model; neither its parameters nor its batch statistics change.
      *args: the batch.
      has_aux: as for `value_and_grad`.
      wrt: as for `value_and_grad`.
      opt_state: as for `subspace_value_and_grad`, whose gradients are then taken; None
        for whole ones.
      rules: as for `subspace_value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      ``(parameters, i) -> gradients``, both as `flax.nnx.Optimizer.update` handles
      them.

    Cost: none; each call of the result is one gradient.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(16, 8, rngs=nnx.Rngs(0)), jnp.ones((4, 16))
      >>> tx = dsbp_optax.subspace_sam(dsbp_optax.dsbp_sgd(0.1, rank=2))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss_fn = lambda model, x: (model(x) ** 2).mean()
      >>> step = dsbp_optax.nnx.value_and_grad(loss_fn)
      >>> loss, grads, statistics = step(model, x, opt_state=optimizer)
      >>> grad_fn = dsbp_optax.nnx.make_grad_fn(loss_fn, model, x)
      >>> _ = optimizer.update(model, grads, grad_fn=grad_fn, statistics=statistics)
    """
    graphdef, *parts = nnx.split(model, wrt, ...)
    rest = _pure(parts[1])

    if opt_state is None:
        where = nnx.DiffState(0, wrt)
        differentiate = nnx.value_and_grad(loss_fn, argnums=where, has_aux=has_aux)
    else:
        differentiate = subspace_value_and_grad(loss_fn, has_aux, wrt=wrt, rules=rules)

    def grad_fn(params: PyTree, displacement: Any) -> PyTree:
        there, extra = nnx.merge(graphdef, params, rest), dict(kwargs)
        if opt_state is not None:
            extra |= {"opt_state": opt_state, "displacement": displacement}
        return _pure(differentiate(there, *args, **extra)[1])

    return grad_fn


def find_shared_inputs(
    loss_fn: Callable[..., Any],
    model: Any,
    *args: Any,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    rules: Mapping[type, LayerRule] | None = None,
    **kwargs: Any,
) -> Groups:
    """Which kernels have one and the same input, so that one basis serves them all.

    Found by tracing the loss on shapes: layers that are handed the same object, and
    read samples off it alike. In self-attention query, key and value come out as one
    group, in cross-attention key and value do.

    Args:
      loss_fn: as for `value_and_grad`.
      model: the model; it is not changed.
      *args: a batch, or its shapes.
      has_aux: as for `value_and_grad`; a loss of either form is only traced.
      wrt: as for `value_and_grad`.
      rules: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      Groups of parameter paths, for ``share=`` of an optimizer.

    Raises:
      TypeError: for `rules` that are none.

    Cost: one abstract trace of the loss; nothing is computed.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: (model(x) ** 2).mean()
      >>> dsbp_optax.nnx.find_shared_inputs(loss_fn, model, jnp.ones((4, 16, 8)))
      (('key/kernel', 'query/kernel', 'value/kernel'),)
    """
    del has_aux
    every_rule = {**RULES, **_tap.check_rules(rules)}
    call = _Call(loss_fn, model, args, kwargs, wrt, every_rule, {})
    return call.watch(call.kernels, Facts()).calls.groups(call.kernels)


class _Recorder(Recorder):
    """The rules of one call, what it tapped, and what entered the watched layers."""

    def watch(self, model: Any) -> None:
        for path in self.calls.watched:
            layer = _observed_layer(model, path, self)
            if layer is not None:
                setattr(layer, _PATH, path)


_RECORDER: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar(
    "dsbp_optax.nnx recorder", default=None
)


def _observed_layer(model: Any, path: str, recorder: _Recorder) -> Any:
    """The layer that owns the kernel at `path`, its call observed; None if untappable.

    The model is a copy of the user's, and only this instance changes its class.
    """
    layer = _find(model, path)
    kind = type(layer)
    rule = _tap.find_rule(recorder.rules, getattr(kind, "__wrapped_type__", kind))
    linear = None if layer is None else rule(layer)
    if linear is None or linear.parameter != path.rpartition("/")[2]:
        return None
    if not hasattr(kind, "__wrapped_type__"):
        observed: Callable[[Any], type] = _observed_class
        object.__setattr__(layer, "__class__", observed(kind))
        setattr(layer, linear.parameter + _SAME, getattr(layer, linear.parameter))
    return layer


def _attach(model: Any, key: str, rider: Rider, recorder: _Recorder) -> None:
    """Hang a probe on the layer that owns a kernel."""
    path = _rider.parameter_path(key)
    layer = _observed_layer(model, path, recorder)
    if layer is None:
        recorder.seen.add(path)
        return
    name = "dsbp_" + "".join(c if c.isalnum() else "_" for c in key)
    setattr(layer, name, Probe(rider, key=key))


def _find(model: Any, path: str) -> Any:
    """The module that owns the parameter at `path`, or None."""
    node = model
    for part in path.split("/")[:-1]:
        if hasattr(node, part):
            node = getattr(node, part)
        elif hasattr(node, "__getitem__"):
            node = node[int(part) if part.isdigit() else part]
        else:
            return None
    return node


@functools.cache
def _observed_class(kind: type) -> type:
    """A subclass whose call observes its input and output; one for each layer type."""

    class Observed(kind):  # type: ignore[misc]  # its base is known at run time only
        __wrapped_type__ = kind

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _observe(self, super().__call__, args, kwargs)

    Observed.__name__, Observed.__qualname__ = kind.__name__, kind.__qualname__
    return Observed


def _observe(layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    recorder = _RECORDER.get()
    if recorder is None:
        return call(*args, **kwargs)
    linear = _tap.find_rule(recorder.rules, type(layer).__wrapped_type__)(layer)
    assert linear is not None  # else no probe was attached
    variable = getattr(layer, linear.parameter)
    probes = [v for v in vars(layer).values() if isinstance(v, Probe)]
    riders = {probe.get_metadata()["key"]: _value(probe) for probe in probes}
    if variable is not getattr(layer, linear.parameter + _SAME):  # It was replaced.
        recorder.doubtful.update(map(_rider.parameter_path, riders))
        return call(*args, **kwargs)
    kernel = _value(variable).shape
    stacked = {k: r for k, r in riders.items() if r.basis.ndim > len(kernel) + 1}
    if stacked:
        raise ValueError(
            f"{sorted(stacked)}: a transformation slices the kernel to {kernel} but "
            "not its probe. Remedy: give it the axis of the parameters, e.g. "
            "nnx.StateAxes({(nnx.Param, dsbp_optax.nnx.Probe): 0, ...: None})."
        )
    riders = recorder.fitting(riders, linear, kernel)
    if (path := getattr(layer, _PATH, None)) is not None:
        recorder.calls.note(path, linear, kernel, args, kwargs)
        recorder.compare(path, linear, kernel)
    return _tap.observe(call, args, kwargs, linear, kernel, riders, recorder.probe)


def _cotangents(probes: Any) -> dict[str, Rider]:
    leaves = jax.tree.leaves(probes, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {leaf.get_metadata()["key"]: _value(leaf) for leaf in leaves}


def _value(variable: Any) -> Any:
    """The value of a Variable; flax before 0.12 has no `get_value`."""
    getter = getattr(variable, "get_value", None)
    return variable.value if getter is None else getter()


def _pure(tree: PyTree) -> PyTree:
    """`tree` with the arrays in the place of their Variables."""
    return jax.tree.map(
        lambda x: _value(x) if isinstance(x, nnx.Variable) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
