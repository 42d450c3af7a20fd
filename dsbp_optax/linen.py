"""Activation statistics out of unedited Flax Linen models.

value_and_grad = dsbp_optax.linen.value_and_grad(loss_fn, has_aux=True)
(loss, aux), grads, statistics = value_and_grad(params, batch, opt_state=opt_state)
updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

import jax
import jax.numpy as jnp
import optax

try:
    import flax.linen as nn
    from flax.core import meta, unfreeze
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ModuleNotFoundError as error:
    from dsbp_optax.core.checks import missing

    raise missing("flax", "flax") from error

from dsbp_optax.capture import linen_scope, origin, recorder, state
from dsbp_optax.capture.coordinates import Displacement
from dsbp_optax.capture.inspection import ROOT, Inspection
from dsbp_optax.capture.linen_layers import DETACHED, REWRITERS, RULES, LayerRule
from dsbp_optax.capture.recorder import Recorder
from dsbp_optax.capture.tap import LinearMap, parameter_path
from dsbp_optax.core import paths
from dsbp_optax.core.paths import Groups
from dsbp_optax.linalg.types import PyTree

__all__ = [
    "LayerRule",
    "LinearMap",
    "TrainState",
    "find_shared_inputs",
    "inspect",
    "subspace_value_and_grad",
    "value_and_grad",
    "warm_start",
]

_MARK = "__dsbp__"
_MUTABLE = (
    "its apply returns the parameters too, and would return what is put beside them; "
    "name the collections that change, mutable=['batch_stats']"
)


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
        update = self.tx.update
        kinds = (p.kind for p in signature(update).parameters.values())
        # That of `optax.MultiSteps` takes keywords, though its type does not say so.
        if Parameter.VAR_KEYWORD not in kinds:
            update = optax.with_extra_args_support(self.tx).update
        before, replacing = self.params, {}
        if OVERWRITE_WITH_GRADIENT in grads:  # Scales of 8-bit floats, as in Flax.
            replacing = {OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
            before, grads = before["params"], grads["params"]
        updates, opt_state = update(
            grads, self.opt_state, before, statistics=statistics, **extra
        )
        params = jax.tree.map(
            lambda p, u: jnp.asarray(p + u).astype(jnp.asarray(p).dtype),
            before,
            updates,
        )
        if replacing:
            params = {"params": params, **replacing}
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **fields
        )


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    rules: Mapping[type, LayerRule] | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """`jax.value_and_grad` that also returns the layers' activation statistics.

    Args:
      loss_fn: ``(params, *args, **kwargs) -> loss`` or ``(loss, aux)``; calls
        ``model.apply({"params": params, ...}, ...)`` as usual. `params` may hold
        several models, or be the whole variables.
      has_aux: as in `jax.value_and_grad`.
      rules: layer type -> rule, for layers of your own; wins over the shipped ones.
      strict: whether it is an error, in the place of a warning, when the layer of a
        projected kernel is never called, has another input than the kernel whose basis
        it shares, or cannot be observed for reasons that are not foreseen.

    Returns:
      ``(params, *args, opt_state, **kwargs) -> (value, grads, statistics)``. Value
      and gradients are those of `jax.value_and_grad`. ``statistics`` maps parameter
      paths to `Sketch`; on steps that refresh nothing it is zero and costs nothing.
      None where `opt_state` holds no state of this package.

    Raises:
      ValueError: at trace time, where `strict`.

    Warns:
      UserWarning: at trace time, once, of kernels that the optimizer reads otherwise
        than their layers use them, with the `axes` that mend it, and of those that
        cannot be observed, each with the reason; their bases come from gradients.

    Cost: on q of every p steps, ``4 n d k`` FLOPs a layer (the layer itself takes
    ``6 n d m``); when it is traced, one trace of the loss on shapes. Inside a loss that
    is itself compiled with `jax.jit` the layers are observed as well; compile the whole
    step, or it is compiled anew in each.

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
    every_rule = {**RULES, **recorder.check_rules(rules)}

    def wrapped(
        params: PyTree, *args: Any, opt_state: PyTree = None, **kwargs: Any
    ) -> Any:
        loss = _Loss(every_rule, loss_fn, has_aux, params, args, kwargs)
        return recorder.collect(loss, opt_state, strict)

    return wrapped


def subspace_value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
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
      rules: as for `value_and_grad`.
      strict: as for `value_and_grad`, and for a loss that depends on a projected kernel
        elsewhere than through its layer; else this kernel gets its whole gradient.

    Returns:
      ``(params, *args, opt_state, displacement=None, **kwargs) -> (value, grads,
      statistics)``, with `dsbp_optax.Coordinates` in the place of the gradients of
      projected kernels: to rounding what `dsbp_optax.project_gradients` makes of whole
      ones. Kernels whose layer has no rule, and bases on the output side, get whole
      gradients. With a displacement, as `dsbp_optax.subspace_sam` hands one to its
      ``grad_fn``, all is taken at ``K + V S``, which is not formed.

    Raises:
      ValueError: at trace time, as `value_and_grad`; when the state holds no
        projection.

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
    every_rule = {**RULES, **recorder.check_rules(rules)}

    def wrapped(
        params: PyTree,
        *args: Any,
        opt_state: PyTree = None,
        displacement: Displacement = None,
        **kwargs: Any,
    ) -> Any:
        loss = _Loss(every_rule, loss_fn, has_aux, params, args, kwargs)
        return recorder.collect(loss, opt_state, strict, True, displacement)

    return wrapped


def warm_start(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    opt_state: PyTree,
    power_iterations: int = 5,
    has_aux: bool = False,
    rules: Mapping[type, LayerRule] | None = None,
    strict: bool = False,
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

    return state.warm_start(collect, opt_state, power_iterations - 1)


def find_shared_inputs(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    rules: Mapping[type, LayerRule] | None = None,
    **kwargs: Any,
) -> Groups:
    """Which kernels have one and the same input, so that one basis serves them all.

    Args:
      loss_fn: as for `value_and_grad`.
      params: parameters, or their shapes.
      *args: a batch, or its shapes.
      has_aux: as for `value_and_grad`.
      rules: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      ``inspect(...).shared``: groups of parameter paths, for ``share=`` of a
      `dsbp_optax.Basis`. Errors and cost are those of `inspect`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, dsbp_optax
      >>> model, x = nn.MultiHeadDotProductAttention(2), jnp.ones((4, 16, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: (model.apply({"params": params}, x) ** 2).mean()
      >>> dsbp_optax.linen.find_shared_inputs(loss_fn, params, x)
      (('key/kernel', 'query/kernel', 'value/kernel'),)
    """
    return inspect(
        loss_fn, params, *args, has_aux=has_aux, rules=rules, **kwargs
    ).shared


def inspect(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    rules: Mapping[type, LayerRule] | None = None,
    **kwargs: Any,
) -> Inspection:
    """What a loss tells of the kernels in it: axes, common inputs, statistics.

    Read off the layers themselves in one trace on shapes, where the optimizer alone
    goes by names: which axes of a kernel face its layer's input and output, along which
    `nn.scan` and `nn.vmap` have stacked it, wherever these lie; which layers are handed
    the same object and read samples off it alike; of which kernels `value_and_grad`
    has statistics, and why not of others.

    Args:
      loss_fn: as for `value_and_grad`.
      params: parameters, or their shapes.
      *args: a batch, or its shapes.
      has_aux: as for `value_and_grad`.
      rules: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      `dsbp_optax.capture.Inspection`, for ``axes=`` of a `dsbp_optax.Basis`; prints
      as a table; its ``shared`` is for ``share=``.

    Raises:
      TypeError: for `rules` that are none.

    Cost: one abstract trace of the loss; nothing is computed.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, dsbp_optax
      >>> model, x = nn.DenseGeneral((2, 4), use_bias=False), jnp.ones((3, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: (model.apply({"params": params}, x) ** 2).mean()
      >>> plan = dsbp_optax.linen.inspect(loss_fn, params, x)
      >>> print(plan)
      kernel  inputs (0,)  outputs (1, 2)  batch ()  statistics
      >>> tx = dsbp_optax.dsbp_muon(0.02, basis=dsbp_optax.Basis(axes=plan))
    """
    every_rule = {**RULES, **recorder.check_rules(rules)}
    make = functools.partial(_Loss, every_rule, loss_fn, has_aux)
    return recorder.inspect_on_shapes(make, params, args, kwargs)


class _Loss(recorder.TreeLoss):
    def __init__(self, rules: Mapping[type, LayerRule], *given: Any) -> None:
        super().__init__(*given)
        self.rules = rules

    def run(self, leaves: dict[str, Any], recorder: Recorder) -> Any:
        with nn.intercept_methods(_Layers(self.rules, recorder).intercept):
            return self.call(leaves)


class _Layers:
    """Lets the layers of one trace report to a recorder."""

    def __init__(self, rules: Mapping[type, LayerRule], recorder: Recorder) -> None:
        self.rules, self.recorder = rules, recorder
        self.roots: Counter[Any] = Counter()
        self.rewriter: str | None = None

    def intercept(
        self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module = context.module
        if module.scope is None or module.name == DETACHED:
            return call(*args, **kwargs)
        if not module.scope.path:
            self.enter(module)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, REWRITERS) and self.rewriter is None:
            self.rewriter = type(module).__name__
            try:
                return call(*args, **kwargs)
            finally:
                self.rewriter = None
        marks = module.get_variable("params", _MARK, {})
        inspecting = self.recorder.notes is not None
        linear = None
        if marks or inspecting:
            linear = recorder.find_rule(self.rules, type(module))(module)
        if linear is None or not module.has_variable("params", linear.parameter):
            return call(*args, **kwargs)
        mine = {
            k: r
            for k, r in marks.items()
            if parameter_path(k).rpartition("/")[2] == linear.parameter
        }
        kernel = meta.unbox(module.get_variable("params", linear.parameter))
        reason = self.rewriter and f"nn.{self.rewriter} rewrites its parameters"
        if module.is_mutable_collection("params"):
            reason = _MUTABLE
        return self.recorder.observe(call, args, kwargs, linear, kernel, mine, reason)

    def enter(self, module: Any) -> None:
        """Put the riders beside their kernels in the variables of one `apply`.

        Parameters are the one collection that every lifted transformation of the user
        is sure to carry, sliced and stacked like the kernels. The user's own tree is
        left alone: a penalty on it must not see the bases. Which parameter lies where
        in these variables the labels tell, which a trace that inspects gives them.
        """
        params, notes = linen_scope.parameters(module.scope), self.recorder.notes
        if module.is_mutable_collection("params"):
            return
        leaves, treedef = paths.flatten(params)
        kernels = {p: x for p, x in leaves.items() if _MARK not in p.split("/")}
        shapes = (
            (p, jnp.shape(x), str(jnp.result_type(x))) for p, x in kernels.items()
        )
        kind = (type(module).__qualname__, *shapes)
        self.roots[kind] += 1
        label = f"{ROOT}{hash(kind)} {self.roots[kind]} "
        if notes is not None:
            named = [
                origin.label(x, label + path) if isinstance(x, jax.core.Tracer) else x
                for path, x in leaves.items()
            ]
            merged = unfreeze(treedef.unflatten(named))
            markers = defaultdict(list)
            for path, marker in notes.markers.items():
                markers[jnp.shape(marker)].append(path)
            for inner, x in kernels.items():  # One of its shape, the next each time.
                if alike := markers[jnp.shape(x)]:
                    path = alike.pop(0)
                    notes.beside[path].add(label + inner)
                    _put_beside(merged, inner, path, notes.markers[path])
            linen_scope.set_parameters(module.scope, merged)
            return
        merged = unfreeze(params) if self.recorder.riders else {}
        for key, rider in self.recorder.riders.items():
            for inner in kernels:
                one = self.recorder.labels.get(label + inner)
                if one is None or not one.whole or one.path != parameter_path(key):
                    continue
                _put_beside(merged, inner, key, rider if one.exact else rider.plain)
        if merged:
            linen_scope.set_parameters(module.scope, merged)


def _put_beside(params: Any, kernel: str, key: str, rider: Any) -> None:
    """Put a rider where the layer of a kernel finds it, if a layer can lie there."""
    for owner in kernel.split("/")[:-1]:
        params = params[owner] if isinstance(params, dict) else None
    if isinstance(params, dict):
        params.setdefault(_MARK, {})[key] = rider
