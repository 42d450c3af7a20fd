"""Which parameters are projected, on which side, at which rank, and why.

Decided once, at ``init``, from paths, shapes and the inner optimizer's appetite for
memory. `explain` shows the same decisions to people.
"""

import contextvars
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _checks, _infer, _known, _layout, _schedule, _share
from dsbp_optax._infer import Reading
from dsbp_optax._layout import Axes, AxesRule, Coordinates, MatrixView, PerPath, Shape
from dsbp_optax._schedule import RankFraction
from dsbp_optax._types import Array, PyTree, Side, compute_dtype, state_bytes

#: Names of arrays that are tables, scales or offsets, not linear maps.
_NOT_KERNELS = re.compile("embed|bias|scale|norm|^(pos|cls|token)")
#: Names of layers whose arrays are tables.
_TABLES = re.compile("embed")
When: TypeAlias = Literal["auto", "always"]


#: Where `dsbp_optax.diagnostics.explain` listens to the plans made inside ``init``.
OBSERVER: contextvars.ContextVar[list[dict[str, Any]] | None] = contextvars.ContextVar(
    "dsbp_optax plans", default=None
)


class Choices(NamedTuple):
    """What the user asked for; resolved per parameter by `plan`.

    Attributes:
      rank: rank, per path if wished.
      side: "input" or "output", per path if wished.
      axes: rule for kernels whose axes the heuristics misread; per path.
      when: "auto" projects where that saves memory; "always" wherever rank < d.
      share: groups of patterns of paths whose kernels keep one basis.
    """

    rank: PerPath[Any]
    side: PerPath[Any]
    axes: AxesRule | None
    when: When
    share: _share.Groups = ()


class Decision(NamedTuple):
    """What is done with one parameter, and why.

    Attributes:
      projected: whether a basis is kept for it.
      reason: in words.
      side: the side that carries the basis, or None.
      rank: number of basis vectors, or 0.
      view: how its axes form matrices, or None.
      owner: the path whose basis it uses, where that is not its own, or None.
    """

    projected: bool
    reason: str
    side: Side | None = None
    rank: int = 0
    view: MatrixView | None = None
    owner: str | None = None


class _Candidate(NamedTuple):
    """A parameter that could have a basis, if that is worth its memory."""

    path: str
    dtype: Any
    view: MatrixView
    side: Side
    rank: int
    guess: Axes | None = None


def plan(
    params: PyTree,
    choices: Choices,
    inner: optax.GradientTransformation,
    outside: Callable[[Array], PyTree] | None = None,
) -> dict[str, Decision]:
    """A decision for each leaf of `params`, by path.

    Args:
      params: parameters.
      choices: what the user asked for.
      inner: inner optimizer.
      outside: zeros shaped as a matrix -> state of the residual rule, or None.
    """
    leaves, _ = _layout.flatten_with_paths(params)
    check_patterns(_known.known_paths(params), choices)
    shapes = _shapes(leaves, {})
    found = {path: _candidate(path, x, shapes, choices) for path, x in leaves.items()}
    candidates = {p: c for p, c in found.items() if isinstance(c, _Candidate)}
    decisions = {p: d for p, d in found.items() if isinstance(d, Decision)}
    for group in _grouped(candidates, choices):
        decisions |= _worthwhile(group, choices, inner, outside)
    decisions = {path: decisions[path] for path in leaves}
    guesses = {p: (c.view, c.guess) for p, c in candidates.items() if c.guess}
    for path, (view, _) in guesses.items():
        reason = f"{decisions[path].reason}; axes guessed, {_layout.in_words(view)}"
        decisions[path] = decisions[path]._replace(reason=f"{reason}: axes= says")
    if (observer := OBSERVER.get()) is not None:
        observer.append(decisions)
    elif guesses:
        warnings.warn(_infer.tell_guesses(guesses), stacklevel=2)
    return decisions


def views(
    params: PyTree,
    choices: Choices,
    bases: Mapping[str, Any],
    owners: Mapping[str, str],
) -> dict[str, Any]:
    """Views of the parameters that have a basis, for ``update``: shapes only.

    Args:
      params: parameters or updates; leaves absent from `owners` are passed over.
      choices: as at ``init``.
      bases: path -> basis in kernel form, checked against the rest.
      owners: path of each projected parameter -> path of its basis.
    """
    leaves, _ = _layout.flatten_with_paths(params)
    found, asked = {}, dict.fromkeys(owners.values(), 0)
    known = {
        path: _layout.kernel_shape(path, leaves[path], bases[owner])
        for path, owner in owners.items()
        if path in leaves
    }
    shapes = _shapes(leaves, known)
    for path, owner in owners.items():
        if path not in leaves:
            raise ValueError(
                f"the state holds a basis for '{path}', which is not among the "
                f"updates ({_checks.some(leaves)}). Remedy: call update with the tree "
                "that init saw, or init again."
            )
        view, _ = _view(path, shapes[path], shapes, choices)
        asked[owner] = max(asked[owner], _rank(path, view, choices) or 0)
        found[path] = view
    for path, owner in owners.items():
        _check_basis(path, bases[owner], found[path], asked[owner], choices)
    return found


def kernels(
    tree: PyTree, choices: Choices, views: Mapping[str, MatrixView]
) -> dict[str, MatrixView]:
    """The view of every kernel, whether projecting it saves memory or not.

    Args:
      tree: parameters or updates; shapes and dtypes only.
      choices: as at ``init``.
      views: of the kernels that are projected.
    """
    leaves, _ = _layout.flatten_with_paths(tree)
    shapes = _shapes(leaves, {path: view.shape for path, view in views.items()})
    found = {}
    for path, leaf in leaves.items():
        if path in views:
            found[path] = views[path]
            continue
        if is_kernel(path, leaf, choices):
            found[path], _ = _view(path, shapes[path], shapes, choices)
    return found


def is_kernel(path: str, leaf: Any, choices: Choices) -> bool:
    """Whether `kernels` would give it a view."""
    if _no_kernel(path, leaf, choices):
        return False
    return _layout.resolve(choices.rank, path, jnp.shape(leaf), None) is not None


def fans(path: str, view: MatrixView, choices: Choices) -> tuple[int, int]:
    """Fan in and fan out of a kernel, whichever of them its rows are."""
    sizes = view.size, view.other
    return sizes if _side(path, view.shape, choices) == "input" else sizes[::-1]


def _no_kernel(path: str, leaf: Any, choices: Choices) -> str | None:
    """Why a parameter is no kernel, or None."""
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if len(shape) < 2:
        return "fewer than two axes"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"dtype {dtype} is not real floating point"
    if math.prod(shape) == 0:
        return "it holds no numbers"
    if _is_table(path) and not _asked_for(path, shape, choices):
        return "by name an embedding, scale or bias"
    return None


def _is_table(path: str) -> bool:
    """By the names of the array and its layer; blocks may be called anything."""
    *_, layer, name = ["", *path.lower().split("/")]
    return bool(_NOT_KERNELS.search(name) or _TABLES.search(layer))


def _check_basis(
    path: str, basis: Any, view: MatrixView, asked: int, choices: Choices
) -> None:
    """A restored state must be of this optimizer and these parameters."""
    expected = _layout.kernel_form_shape(view, True, asked)
    if basis.shape != expected:
        side = _side(path, view.shape, choices)
        raise ValueError(
            f"the state's basis of '{path}': got shape {basis.shape}, expected "
            f"{expected} ({side} side, rank {asked}). Remedy: restore a state of the "
            "same rank, side and axes, build the optimizer with those of the state "
            f"(rank {basis.shape[-1]}), or init again."
        )


def _candidate(
    path: str, leaf: Any, shapes: Mapping[str, Shape], choices: Choices
) -> _Candidate | Decision:
    """What a parameter could be given, or why it is given nothing."""
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if (reason := _no_kernel(path, leaf, choices)) is not None:
        return Decision(False, reason)
    view, side = _view(path, shape, shapes, choices)
    rank = _rank(path, view, choices)
    if rank is None:
        return Decision(False, "no rank is given for this path")
    axes, sure = _reading(path, shape, shapes, choices)
    return _Candidate(path, dtype, view, side, rank, None if sure else axes)


def _rank(path: str, view: MatrixView, choices: Choices) -> int | None:
    """The rank of one kernel, at most d; None where it is not to be projected."""
    asked = _layout.resolve(choices.rank, path, view.shape, None)
    if isinstance(asked, RankFraction):
        return asked.of(view.size, view.other)
    rank = check_rank(asked, path)
    return None if rank is None else min(rank, view.size)


def _grouped(
    candidates: Mapping[str, _Candidate], choices: Choices
) -> list[tuple[_Candidate, ...]]:
    """Candidates that keep one basis together; most are alone."""
    groups = _share.resolve_groups(choices.share, candidates)
    candidates = dict(candidates)
    for owner, *others in groups:
        most = max(candidates[path].rank for path in (owner, *others))
        for path in (owner, *others):
            one = candidates[path]
            asked = _layout.resolve(choices.rank, path, one.view.shape, None)
            if isinstance(asked, RankFraction):
                candidates[path] = one._replace(rank=most)
        for other in others:
            _check_pair(candidates[owner], candidates[other])
    shared = {path for group in groups for path in group}
    alone = [(path,) for path in candidates if path not in shared]
    return [tuple(candidates[path] for path in group) for group in (*groups, *alone)]


def _check_pair(owner: _Candidate, other: _Candidate) -> None:
    """One basis fits both kernels, or an error that says why not."""

    def traits(one: _Candidate) -> dict[str, Any]:
        return {
            "side": one.side,
            "shape of the basis": _layout.kernel_form_shape(one.view, True, one.rank),
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
    choices: Choices,
    inner: optax.GradientTransformation,
    outside: Callable[[Array], PyTree] | None,
) -> dict[str, Decision]:
    """The decision for kernels that keep one basis, by path: all of them or none."""
    first, *others = group
    auto = choices.when == "auto"
    reason = _pointless(group, inner, outside) if auto else None
    if reason is not None:
        return {one.path: Decision(False, reason) for one in group}
    side, rank, view = first.side, first.rank, first.view
    asked = _layout.resolve(choices.rank, first.path, view.shape, None)
    up_to = "up to " if _schedule.auto_rank(asked) else ""
    text = f"{side} side, rank {up_to}{rank} of {view.size}{_stacked(view)}"
    decisions = {first.path: Decision(True, text, side, rank, view)}
    for one in others:
        text = f"shares the basis of '{first.path}', rank {rank} of {view.size}"
        decisions[one.path] = Decision(True, text, side, rank, one.view, first.path)
    return decisions


def _pointless(
    group: tuple[_Candidate, ...],
    inner: optax.GradientTransformation,
    outside: Callable[[Array], PyTree] | None,
) -> str | None:
    """Why the kernels of a group should not be projected, or None."""
    view, rank = group[0].view, group[0].rank
    size, other = view.size, sum(one.view.other for one in group)
    if size < 2 or other < 2:
        return f"a {size} x {other} matrix has nothing to project"
    if rank == size:
        return f"rank reaches d = {size}: the identity{_stacked(view)}"
    stack, dtype = math.prod(view.batch_shape), compute_dtype(group[0].dtype)
    small = stack * size * rank * dtype.itemsize
    full = 0
    for one in group:
        full += stack * inner_bytes(inner, (size, one.view.other), one.dtype)
        small += stack * inner_bytes(inner, (rank, one.view.other), dtype)
        if outside is not None:
            whole = jax.ShapeDtypeStruct((size, one.view.other), dtype)
            small += stack * state_bytes(jax.eval_shape(outside, whole))
    if full and small >= full:
        jointly = " for all that share the basis" if len(group) > 1 else ""
        return f"saves no memory{jointly}: {small} >= {full} bytes"
    return None


def _stacked(view: MatrixView) -> str:
    """How the axes were read, where there is more than one way."""
    if not view.batch:
        return ""
    count, pair = math.prod(view.batch_shape), view.matrix_shape
    return f" (read as {count} stacked {pair[0]} x {pair[1]} matrices)"


def inner_bytes(inner: optax.GradientTransformation, shape: Shape, dtype: Any) -> int:
    """Bytes that `inner` keeps for one matrix, counters apart."""
    like = {"kernel": jax.ShapeDtypeStruct(shape, dtype)}
    state = jax.eval_shape(inner.init, like)
    sizes = (
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim
    )
    return sum(sizes)


def _view(
    path: str, shape: Shape, shapes: Mapping[str, Shape], choices: Choices
) -> tuple[MatrixView, Side]:
    side = _side(path, shape, choices)
    axes, _ = _reading(path, shape, shapes, choices)
    return _layout.matrix_view(shape, axes, side), side


def _reading(
    path: str, shape: Shape, shapes: Mapping[str, Shape], choices: Choices
) -> Reading:
    axes = _axes_by_rule(path, shape, choices.axes)
    if axes is not None:
        return Reading(axes, True)
    bias = shapes.get("/".join((*path.split("/")[:-1], "bias")))
    beside = {} if len(shape) < 3 else _infer.neighbours(path, shapes)
    return _infer.infer_axes(path, shape, bias, beside)


def _shapes(leaves: Mapping[str, Any], known: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of each parameter, `known` where it came as coordinates."""
    held = {p: x for p, x in leaves.items() if not isinstance(x, Coordinates)}
    return {path: jnp.shape(x) for path, x in held.items()} | dict(known)


def _side(path: str, shape: Shape, choices: Choices) -> Side:
    return _checks.check_side(_layout.resolve(choices.side, path, shape, "input"), path)


def _axes_by_rule(path: str, shape: Shape, rule: AxesRule | None) -> Axes | None:
    if rule is None:
        return None
    axes: Axes | None = _layout.resolve(cast(Any, rule), path, shape, None)
    return None if axes is None else _layout.check_axes(path, shape, axes)


def _asked_for(path: str, shape: Shape, choices: Choices) -> bool:
    """Whether a mapping names this very path, or an axes rule covers it."""
    named = isinstance(choices.rank, Mapping) and path in choices.rank
    return named or _axes_by_rule(path, shape, choices.axes) is not None


def check_rank(rank: Any, path: str = "") -> int | None:
    """A positive Python integer, or None, or an error that says where.

    Of an adaptive rank the greatest, which sets the shapes. Of a fraction its limit;
    `_rank` knows that of a kernel.
    """
    if rank is None:
        return None
    if isinstance(rank, RankFraction):
        return rank.most
    if (rule := _schedule.auto_rank(rank)) is not None:
        return rule.most
    where = f" of '{path}'" if path else ""
    if isinstance(rank, jax.Array):
        raise TypeError(
            f"rank{where}: got an array or traced value, expected a Python integer, "
            "since it sets array shapes. Remedy: optax.inject_hyperparams(f, "
            "static_args=('rank',))."
        )
    if isinstance(rank, float) and 0 < rank < 1:
        raise TypeError(
            f"rank{where}: got {rank} of type float, expected an integer of at least "
            f"1. Remedy: for a share of the width dsbp_optax.RankFraction({rank})."
        )
    return int(_checks.check_integer("rank", rank, 1, where))


def check_choices(choices: Choices) -> Choices:
    """Early errors for what is one value for all paths."""
    if not _per_path(choices.rank):
        check_rank(choices.rank)
    if not _per_path(choices.side):
        _checks.check_side(choices.side)
    if choices.when not in ("auto", "always"):
        raise ValueError(f"project: got {choices.when!r}, expected 'auto' or 'always'.")
    return choices


def _per_path(choice: Any) -> bool:
    return callable(choice) or isinstance(choice, Mapping)


def check_patterns(paths: _known.KnownPaths, choices: Choices) -> None:
    """A pattern that matches no parameter, not even a hidden one, is a misspelling."""
    asked = {"rank": choices.rank, "side": choices.side, "axes": choices.axes}
    given = [
        (name, pattern, _layout.matches)
        for name, choice in asked.items()
        for pattern in (choice if isinstance(choice, Mapping) else ())
    ]
    given += [
        ("share", pattern, _share.covers)
        for group in choices.share
        for pattern in group
    ]
    for name, pattern, covers in given:
        found = any(covers(path, pattern) for path in paths.all)
        if paths.all and not found and not paths.may_hide(pattern):
            raise ValueError(
                f"{name}: pattern '{pattern}' matches no parameter; there are "
                f"{_checks.some(paths.all)}.{_checks.did_you_mean(pattern, paths.all)}"
            )
