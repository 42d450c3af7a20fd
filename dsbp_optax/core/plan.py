"""What is decided once, at ``init``: which parameters are kernels, how they are read,
which have a basis, of which rank, and whose.

The plan is a static value. A state carries it as the keys of nested dicts, which every
serializer keeps and which hold no arrays: whoever is given a state reads there what
`decide` found, and nobody finds it again.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from dsbp_optax.core import checks, infer, layout, paths
from dsbp_optax.core.infer import Reading
from dsbp_optax.core.layout import Axes, AxesRule, Coordinates, MatrixView, Shape
from dsbp_optax.core.paths import Groups, PerPath
from dsbp_optax.core.rank import Rank, RankFraction, check_rank
from dsbp_optax.linalg.eigensolvers import power_iteration
from dsbp_optax.linalg.types import (
    PyTree,
    Scalar,
    Side,
    Solver,
    compute_dtype,
    state_bytes,
)

#: Names of arrays that are tables, scales or offsets, not linear maps.
_NOT_KERNELS = re.compile(
    r"embed|(^|_)(bias(es)?|scales?|(batch|layer|group|rms)?norm)(_|\d|$)"
    r"|^pos(itions?|itional)?(_|\d|$)|^(cls|tokens?)(_token|\d|$)"
)
#: Names of layers whose arrays are tables.
_TABLES = re.compile("embed")
When: TypeAlias = Literal["auto", "always", "never"]

#: Where `dsbp_optax.diagnostics.explain` listens to the plans made inside ``init``.
OBSERVER: contextvars.ContextVar[list[dict[str, Any]] | None] = contextvars.ContextVar(
    "dsbp_optax plans", default=None
)


@dataclasses.dataclass(frozen=True)
class Basis:
    """How the eigenbases of a model are chosen, found and kept.

    Handed to any recipe, projection or metric as ``basis=``; their `rank` and
    `update_every` say how large a basis is and how old it may become.

    Attributes:
      side: the side of a kernel that carries its basis, "input" (the activations that
        enter the layer) or "output"; per path if wished: a mapping from glob pattern,
        or a callable ``(path, shape) -> side``. None, and what no pattern names:
        "input", for `dsbp` "output".
      axes: which axes of a kernel face the layer's input, which its output and along
        which it is stacked, where names and shapes are misread: a mapping from glob
        pattern to `Axes`, a callable ``(path, shape) -> Axes | None``, or what an
        adapter's ``inspect`` returns.
      share: groups of kernels with one and the same input, which keep one basis:
        tuples of paths, as an adapter's ``find_shared_inputs`` returns them, or of
        patterns such as ``("*/query/kernel", "*/key/kernel")``, which group the paths
        whose parts under each ``*`` are equal.
      power_iterations: q, power iterations a refresh. A sketch gives one a step, on the
        first q of every p steps; whole matrices give all at once. None: as the
        transformation has it, 2 round a metric, 5 for a projection.
      solver: ``(operator, basis, iterations) -> Eigenpairs``.
      decay: share of the past that is left in a statistic after each refresh, in
        [0, 1).
      dtype: that bases are stored in; None: as the transformation has it.
      statistics_in_state: whether to reserve a place for `put_statistics`, for wrappers
        that drop keywords.

    Raises:
      ValueError, TypeError: for arguments out of range, naming them.

    Example:
      >>> import dsbp_optax
      >>> basis = dsbp_optax.Basis(
      ...     share=[("*/query/kernel", "*/key/kernel", "*/value/kernel")])
      >>> tx = dsbp_optax.dsbp_muon(0.02, rank=16, basis=basis)
    """

    side: PerPath[Side] | None = None
    axes: AxesRule | None = None
    share: Sequence[Sequence[str]] = ()
    power_iterations: Scalar | None = None
    solver: Solver = power_iteration
    decay: Scalar = 0.0
    dtype: Any = None
    statistics_in_state: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", paths.check_groups(self.share))
        if self.side is not None and not _per_path(self.side):
            checks.check_side(self.side)
        if self.power_iterations is not None:
            checks.check_integer("power_iterations", self.power_iterations, 1)
        checks.check_number("decay", self.decay, 0.0, 1.0)
        checks.check_dtype("dtype", self.dtype)
        if not callable(self.solver):
            raise TypeError(
                f"solver: got {self.solver!r}, expected a function (operator, basis, "
                "iterations) -> Eigenpairs, such as dsbp_optax.power_iteration."
            )


class Choices(NamedTuple):
    """What the user asked for, with a transformation's own defaults filled in.

    Attributes:
      rank: rank, per path if wished; None for a path is no kernel.
      every: p, steps between refreshes.
      basis: the rest, `power_iterations` a number.
      when: "auto" keeps a basis where that saves memory; "always" for each kernel
        that has a rank; "never" for rules that need none, whose kernels are all
        arrays of two axes or more.
    """

    rank: PerPath[Any]
    every: Scalar
    basis: Basis
    when: When


class Kernel(NamedTuple):
    """What is decided for one kernel; hashable, and the text of a state's plan.

    Attributes:
      path: of the parameter.
      view: how its axes form matrices.
      side: the side that carries the basis.
      rank: number of basis vectors, 0 without a basis.
      dtype: of its linear algebra.
      owner: path of the kernel whose basis it uses, mostly its own.
    """

    path: str
    view: MatrixView
    side: Side
    rank: int
    dtype: str
    owner: str

    @property
    def fans(self) -> tuple[int, int]:
        """Fan in and fan out, whichever of them the rows are."""
        sizes = self.view.size, self.view.other
        return sizes if self.side == "input" else sizes[::-1]


class Decision(NamedTuple):
    """What is done with one parameter, and why.

    Attributes:
      projected: whether a basis is kept for it.
      reason: in words.
      kernel: what was decided, None for a parameter that is no kernel.
    """

    projected: bool
    reason: str
    kernel: Kernel | None = None

    @property
    def rank(self) -> int:
        """Number of basis vectors, or 0."""
        return 0 if self.kernel is None else self.kernel.rank


def choices(
    rank: PerPath[Rank],
    every: Scalar,
    basis: Basis | None,
    power_iterations: int,
    dtype: Any,
    when: When,
) -> Choices:
    """What was asked for, checked; the last three are a transformation's own."""
    basis = check_basis(basis)
    if basis.power_iterations is None:
        basis = dataclasses.replace(basis, power_iterations=power_iterations)
    if basis.dtype is None:
        basis = dataclasses.replace(basis, dtype=dtype)
    if basis.side is None:
        basis = dataclasses.replace(basis, side="input")
    if not _per_path(rank):
        check_rank(rank)
    checks.check_integer("update_every", every, 1)
    return Choices(rank, every, basis, when)


def check_basis(basis: Any) -> Basis:
    """`basis`, by default one that says nothing, or an error."""
    if basis is None:
        return Basis()
    if not isinstance(basis, Basis):
        raise TypeError(
            f"basis: got {basis!r}, expected a dsbp_optax.Basis, such as "
            "dsbp_optax.Basis(power_iterations=2)."
        )
    return basis


def decide(
    params: PyTree, asked: Choices, memory: Callable[[Shape, int, Any], int]
) -> dict[str, Decision]:
    """A decision for each leaf of `params`, by path.

    Args:
      params: parameters; shapes and dtypes only.
      asked: what the user asked for.
      memory: (matrix shape, rank, dtype) -> bytes of a rule's state, where "auto".
    """
    leaves, _ = paths.flatten(params)
    _check_patterns(paths.known_paths(params), asked)
    shapes = {path: jnp.shape(x) for path, x in leaves.items()}
    found = {path: _candidate(path, x, shapes, asked) for path, x in leaves.items()}
    kernels = {p: one for p, one in found.items() if isinstance(one, _Candidate)}
    decisions = {p: d for p, d in found.items() if isinstance(d, Decision)}
    for group in _grouped(kernels, asked):
        decisions |= _worthwhile(group, asked, memory)
    decisions = {path: decisions[path] for path in leaves}
    guesses = {p: (c.view, c.guess) for p, c in kernels.items() if c.guess}
    for path, (view, _) in guesses.items():
        reason = f"{decisions[path].reason}; axes guessed, {layout.in_words(view)}"
        decisions[path] = decisions[path]._replace(reason=f"{reason}: axes= says")
    if asked.when == "never":
        return decisions
    if (observer := OBSERVER.get()) is not None:
        observer.append(decisions)
    elif guesses:
        checks.warn(infer.tell_guesses(guesses))
    return decisions


def is_kernel(path: str, leaf: Any, asked: Choices) -> bool:
    """Whether `decide` would take a parameter for a kernel."""
    if _no_kernel(path, leaf, asked) is not None:
        return False
    return paths.resolve(asked.rank, path, jnp.shape(leaf), None) is not None


def as_keys(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """A plan as nested dicts without leaves: ``{path: {text: {owner: {}}}}``."""
    return {one.path: {_text(one): {one.owner: {}}} for one in kernels}


def from_keys(keys: Mapping[str, Any]) -> tuple[Kernel, ...]:
    """The inverse of `as_keys`, in the order of paths."""
    triples = [
        (path, text, owner)
        for path, texts in keys.items()
        for text, owners in texts.items()
        for owner in owners
    ]
    return tuple(_parsed(*triple) for triple in sorted(triples))


def in_words(path: str, text: str) -> str:
    """What the text of a plan says of a kernel."""
    one = _parsed(path, text, path)
    kept = f"rank {one.rank}" if one.rank else "no basis"
    return f"{one.side} side, {layout.in_words(one.view)}, {kept}"


def _text(one: Kernel) -> str:
    shape, *axes = (",".join(map(str, group)) for group in one.view)
    return "|".join([shape, *axes, one.side, str(one.rank), one.dtype])


@functools.lru_cache(maxsize=4096)
def _parsed(path: str, text: str, owner: str) -> Kernel:
    *groups, side, rank, dtype = text.split("|")
    view = MatrixView(*(tuple(map(int, filter(None, g.split(",")))) for g in groups))
    return Kernel(path, view, cast(Side, side), int(rank), dtype, owner)


class _Candidate(NamedTuple):
    """A parameter that could have a basis, if that is worth its memory."""

    path: str
    dtype: Any
    view: MatrixView
    side: Side
    asked: Any
    rank: int
    guess: Axes | None = None

    def kernel(self, rank: int, owner: str | None = None) -> Kernel:
        """What is decided for it."""
        dtype = jnp.dtype(compute_dtype(self.dtype)).name
        owner = owner or self.path
        return Kernel(self.path, self.view, self.side, rank, dtype, owner)


def _candidate(
    path: str, leaf: Any, shapes: Mapping[str, Shape], asked: Choices
) -> _Candidate | Decision:
    """What a parameter could be given, or why it is given nothing."""
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if (reason := _no_kernel(path, leaf, asked)) is not None:
        return Decision(False, reason)
    chosen = paths.resolve(cast(Any, asked.basis.side), path, shape, "input")
    side = checks.check_side(chosen, path)
    axes, sure = _reading(path, shape, shapes, asked)
    view = layout.matrix_view(shape, axes, side)
    rank = paths.resolve(asked.rank, path, shape, None)
    if isinstance(rank, RankFraction):
        most: int | None = rank.of(view.size, view.other)
    else:
        most = check_rank(rank, path)
    if most is None:
        return Decision(False, "no rank is given for this path")
    guess = None if sure else axes
    return _Candidate(path, dtype, view, side, rank, min(most, view.size), guess)


def _no_kernel(path: str, leaf: Any, asked: Choices) -> str | None:
    """Why a parameter is no kernel, or None."""
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if len(shape) < 2:
        return "fewer than two axes"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"dtype {dtype} is not real floating point"
    if math.prod(shape) == 0:
        return "it holds no numbers"
    named = isinstance(asked.rank, Mapping) and path in asked.rank
    if asked.when == "never" or named or _axes_by_rule(path, shape, asked) is not None:
        return None
    *_, layer, name = ["", *path.lower().split("/")]
    if _NOT_KERNELS.search(name) or _TABLES.search(layer):
        return "by name an embedding, scale or bias"
    return None


def _reading(
    path: str, shape: Shape, shapes: Mapping[str, Shape], asked: Choices
) -> Reading:
    axes = _axes_by_rule(path, shape, asked)
    if axes is not None:
        return Reading(axes, True)
    bias = shapes.get("/".join((*path.split("/")[:-1], "bias")))
    beside = {} if len(shape) < 3 else infer.neighbours(path, shapes)
    return infer.infer_axes(path, shape, bias, beside)


def _axes_by_rule(path: str, shape: Shape, asked: Choices) -> Axes | None:
    rule = asked.basis.axes
    if rule is None:
        return None
    axes: Axes | None = paths.resolve(cast(Any, rule), path, shape, None)
    return None if axes is None else layout.check_axes(path, shape, axes)


def _grouped(
    candidates: Mapping[str, _Candidate], asked: Choices
) -> list[tuple[_Candidate, ...]]:
    """Candidates that keep one basis together; most are alone."""
    groups = paths.resolve_groups(cast(Groups, asked.basis.share), candidates)
    candidates = dict(candidates)
    for group in groups:
        most = max(candidates[path].rank for path in group)
        for path in group:
            if isinstance(candidates[path].asked, RankFraction):
                candidates[path] = candidates[path]._replace(rank=most)
        for other in group[1:]:
            _check_pair(candidates[group[0]], candidates[other])
    shared = {path for group in groups for path in group}
    alone = [(path,) for path in candidates if path not in shared]
    return [tuple(candidates[path] for path in group) for group in (*groups, *alone)]


def _check_pair(owner: _Candidate, other: _Candidate) -> None:
    """One basis fits both kernels, or an error that says why not."""

    def traits(one: _Candidate) -> dict[str, Any]:
        return {
            "side": one.side,
            "shape of the basis": one.view.form(True, one.rank),
            "stacking axes": one.view.batch,
            "input axes": one.view.rows,
            "dtype": jnp.dtype(compute_dtype(one.dtype)).name,
        }

    left, right = traits(owner), traits(other)
    wrong = [f"{k}: {left[k]} and {right[k]}" for k in left if left[k] != right[k]]
    if owner.side != "input":
        wrong.append("only the input side can be shared")
    if wrong:
        raise ValueError(
            f"share: '{owner.path}' {owner.view.shape} and '{other.path}' "
            f"{other.view.shape} cannot keep one basis ({'; '.join(wrong)}). Remedy: "
            "share between kernels that have the same input, axes, rank and dtype."
        )


def _worthwhile(
    group: tuple[_Candidate, ...],
    asked: Choices,
    memory: Callable[[Shape, int, Any], int],
) -> dict[str, Decision]:
    """The decision for kernels that keep one basis, by path: all of them or none."""
    first, *others = group
    if asked.when == "never":
        return {one.path: Decision(False, "no basis", one.kernel(0)) for one in group}
    reason = _pointless(group, asked, memory) if asked.when == "auto" else None
    if reason is not None:
        return {one.path: Decision(False, reason, one.kernel(0)) for one in group}
    rank, view = first.rank, first.view
    text = f"{first.side} side, rank {rank} of {view.size}{_stacked(view)}"
    decisions = {first.path: Decision(True, text, first.kernel(rank))}
    for one in others:
        text = f"shares the basis of '{first.path}', rank {rank} of {view.size}"
        decisions[one.path] = Decision(True, text, one.kernel(rank, first.path))
    return decisions


def _pointless(
    group: tuple[_Candidate, ...],
    asked: Choices,
    memory: Callable[[Shape, int, Any], int],
) -> str | None:
    """Why the kernels of a group should not be projected, or None."""
    view, rank = group[0].view, group[0].rank
    size, other = view.size, sum(one.view.other for one in group)
    if size < 2 or other < 2:
        return f"a {size} x {other} matrix has nothing to project"
    if rank == size:
        return f"rank reaches d = {size}: the identity{_stacked(view)}"
    dtype = compute_dtype(group[0].dtype)
    full = sum(memory((size, one.view.other), 0, dtype) for one in group)
    small = sum(memory((size, one.view.other), rank, dtype) for one in group)
    small += size * rank * jnp.dtype(asked.basis.dtype or dtype).itemsize
    if full and small >= full:
        jointly = " for all that share the basis" if len(group) > 1 else ""
        count = view.matrices
        return f"saves no memory{jointly}: {count * small} >= {count * full} bytes"
    return None


def bytes_of(init: Callable[[], PyTree]) -> int:
    """Bytes that `init` would keep for one matrix, counters apart."""
    leaves = jax.tree.leaves(jax.eval_shape(init))
    return state_bytes([leaf for leaf in leaves if leaf.ndim])


def _stacked(view: MatrixView) -> str:
    """How the axes were read, where there is more than one way."""
    return f" (read as {layout.in_words(view)})" if view.batch else ""


def _per_path(choice: Any) -> bool:
    return callable(choice) or isinstance(choice, Mapping)


def _check_patterns(known: paths.KnownPaths, asked: Choices) -> None:
    """A pattern that matches no parameter, not even a hidden one, is a misspelling."""
    basis = asked.basis
    each = {"rank": asked.rank, "side": basis.side, "axes": basis.axes}
    given: list[tuple[str, str, Callable[[str, str], Any]]] = [
        (name, pattern, paths.matches)
        for name, choice in each.items()
        for pattern in (choice if isinstance(choice, Mapping) else ())
    ]
    given += [
        ("share", pattern, lambda path, p: paths.captured(path, p) is not None)
        for group in basis.share
        for pattern in group
    ]
    for name, pattern, covers in given:
        found = any(covers(path, pattern) for path in known.all)
        if known.all and not found and not known.may_hide(pattern):
            raise ValueError(
                f"{name}: pattern '{pattern}' matches no parameter; there are "
                f"{checks.some(known.all)}.{checks.did_you_mean(pattern, known.all)}"
            )


def check_coordinates(path: str, got: Coordinates, view: MatrixView, rank: int) -> None:
    """Raise for coordinates that were not taken in a basis of this rank and view."""
    expected = view.coordinate_form(rank)
    if got.values.shape != expected:
        raise ValueError(
            f"the coordinates of '{path}' have shape {got.values.shape}, expected "
            f"{expected}, which does not fit the state's basis. Remedy: take them with "
            "project_gradients from the state that update is given."
        )


def seed(path: str) -> int:
    """A number that follows from a path alone."""
    return zlib.crc32(path.encode())
