"""One refresh of all bases: from statistics to eigenpairs that are accepted or not.

V, lambda <- solver(w past + (1 - w) C, V)          of each matrix
accepted  =  orthonormal, finite, of full rank      else the last good basis stays
R         =  V_new^T V_old                          carries moments over
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_optax.core import schedule, stacks
from dsbp_optax.core.plan import Choices, Kernel
from dsbp_optax.core.schedule import AutoInterval, Turn
from dsbp_optax.core.stacks import Stack
from dsbp_optax.core.state import Interval, Spectrum, in_use, where
from dsbp_optax.core.statistics import Sketch, blend, gradient_sketch
from dsbp_optax.linalg import subspace
from dsbp_optax.linalg.types import Array, Eigenpairs, Operator, is_zero

T = TypeVar("T")
#: (kernels alike, their gradients (n, d, m)) -> what a rule makes of them at first
Incoming: TypeAlias = Callable[[Stack, Array], Array]

#: The share of lambda_1 under which lambda_k counts as zero, in units of eps.
_RANK_TOLERANCE = 32.0


class Bases(NamedTuple):
    """The bases of a state in the dtype of their linear algebra.

    Attributes:
      basis: name of a stack -> ``(n, d, k)``.
      spectrum: name of a stack -> `Spectrum`.
      interval: `Interval`, or empty.
    """

    basis: dict[str, Array]
    spectrum: dict[str, Spectrum]
    interval: Any


def turn_of(asked: Choices, interval: Any, step: Array, instant: bool) -> Turn:
    """Where a step stands.

    Args:
      asked: p and q.
      interval: `Interval` of an adaptive p.
      step: int32.
      instant: whether all statistics are whole matrices, which take all iterations on
        the first step of a window.
    """
    window = to_int(asked.basis.power_iterations) if not instant else 1
    if isinstance(asked.every, AutoInterval):
        return schedule.turn(step - interval.start, asked.every.shortest, window)
    every = to_int(asked.every)
    return schedule.turn(step % every, every, window)


def refreshed(
    asked: Choices,
    kernels: tuple[Kernel, ...],
    held: Bases,
    statistics: Mapping[str, Any],
    gradients: Mapping[Stack, Array],
    step: Array,
    turn: Turn,
    unsure: bool,
    incoming: Incoming = lambda home, whole: whole,
) -> tuple[Bases, dict[str, Array]]:
    """All bases after a step of a window of refreshes.

    Bases with sketches (or with nothing, which use their gradient) take one power
    iteration on each step of a window; those with a whole matrix take all of them on
    the first. One whose gradients came as coordinates waits for a statistic.

    Args:
      asked: settings.
      kernels: the plan.
      held: before the step.
      statistics: path of the owner -> statistic.
      gradients: kernels alike -> ``(n, d, m)``, of those that came whole.
      step: int32.
      turn: where it stands.
      unsure: whether sketches may be empty, and the gradient's is to stand in then.
      incoming: what gradients come in as where their own directions are a basis.

    Returns:
      The bases, and name of a stack -> rotations ``(n, k, k)`` of coordinates.
    """
    basis, spectrum, rotations = {}, {}, {}
    for stack in stacks.of_bases(kernels):
        old, past = held.basis[stack.name], held.spectrum[stack.name]
        known = _known(stack, old, statistics, gradients, unsure, incoming)
        run = functools.partial(_one, asked, stack.first.adaptive, step, turn)
        found = []
        for rows, *of_rows in known:
            mine = jax.tree.map(lambda x, rows=rows: _take(x, rows), (old, past))
            found.append(stacks.one_by_one(run, *mine, *of_rows))
        new, after, rotation = _joined([rows for rows, *_ in known], found)
        energy = past.energy
        for rows, g in _gradients(stack, gradients):
            energy = _put(energy, rows, jax.vmap(_energy)(_take(new, rows), g))
        spectrum[stack.name] = after._replace(energy=energy)
        basis[stack.name], rotations[stack.name] = new, rotation
    interval = held.interval
    if isinstance(asked.every, AutoInterval):
        after_all = Bases(basis, spectrum, interval)
        interval = _next_interval(asked, after_all, rotations, step, turn)
    return Bases(basis, spectrum, interval), rotations


def _gradients(
    stack: Stack,
    gradients: Mapping[Stack, Array],
    shared: bool = False,
    incoming: Incoming = lambda home, whole: whole,
) -> list[tuple[np.ndarray, Array]]:
    """Gradients of the kernels of a stack of bases, and which matrices these are.

    Or, where `shared`, of the other kernels that use these bases.
    """
    found, owners = [], {one.path: stack.rows(one.path) for one in stack.kernels}
    for home, whole in gradients.items():
        some = [
            one
            for one in home.kernels
            if one.owner in owners and (one.owner != one.path) == shared
        ]
        if some:
            rows, mine = (
                np.concatenate([np.arange(x.start, x.stop) for x in slices])
                for slices in (
                    [home.rows(one.path) for one in some],
                    [owners[one.owner] for one in some],
                )
            )
            found.append((mine, _take(incoming(home, whole), rows)))
    return found


def _joined(groups: Sequence[np.ndarray], parts: Sequence[T]) -> T:
    """What was found of groups of rows, in the order of the rows."""
    order = np.argsort(np.concatenate(groups))
    joined: T = jax.tree.map(lambda *x: _take(jnp.concatenate(x), order), *parts)
    return joined


def _all_of(x: Array, rows: np.ndarray) -> bool:
    """Whether `rows` are those of `x`, each where it lies."""
    return np.array_equal(rows, np.arange(len(x)))


def _take(x: Array, rows: np.ndarray) -> Array:
    return x if _all_of(x, rows) else x[rows]


def _put(x: Array, rows: np.ndarray, new: Array) -> Array:
    return new if _all_of(x, rows) else jnp.asarray(x).at[rows].set(new)


def _add(x: Array, rows: np.ndarray, new: Array) -> Array:
    return x + new if _all_of(x, rows) else jnp.asarray(x).at[rows].add(new)


def _energy(basis: Array, gradient: Array) -> Array:
    return subspace.captured_energy(subspace.project(basis, gradient), gradient)


def _known(
    stack: Stack,
    basis: Array,
    statistics: Mapping[str, Any],
    gradients: Mapping[Stack, Array],
    unsure: bool,
    incoming: Incoming,
) -> list[tuple[np.ndarray, Any, Array]]:
    """Groups of matrices, their statistics, and 1 where these tell of activations."""
    index = np.arange(stack.matrices)
    given = {p: s for p, s in statistics.items() if s is not None}
    told = [one for one in stack.kernels if one.path in given]
    blind = [one for one in stack.kernels if one.path not in given]
    told, whole = (
        [one for one in told if given[one.path].instant == instant]
        for instant in (False, True)
    )
    groups: list[tuple[np.ndarray, Any, Array]] = []

    def rows_of(some: Sequence[Kernel]) -> np.ndarray:
        return np.concatenate([index[stack.rows(one.path)] for one in some])

    def from_gradients(rows: np.ndarray) -> Sketch:
        """As if the columns of all kernels with one basis lay side by side."""
        none = jnp.zeros(stack.matrices, basis.dtype)
        total = Sketch(jnp.zeros_like(basis), none, none)
        for shared in (False, True):
            for mine, g in _gradients(stack, gradients, shared, incoming):
                more = jax.vmap(gradient_sketch)(g, _take(basis, mine))
                total = jax.tree.map(
                    lambda x, y, mine=mine: _add(x, mine, y), total, more
                )
        found: Sketch = jax.tree.map(lambda x: _take(x, rows), total)
        return found

    if told:
        rows = rows_of(told)
        each = [given[one.path].matrices(one.view, one.dtype) for one in told]
        sketch = jax.tree.map(lambda *x: jnp.concatenate(x), *each)
        seen = jnp.ones(len(rows), jnp.int32)
        if unsure:
            empty = sketch.count == 0
            sketch = jax.vmap(where)(empty, from_gradients(rows), sketch)
            seen = jnp.where(empty, 0, 1)
        groups.append((rows, sketch, seen))
    if blind:
        rows = rows_of(blind)
        groups.append((rows, from_gradients(rows), jnp.zeros(len(rows), jnp.int32)))
    for one in whole:
        found = given[one.path].matrices(one.view, one.dtype)
        seen = jnp.ones(one.view.matrices, jnp.int32)
        groups.append((rows_of([one]), found, seen))
    return groups


def _one(
    asked: Choices,
    adaptive: tuple[int, float] | None,
    step: Array,
    turn: Turn,
    old: Array,
    past: Spectrum,
    statistic: Any,
    observed: Array,
) -> tuple[Array, Spectrum, Array]:
    """Basis, spectrum and rotation of one matrix; the old ones where refused."""
    settings, iterations = asked.basis, to_int(asked.basis.power_iterations)
    operator = statistic.operator(old)
    decay = jnp.asarray(settings.decay, old.dtype)
    if not operator.exact:  # The steps of a window are one observation together.
        decay = decay ** (1 / jnp.asarray(iterations, old.dtype))
    weight = decay * past.weight
    total = weight + (1 - decay)
    if not is_zero(settings.decay):
        share = weight / total
        operator = blend(operator, old, past.eigenvalues, past.trace, share)
    pairs = settings.solver(operator, old, iterations)
    # What activations told in this window is not to be replaced by a gradient.
    lately = (past.refreshed >= 0) & (past.refreshed > step - iterations)
    tried = ~((observed == 0) & (past.activations > 0) & lately)
    if statistic.instant:  # It takes all iterations on the first step of a window.
        tried &= turn.first
    good = tried & _usable(operator, pairs, deficient=adaptive is not None)
    fresh = past._replace(
        eigenvalues=pairs.eigenvalues,
        trace=jnp.asarray(operator.trace, old.dtype),
        weight=total,
        residual=pairs.residual,
        iterations=past.iterations + (iterations if operator.exact else 1),
        activations=observed,
        refreshed=step,
    )
    failures = past.failures + jnp.where(tried & (operator.count != 0), 1, 0)
    after = where(good, fresh, past._replace(failures=failures))
    basis = jnp.where(good, pairs.basis, old)
    same = jnp.eye(old.shape[-1], dtype=old.dtype)
    rotation = jnp.where(good, subspace.rotation(basis, old), same)
    if adaptive is None:
        return basis, after, rotation
    told = turn.last & ((good | lately) & (after.refreshed >= 0))
    chosen = schedule.next_rank(*adaptive, past.rank, after.eigenvalues, after.trace)
    after = after._replace(rank=jnp.where(told, chosen, past.rank))
    before, now = (in_use(x.rank, old.shape[-1]) for x in (past, after))
    return basis, after, rotation * now[:, None] * before


def _usable(operator: Operator, pairs: Eigenpairs, deficient: bool) -> Array:
    """Whether a refresh may replace the last good basis.

    Refused: nothing observed, non-finite numbers, a second moment whose rank is
    below that of the basis (unless `deficient`: an adaptive rank leaves out what
    explains nothing), a zero one, and a basis that is not orthonormal.
    """
    eps = jnp.finfo(pairs.basis.dtype).eps
    gram = subspace.rotation(pairs.basis, pairs.basis)
    orthonormal = jnp.max(jnp.abs(gram - jnp.eye(len(gram)))) < jnp.sqrt(eps)
    leading, last = pairs.eigenvalues[0], pairs.eigenvalues[-1]
    full_rank = leading > 0
    if not deficient:
        full_rank &= last > _RANK_TOLERANCE * eps * leading
    finite = jnp.isfinite(leading) & jnp.isfinite(operator.trace)
    finite &= jnp.isfinite(pairs.residual)
    return (operator.count > 0) & finite & full_rank & orthonormal


def _next_interval(
    asked: Choices,
    held: Bases,
    rotations: Mapping[str, Array],
    step: Array,
    turn: Turn,
) -> Interval:
    """What the bases' movement in a window says of the next one's distance."""
    rule, past = asked.every, held.interval
    window = to_int(asked.basis.power_iterations)
    drifts, jitters, told, warm = [], [], [], []
    for name, basis in held.basis.items():
        spectrum = held.spectrum[name]
        size = basis.shape[-1]
        rank = jnp.full(len(basis), size) if spectrum.rank is None else spectrum.rank
        whole = subspace.rotation(basis, past.reference[name].astype(basis.dtype))
        drifts.append(jax.vmap(schedule.drift)(whole, rank))
        jitters.append(jax.vmap(schedule.drift)(rotations[name], rank))
        told.append(spectrum.refreshed > step - window)
        warm.append(spectrum.iterations > window)
    known = jnp.concatenate(told)
    count = jnp.maximum(jnp.sum(known), 1)
    drift, jitter = (
        jnp.sum(jnp.where(known, jnp.concatenate(x), 0)) / count
        for x in (drifts, jitters)
    )
    jitter = jnp.where(turn.first, 0, jitter)  # A window of one step has none.
    decides = jnp.any(known) & jnp.any(jnp.concatenate(warm)) & (past.start > 0)
    length = schedule.next_interval(rule, past.length, drift, jitter)
    length = jnp.where(decides, length, past.length)
    new = Interval(
        start=jnp.maximum(past.start + length, step + 1),
        length=length,
        drift=jnp.where(jnp.any(known), drift, past.drift),
        jitter=jnp.where(jnp.any(known), jitter, past.jitter),
        reference={n: v.astype(jnp.bfloat16) for n, v in held.basis.items()},
    )
    kept: Interval = where(turn.last, new, past)
    return kept


def init_interval(asked: Choices, basis: Mapping[str, Array]) -> Any:
    """`Interval` before the first window; empty where p is fixed."""
    if not isinstance(asked.every, AutoInterval):
        return ()
    return Interval(
        start=jnp.zeros([], jnp.int32),
        length=jnp.asarray(asked.every.shortest, jnp.int32),
        drift=jnp.zeros([]),
        jitter=jnp.zeros([]),
        reference={  # Copies: of bases in bfloat16 too, whose buffers are donated.
            name: jnp.array(v, jnp.bfloat16, copy=True) for name, v in basis.items()
        },
    )


def check_interval(asked: Choices, interval: Any) -> None:
    """Raise where p is adaptive and the state has no place for that, or inversely."""
    kinds = {True: "an adaptive interval", False: "a fixed interval"}
    got, expected = bool(interval), isinstance(asked.every, AutoInterval)
    if got != expected:
        raise ValueError(
            f"the optimizer state: got {kinds[got]}, expected {kinds[expected]}. "
            "Remedy: the update_every= that init had; or init again, and "
            "with_layers(state, by_path(old)) for what the old state knows."
        )


def to_int(value: Any) -> Any:
    """Traced hyperparameters may arrive as floats."""
    return value if isinstance(value, int) else jnp.asarray(value).astype(jnp.int32)
