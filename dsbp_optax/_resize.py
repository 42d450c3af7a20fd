"""An optimizer state at another rank: what leads is kept, what is new starts empty.

V <- V_{1..k'},  m <- m_{1..k'},  v <- v_{1..k'}            (fewer directions)
V <- [V, V_new],  m <- [m, 0],  v <- [v, mean of v]         (more)

`V_new` is orthonormal and orthogonal to `V`; it follows from the kernel's path alone.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_optax import (
    _basis,
    _eigenbasis,
    _layout,
    _plan,
    _schedule,
    _spectral,
    _transport,
)
from dsbp_optax._layout import PerPath, Shape
from dsbp_optax._msam import SubspaceMsamState
from dsbp_optax._perturb import BasisState
from dsbp_optax._sam import SubspaceSamState
from dsbp_optax._schedule import Rank, RankFraction
from dsbp_optax._spectral import SpectralProjectionState, SpectralState
from dsbp_optax._transport import Kind
from dsbp_optax._types import Array, PyTree, compute_dtype


class Request(NamedTuple):
    """What the user asks for.

    Attributes:
      rank: per path if wished.
      table: how moments follow a basis.
      shapes: path -> shape of each parameter; None where they were not given.
    """

    rank: PerPath[Any]
    table: _transport.Table
    shapes: Mapping[str, Shape] | None


class Change(NamedTuple):
    """What becomes of the coordinates of one kernel.

    Attributes:
      old: rank so far.
      new: rank asked for.
      axis: of the coordinates, -2, flipped -1.
      used: whether directions that are new are in use from now on; not where the rank
        is adaptive.
    """

    old: int
    new: int
    axis: int
    used: bool


def resize_state(
    opt_state: PyTree,
    params: PyTree | None = None,
    *,
    rank: PerPath[Rank],
    transport: _transport.Additions = None,
) -> PyTree:
    """The state of an optimizer that is the same but for its rank.

    Fewer directions: the leading ones are kept, with their eigenvalues and moments.
    More: new ones fill up, orthogonal to the others, with zeros for eigenvalues and
    first moments. Their second moments are the mean of the old directions' in the same
    column, as for a basis that turns: zeros would make Adam's next steps along them
    up to ten times too long.

    The state of an `flax.nnx.Optimizer` goes in without its Variables and comes back
    with ``nnx.update(optimizer.opt_state, nnx.state(resized))``.

    What the old optimizer projects stays projected, and what it left in full space
    stays there: ``update`` follows the state. Where the new optimizer would decide
    otherwise, ``check_checkpoint(resized, jax.eval_shape(tx.init, params))`` names the
    kernel; else the result has the structure of ``tx.init(params)``. Statistics that
    wait in the state are dropped.

    Args:
      opt_state: any nest of optax states.
      params: the parameters, or their shapes; needed for a `rank` that is a function or
        a `RankFraction`, and where a state alone does not tell how it reads a kernel.
      rank: as in `scale_by_spectral_projection`, and as the new optimizer has it. It is
        that of every basis in the state; paths of `add_spectral_sharpness` end in
        "#sharpness": ``{"*#sharpness": 4, "*": 16}``. An adaptive rank stays adaptive.
      transport: additions to the table of moments, those of the optimizer.

    Returns:
      The state, dtypes kept. Its bases, moments and eigenvalues are of the new rank.

    Raises:
      ValueError, TypeError: naming the path, for a rank that reaches the length of the
        kernel's side, a missing one, an adaptive one in the place of a fixed one, or a
        state that is no state of these parameters.

    Cost: a QR decomposition of each basis that grows, ``O(d k^2)``.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> state = dsbp_optax.dsbp_sgd(0.02, rank=8).init(params)
      >>> state = dsbp_optax.resize_state(state, rank=4)
      >>> updates, state = dsbp_optax.dsbp_sgd(0.02, rank=4).update(params, state)
      >>> state[0].basis["kernel"].shape
      (64, 1, 4)
    """
    shapes = None
    if params is not None:
        leaves, _ = _layout.flatten_with_paths(params)
        shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in leaves.items()}
    request = Request(rank, _transport.make_table(transport), shapes)
    states = _spectral.find_states(opt_state)
    if not states:
        raise ValueError(
            f"resize_state: got {type(opt_state).__name__}, which holds no state of a "
            "transformation with an eigenbasis. Remedy: pass what tx.init(params) gave "
            "or a checkpoint restored in its form."
        )
    opt_state = jax.tree.map(
        lambda node: _resized_wrapper(node, request),
        opt_state,
        is_leaf=lambda x: isinstance(x, SubspaceSamState | SubspaceMsamState),
    )
    return _spectral.map_states(lambda state: _resized(state, request), opt_state)


def _resized_wrapper(node: Any, request: Request) -> Any:
    """The fields of a wrapper that are in coordinates."""
    if isinstance(node, SubspaceMsamState):
        moved = isinstance(node.radius, jax.core.Tracer) or bool(node.radius != 0)
        if moved:
            raise ValueError(
                "resize_state: the parameters carry the step of subspace_msam, which "
                "depends on the basis. Remedy: params = evaluation_params(state, "
                "params), then state = state._replace(radius=0 * state.radius), then "
                "resize."
            )
    if not isinstance(node, SubspaceSamState):
        return node
    changes: dict[str, Change] = {}
    for state in _spectral.find_states(node.optimizer):
        if isinstance(state, BasisState):
            changes |= _changes(state, request)
    sized = {p: _sized(x, changes[p], "first") for p, x in node.change.items()}
    return node._replace(change=sized)


def _resized(state: SpectralState, request: Request) -> SpectralState:
    _spectral.check_version(state)
    changes = _changes(state, request)
    basis, schedule = {}, dict(state.schedule)
    for path, old in state.basis.items():
        fresh = _directions(path, old, state.spectrum[path].trace, changes[path])
        basis[path] = _with(old, fresh, changes[path].new)
        if path in schedule:
            schedule[path] = _resized_schedule(schedule[path], fresh, changes[path])
    spectrum = {
        path: one._replace(eigenvalues=_padded(one.eigenvalues, changes[path].new))
        for path, one in state.spectrum.items()
    }
    statistics = {
        path: dataclasses.replace(
            jax.tree.map(jnp.zeros_like, sketch),
            product=jnp.zeros_like(_padded(sketch.product, changes[path].new)),
        )
        for path, sketch in state.statistics.items()
    }
    done = state._replace(
        basis=basis, spectrum=spectrum, schedule=schedule, statistics=statistics
    )
    if not isinstance(done, SpectralProjectionState):
        return done
    return done._replace(inner=_resized_inner(done.inner, changes, request.table))


def _resized_inner(
    inner: PyTree, changes: Mapping[str, Change], table: _transport.Table
) -> PyTree:
    """The inner optimizer's state; what is not in coordinates stays."""
    paths = frozenset(changes)
    fields, moments = _transport.split(inner, paths, table)
    sized = [
        {path: _sized(x, changes[path], field.kind) for path, x in held.items()}
        for field, held in zip(fields, moments, strict=True)
    ]
    return _transport.restore(inner, sized, paths, table)


def _resized_schedule(
    schedule: _eigenbasis.Schedule, fresh: Array, change: Change
) -> _eigenbasis.Schedule:
    if schedule.reference is not None:  # New directions have not moved yet.
        reference = _with(schedule.reference, fresh, change.new)
        schedule = schedule._replace(reference=reference)
    if schedule.rank is not None:
        schedule = schedule._replace(rank=jnp.minimum(schedule.rank, change.new))
    return schedule


def _changes(state: SpectralState, request: Request) -> dict[str, Change]:
    """What becomes of each projected kernel; all errors about the rank."""
    changes: dict[str, Change] = {}
    suffix, fractions = _spectral.STATES[type(state)], _fractions(state, request)
    for path, owner in _spectral.owners_of(state).items():
        shape = _known_shape(path, state.basis[owner].shape[:-1], request)
        rank = fractions.get(owner, request.rank)
        new = _new_rank(path + suffix, shape, state, owner, rank)
        if path != owner and new != changes[owner].new:
            raise ValueError(
                f"resize_state: rank of '{path}{suffix}': got {new}, expected "
                f"{changes[owner].new} as for '{owner}', whose basis it shares. "
                "Remedy: one rank for kernels that share a basis."
            )
        old, adaptive = state.basis[owner].shape[-1], _adaptive(state, owner)
        axis = -1 if _flipped(path, shape, state, owner, request.table) else -2
        changes[path] = Change(old, new, axis, not adaptive)
    return changes


def _fractions(state: SpectralState, request: Request) -> dict[str, int]:
    """Owner of a basis -> the largest rank that a `RankFraction` gives its kernels."""
    found: dict[str, int] = {}
    suffix = _spectral.STATES[type(state)]
    for path, owner in _spectral.owners_of(state).items():
        form, stacked = state.basis[owner].shape[:-1], state.spectrum[owner].trace.shape
        shape = _known_shape(path, form, request)
        if shape is None and callable(request.rank):
            continue  # An error later.
        asked = _layout.resolve(request.rank, path + suffix, shape or (), None)
        if not isinstance(asked, RankFraction):
            continue
        if shape is None:
            raise ValueError(
                "resize_state: got a RankFraction, which wants the shapes of kernels. "
                "Remedy: resize_state(opt_state, params, rank=...)."
            )
        view = _layout.view_of(shape, form, stacked)
        found[owner] = max(found.get(owner, 0), asked.of(view.size, view.other))
    return found


def _known_shape(path: str, form: Shape, request: Request) -> Shape | None:
    """The kernel's shape, if it was given; it must fit the basis."""
    if request.shapes is None:
        return None
    _spectral.check_path(path, request.shapes)
    shape = request.shapes[path]
    fits = len(shape) == len(form) and all(
        f in (1, n) for f, n in zip(form, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"resize_state: the state's basis of '{path}' is for a kernel of shape "
            f"{form} (1 for any length), the parameter has {shape}. Remedy: pass the "
            "state and the parameters of one model."
        )
    return shape


def _new_rank(
    name: str, shape: Shape | None, state: SpectralState, owner: str, rank: Any
) -> int:
    if shape is None and callable(rank):
        raise ValueError(
            "resize_state: got a function as rank, which wants the shapes of kernels. "
            "Remedy: resize_state(opt_state, params, rank=...)."
        )
    asked = _layout.resolve(rank, name, shape or (), None)
    new = _plan.check_rank(asked, name)
    if new is None:
        raise ValueError(
            f"resize_state: no rank is given for '{name}', which the state projects. "
            f"Remedy: rank={{'{name}': ..., ...}}, or init again to leave it in full "
            "space."
        )
    adaptive = _adaptive(state, owner)
    if adaptive != (_schedule.auto_rank(asked) is not None):
        kinds = "an adaptive one", "a fixed one"
        wanted, given = kinds if adaptive else kinds[::-1]
        form = f"AutoRank(most={new})" if adaptive else "an integer"
        raise ValueError(
            f"resize_state: rank of '{name}': got {given}, expected {wanted}, which "
            f"the state has. Remedy: rank={{'{name}': {form}, ...}} here and in the "
            "optimizer, or init again."
        )
    return _bounded(name, new, state.basis[owner], state.spectrum[owner].trace)


def _bounded(name: str, new: int, basis: Array, trace: Array) -> int:
    """The rank, below the length of the side unless it has been the length so far."""
    size = math.prod(basis.shape[:-1]) // math.prod(trace.shape[:-1])
    old = basis.shape[-1]
    if new >= size > old:
        raise ValueError(
            f"resize_state: rank of '{name}': got {new}, expected below {size}, the "
            "length of its side: the basis would be the identity, and an optimizer of "
            f"that rank keeps the kernel in full space. Remedy: rank={{'{name}': "
            f"{old}, ...}} here and in the optimizer, or init again."
        )
    return min(new, size)


def _adaptive(state: SpectralState, owner: str) -> bool:
    schedule = state.schedule.get(owner)
    return schedule is not None and schedule.rank is not None


def _flipped(
    path: str,
    shape: Shape | None,
    state: SpectralState,
    owner: str,
    table: _transport.Table,
) -> bool:
    """Whether coordinates are ``(*batch, m, k)``, by shapes alone."""
    form, stacked = state.basis[owner].shape[:-1], state.spectrum[owner].trace.shape
    if shape is not None:
        return _layout.view_of(shape, form, stacked).flipped
    rows = [a for a, (f, s) in enumerate(zip(form, stacked, strict=False)) if f > s]
    if not rows:  # One row has one coordinate, whatever rank is asked for.
        return False
    sides = {axis < rows[0] for axis, length in enumerate(form) if length == 1}
    if len(sides) == 1:
        return sides.pop()
    inner = state.inner if isinstance(state, SpectralProjectionState) else ()
    rank = state.basis[owner].shape[-1]
    _, moments = _transport.split(inner, frozenset({path}), table)
    shapes = [held[path].shape for held in moments if path in held]
    fits = [
        side
        for side in (False, True)
        if all(s[-1 if side else -2] == rank for s in shapes if len(s) > 1)
    ]
    if len(fits) == 2 and shapes:
        raise ValueError(
            f"resize_state: the state does not tell which axis of the moments of "
            f"'{path}', {shapes[0]}, is the basis's. Remedy: resize_state(opt_state, "
            "params, rank=...)."
        )
    return fits == [True]


def _directions(path: str, basis: Array, trace: Array, change: Change) -> Array:
    """New directions in kernel form, orthonormal and orthogonal to `basis`.

    Args:
      path: of the kernel, the seed.
      basis: kernel form.
      trace: one number a matrix, kernel form.
      change: how many are missing; none are made if none are.
    """
    missing = max(change.new - change.old, 0)
    view = _layout.view_of(basis.shape[:-1], basis.shape[:-1], trace.shape[:-1])
    dtype = compute_dtype(basis.dtype)
    known = _layout.from_kernel_form(basis.astype(dtype), view)
    if not missing:
        return basis[..., :0]
    key = jax.random.key(zlib.crc32(f"{path}#resize".encode()))
    fresh = jax.random.normal(key, (*known.shape[:-1], missing), dtype)
    both = jnp.concatenate([known, fresh], axis=-1)
    fresh = _basis.orthonormalize(both)[..., change.old :]
    return _layout.to_kernel_form(fresh, view).astype(basis.dtype)


def _with(array: Array, fresh: Array, rank: int) -> Array:
    """`array` with the directions `fresh` behind its own, or the leading ones alone."""
    if rank <= array.shape[-1]:
        return array[..., :rank]
    return jnp.concatenate([array, fresh.astype(array.dtype)], axis=-1)


def _padded(array: Array, rank: int, axis: int = -1) -> Array:
    """The leading entries along an axis, or all and zeros behind."""
    missing = rank - array.shape[axis]
    if missing <= 0:
        return jax.lax.slice_in_dim(array, 0, rank, axis=axis)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


def _sized(moment: Array, change: Change, kind: Kind) -> Array:
    """A moment at the new rank; see the module's docstring."""
    axis = change.axis
    if moment.ndim < 2 or moment.shape[axis] != change.old:
        return moment
    sized = _padded(moment, change.new, axis)
    if change.new <= change.old or kind != "second" or not change.used:
        return sized
    wide = moment.astype(compute_dtype(moment.dtype))
    mean = jnp.mean(wide, axis=axis, keepdims=True).astype(moment.dtype)
    index = jax.lax.broadcasted_iota(jnp.int32, sized.shape, sized.ndim + axis)
    return jnp.where(index < change.old, sized, mean)
