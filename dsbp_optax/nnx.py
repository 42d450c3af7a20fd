"""Activation statistics out of unedited Flax NNX models.

value_and_grad = dsbp_optax.nnx.value_and_grad(loss_fn, has_aux=True)
(loss, aux), grads, statistics = value_and_grad(model, batch, opt_state=optimizer)
optimizer.update(model, grads, statistics=statistics)
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ModuleNotFoundError as error:
    from dsbp_optax.core.checks import missing

    raise missing("flax", "flax") from error

from dsbp_optax.capture import coordinates, recorder, state
from dsbp_optax.capture.coordinates import Displacement
from dsbp_optax.capture.inspection import Inspection
from dsbp_optax.capture.nnx_layers import RULES, LayerRule
from dsbp_optax.capture.recorder import Recorder
from dsbp_optax.capture.tap import LinearMap, Rider, parameter_path
from dsbp_optax.core import paths
from dsbp_optax.core.paths import Groups
from dsbp_optax.linalg.types import Array, PyTree

__all__ = [
    "LayerRule",
    "LinearMap",
    "Probe",
    "find_shared_inputs",
    "inspect",
    "make_grad_fn",
    "subspace_value_and_grad",
    "value_and_grad",
    "warm_start",
]
#: What follows the kernel's name where a layer, in which it is replaced before a call,
#: holds it once more; behind it in the alphabet, so that the kernel keeps its path.
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
    strict: bool = False,
) -> Callable[..., Any]:
    """`flax.nnx.value_and_grad` that also returns the layers' activation statistics.

    Args:
      loss_fn: ``(model, *args, **kwargs) -> loss`` or ``(loss, aux)``.
      has_aux: as in `flax.nnx.value_and_grad`.
      wrt: filter of the variables to differentiate, as in `flax.nnx.Optimizer`.
      rules: layer type -> rule, for layers of your own; wins over the shipped ones.
      strict: as for `dsbp_optax.linen.value_and_grad`.

    Returns:
      ``(model, *args, opt_state, **kwargs) -> (value, grads, statistics)``, where
      ``opt_state`` may also be the `flax.nnx.Optimizer`. Value, gradients and changes
      to the model (batch statistics, rng counts) are those of
      `flax.nnx.value_and_grad`. ``statistics`` maps parameter paths to `Sketch`; on
      steps that refresh nothing it is zero and costs nothing. None where `opt_state`
      holds no state of this package.

    Raises:
      ValueError: at trace time, where `strict`.

    Warns:
      UserWarning: at trace time, once, of kernels that the optimizer reads otherwise
        than their layers use them, with the `axes` that mend it, and of those that
        cannot be observed, each with the reason; their bases come from gradients.

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
    every_rule = {**RULES, **recorder.check_rules(rules)}

    def wrapped(model: Any, *args: Any, opt_state: PyTree = None, **kwargs: Any) -> Any:
        loss = _Loss(loss_fn, has_aux, every_rule, wrt, model, args, kwargs)
        return recorder.collect(loss, _state_of(opt_state), strict)

    return wrapped


def subspace_value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: Any = nnx.Param,
    rules: Mapping[type, LayerRule] | None = None,
    strict: bool = False,
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
      strict: as for `value_and_grad`, and for a loss that depends on a projected kernel
        elsewhere than through its layer; else this kernel gets its whole gradient.

    Returns:
      ``(model, *args, opt_state, displacement=None, **kwargs) -> (value, grads,
      statistics)``, with `dsbp_optax.Coordinates` in the place of the gradients of
      projected kernels: to rounding what `dsbp_optax.project_gradients` makes of whole
      ones. Kernels whose layer has no rule, and bases on the output side, get whole
      gradients. A displacement is as in `dsbp_optax.linen`.

    Raises:
      ValueError: at trace time, as `value_and_grad`; when the state holds no
        projection.

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
    every_rule = {**RULES, **recorder.check_rules(rules)}

    def wrapped(
        model: Any,
        *args: Any,
        opt_state: PyTree = None,
        displacement: Displacement = None,
        **kwargs: Any,
    ) -> Any:
        loss = _Loss(loss_fn, has_aux, every_rule, wrt, model, args, kwargs)
        state = _state_of(opt_state)
        return recorder.collect(loss, state, strict, True, displacement)

    return wrapped


def _check_model(model: Any) -> None:
    """Raise for what holds modules, or their arrays, and is none."""
    if isinstance(model, nnx.State):
        raise TypeError(
            "model: got an nnx.State, whose layers nobody sees, expected an "
            "nnx.Module. Remedy: model = nnx.merge(graphdef, params, rest, copy=True) "
            "first, a loss of that model, and tx.update(grads, opt_state, params, "
            "statistics=statistics) as before."
        )
    if isinstance(model, dict | list | tuple):
        kind = "nnx.Dict" if isinstance(model, dict) else "nnx.List"
        raise TypeError(
            f"model: got a {type(model).__name__}, expected an nnx.Module. Remedy: one "
            f"that holds them, such as {kind}(...), also for nnx.Optimizer."
        )


class _Loss:
    """One call of a loss, see `recorder.Loss`."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        has_aux: bool,
        rules: Mapping[type, LayerRule],
        wrt: Any,
        model: Any,
        args: Any,
        kwargs: Any,
    ) -> None:
        parameters = nnx.state(model, wrt)
        if not jax.tree.leaves(parameters):  # Linen's parameters hold no Variable.
            raise TypeError(
                f"model: got {type(model).__name__} without variables to "
                "differentiate, expected an nnx.Module. Remedy: for Flax Linen "
                "dsbp_optax.linen."
            )
        _check_model(model)
        self.loss_fn, self.has_aux, self.rules = loss_fn, has_aux, rules
        self.wrt, self.model, self.args, self.kwargs = wrt, model, args, kwargs
        self.replaced: set[str] = set()  # Kernels not called as they are.
        self.leaves, _ = paths.flatten(_pure(parameters))
        _, self.treedef = paths.flatten(parameters)

    def evaluate(self, leaves: dict[str, Any], recorder: Recorder) -> Array:
        copy = self._observed(recorder)
        graphdef, *parts = nnx.split(copy, self.wrt, ...)
        treedef, rest = paths.flatten(parts[0])[1], _pure(parts[1])
        merged = nnx.merge(graphdef, treedef.unflatten(leaves.values()), rest)
        args, kwargs = _copied((self.args, self.kwargs))
        with self._recording(recorder):
            found = self.loss_fn(merged, *args, **kwargs)
        value: Array = found[0] if self.has_aux else found
        return value

    def differentiate(self, recorder: Recorder, held: Collection[str]) -> Any:
        wrt = self.wrt
        if held:
            wrt = nnx.All(wrt, lambda path, _: "/".join(map(str, path)) not in held)
        differentiate = nnx.value_and_grad(
            self.loss_fn,
            argnums=nnx.DiffState(0, nnx.Any(wrt, Probe)),
            has_aux=self.has_aux,
        )
        copy = self._observed(recorder)
        with self._recording(recorder):
            value, both = differentiate(copy, *self.args, **self.kwargs)
        nnx.update(self.model, nnx.state(copy, nnx.Not(Probe)))
        probes, grads = nnx.split_state(both, Probe, ...)
        cotangents: dict[str, Rider] = {}
        for probe in jax.tree.leaves(probes, is_leaf=_is_variable):
            key, one = probe.get_metadata()["key"], _value(probe)
            if key in cotangents:  # Layers with one kernel.
                one = jax.tree.map(jnp.add, cotangents[key], one)
            cotangents[key] = one
        return value, grads, cotangents

    def join(
        self, grads: Any, cotangents: Mapping[str, Rider], held: Collection[str]
    ) -> PyTree:
        if not held:
            return grads
        found, _ = paths.flatten(grads)
        return self.treedef.unflatten(
            coordinates.join(self.leaves, found, cotangents, held)
        )

    def _observed(self, recorder: Recorder) -> Any:
        """A copy whose layers are observed and carry probes.

        In a trace that inspects these hold markers, which tell whether anything else
        computes with them, and whether the user's transformations treat a kernel and
        its rider alike.
        """
        copy, notes = nnx.clone(self.model), recorder.notes
        carried: dict[str, dict[str, Any]] = defaultdict(dict)
        if notes is not None:
            carried |= {path: {path: x} for path, x in notes.markers.items()}
        labels = recorder.labels.values()
        rewritten = {one.path for one in labels if one and not one.exact}
        for key, rider in recorder.riders.items():
            path = parameter_path(key)
            carried[path][key] = rider.plain if path in rewritten else rider
        for path, layer, name in _layers(copy, self.rules):
            if path not in carried:
                continue
            observed: Callable[[Any], type] = _observed_class
            object.__setattr__(layer, "__class__", observed(type(layer)))
            if notes is not None or path in self.replaced:
                setattr(layer, name + _SAME, getattr(layer, name))
            for key, one in carried[path].items():
                name = "dsbp_" + "".join(c if c.isalnum() else "_" for c in key)
                setattr(layer, name, Probe(one, key=key))
        return copy

    @contextlib.contextmanager
    def _recording(self, recorder: Recorder) -> Iterator[None]:
        """Layers that are called meanwhile report to `recorder`."""
        token = _RECORDER.set((self.rules, recorder, self.replaced))
        try:
            yield
        finally:
            _RECORDER.reset(token)


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
    strict: bool = False,
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
    warm = state.warm_start(
        lambda cold: collect(cold, values), _state_of(opt_state), power_iterations - 1
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

    Args:
      loss_fn: as for `value_and_grad`.
      model: the model; it is not changed.
      *args: a batch, or its shapes.
      has_aux: as for `value_and_grad`.
      wrt: as for `value_and_grad`.
      rules: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      ``inspect(...).shared``: groups of parameter paths, for ``share=`` of a
      `dsbp_optax.Basis`. Errors and cost are those of `inspect`.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: (model(x) ** 2).mean()
      >>> dsbp_optax.nnx.find_shared_inputs(loss_fn, model, jnp.ones((4, 16, 8)))
      (('key/kernel', 'query/kernel', 'value/kernel'),)
    """
    return inspect(
        loss_fn, model, *args, has_aux=has_aux, wrt=wrt, rules=rules, **kwargs
    ).shared


def inspect(
    loss_fn: Callable[..., Any],
    model: Any,
    *args: Any,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    rules: Mapping[type, LayerRule] | None = None,
    **kwargs: Any,
) -> Inspection:
    """What a loss tells of the kernels in it: axes, common inputs, statistics.

    As `dsbp_optax.linen.inspect`; stacks are those of `nnx.scan` and `nnx.vmap`.

    Args:
      loss_fn: as for `value_and_grad`.
      model: the model; it is not changed.
      *args: a batch, or its shapes.
      has_aux: as for `value_and_grad`.
      wrt: as for `value_and_grad`.
      rules: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      `dsbp_optax.capture.Inspection`, for ``axes=`` of a `dsbp_optax.Basis`; prints
      as a table; its ``shared`` is for ``share=``.

    Raises:
      TypeError: for `rules` that are none.

    Cost: one abstract trace of the loss; nothing is computed.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from flax import nnx
      >>> model = nnx.Einsum("BD,NDH->BNH", (2, 8, 4), rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: (model(x) ** 2).mean()
      >>> plan = dsbp_optax.nnx.inspect(loss_fn, model, jnp.ones((3, 8)))
      >>> print(plan)
      kernel  inputs (1,)  outputs (0, 2)  batch ()  statistics
      >>> tx = dsbp_optax.dsbp_muon(0.02, basis=dsbp_optax.Basis(axes=plan))
    """
    every_rule = {**RULES, **recorder.check_rules(rules)}
    make = functools.partial(_Loss, loss_fn, has_aux, every_rule, wrt, model)
    return recorder.inspect_on_shapes(make, args, kwargs)


#: The rules and the recorder of the trace that goes on, and what it finds replaced.
_RECORDER: contextvars.ContextVar[
    tuple[Mapping[type, LayerRule], Recorder, set[str]] | None
] = contextvars.ContextVar("dsbp_optax.nnx recorder", default=None)


def _layers(model: Any, rules: Mapping[type, LayerRule]) -> list[tuple[str, Any, str]]:
    """Path of a kernel, a layer that uses it as its rule says, and its name there."""
    nodes = list(nnx.iter_graph(model))
    named: dict[int, str] = {}
    for path, node in nodes:
        if _is_variable(node):  # Of several places the first is its path.
            named.setdefault(id(node), "/".join(map(str, path)))
    found = []
    for _, node in nodes:
        linear = recorder.find_rule(rules, type(node))(node)
        if linear is not None:
            kernel = named.get(id(getattr(node, linear.parameter, None)))
            found += [] if kernel is None else [(kernel, node, linear.parameter)]
    return found


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
    if (current := _RECORDER.get()) is None:
        return call(*args, **kwargs)
    rules, recording, replaced = current
    linear = recorder.find_rule(rules, type(layer).__wrapped_type__)(layer)
    assert linear is not None  # else it would not be observed
    variable, reason = getattr(layer, linear.parameter), None
    probes = [v for v in vars(layer).values() if isinstance(v, Probe)]
    carried = {probe.get_metadata()["key"]: _value(probe) for probe in probes}
    kernel = _value(variable)
    itself = variable is getattr(layer, linear.parameter + _SAME, variable)
    if recording.notes is None:
        if not itself:
            return call(*args, **kwargs)
    else:
        if not itself:
            replaced.update(map(parameter_path, carried))
        if any(x.shape != kernel.shape for x in carried.values()):
            reason = (
                f"a transformation slices the kernel to {kernel.shape} but not its "
                "Probe; give it the axis of the parameters, e.g. nnx.StateAxes("
                "{(nnx.Param, dsbp_optax.nnx.Probe): 0, ...: None})"
            )
    return recording.observe(call, args, kwargs, linear, kernel, carried, reason)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _copied(tree: PyTree) -> PyTree:
    """`tree` with copies of its models, random streams and metrics, if it has any."""

    def stateful(x: Any) -> bool:
        return isinstance(x, nnx.Pytree | nnx.Variable)

    return jax.tree.map(
        lambda x: nnx.clone(x) if stateful(x) else x, tree, is_leaf=stateful
    )


def _value(variable: Any) -> Any:
    """The value of a Variable; flax before 0.12 has no `get_value`."""
    getter = getattr(variable, "get_value", None)
    return variable.value if getter is None else getter()


def _pure(tree: PyTree) -> PyTree:
    """`tree` with the arrays in the place of their Variables."""
    return jax.tree.map(
        lambda x: _value(x) if _is_variable(x) else x, tree, is_leaf=_is_variable
    )
