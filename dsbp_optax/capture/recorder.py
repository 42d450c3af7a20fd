"""Statistics beside a value and its gradients, for any framework's adapter.

The loss is traced once on shapes, which tells what can be observed; then it is
differentiated with the riders of these kernels. What is left has the basis of its
gradient, and one warning says so.
"""

import abc
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dsbp_optax.capture import coordinates, inspection, origin, state
from dsbp_optax.capture.inspection import (
    NOT_CALLED,
    REPLACED,
    Findings,
    Inspection,
    Notes,
)
from dsbp_optax.capture.tap import (
    LinearMap,
    Once,
    Rider,
    observe_input,
    observe_output,
    parameter_path,
    rider_side,
)
from dsbp_optax.core import checks, layout, paths
from dsbp_optax.core.layout import Axes, Shape
from dsbp_optax.linalg.types import Array, PyTree


class Recorder:
    """What layers report to during one trace of a loss.

    Attributes:
      riders: by key, those that come into the loss.
      labels: what the labelled arrays are.
      notes: takes the calls down, in a trace that inspects; None in others.
      holdable: takes note of kernels that could be held; the results of their layers
        are then of the right shape only, and hang on the input alone. None in others.
      tapped: keys of the riders that were used.
    """

    def __init__(
        self,
        riders: Mapping[str, Rider] | None = None,
        labels: Mapping[str, origin.Origin | None] | None = None,
        notes: Notes | None = None,
        holdable: set[str] | None = None,
    ) -> None:
        self.riders, self.labels = dict(riders or {}), dict(labels or {})
        self.notes, self.holdable = notes, holdable
        self.tapped: set[str] = set()
        self.once = Once()

    def observe(
        self,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        linear: LinearMap,
        kernel: Any,
        riders: Mapping[str, Rider],
        reason: str | None = None,
    ) -> Any:
        """The layer's own result, its input or output observed on the way.

        Args:
          call: the layer's call.
          args: its arguments; the first array among them, then `kwargs`, is the input.
          kwargs: its keywords.
          linear: how the layer acts.
          kernel: the array that it uses.
          riders: the riders on this kernel, by key.
          reason: why it cannot be observed, where that is known.
        """
        where, x = _input(args, kwargs)
        if self.notes is not None:
            y = call(*args, **kwargs)
            self.notes.note(linear, kernel, x, y, reason)
            return y
        shape = jnp.shape(kernel)
        axes, held, outputs, through = linear.axes_of(len(shape)), {}, [], []
        for key, rider in riders.items():
            side = rider_side(rider, axes, shape)
            if side is None:
                continue
            self.tapped.add(key)
            if side == "output":
                outputs.append(rider.plain)
            elif linear.gives_kernel:
                through.append(rider.plain)
            elif rider.coordinates is not None:
                held[key] = rider
            else:
                seen = _input(args, kwargs)[1]
                tapped = observe_input(self.once, linear, axes, seen, rider)
                args, kwargs = _put(args, kwargs, where, tapped)
        y = call(*args, **kwargs)
        for rider in through:
            first, *rest = y
            y = (observe_input(self.once, linear, axes, x, rider, first), *rest)
        for rider in outputs:
            y = observe_output(self.once, linear, axes, y, rider)
        for rider in held.values():
            y = coordinates.take_coordinates(linear, axes, x, y, rider)
        if self.holdable is None or not held:
            return y
        self.holdable.update(held)
        return jnp.zeros_like(y) + 0 * jnp.sum(x).astype(y.dtype)


def _input(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Where the first array among the arguments is, and the array."""
    for where, x in [*enumerate(args), *kwargs.items()]:
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return where, x
    return (0, args[0]) if args else next(iter(kwargs.items()))


def _put(args: Any, kwargs: Any, where: Any, x: Any) -> tuple[Any, Any]:
    if isinstance(where, str):
        return args, {**kwargs, where: x}
    return (*args[:where], x, *args[where + 1 :]), kwargs


class Loss(Protocol):
    """A loss as an adapter knows it: one call of the user's, on its arguments."""

    #: Path -> parameter.
    leaves: dict[str, Any]

    def evaluate(self, leaves: dict[str, Any], recorder: Recorder) -> Array:
        """The value at these parameters."""

    def differentiate(self, recorder: Recorder, held: Collection[str]) -> Any:
        """Value, gradients of what is not held, cotangents of the riders."""

    def join(
        self, grads: Any, cotangents: Mapping[str, Rider], held: Collection[str]
    ) -> PyTree:
        """The gradients in the user's own tree."""


class TreeLoss(abc.ABC):
    """A `Loss` of a tree of parameters; `run` sets up that its layers are observed."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        has_aux: bool,
        params: PyTree,
        args: Any,
        kwargs: Any,
    ) -> None:
        self.loss_fn, self.has_aux = loss_fn, has_aux
        self.args, self.kwargs = args, kwargs
        self.leaves, self.treedef = paths.flatten(params)

    @abc.abstractmethod
    def run(self, leaves: dict[str, Any], recorder: Recorder) -> Any:
        """`call`, while layers report to `recorder`."""

    def call(self, leaves: dict[str, Any]) -> Any:
        """The user's loss at these parameters."""
        params = self.treedef.unflatten(leaves.values())
        return self.loss_fn(params, *self.args, **self.kwargs)

    def evaluate(self, leaves: dict[str, Any], recorder: Recorder) -> Array:
        """As in `Loss`."""
        found = self.run(leaves, recorder)
        value: Array = found[0] if self.has_aux else found
        return value

    def differentiate(self, recorder: Recorder, held: Collection[str]) -> Any:
        """As in `Loss`."""
        free = {path: x for path, x in self.leaves.items() if path not in held}

        def tapped(free: dict[str, Any], riders: dict[str, Rider]) -> Any:
            recorder.riders = riders
            return self.run({**self.leaves, **free}, recorder)

        value, (grads, cotangents) = jax.value_and_grad(
            tapped, argnums=(0, 1), has_aux=self.has_aux
        )(free, recorder.riders)
        return value, grads, cotangents

    def join(
        self, grads: Any, cotangents: Mapping[str, Rider], held: Collection[str]
    ) -> PyTree:
        """As in `Loss`."""
        joined = coordinates.join(self.leaves, grads, cotangents, held)
        return self.treedef.unflatten(joined)


def inspect_loss(loss: Loss) -> Findings:
    """What a loss tells of its kernels, in one trace on shapes."""

    def run(leaves: dict[str, Any], notes: Notes) -> Any:
        return loss.evaluate(leaves, Recorder(notes=notes))

    return inspection.inspect(run, loss.leaves)


def inspect_on_shapes(make: Callable[..., Loss], *trees: PyTree) -> Inspection:
    """What a loss tells the user of its kernels; nothing is computed.

    Args:
      make: `trees`, their arrays and shapes traced -> the loss.
      *trees: what it depends on.
    """
    found = []

    def trace(*trees: PyTree) -> None:
        found.append(inspect_loss(make(*trees)).inspection())

    inspection.on_shapes(trace, *trees)
    return found[0]


class Misread(NamedTuple):
    """A kernel that the optimizer reads as other matrices than its layer does."""

    shape: Shape
    read: layout.MatrixView
    used: Axes


def collect(
    loss: Loss,
    opt_state: PyTree,
    strict: bool,
    subspace: bool = False,
    displacement: coordinates.Displacement = None,
) -> tuple[Any, PyTree, Any]:
    """Value, gradients and statistics of a loss, see the adapters' `value_and_grad`.

    Statistics are None where `opt_state` holds no state that could use them.
    """
    owners = state.riders(opt_state)
    riders = owners
    if subspace:
        riders = state.coordinate_riders(owners, opt_state, loss.leaves, displacement)
    reasons: dict[str, str] = {}
    misread: dict[str, Misread] = {}
    labels: Mapping[str, origin.Origin | None] = {}
    fitting: dict[str, Rider] = {}
    try:
        found = inspect_loss(loss)
    except Exception as error:  # The loss's own it raises again, without us.
        reasons = dict.fromkeys(
            map(parameter_path, riders), f"the loss has no trace on shapes: {error!r}"
        )
    else:
        labels, reasons = found.labels, {**found.strangers(state.shared(opt_state))}
        if strict and reasons:
            raise ValueError(
                "share: "
                + "; ".join(f"'{path}' {why}" for path, why in reasons.items())
                + ". Remedy: take it out of share=, or pass what inspect(...).shared "
                "of the adapter returns; strict=False skips this check."
            )
        for key, rider in riders.items():
            path = parameter_path(key)
            if path not in loss.leaves or path in found.reasons:
                reasons[path] = found.reasons.get(path, NOT_CALLED)
                continue
            shape = jnp.shape(loss.leaves[path])
            if rider_side(rider, found.axes[path], shape) is None:
                view = state.view(rider, shape)
                misread[path] = Misread(shape, view, found.axes[path])
            else:
                fitting[key] = rider
        if strict and (lost := [p for p, why in reasons.items() if why == NOT_CALLED]):
            raise ValueError(_not_called(lost))
    moved = {key: rider for key, rider in riders.items() if rider.displaced}

    def attempt(fitting: Mapping[str, Rider]) -> Any:
        held: set[str] = set()
        elsewhere: set[str] = set()
        if subspace and fitting:

            def probe(leaves: dict[str, Any], noted: set[str]) -> Array:
                return loss.evaluate(leaves, Recorder(fitting, labels, holdable=noted))

            held, elsewhere = coordinates.find_held(probe, loss.leaves)
            if elsewhere and strict:
                raise ValueError(
                    f"the loss depends on {checks.some(sorted(elsewhere))} not "
                    "through a layer alone (a penalty, a tied head), and the gradient "
                    "of that would be lost. Remedy: weight_decay= of the optimizer in "
                    "place of a penalty, or rank={...} that leaves these kernels out; "
                    "strict=False takes their whole gradient."
                )
        taken = coordinates.release({**moved, **fitting}, held, owners)
        recorder = Recorder({k: taken[k] for k in taken if k in fitting}, labels)
        with origin.apart():
            value, grads, cotangents = loss.differentiate(recorder, held)
        joined = loss.join(grads, cotangents, held)
        return value, joined, cotangents, recorder.tapped, elsewhere

    try:
        result = attempt(fitting)
    except Exception as error:
        if strict or moved or not fitting:
            raise
        result = attempt({})
        told = f"its layer cannot be observed: {inspection.first_line(error)}"
        reasons |= dict.fromkeys(map(parameter_path, fitting), told)
        fitting = {}
    value, grads, cotangents, tapped, elsewhere = result
    for key in fitting:
        if key not in tapped and (key in owners or not subspace):
            reasons.setdefault(parameter_path(key), REPLACED)
    if misread or reasons or elsewhere:
        checks.warn(_tell(reasons, misread, elsewhere))
    if not state.known(opt_state):
        return value, grads, None
    return value, grads, state.statistics(cotangents, tapped & {*owners})


def _tell(
    reasons: Mapping[str, str],
    misread: Mapping[str, Misread],
    elsewhere: Collection[str],
) -> str:
    """Says of all kernels without statistics why, what comes of it, and the remedy."""
    said = []
    if misread:
        each = [
            f"'{path}' {one.shape} is read as {layout.in_words(one.read)}, but its "
            f"layer sums over axes {one.used.inputs}, gives axes {one.used.outputs}"
            + (f" and is stacked along axes {one.used.batch}" if one.used.batch else "")
            for path, one in misread.items()
        ]
        entries = [f"'{p}': {layout.entry(one.used)}" for p, one in misread.items()]
        said.append(
            f"kernels read otherwise than their layers use them: {'; '.join(each)}. "
            "They have no statistic, their bases come from gradients, and their "
            "updates another size. Remedy: in the optimizer basis=dsbp_optax.Basis("
            f"axes={{{', '.join(entries)}}}), or axes= what inspect of the adapter "
            "gives; and init again."
        )
    if reasons:
        each = [f"'{path}': {why}" for path, why in reasons.items()]
        said.append(
            f"kernels without statistics of their own: {'; '.join(each)}. Where they "
            "have a basis, it comes from gradients. Remedy: for layers of your own "
            "rules={LayerType: rule}, rule(layer) -> LinearMap, in value_and_grad of "
            "dsbp_optax.linen for Linen, dsbp_optax.nnx for NNX (neither: "
            "dsbp_optax.tap in the layer, or pass Activations to update); else call "
            "the model's own apply on the differentiated parameters, in the "
            "loss; or rank={...} that leaves these kernels out, or share= without "
            "them. strict=True makes an error of layers that are not called."
        )
    if elsewhere:
        said.append(
            f"the loss depends on {checks.some(sorted(elsewhere))} not through a "
            "layer alone (a penalty, a tied head): their whole gradients are taken. "
            "Remedy: weight_decay= of the optimizer in place of a penalty."
        )
    return " ".join(said)


def _not_called(paths: Collection[str]) -> str:
    return (
        f"no activations were seen for {', '.join(f'{p!r}' for p in paths)}: the layer "
        "was not called inside the loss, or the outermost module is itself a lifted "
        "class (nn.vmap(MLP), nn.scan(Block)), or the model is of another framework "
        "than the adapter. Remedy: call the model's own apply in the loss, put a "
        "lifted class inside a module of your own, take dsbp_optax.linen for Linen "
        "and dsbp_optax.nnx for NNX (neither: dsbp_optax.tap, or pass Activations to "
        "update), or pass strict=False to let such kernels use the basis of their "
        "gradient."
    )


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
