"""State and step that the two spectral transformations share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _checks, _eigenbasis, _layout, _plan, _schedule
from dsbp_optax._eigenbasis import Layer, Refresh, Spectrum
from dsbp_optax._known import KnownPaths
from dsbp_optax._layout import Coordinates, MatrixView
from dsbp_optax._schedule import AutoRank
from dsbp_optax._statistics import Sketch
from dsbp_optax._types import Array, PyTree, compute_dtype

T = TypeVar("T")

#: Of the states below: their fields, and what the arrays in them mean. A change of
#: either is a new number.
VERSION = "1"
#: Times a gradient may grow in a moment before squares are no longer finite.
_ROOM = 2.0**10


class SpectralProjectionState(NamedTuple):
    """State of `scale_by_spectral_projection`.

    Every array of `basis` and `spectrum` has the *kernel form*: the kernel's axes
    in the kernel's order plus one trailing axis, of length 1 along each axis that
    it does not depend on. A Dense kernel ``(784, 512)`` has an input basis
    ``(784, 1, k)`` and an output basis ``(1, 512, k)``.

    Attributes:
      step: int32, updates seen.
      skipped: int32, updates whose gradients were not finite, or so large that their
        squares are not; they changed nothing.
      collect: int32, 1 if the next step's statistics of any layer will be used, else 0.
      basis: parameter path -> orthonormal basis, a flat dict.
      spectrum: parameter path -> `Spectrum`.
      schedule: parameter path -> `Schedule`, for layers that have something to decide.
      statistics: place for `put_statistics`; empty unless reserved.
      shared: who uses another kernel's basis, ``{owner: {member: {}}}``; holds no
        arrays.
      inner: state of the inner optimizer on a flat dict by path, with ``(*batch, k,
        m)`` coordinates for projected kernels and full arrays for the rest.
      residual: parameter path -> state of the residual rule; empty where it keeps none.
      fallback: state of the optimizer of parameters that are no kernels, on a flat
        dict by path; empty without one.
      version: ``{version: {}}``, that of the state's form; holds no arrays, so that
        states of two versions differ in their structure.
    """

    step: Array
    skipped: Array
    collect: Array
    basis: Any
    spectrum: Any
    schedule: Any
    statistics: Any
    shared: Any
    inner: Any
    residual: Any
    fallback: Any
    version: Any


class SpectralSharpnessState(NamedTuple):
    """State of `add_spectral_sharpness`; fields as in `SpectralProjectionState`."""

    step: Array
    skipped: Array
    collect: Array
    basis: Any
    spectrum: Any
    schedule: Any
    statistics: Any
    shared: Any
    version: Any


class ActivationMetricState(NamedTuple):
    """State of `scale_by_activation_metric`; fields as in `SpectralProjectionState`.

    A step that is not finite leaves all of it but `skipped` as it is; `inner` is the
    state of the inner transformation on a flat dict by path.
    """

    step: Array
    skipped: Array
    collect: Array
    basis: Any
    spectrum: Any
    schedule: Any
    statistics: Any
    shared: Any
    version: Any
    inner: Any


#: State type -> what its statistics' paths end in. Those of a kernel's first basis,
#: the projection's or the metric's, end in nothing.
STATES: Mapping[type, str] = {
    SpectralProjectionState: "",
    ActivationMetricState: "",
    SpectralSharpnessState: "#sharpness",
}
SpectralState: TypeAlias = (
    SpectralProjectionState | ActivationMetricState | SpectralSharpnessState
)


def find_states(opt_state: PyTree) -> list[SpectralState]:
    """The spectral states inside any nest of optax wrappers."""
    found: list[SpectralState] = []

    def note(state: SpectralState) -> SpectralState:
        found.append(state)
        return state

    map_states(note, opt_state)
    return found


def owners_of(state: SpectralState) -> dict[str, str]:
    """Path of each projected parameter -> path under which its basis is kept."""
    owners = {path: path for path in state.basis}
    for owner, members in state.shared.items():
        owners |= dict.fromkeys(members, owner)
    return owners


def check_path(path: str, leaves: Mapping[str, Any]) -> None:
    """Raise where a projected kernel is not among the parameters."""
    if path not in leaves:
        raise ValueError(
            f"the state holds a basis for '{path}', which is not among the "
            f"parameters ({_checks.some(leaves)}). Remedy: pass the whole "
            "tree that init saw."
        )


def check_version(state: SpectralState) -> None:
    """Raise for a state whose form is not that of this package."""
    got = "/".join(map(str, state.version)) or "none"
    if got != VERSION:
        raise ValueError(
            f"the optimizer state is of version {got}, expected {VERSION}. Remedy: go "
            "on with the dsbp_optax that wrote it, or init again."
        )


def map_states(
    function: Callable[[SpectralState], SpectralState], opt_state: PyTree
) -> PyTree:
    """`function` at every spectral state inside any nest of optax wrappers."""

    def visit(node: Any) -> Any:
        return function(node) if _is_state(node) else node

    return jax.tree.map(visit, opt_state, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    """Whether `node` is a spectral state, and not that of an empty tree."""
    return isinstance(node, SpectralState) and isinstance(node.basis, Mapping)


def put_statistics(opt_state: PyTree, statistics: Mapping[str, Any]) -> PyTree:
    """Hand statistics over inside the state, through wrappers that drop keywords.

    For ``optax.lookahead``, ``MultiSteps`` in a chain and the like. The optimizer
    must have been built with ``statistics_in_state=True``.

    Args:
      opt_state: any nest of optax states.
      statistics: sketches by path, as an adapter returns them.

    Returns:
      `opt_state` with the statistics in their place; the next update consumes them.

    Raises:
      ValueError: when no place was reserved.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2, statistics_in_state=True)
      >>> state = tx.init({"kernel": jnp.ones((8, 8))})
      >>> sketches = optax.tree.get(state, "statistics")
      >>> state = dsbp_optax.put_statistics(state, sketches)
    """
    states = find_states(opt_state)
    if not states or any(not s.statistics and s.basis for s in states):
        raise ValueError(
            "put_statistics: the optimizer state has no place for statistics. "
            "Remedy: build the optimizer with statistics_in_state=True."
        )
    known = [p + STATES[type(s)] for s in states for p in s.statistics]
    _eigenbasis.check_mapping(statistics, KnownPaths(known, []), [])
    for path, given in statistics.items():
        if not isinstance(given, Sketch):
            raise TypeError(
                f"put_statistics: got {type(given).__name__} for '{path}', expected a "
                "Sketch, as the adapters return it; no other has a place there. "
                "Remedy: pass whole matrices as statistics= to update."
            )

    def put(state: SpectralState) -> SpectralState:
        suffix = STATES[type(state)]
        given = {
            path: statistics.get(path + suffix, empty)
            for path, empty in state.statistics.items()
        }
        filled = {  # The dtypes of a state stay, whatever took the sketch.
            path: cast_like(x, state.statistics[path]) for path, x in given.items()
        }
        return state._replace(statistics=filled)

    return map_states(put, opt_state)


def empty_statistics(layers: Mapping[str, Layer]) -> dict[str, Sketch]:
    """Sketches of nothing, in kernel form."""
    return {
        path: empty_sketch(layer.basis, layer.spectrum)
        for path, layer in layers.items()
    }


def empty_sketch(basis: Array, spectrum: Spectrum) -> Sketch:
    """A sketch of no samples, of the shapes that `basis` asks for."""
    return Sketch(
        product=jnp.zeros_like(basis),
        count=jnp.zeros_like(spectrum.trace),
        trace=jnp.zeros_like(spectrum.trace),
    )


def gather_statistics(
    given: Any,
    state: SpectralState,
    views: Mapping[str, MatrixView],
    known: KnownPaths,
) -> dict[str, Any]:
    """Statistics by path: those of the call, else those put into the state.

    A path may end in the suffix of one transformation; under plain paths, sketches are
    the projection's and whole matrices serve all.
    """
    if given is None:
        return dict(state.statistics)
    _eigenbasis.check_mapping(given, known, [s for s in STATES.values() if s])
    suffix = STATES[type(state)]
    found: dict[str, Any] = {}
    for path, owner in owners_of(state).items():
        statistic = given.get(path + suffix)
        if statistic is None and not isinstance(given.get(path), Sketch):
            statistic = given.get(path)  # whole matrices serve every transformation
        if statistic is not None:
            rank = state.basis[owner].shape[-1]
            view = views[path]
            statistic = _eigenbasis.check_statistic(path, statistic, view, rank)
            _check_same(found.setdefault(owner, statistic), statistic, owner, path)
    return found


def _check_same(one: Any, two: Any, owner: str, path: str) -> None:
    """Kernels that share a basis share its statistic; shapes betray another input."""
    shapes = [jax.tree.map(jnp.shape, statistic) for statistic in (one, two)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"statistics['{path}']: got {shapes[1]}, expected {shapes[0]} as for "
            f"'{owner}', whose basis it shares. Remedy: pass one statistic for kernels "
            "that share a basis, or take this one out of share=."
        )


def all_finite(tree: PyTree) -> Array:
    """Whether every number of every leaf is finite, and can be squared and added up.

    By the sum of squares, which reduces several times faster than a test of each: the
    moments that a gradient goes into are squared themselves.
    """
    sizes = [
        jnp.abs(x).astype(compute_dtype(jnp.abs(x).dtype))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    checks = [jnp.sum(x * x) < jnp.finfo(x.dtype).max / _ROOM**2 for x in sizes]
    return jnp.stack(checks).all() if checks else jnp.asarray(True)


def cast_like(new: T, old: T) -> T:
    """`new` in the dtypes of `old`; random keys, which cannot be cast, as they are."""
    cast: T = jax.tree.map(
        lambda a, b: a if jnp.result_type(a) == b.dtype else a.astype(b.dtype),
        new,
        old,
    )
    return cast


def collects(state: SpectralState, path: str) -> Array:
    """Whether the next step's statistics of this layer will be used; int32."""
    schedule = state.schedule.get(path)
    if schedule is None or schedule.collect is None:
        return state.collect
    flag: Array = schedule.collect
    return flag


def rank_rules(
    choices: _plan.Choices, views: Mapping[str, MatrixView]
) -> dict[str, AutoRank]:
    """Path -> rule, of the layers whose rank is adaptive."""
    asked = {
        path: _schedule.auto_rank(_layout.resolve(choices.rank, path, v.shape, None))
        for path, v in views.items()
    }
    return {path: rule for path, rule in asked.items() if rule is not None}


def init_layers(
    params: PyTree,
    decisions: Mapping[str, _plan.Decision],
    refresh: Refresh,
    rules: Mapping[str, AutoRank],
) -> dict[str, Layer]:
    """Cold layers for the projected parameters."""
    leaves, _ = _layout.flatten_with_paths(params)
    return {
        path: _eigenbasis.init_layer(
            path,
            choice.view,
            choice.rank,
            compute_dtype(jnp.result_type(leaves[path])),
            refresh,
            rules.get(path),
        )
        for path, choice in decisions.items()
        if choice.view is not None and choice.projected and choice.owner is None
    }


def init_shared(decisions: Mapping[str, _plan.Decision]) -> dict[str, Any]:
    """Who uses another parameter's basis, as the keys of nested dicts."""
    shared: dict[str, dict[str, Any]] = {}
    for path, choice in decisions.items():
        if choice.owner is not None:
            shared.setdefault(choice.owner, {})[path] = {}
    return shared


def init_fields(
    params: PyTree,
    choices: _plan.Choices,
    refresh: Refresh,
    reserve: bool,
    inner: optax.GradientTransformation,
    outside: Callable[[Array], PyTree] | None = None,
) -> tuple[dict[str, _plan.Decision], dict[str, Any]]:
    """What is decided for each parameter, and the state fields that follow from it.

    Args:
      params: parameters.
      choices: what the user asked for.
      refresh: settings.
      reserve: whether to reserve a place for `put_statistics`.
      inner: inner optimizer, whose memory tells what is worth projecting.
      outside: zeros shaped as a matrix -> state of the residual rule, or None.
    """
    decisions = _plan.plan(params, choices, inner, outside)
    views = {p: d.view for p, d in decisions.items() if d.view is not None}
    rules = rank_rules(choices, views)
    layers = init_layers(params, decisions, refresh, rules)
    return decisions, {
        **counters(),
        **join_layers(layers),
        "statistics": empty_statistics(layers) if reserve else {},
        "shared": init_shared(decisions),
        "version": {VERSION: {}},
    }


def empty_fields() -> dict[str, Any]:
    """The same for a tree without parameters: one leaf for each.

    Also what `optax.tree.map_params` asks for, which wants one leaf in the place of
    everything that is not a copy of the parameters.
    """
    names = ("basis", "spectrum", "schedule", "statistics", "shared", "version")
    return {**counters(), **{name: jnp.zeros([]) for name in names}}


def counters() -> dict[str, Array]:
    """step, skipped, collect of a fresh state; buffers of their own, to be donated."""
    step, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
    return {"step": step, "skipped": skipped, "collect": jnp.ones([], jnp.int32)}


def matrices(
    gradients: Mapping[str, Array | Coordinates], views: Mapping[str, MatrixView]
) -> dict[str, Array]:
    """The projected parameters as matrices, in their compute dtype.

    Those that come as coordinates are left out.
    """
    return {
        path: _layout.to_matrices(_layout.astype(gradients[path], dtype), view)
        for path, view in views.items()
        if not isinstance(gradients[path], Coordinates)
        for dtype in [compute_dtype(jnp.result_type(gradients[path]))]
    }


def split_layers(state: SpectralState) -> dict[str, Layer]:
    """The layers of a state, by path."""
    return {
        path: Layer(
            basis.astype(state.spectrum[path].trace.dtype),
            state.spectrum[path],
            state.schedule.get(path),
        )
        for path, basis in state.basis.items()
    }


def join_layers(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """The state fields that hold `layers`, the inverse of `split_layers`."""
    return {
        "basis": {path: layer.basis for path, layer in layers.items()},
        "spectrum": {path: layer.spectrum for path, layer in layers.items()},
        "schedule": {
            path: layer.schedule
            for path, layer in layers.items()
            if layer.schedule is not None
        },
    }


def store_bases(fields: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The fields of a state with bases of `dtype`; None leaves them."""
    if dtype is None:
        return fields
    stored = {path: basis.astype(dtype) for path, basis in fields["basis"].items()}
    return {**fields, "basis": stored}
