"""Activation statistics out of unedited Flax Linen models.

value_and_grad = dsbp_optax.linen.value_and_grad(loss_fn, has_aux=True)
(loss, aux), grads, statistics = value_and_grad(params, batch, opt_state=opt_state)
updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.core import meta, unfreeze
from flax.training import train_state

from dsbp_optax import _held, _inputs, _layout, _origin, _recorder, _rider, _tap
from dsbp_optax._held import Displacement
from dsbp_optax._linen_layers import DETACHED, RULES, LayerRule
from dsbp_optax._origin import Origin, Unsettled
from dsbp_optax._reading import Misread
from dsbp_optax._recorder import Facts, Recorder
from dsbp_optax._rider import LinearMap, Rider
from dsbp_optax._share import Groups
from dsbp_optax._types import Array, PyTree

__all__ = [
    "LayerRule",
    "LinearMap",
    "TrainState",
    "find_shared_inputs",
    "subspace_value_and_grad",
    "value_and_grad",
    "warm_start",
]

_MARK = "__dsbp__"


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose updates take ``statistics=``.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from dsbp_optax.linen import TrainState
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> state = TrainState.create(
      ...     apply_fn=None, params=params, tx=dsbp_optax.dsbp_sgd(0.1, rank=2))
      >>> state = state.apply_gradients(grads=params, statistics=None)
    """

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        statistics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainState:
        """One step of the optimizer.

        Args:
          grads: gradients, shaped as ``params``.
          statistics: what `value_and_grad` returned, or None.
          **kwargs: names of fields to replace (``batch_stats=...``); what is no field
            goes to the optimizer (``value=loss``).
        """
        fields = {k: v for k, v in kwargs.items() if k in self.__dataclass_fields__}
        extra = {k: v for k, v in kwargs.items() if k not in fields}
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(
            grads, self.opt_state, self.params, statistics=statistics, **extra
        )
        params = jax.tree.map(
            lambda p, u: jnp.asarray(p + u).astype(jnp.asarray(p).dtype),
            self.params,
            updates,
        )
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **fields
        )


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    rules: Mapping[type, LayerRule] | None = None,
    strict: bool = True,
) -> Callable[..., Any]:
    """`jax.value_and_grad` that also returns the layers' activation statistics.

    Args:
      loss_fn: ``(params, *args, **kwargs) -> loss`` or ``(loss, aux)``; calls
        ``model.apply({"params": params, ...}, ...)`` as usual. `params` may hold
        several models, or be the whole variables.
      has_aux: as in `jax.value_and_grad`.
      rules: layer type -> rule, for layers of your own; wins over the shipped ones.
      strict: whether it is an error when the layer of a projected kernel is never
        called, or has another input than the kernel whose basis it shares.

    Returns:
      ``(params, *args, opt_state, **kwargs) -> (value, grads, statistics)``. Value
      and gradients are those of `jax.value_and_grad`. ``statistics`` maps parameter
      paths to `Sketch`; on steps that refresh nothing it is zero and costs nothing.

    Raises:
      ValueError: at trace time, when a layer was not called, or does not have the input
        of the basis that it shares.

    Warns:
      UserWarning: at trace time, of kernels that the optimizer reads otherwise than
        their layers use them, with the `axes` that mend it, and of those that cannot be
        observed; their bases come from gradients.

    Cost: on q of every p steps, ``4 n d k`` FLOPs a layer (the layer itself takes
    ``6 n d m``).

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, dsbp_optax
      >>> model, x = nn.Dense(8), jnp.ones((4, 16))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2)
      >>> opt_state = tx.init(params)
      >>> loss_fn = lambda params, x: (model.apply({"params": params}, x) ** 2).mean()
      >>> step = dsbp_optax.linen.value_and_grad(loss_fn)
      >>> loss, grads, statistics = step(params, x, opt_state=opt_state)
      >>> float(statistics["kernel"].count[0, 0, 0])
      4.0
    """
    every_rule = {**RULES, **_tap.check_rules(rules)}

    def wrapped(
        params: PyTree, *args: Any, opt_state: PyTree = None, **kwargs: Any
    ) -> Any:
        riders, shared = _tap.make_riders(opt_state), _inputs.shared_in(opt_state)
        call = _Call(loss_fn, params, args, kwargs, every_rule, riders)

        def attempt(facts: Facts) -> Any:
            recorder = call.recorder(_inputs.members_of(shared), facts)
            differentiate = jax.value_and_grad(
                functools.partial(call.run, recorder), argnums=(0, 1), has_aux=has_aux
            )
            return recorder, *differentiate(params, facts.fitting(riders))

        recorder, value, (grads, cotangents) = call.settle(attempt)
        recorder.finish(recorder.riders, strict, shared)
        return value, grads, _tap.to_sketches(cotangents, recorder.tapped)

    return wrapped


def subspace_value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
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
      rules: as for `value_and_grad`.
      strict: as for `value_and_grad`, and whether it is an error when the loss
        depends on a projected kernel elsewhere than through its layer.

    Returns:
      ``(params, *args, opt_state, displacement=None, **kwargs) -> (value, grads,
      statistics)``, with `dsbp_optax.Coordinates` in the place of the gradients of
      projected kernels: to rounding what `dsbp_optax.project_gradients` makes of whole
      ones. Kernels whose layer has no rule, and bases on the output side, get whole
      gradients. With a displacement, as `dsbp_optax.subspace_sam` hands one to its
      ``grad_fn``, all is taken at ``K + V S``, which is not formed.

    Raises:
      ValueError: at trace time, as `value_and_grad`; when the loss has a penalty on,
        or another use of, a projected kernel; when the state holds no projection.

    Cost: for a layer ``4 n d m`` FLOPs and ``n k`` numbers kept, where the whole
    gradient takes ``6 n d m`` and ``n d``; the loss is traced once more.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, dsbp_optax
      >>> model, x = nn.Dense(8), jnp.ones((4, 16))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = dsbp_optax.subspace_adamw(1e-3, rank=2)
      >>> opt_state = tx.init(params)
      >>> loss_fn = lambda params, x: (model.apply({"params": params}, x) ** 2).mean()
      >>> step = dsbp_optax.linen.subspace_value_and_grad(loss_fn)
      >>> loss, grads, statistics = step(params, x, opt_state=opt_state)
      >>> grads["kernel"].values.shape
      (1, 8, 2)
      >>> updates, opt_state = tx.update(
      ...     grads, opt_state, params, statistics=statistics)
    """
    every_rule = {**RULES, **_tap.check_rules(rules)}

    def wrapped(
        params: PyTree,
        *args: Any,
        opt_state: PyTree = None,
        displacement: Displacement = None,
        **kwargs: Any,
    ) -> Any:
        leaves, treedef = _layout.flatten_with_paths(params)
        owners, shared = _tap.make_riders(opt_state), _inputs.shared_in(opt_state)
        riders = _held.add_coordinates(owners, opt_state, leaves, displacement)
        call = _Call(loss_fn, params, args, kwargs, every_rule, riders)

        def attempt(facts: Facts) -> Any:
            fitting = facts.fitting(riders)

            def probe(leaves: dict[str, Any], held: set[str]) -> Array:
                recorder = call.recorder((), facts, held)
                found = call.run(recorder, treedef.unflatten(leaves.values()), fitting)
                loss: Array = found[0] if has_aux else found
                return loss

            held = _held.find_held(probe, leaves, strict)
            recorder = call.recorder(_inputs.members_of(shared), facts)
            free = {path: leaf for path, leaf in leaves.items() if path not in held}

            def tapped_loss(free: dict[str, Any], riders: dict[str, Rider]) -> Any:
                tree = treedef.unflatten({**leaves, **free}.values())
                return call.run(recorder, tree, riders)

            differentiate = jax.value_and_grad(
                tapped_loss, argnums=(0, 1), has_aux=has_aux
            )
            taken = _held.release(fitting, held, facts.fitting(owners))
            return recorder, held, *differentiate(free, taken)

        recorder, held, value, (grads, cotangents) = call.settle(attempt)
        recorder.finish(recorder.riders, strict, shared)
        joined = treedef.unflatten(_held.join(leaves, grads, cotangents, held))
        return value, joined, _tap.to_sketches(cotangents, recorder.tapped & {*owners})

    return wrapped


def warm_start(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    opt_state: PyTree,
    power_iterations: int = 5,
    has_aux: bool = False,
    rules: Mapping[type, LayerRule] | None = None,
    strict: bool = True,
    **kwargs: Any,
) -> PyTree:
    """All power iterations but the last on the first batch, as the paper does.

    The first training step on the same batch makes the last one, before its
    projection. Optional: without it the first steps do one iteration each.

    Args:
      loss_fn: as for `value_and_grad`.
      params: parameters.
      *args: the first batch.
      opt_state: what ``tx.init(params)`` gave.
      power_iterations: q of the optimizer.
      has_aux: as for `value_and_grad`.
      rules: as for `value_and_grad`.
      strict: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      `opt_state` with warm bases.
    """
    step = value_and_grad(loss_fn, has_aux, rules=rules, strict=strict)

    @jax.jit
    def collect(opt_state: PyTree) -> Any:
        return step(params, *args, opt_state=opt_state, **kwargs)[-1]

    return _tap.warm_start(collect, opt_state, power_iterations - 1)


def find_shared_inputs(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    rules: Mapping[type, LayerRule] | None = None,
    **kwargs: Any,
) -> Groups:
    """Which kernels have one and the same input, so that one basis serves them all.

    Found by tracing the loss on shapes: layers that are handed the same object, and
    read samples off it alike. In self-attention query, key and value come out as one
    group, in cross-attention key and value do.

    Args:
      loss_fn: as for `value_and_grad`.
      params: parameters, or their shapes.
      *args: a batch, or its shapes.
      has_aux: as for `value_and_grad`; a loss of either form is only traced.
      rules: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      Groups of parameter paths, for ``share=`` of an optimizer.

    Raises:
      TypeError: for `rules` that are none.

    Cost: one abstract trace of the loss; nothing is computed.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, dsbp_optax
      >>> model, x = nn.MultiHeadDotProductAttention(2), jnp.ones((4, 16, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: (model.apply({"params": params}, x) ** 2).mean()
      >>> dsbp_optax.linen.find_shared_inputs(loss_fn, params, x)
      (('key/kernel', 'query/kernel', 'value/kernel'),)
    """
    del has_aux
    every_rule = {**RULES, **_tap.check_rules(rules)}
    call = _Call(loss_fn, params, args, kwargs, every_rule, {})
    recorder = call.settle(lambda facts: call.watch(call.kernels, facts))
    groups: Groups = recorder.calls.groups(call.kernels)
    return groups


class _Call:
    """One call of a loss, which is traced as often as it takes to know its layers."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        params: PyTree,
        args: Any,
        kwargs: Any,
        rules: Mapping[type, LayerRule],
        riders: Mapping[str, Rider],
    ) -> None:
        self.loss_fn, self.params, self.rules = loss_fn, params, rules
        self.args, self.kwargs, self.riders = args, kwargs, riders
        self.kernels, self.treedef = _layout.flatten_with_paths(params)

    def recorder(
        self, watched: Collection[str], facts: Facts, probe: set[str] | None = None
    ) -> _Recorder:
        found = _Recorder(self.rules, watched, probe, facts)
        found.whole = self.riders
        return found

    def run(
        self,
        recorder: _Recorder,
        params: PyTree,
        riders: Mapping[str, Rider],
        *batch: Any,
    ) -> Any:
        """The loss, its layers reporting to `recorder`."""
        args, kwargs = batch or (self.args, self.kwargs)
        recorder.start(params, riders, (args, kwargs))
        with nn.intercept_methods(recorder.intercept):
            return self.loss_fn(params, *args, **kwargs)

    def watch(self, paths: Collection[str], facts: Facts) -> _Recorder:
        """What happens to these kernels, by a trace on shapes, without riders."""
        recorder = self.recorder(paths, facts)

        def traced(params: PyTree, args: Any, kwargs: Any) -> None:
            self.run(recorder, params, {}, args, kwargs)

        with _origin.apart():
            _inputs.trace(traced, self.params, self.args, self.kwargs)
        return recorder

    def settle(self, attempt: Callable[[Facts], Any]) -> Any:
        """`_recorder.settle` of this call."""
        return _recorder.settle(attempt, self._origins, self._misread)

    def _origins(self) -> dict[str, Origin | None]:
        def run(leaves: dict[str, Any]) -> Any:
            tree = self.treedef.unflatten(leaves.values())
            return self.run(_Labels(self.rules, ()), tree, {})

        return _origin.trace_origins(run, self.kernels)

    def _misread(self, facts: Facts) -> dict[str, Misread]:
        """Of kernels with riders, found without them: they would not fit."""
        paths = {_rider.parameter_path(key) for key in self.riders}
        if all(jnp.ndim(self.kernels.get(path, 0)) < 3 for path in paths):
            return {}
        return _recorder.settle(
            lambda facts: self.watch(paths, facts).misread,
            self._origins,
        )


class _Recorder(Recorder):
    """Carries riders into the layers of one trace and notes what happened there.

    Kernels that are watched but have no rider are marked by an empty dict.
    """

    def start(
        self, params: PyTree, riders: Mapping[str, Rider], foreign: PyTree
    ) -> None:
        self.riders, self.foreign = riders, jax.tree.leaves(foreign)
        self.kernels, _ = _layout.flatten_with_paths(params)
        self.roots: Counter[Any] = Counter()

    def intercept(
        self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module = context.module
        if module.scope is None or module.name == DETACHED:
            return call(*args, **kwargs)
        if not module.scope.path:
            self.enter(module.scope._variables, self._label(module))
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        marks = module.get_variable("params", _MARK, {})
        self.seen.update(_rider.parameter_path(key) for key in marks)
        linear = _tap.find_rule(self.rules, type(module))(module) if marks else None
        if linear is None:
            return call(*args, **kwargs)
        mine = {
            k: r
            for k, r in marks.items()
            if _rider.parameter_path(k).rpartition("/")[2] == linear.parameter
        }
        kernel = meta.unbox(module.get_variable("params", linear.parameter))
        shape = jnp.shape(kernel)
        for path in {_rider.parameter_path(key) for key in mine}:
            self.calls.note(path, linear, shape, args, kwargs)
        fitting = self.fitting(mine, linear, shape)
        riders = {k: r for k, r in fitting.items() if isinstance(r, Rider)}
        return _tap.observe(call, args, kwargs, linear, shape, riders, self.probe)

    def enter(self, variables: dict[str, Any], label: str) -> None:
        """Put the riders beside their kernels in the variables of one `apply`.

        Parameters are the one collection that every lifted transformation of the user
        is sure to carry, sliced and stacked like the kernels. The user's own tree is
        left alone: a penalty on it must not see the bases.
        """
        params = variables.get("params") or {}
        leaves = _kernels_in(params)
        if not (homes := self._homes(leaves, label)):
            return
        merged = unfreeze(params)
        marks: dict[str, Any] = {path: {} for path in self.calls.watched}
        for key, rider in {**marks, **self.riders}.items():
            path = _rider.parameter_path(key)
            for inner, origin in homes.get(path, {}).items():
                *owners, _ = inner.split("/")
                node = merged
                for owner in owners:
                    node = node[owner]
                beside = node.setdefault(_MARK, {})
                if origin is None:  # Another array has taken the kernel's place.
                    beside.pop(key, None)
                elif origin.exact or not isinstance(rider, Rider):
                    beside.setdefault(key, rider)
                else:
                    beside.setdefault(key, dataclasses.replace(rider, coordinates=None))
        variables["params"] = merged

    def _label(self, module: Any) -> str:
        """The same for one and the same call in every trace of the loss."""
        leaves = _kernels_in(module.scope._variables.get("params") or {})
        shapes = ((q, jnp.shape(x), str(jnp.result_type(x))) for q, x in leaves.items())
        kind = (type(module).__qualname__, *shapes)
        self.roots[kind] += 1
        return f"{hash(kind)} {self.roots[kind]} "

    def _homes(
        self, leaves: Mapping[str, Any], label: str
    ) -> dict[str, dict[str, Origin | None]]:
        """Path -> where it lies in these parameters, and whether what lies there is it.

        The differentiated parameters are known by being the same objects. Where the
        loss has cast or otherwise rewritten them, or handed them to a transformation, a
        jaxpr tells; names and shapes alone tell nothing.
        """
        found: dict[str, dict[str, Origin | None]] = {}
        riding = {_rider.parameter_path(key) for key in self.riders}
        for prefix in self._prefixes(leaves):
            for inner, leaf in leaves.items():
                path = prefix + inner
                if path not in riding and path not in self.calls.watched:
                    continue
                kernel = self.kernels.get(path)
                if leaf is kernel:
                    found.setdefault(path, {})[inner] = Origin(path, True)
                elif kernel is not None and jnp.shape(leaf) == jnp.shape(kernel):
                    origin = self._origin(leaf, label + inner)
                    mine = origin is not None and origin.path == path
                    found.setdefault(path, {})[inner] = origin if mine else None
                    if not mine and isinstance(leaf, jax.core.Tracer):
                        self.doubtful.add(path)
        return found

    def _prefixes(self, leaves: Mapping[str, Any]) -> list[str]:
        """Where these parameters may lie in the differentiated tree."""
        found = _prefixes(self.kernels, leaves)

        def same(prefix: str) -> int:
            return sum(self.kernels.get(prefix + q) is x for q, x in leaves.items())

        best = max(found, key=same, default="")
        return [best] if found and same(best) else found

    def _origin(self, leaf: Any, label: str) -> Origin | None:
        """The parameter that `leaf` is, if it is one; constants are none."""
        foreign = any(leaf is x for x in self.foreign)
        if foreign or not isinstance(leaf, jax.core.Tracer):
            return None
        if self.facts.origins is None:
            raise Unsettled(label)
        return self.facts.origins.get(label)


class _Labels(_Recorder):
    """Names the parameters of each `apply`, for `_origin.trace_origins`."""

    def enter(self, variables: dict[str, Any], label: str) -> None:
        leaves, treedef = _layout.flatten_with_paths(variables.get("params") or {})
        named = [
            _origin.label(leaf, label + path)
            if isinstance(leaf, jax.core.Tracer)
            else leaf
            for path, leaf in leaves.items()
        ]
        variables["params"] = treedef.unflatten(named)


def _kernels_in(params: PyTree) -> dict[str, Any]:
    """Path -> parameter; what rides beside them is none."""
    leaves, _ = _layout.flatten_with_paths(params)
    return {path: x for path, x in leaves.items() if _MARK not in path.split("/")}


def _prefixes(known: Mapping[str, Any], inner: Mapping[str, Any]) -> list[str]:
    """Prefixes under which some path of `inner` is a path of `known`."""
    found = {
        path[: len(path) - len(q)]: None
        for q in inner
        for path in known
        if path == q or path.endswith("/" + q)
    }
    return list(found)
