"""The state of every transformation with an eigenbasis, read and written by path."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_optax.core import checks, layout, plan, stacks
from dsbp_optax.core.paths import KnownPaths
from dsbp_optax.core.plan import Kernel
from dsbp_optax.core.stacks import Stack
from dsbp_optax.core.statistics import FORMS, Activations, Sketch
from dsbp_optax.linalg.eigensolvers import orthonormalize
from dsbp_optax.linalg.types import Array, PyTree

T = TypeVar("T")
Kind: TypeAlias = Literal[
    "projection", "metric", "momentum_metric", "sharpness", "moments"
]

#: Of the form of the state below and the meaning of its arrays.
VERSION = "3"
#: What the statistics' paths of a second basis of a kernel end in.
SUFFIX: Mapping[str, str] = {"sharpness": "#sharpness"}


class Spectrum(NamedTuple):
    """What is known of a stack of bases, one value a matrix.

    Attributes:
      eigenvalues: ``(n, k)`` descending, per sample. With sketches, the Ritz values of
        the basis they were taken with.
      trace: ``(n,)``, trace of the second moment, per sample.
      weight: ``(n,)``, bias correction of the decay; 0 before any observation.
      residual: ``(n,)``, ``|C V - V Lambda| / lambda_1`` at the last refresh.
      energy: ``(n,)``, share of the gradient's energy inside the basis at the last
        refresh that saw a whole gradient.
      iterations: int32, power iterations done so far; 0 means never refreshed.
      failures: int32, refreshes that were refused (too few samples, zero or
        non-finite statistics); the last good basis was kept.
      activations: int32, 1 if the last refresh used activations, 0 if gradients.
      refreshed: int32, the step of the last refresh that was accepted, -1 before.
    """

    eigenvalues: Array
    trace: Array
    weight: Array
    residual: Array
    energy: Array
    iterations: Array
    failures: Array
    activations: Array
    refreshed: Array


class SpectralState(NamedTuple):
    """State of every transformation of this package that works on matrices.

    Kernels alike lie in one array, see `dsbp_optax.core.stacks`; `dsbp_optax.by_path`
    shows what belongs to each.

    Attributes:
      step: int32, updates taken.
      skipped: int32, updates whose gradients were not finite, or so large that their
        squares are not; they changed nothing else.
      collect: int32, 1 if the next step's statistics will be used, else 0.
      basis: name of a stack -> orthonormal bases ``(n, d, k)``.
      spectrum: name of a stack -> `Spectrum`.
      statistics: place for `put_statistics`, by path; empty unless reserved.
      inner: name of a stack of kernels -> state of the rule of each matrix.
      fallback: state of the transformation of parameters that are no kernels, on a
        flat dict by path.
      plan: what was decided at ``init``, as keys: see `dsbp_optax.core.plan`.
      form: ``{version: {kind: {}}}``; holds no arrays.
    """

    step: Array
    skipped: Array
    collect: Array
    basis: Any
    spectrum: Any
    statistics: Any
    inner: Any
    fallback: Any
    plan: Any
    form: Any

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """What was decided of each kernel, in the order of paths."""
        return plan.from_keys(self.plan)

    @property
    def kind(self) -> str:
        """Which transformation's state this is."""
        (kinds,) = self.form.values()
        return str(*kinds)

    @property
    def suffix(self) -> str:
        """What its statistics' paths end in."""
        return SUFFIX.get(self.kind, "")

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of all kernels."""
        return stacks.of_kernels(self.kernels)

    @property
    def bases(self) -> tuple[Stack, ...]:
        """The stacks of bases."""
        return stacks.of_bases(self.kernels)


class Layer(NamedTuple):
    """What a state holds of one kernel, see `by_path`.

    Attributes:
      kernel: what was decided.
      basis: ``(*stacked, d, k)``, None without one.
      spectrum: `Spectrum` of arrays ``(*stacked, ...)``, or None.
      inner: state of its rule, with leading axes likewise.
    """

    kernel: Kernel
    basis: Any
    spectrum: Any
    inner: Any


def by_path(opt_state: PyTree) -> dict[str, Layer]:
    """What a state holds of each kernel: basis, spectrum, moments.

    Args:
      opt_state: any nest of optax states, or its shapes.

    Returns:
      Path -> `Layer`. The path of a kernel's second basis, that of
      `add_spectral_sharpness`, ends in "#sharpness"; kernels of moments that know no
      basis, in "#moments".

    Cost: slices; nothing is copied where nothing is stacked.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> params = {f"Dense_{i}": {"kernel": jnp.ones((32, 16))} for i in range(3)}
      >>> state = dsbp_optax.dsbp_muon(0.02, rank=4).init(params)
      >>> dsbp_optax.by_path(state)["Dense_1/kernel"].basis.shape
      (32, 4)
    """
    found = {}
    for state in find_states(opt_state):
        suffix = "#moments" if state.kind == "moments" else state.suffix
        for one in state.kernels:
            basis, spectrum = _of_owner(state, one)
            stack = next(s for s in state.stacks if one in s.kernels)
            inner = _rows(state.inner.get(stack.name, ()), stack, one)
            found[one.path + suffix] = Layer(one, basis, spectrum, inner)
    return found


def _of_owner(state: SpectralState, one: Kernel) -> tuple[Any, Any]:
    if not one.rank:
        return None, None
    stack = next(s for s in state.bases for k in s.kernels if k.path == one.owner)
    owner = next(k for k in stack.kernels if k.path == one.owner)
    both = state.basis[stack.name], state.spectrum[stack.name]
    basis, spectrum = _rows(both, stack, owner)
    return basis, spectrum


def _rows(tree: PyTree, stack: Stack, one: Kernel) -> PyTree:
    """What belongs to a kernel, with its stacking axes or none."""
    rows, shape = stack.rows(one.path), one.view.batch_shape

    def cut(x: Any) -> Any:
        return x[rows].reshape((*shape, *x.shape[1:]))

    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
        return jax.eval_shape(lambda t: jax.tree.map(cut, t), tree)
    return jax.tree.map(cut, tree)


def wide_basis(layer: Layer) -> Array:
    """A layer's bases ``(n, d, k)`` in the dtype of their linear algebra."""
    view = layer.kernel.view
    wide: Array = layer.basis.astype(layer.spectrum.trace.dtype)
    return wide.reshape(view.matrices, view.size, layer.kernel.rank)


def with_layers(opt_state: PyTree, layers: Mapping[str, Layer]) -> PyTree:
    """Write what `by_path` shows into a state, of this model or of a similar one.

    For states of a model that has changed, and of optimizers that stack otherwise:
    kernels that `layers` does not have stay as they are.

    Args:
      opt_state: any nest of optax states.
      layers: path -> `Layer`, as `by_path` gives them.

    Returns:
      A state of the structure of `opt_state`.

    Raises:
      ValueError: where a kernel is read otherwise, or the shapes of its arrays are not
        those of `opt_state`.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_muon(0.02, rank=4)
      >>> old = tx.init({"one": {"kernel": jnp.ones((32, 16))}})
      >>> new = tx.init({x: {"kernel": jnp.ones((32, 16))} for x in ("one", "two")})
      >>> new = dsbp_optax.with_layers(new, dsbp_optax.by_path(old))
    """

    def put(path: str, whole: Any, part: Any, rows: slice) -> Any:
        def one(x: Any, y: Any) -> Any:
            flat = jnp.reshape(y, (-1, *x.shape[1:])) if jnp.size(y) else jnp.asarray(y)
            if flat.shape != x[rows].shape:
                raise ValueError(
                    f"with_layers: '{path}': got an array of shape {jnp.shape(y)}, "
                    f"expected one of {x[rows].shape}. {_ALIKE}"
                )
            return jnp.asarray(x).at[rows].set(flat.astype(x.dtype))

        got, expected = (str(jax.tree.structure(x)) for x in (part, whole))
        if got != expected:
            raise ValueError(
                f"with_layers: '{path}': got {got}, expected {expected}. {_ALIKE}"
            )
        return jax.tree.map(one, whole, part)

    def check(layer: Layer, one: Kernel) -> None:
        got, expected = (k._replace(path="", owner="") for k in (layer.kernel, one))
        if got != expected:
            raise ValueError(
                f"with_layers: '{one.path}': got {got}, expected {expected}. {_ALIKE}"
            )

    def visit(state: SpectralState) -> SpectralState:
        suffix = "#moments" if state.kind == "moments" else state.suffix
        basis, spectrum, inner = dict(state.basis), dict(state.spectrum), state.inner
        inner = dict(inner)
        for one in state.kernels:
            if (layer := layers.get(one.path + suffix)) is None:
                continue
            check(layer, one)
            for stack in state.stacks:
                if one in stack.kernels and stack.name in inner:
                    rows = stack.rows(one.path)
                    inner[stack.name] = put(
                        one.path, inner[stack.name], layer.inner, rows
                    )
            for stack in state.bases:
                if one in stack.kernels:
                    rows, name = stack.rows(one.path), stack.name
                    basis[name] = put(one.path, basis[name], layer.basis, rows)
                    # Steps of this state: what lies ahead of it has not happened.
                    done = jnp.minimum(layer.spectrum.refreshed, state.step - 1)
                    told = layer.spectrum._replace(refreshed=done)
                    spectrum[name] = put(one.path, spectrum[name], told, rows)
        return state._replace(basis=basis, spectrum=spectrum, inner=inner)

    return map_states(visit, opt_state)


_ALIKE = "Remedy: layers of the same shapes, axes, side, rank, inner and bits."


def find_states(opt_state: PyTree, *kinds: Kind) -> list[SpectralState]:
    """The spectral states inside any nest of optax wrappers; all, or of some kinds."""
    found: list[SpectralState] = []

    def note(state: SpectralState) -> SpectralState:
        if not kinds or state.kind in kinds:
            found.append(state)
        return state

    map_states(note, opt_state)
    return found


def map_states(
    function: Callable[[SpectralState], SpectralState], opt_state: PyTree
) -> PyTree:
    """`function` at every spectral state inside any nest of optax wrappers."""

    def visit(node: Any) -> Any:
        if not _is_state(node):
            return node
        inside = map_states(function, node.fallback)
        return function(node._replace(fallback=inside))

    return jax.tree.map(visit, opt_state, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    """Whether `node` is a spectral state, and not that of an empty tree."""
    return isinstance(node, SpectralState) and isinstance(node.basis, Mapping)


def check_form(state: SpectralState, kind: Kind) -> None:
    """Raise for a state of another version, or of another transformation."""
    got = "/".join(map(str, state.form)) or "none"
    if got != VERSION:
        raise ValueError(
            f"the optimizer state is of version {got}, expected {VERSION}. Remedy: go "
            "on with the dsbp_optax that wrote it, or init again."
        )
    if state.kind != kind:
        found, wanted = (one.replace("_", " ") for one in (state.kind, kind))
        raise ValueError(
            f"the optimizer state is that of a {found}, expected that of a {wanted}."
            " Remedy: the optimizer that it was made with, or init again."
        )


def check_leaves(state: SpectralState, leaves: Mapping[str, Any]) -> None:
    """Raise where a kernel of the state is not among the updates, or is another."""
    with_basis = {one.path for one in state.kernels if one.rank}
    for path, leaf in leaves.items():
        if isinstance(leaf, layout.Coordinates) and path not in with_basis:
            raise ValueError(
                f"updates: got Coordinates for '{path}', for which this state keeps no "
                "basis. Remedy: take them with project_gradients from the state that "
                "update is given."
            )
    for one in state.kernels:
        if one.path not in leaves:
            raise ValueError(
                f"the state holds a place for '{one.path}', which is not among the "
                f"parameters ({checks.some(leaves)}). Remedy: pass the whole tree that "
                "init saw, or init again."
            )
        leaf = leaves[one.path]
        if isinstance(leaf, layout.Coordinates):
            plan.check_coordinates(one.path, leaf, one.view, one.rank)
        elif jnp.shape(leaf) != one.view.shape:
            raise ValueError(
                f"'{one.path}': got shape {jnp.shape(leaf)}, expected "
                f"{one.view.shape}, which the state was made for. Remedy: pass the "
                "tree that init saw, or init again."
            )


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_bases(
    bases: tuple[Stack, ...], dtype: Any
) -> tuple[dict[str, Array], dict[str, Spectrum]]:
    """Cold bases: orthonormal, each following from its path alone.

    One program: operation by operation it is hundreds.

    Args:
      bases: the stacks.
      dtype: to store them in; None for that of the computation.
    """
    basis, spectrum = {}, {}
    for stack in bases:
        first, count = stack.first, stack.matrices
        wide = jnp.dtype(first.dtype)
        shape = (*first.view.batch_shape, first.view.size, first.rank)
        seeds = [zlib.crc32(one.path.encode()) for one in stack.kernels]
        draw = functools.partial(jax.random.normal, shape=shape, dtype=wide)
        noise = jax.vmap(draw)(jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32)))
        found = stacks.one_by_one(orthonormalize, noise.reshape(count, *shape[-2:]))
        basis[stack.name] = found.astype(dtype or wide)
        spectrum[stack.name] = Spectrum(
            eigenvalues=jnp.zeros((count, first.rank), wide),
            trace=jnp.zeros(count, wide),
            weight=jnp.zeros(count, wide),
            residual=jnp.zeros(count, wide),
            energy=jnp.zeros(count, wide),
            iterations=jnp.zeros(count, jnp.int32),
            failures=jnp.zeros(count, jnp.int32),
            activations=jnp.zeros(count, jnp.int32),
            refreshed=jnp.full(count, -1, jnp.int32),
        )
    return basis, spectrum


def empty_state() -> SpectralState:
    """That of a tree without parameters: a leaf for each field.

    Also what `optax.tree.map_params` asks for, which wants one leaf in the place of
    everything that is not a copy of the parameters.
    """
    counters = (jnp.zeros([], jnp.int32) for _ in range(3))
    return SpectralState(*counters, *(jnp.zeros([]) for _ in range(7)))


def empty_sketches(state: SpectralState) -> dict[str, Sketch]:
    """Sketches of nothing in kernel form, by path of the owners."""
    found = {}
    for stack in state.bases:
        for one in stack.kernels:
            dtype, form = one.dtype, one.view.form
            count, trace = (jnp.zeros(form(False, 1), dtype) for _ in range(2))
            product = jnp.zeros(form(True, one.rank), dtype)
            found[one.path] = Sketch(product, count, trace)
    return found


def put_statistics(opt_state: PyTree, statistics: Mapping[str, Any]) -> PyTree:
    """Put statistics into the state, for wrappers that drop keywords.

    For ``optax.lookahead``, ``MultiSteps`` in a chain and the like. The optimizer
    must have been built with ``basis=Basis(statistics_in_state=True)``.

    Args:
      opt_state: any nest of optax states.
      statistics: sketches by path, as an adapter returns them.

    Returns:
      `opt_state` with the statistics in their place; the next update consumes them.

    Raises:
      ValueError: when no place was reserved.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_optax
      >>> basis = dsbp_optax.Basis(statistics_in_state=True)
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2, basis=basis)
      >>> state = tx.init({"kernel": jnp.ones((8, 8))})
      >>> sketches = optax.tree.get(state, "statistics")
      >>> state = dsbp_optax.put_statistics(state, sketches)
    """
    states = [state for state in find_states(opt_state) if state.basis]
    if not states or any(not state.statistics for state in states):
        raise ValueError(
            "put_statistics: the optimizer state has no place for statistics. "
            "Remedy: build the optimizer with basis=dsbp_optax.Basis("
            "statistics_in_state=True)."
        )
    known = [p + s.suffix for s in states for p in s.statistics]
    check_mapping(statistics, KnownPaths(known, []))
    for path, given in statistics.items():
        if not isinstance(given, Sketch):
            raise TypeError(
                f"put_statistics: got {type(given).__name__} for '{path}', expected a "
                "Sketch, as the adapters return it; no other has a place there. "
                "Remedy: pass whole matrices as statistics= to update."
            )

    def put(state: SpectralState) -> SpectralState:
        filled = {
            path: cast_like(statistics.get(path + state.suffix, empty), empty)
            for path, empty in state.statistics.items()
        }
        return state._replace(statistics=filled)

    return map_states(put, opt_state)


def gather_statistics(
    given: Any, state: SpectralState, known: KnownPaths
) -> dict[str, Any]:
    """Statistics by path of the owner: those of the call, else those in the state.

    A path may end in the suffix of one transformation; under plain paths, sketches are
    the projection's and whole matrices serve all.
    """
    if given is None:
        return dict(state.statistics)
    check_mapping(given, known)
    found: dict[str, Any] = {}
    for one in sorted(state.kernels, key=lambda one: one.owner != one.path):
        statistic = given.get(one.path + state.suffix)
        if statistic is None and not isinstance(given.get(one.path), Sketch):
            statistic = given.get(one.path)
        if statistic is not None and one.rank:
            statistic = _checked(one, statistic)
            _check_same(found.setdefault(one.owner, statistic), statistic, one)
    return found


def statistics_of(
    leaves: Mapping[str, Any], statistics: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of some parameters alone, of which others know nothing."""
    ends = ("", *SUFFIX.values())
    keys = {path + end for path in leaves for end in ends}
    return {key: one for key, one in statistics.items() if key in keys}


def check_mapping(statistics: Any, known: KnownPaths) -> None:
    """Statistics are a flat mapping from known paths, or an error that says where."""
    if not isinstance(statistics, Mapping):
        raise TypeError(
            f"statistics: got {type(statistics).__name__}, expected a flat mapping "
            "from parameter path to Sketch, Activations or Covariance, such as "
            "{'Dense_0/kernel': dsbp_optax.Activations(x)}."
        )
    for key in statistics:
        path = str(key)
        if path not in known.all:
            for suffix in SUFFIX.values():
                path = path.removesuffix(suffix)
        if not isinstance(key, str) or not known.may_have(path):
            raise ValueError(
                f"statistics: unknown path {key!r}, expected one of "
                f"{checks.some(known.all)}.{checks.did_you_mean(path, known.all)}"
            )


def _checked(one: Kernel, given: Any) -> Any:
    """`given` as a statistic that fits the kernel; bare arrays are activations."""
    whole = isinstance(given, FORMS)
    if not whole and not (hasattr(given, "shape") and hasattr(given, "dtype")):
        raise TypeError(
            f"statistics['{one.path}']: got {type(given).__name__}, expected Sketch, "
            "Activations, Covariance, or an activation matrix (n, d)."
        )
    statistic = given if whole else Activations(given)
    for field, allowed in statistic.shapes(one.view, one.rank).items():
        array = getattr(statistic, field)
        _check_array(f"statistics['{one.path}'].{field}", array, allowed)
    return statistic


def _check_array(
    where: str, array: Any, allowed: Sequence[tuple[int | None, ...]]
) -> None:
    kind = getattr(array, "dtype", None) or np.result_type(type(array))
    if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
        raise TypeError(f"{where}: got dtype {kind}, expected a real number's.")
    got = np.shape(array)
    for shape in allowed:
        pairs = zip(shape, got, strict=False)
        if len(got) == len(shape) and all(a is None or a == b for a, b in pairs):
            return
    wanted = " or ".join(str(shape).replace("None", "n") for shape in allowed)
    raise ValueError(
        f"{where}: got shape {got}, expected {wanted}. Remedy: pass the activations of "
        "the side that is projected, with the kernel's axes of that side flattened; if "
        "the kernel's axes were misread, pass basis=dsbp_optax.Basis(axes={...: "
        "dsbp_optax.Axes(...)}) to the optimizer."
    )


def _check_same(left: Any, right: Any, one: Kernel) -> None:
    """Kernels that share a basis share its statistic; shapes betray another input."""
    shapes = [jax.tree.map(jnp.shape, statistic) for statistic in (left, right)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"statistics['{one.path}']: got {shapes[1]}, expected {shapes[0]} as for "
            f"'{one.owner}', whose basis it shares. Remedy: pass one statistic for "
            "kernels that share a basis, or take this one out of share=."
        )


def cast_like(new: T, old: T) -> T:
    """`new` in the dtypes of `old`; random keys, which cannot be cast, as they are."""
    cast: T = jax.tree.map(
        lambda a, b: a if jnp.result_type(a) == b.dtype else jnp.asarray(a, b.dtype),
        new,
        old,
    )
    return cast


def where(condition: Array, new: T, old: T) -> T:
    """`new` where the condition holds, else `old`, dtypes kept."""
    chosen: T = jax.tree.map(
        lambda a, b: jnp.where(condition, a, b), cast_like(new, old), old
    )
    return chosen
