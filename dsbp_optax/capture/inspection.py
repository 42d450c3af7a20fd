"""What a loss tells of its kernels in one trace; knows no framework.

Layers with a rule report their calls; the jaxpr tells which parameter each of them uses
as its kernel, and along which axes transformations have stacked it. Two layers that are
handed one object, and read samples off it alike, see the same activations: a copy of an
input counts as another input.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_optax.capture import origin
from dsbp_optax.capture.tap import LinearMap
from dsbp_optax.core.layout import Axes, Shape
from dsbp_optax.core.paths import Groups
from dsbp_optax.linalg.types import PyTree

#: Begins the labels of the parameters of a whole model, where riders are put in.
ROOT = "root "
#: Begins the paths of what stands for riders in a trace that inspects.
_MARKER = "marker "
NOT_CALLED = "its layer was not called"
NO_RULE = "no rule says how its layer acts through this kernel"
ANOTHER = (
    "its layer was called with an array that cannot be told to be this parameter (one "
    "function that is compiled or checkpointed once for two sets of parameters, values "
    "that were taken apart)"
)
CUSTOM = (
    "its layer is called inside of a function with a derivative of its own "
    "(jax.custom_vjp, jax.custom_jvp, jax.lax.custom_root)"
)
WALKED = (
    "the loss computes with the whole tree of the model's variables, in which what is "
    "put beside this kernel to observe it would count (a penalty of jax.tree.leaves("
    "model), nn.map_variables)"
)
REPLACED = (
    "its layer has another array in its place when it is called, or the model goes "
    "through a function of JAX as a pytree (jax.checkpoint, jax.jit, jax.tree.map; "
    "those of nnx are observed)"
)
NOT_LINEAR = "its layer does not act on its input through it as the rule says"


class Inspection(NamedTuple):
    """What `inspect` of an adapter found out about the kernels of a model.

    Handed to an optimizer as ``basis=Basis(axes=it, share=it.shared)``; prints
    as a table.

    Attributes:
      axes: (path, `Axes`) of each kernel whose axes the loss tells.
      shared: groups of kernels with one and the same input.
      covered: paths of the kernels of whose input an adapter takes statistics.
      reasons: (path, why not) of the other ones.

    Example:
      >>> from dsbp_optax import Axes
      >>> from dsbp_optax.capture import Inspection
      >>> found = Inspection((("q", Axes((0,), (1, 2))),), (), ("q",), ())
      >>> found("q", (8, 2, 4))
      Axes(inputs=(0,), outputs=(1, 2), batch=())
      >>> print(found)
      q  inputs (0,)  outputs (1, 2)  batch ()  statistics
    """

    axes: tuple[tuple[str, Axes], ...]
    shared: Groups
    covered: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...]

    def __call__(self, path: str, shape: Shape) -> Axes | None:
        """The axes of one kernel, None where the loss does not tell."""
        found = dict(self.axes).get(path)
        fits = found is not None and sum(map(len, found)) == len(shape)
        return found if fits else None

    def __str__(self) -> str:
        """A table of one line a kernel."""
        axes, reasons = dict(self.axes), dict(self.reasons)
        owner = {path: group[0] for group in self.shared for path in group[1:]}
        rows = []
        for path in dict.fromkeys([*axes, *reasons]):
            said = (
                [f"{k} {v}" for k, v in axes[path]._asdict().items()]
                if (path in axes)
                else ["axes unknown", "", ""]
            )
            status = reasons.get(path, "statistics")
            if path in owner:
                status += f", one input with {owner[path]}"
            rows.append([path, *said, status])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


class Call(NamedTuple):
    """One call of a layer, kept so that no object takes the place of another.

    Attributes:
      label: of the kernel in the jaxpr.
      path: of the parameter, where it is known.
      linear: how the layer acts.
      kernel: shape of the kernel in the layer, inside of the transformations around it.
      seen: which axes of the labelled array the layer sees, `vmap` hides the others.
      x: what entered.
      reading: the layer's linear map for one output, a jaxpr: patches and paddings;
        None where there is none.
      reason: why it cannot be tapped; None where it can.
    """

    label: str
    path: str | None
    linear: LinearMap
    kernel: Shape
    seen: Shape
    x: Any
    reading: Any
    reason: str | None

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for calls that read the same samples."""
        consts = () if self.reading is None else map(id, self.reading.consts)
        return id(self.x), str(self.reading), *consts


class Notes:
    """The calls of layers during one trace.

    Attributes:
      calls: in their order.
      markers: path -> an array of the kernel's shape, to be put where its rider will
        be: whatever computes with it would compute with the rider.
      beside: path of a marker -> labels of the kernels that it lies beside, where that
        need not be the one at its path.
    """

    def __init__(self, markers: Mapping[str, Any]) -> None:
        self.calls: list[Call] = []
        self.markers = markers
        self.beside: dict[str, set[str]] = defaultdict(set)
        self.readings: dict[Any, Any] = {}

    def note(
        self,
        linear: LinearMap,
        kernel: Any,
        x: Any,
        y: Any,
        reason: str | None = None,
        path: str | None = None,
    ) -> None:
        """Take note of one call.

        Args:
          linear: how the layer acts.
          kernel: what it uses as its kernel.
          x: what entered.
          y: what it returned.
          reason: why it cannot be tapped, where that is known.
          path: of the parameter, where it is known.
        """
        label, shape, reading = f"call {len(self.calls)}", jnp.shape(kernel), None
        origin.label(kernel, label)
        if reason is None:
            try:
                key = linear.apply, linear.axes_of(len(shape)), shape, jnp.shape(x)
                if key not in self.readings:
                    self.readings[key] = _reading(linear, shape, x)
                reading = self.readings[key]
                if y is not None and not linear.gives_kernel:
                    _check_result(linear, shape, reading, y)
            except Exception as error:
                reason = f"{NOT_LINEAR} ({first_line(error)})"
        seen = _seen(kernel)
        self.calls.append(Call(label, path, linear, shape, seen, x, reading, reason))


class Findings(NamedTuple):
    """What one trace of a loss has told of its kernels, by path.

    Attributes:
      axes: of the whole kernels.
      reasons: why a kernel cannot be observed; the others can.
      calls: of each kernel's layer.
      labels: what labelled arrays are.
      shapes: of the parameters.
    """

    axes: Mapping[str, Axes]
    reasons: Mapping[str, str]
    calls: Mapping[str, list[Call]]
    labels: Mapping[str, origin.Origin | None]
    shapes: Mapping[str, Any]

    def inspection(self) -> Inspection:
        """For the user: of all that has two axes or more."""
        kernels = [p for p, leaf in self.shapes.items() if len(leaf.shape) > 1]
        return Inspection(
            tuple((p, self.axes[p]) for p in kernels if p in self.axes),
            self.groups(),
            tuple(p for p in kernels if p not in self.reasons),
            tuple((p, self.reasons[p]) for p in kernels if p in self.reasons),
        )

    def groups(self) -> Groups:
        """Paths whose calls all coincide and that one basis fits, in tree order."""
        together: dict[Any, list[str]] = defaultdict(list)
        for path, leaf in self.shapes.items():
            if path in self.calls and path not in self.reasons:
                kept = (*self.axes[path].inputs, *self.axes[path].batch)
                form = tuple(n if a in kept else 1 for a, n in enumerate(leaf.shape))
                together[self._input(path), form, leaf.dtype].append(path)
        return tuple(tuple(paths) for paths in together.values() if len(paths) > 1)

    def strangers(self, shared: Mapping[str, Collection[str]]) -> dict[str, str]:
        """Kernels that use a basis of activations that they do not see, and why."""
        found = {}
        for owner, members in shared.items():
            for path in members:
                if owner in self.calls and self._input(path) != self._input(owner):
                    calls = len(self.calls.get(path, ()))
                    told = "with another input" if calls else "by no known layer"
                    found[path] = (
                        f"uses the basis of '{owner}' but was called {told} ({calls} "
                        f"calls and {len(self.calls[owner])})"
                    )
        return found

    def _input(self, path: str) -> tuple[Any, ...]:
        return tuple(sorted(call.key for call in self.calls.get(path, ())))


def inspect(
    function: Callable[[dict[str, Any], Notes], Any], leaves: Mapping[str, Any]
) -> Findings:
    """What `function` tells of its parameters, in one trace.

    Args:
      function: (parameters by path, notes) -> anything; its layers report to the notes.
      leaves: path -> parameter, or its shape.
    """
    kernels = {path: x for path, x in leaves.items() if jnp.ndim(x) > 1}
    try:
        traced, notes = _trace(function, leaves, kernels)
    except Exception:  # Not all modules bear to have markers put into them.
        traced, notes = _trace(function, leaves, {})
    shapes = {p: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for p, x in leaves.items()}
    axes: dict[str, Axes] = {}
    reasons: dict[str, str] = {}
    calls: dict[str, list[Call]] = defaultdict(list)
    unknown = set()
    for call in notes.calls:
        one = traced.labels.get(call.label)
        if call.path is not None and call.path in leaves:
            every = tuple(range(len(shapes[call.path].shape)))
            one = origin.Origin(call.path, True, every)
        if one is None:
            unknown.add(call.kernel)
        elif one.dims == tuple(sorted(one.dims)):
            calls[one.path].append(call)
            ways = _ways(call, one, shapes[one.path].shape)
            used = [use for use in traced.uses.get(one.path, ()) if use]
            reason = CUSTOM if call.label in traced.custom else call.reason
            if len(ways) > 1:
                ways = [way for way in ways if way in used] or ways
            if len(ways) != 1 and reason is None:
                reason = "lengths do not tell along which of its axes it is stacked"
            if ways:
                way = axes.setdefault(one.path, ways[0])
                if (
                    reason is None
                    and used
                    and not any({*use.inputs} == {*way.inputs} for use in used)
                ):
                    reason = (
                        f"{NOT_LINEAR} (axes {way.inputs} are summed over by its rule, "
                        f"{used[0].inputs} by the layer)"
                    )
                    axes[one.path] = used[0]
            if reason is not None:
                reasons[one.path] = reason
    for path in kernels:
        if _MARKER + path in traced.touched | traced.cast:
            found = [traced.labels.get(label) for label in notes.beside[path]]
            for place in [one.path for one in found if one] if found else [path]:
                reasons.setdefault(place, WALKED)
    roots = [one for key, one in traced.labels.items() if key.startswith(ROOT)]
    whole = {one.path for one in roots if one and one.whole}
    for path, leaf in shapes.items():
        uses = traced.uses.get(path, [])
        if path in calls and (path in whole or not roots):
            continue
        inner = leaf.shape if not uses or uses[0] is None else _unstacked(leaf, uses[0])
        doubt = path in calls or (uses and inner in unknown)
        touched = path in traced.touched
        said = ANOTHER if doubt else NO_RULE if touched else NOT_CALLED
        reasons.setdefault(path, said)
        told = len(set(uses)) == 1 and uses[0]
        if told and told.inputs and told.outputs:
            axes.setdefault(path, told)
    return Findings(axes, reasons, calls, traced.labels, shapes)


def _trace(
    function: Callable[[dict[str, Any], Notes], Any],
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Any],
) -> tuple[origin.Trace, Notes]:
    """What it does with its parameters, and with markers of `kernels`; its notes."""
    noted = []

    def run(given: dict[str, Any]) -> Any:
        notes = Notes({path: given.pop(_MARKER + path) for path in kernels})
        noted.append(notes)
        return function(given, notes)

    markers = {_MARKER + path: x for path, x in kernels.items()}
    traced = origin.trace(run, {**leaves, **markers})
    return traced, noted[0]


def _unstacked(leaf: Any, axes: Axes) -> Shape:
    return tuple(n for a, n in enumerate(leaf.shape) if a not in axes.batch)


def _ways(call: Call, one: origin.Origin, kernel: Shape) -> list[Axes]:
    """Axes of the whole kernel as a layer uses them that sees a slice of it."""
    own, found = call.linear.axes_of(len(call.kernel)), []
    if len(call.seen) == len(call.kernel):
        choices = [tuple(one.dims[a] for a in call.seen)]
    else:
        mine = [a for a in one.dims if a >= 0]
        choices = list(itertools.combinations(mine, len(call.kernel)))
    for kept in choices:
        if -1 not in kept and tuple(kernel[a] for a in kept) == call.kernel:
            inputs, outputs, inner = (
                tuple(sorted(kept[a] for a in group)) for group in own
            )
            hidden = (a for a in range(len(kernel)) if a not in kept)
            found.append(Axes(inputs, outputs, tuple(sorted((*inner, *hidden)))))
    return found


def _seen(kernel: Any) -> Shape:
    """Which axes of an array that `vmap` has put its own axes into are still seen."""
    hidden = []
    while isinstance(axis := getattr(kernel, "batch_dim", None), int):
        hidden.append(axis)
        kernel = kernel.val
    seen = list(range(jnp.ndim(kernel)))
    for axis in reversed(hidden):
        del seen[axis]
    return tuple(seen)


def _reading(linear: LinearMap, kernel: Shape, x: Any) -> Any:
    """The linear map for one output, or an error where it is none."""
    axes = linear.axes_of(len(kernel))
    ins = tuple(kernel[a] for a in (*axes.batch, *axes.inputs))
    like = jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32)
    column = jax.ShapeDtypeStruct((*ins, 1), jnp.float32)
    reading = jax.make_jaxpr(linear.apply)(like, column)
    (result,) = reading.out_avals

    def transpose(x: Any, z: Any) -> Any:
        return jax.linear_transpose(lambda kernel: linear.apply(x, kernel), column)(z)

    jax.eval_shape(transpose, like, jax.ShapeDtypeStruct(result.shape, result.dtype))
    return reading


def _check_result(linear: LinearMap, kernel: Shape, reading: Any, y: Any) -> None:
    """Raise where a layer returns another shape than its rule says."""
    got, (one,) = y.shape, reading.out_avals
    if linear.arrange is not None:
        like = jax.ShapeDtypeStruct(y.shape, y.dtype)
        got = jax.eval_shape(linear.arrange, like).shape
    outs = (kernel[a] for a in linear.axes_of(len(kernel)).outputs)
    expected = (*one.shape[:-1], *outs)
    if got != expected:
        raise ValueError(f"it returns {got}, the rule says {expected}")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def on_shapes(function: Callable[..., None], *trees: PyTree) -> None:
    """Call `function` on shapes: arrays become tracers, all else stays as it is."""
    leaves, treedef = jax.tree.flatten(trees)
    arrays = [
        i for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")
    ]

    def run(values: list[Any]) -> None:
        filled = {**dict(enumerate(leaves)), **dict(zip(arrays, values, strict=True))}
        function(*jax.tree.unflatten(treedef, filled.values()))

    jax.eval_shape(run, [leaves[i] for i in arrays])
