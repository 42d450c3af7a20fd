"""One refresh of all bases: from statistics to eigenpairs that are accepted or not.

V, lambda <- solver(w past + (1 - w) C, V)          of each matrix
accepted  =  orthonormal, finite, enough samples    else the last good basis stays
R         =  V_new^T V_old                          carries moments over
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_optax.core import stacks
from dsbp_optax.core.plan import Choices, Kernel
from dsbp_optax.core.stacks import Stack
from dsbp_optax.core.state import Spectrum, where
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
    """

    basis: dict[str, Array]
    spectrum: dict[str, Spectrum]


class Turn(NamedTuple):
    """Where a step stands in a window of refreshes; bools ``()``.

    Attributes:
      now: whether it refreshes.
      first: whether the window begins with it.
    """

    now: Array
    first: Array


def turn_of(asked: Choices, step: Array, instant: bool) -> Turn:
    """Where a step stands.

    Args:
      asked: p and q.
      step: int32.
      instant: whether all statistics are whole matrices, which take all iterations on
        the first step of a window.
    """
    window = to_int(asked.basis.power_iterations) if not instant else 1
    phase = step % to_int(asked.every)
    return Turn(phase < window, phase == 0)


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
        run = functools.partial(_one, asked, step, turn)
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
    return Bases(basis, spectrum), rotations


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
    good = tried & _usable(operator, pairs)
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
    return basis, after, rotation


def _usable(operator: Operator, pairs: Eigenpairs) -> Array:
    """Whether a refresh may replace the last good basis.

    Refused: nothing observed, non-finite numbers, a zero second moment, fewer samples
    than directions (unless the past makes up for them), and a basis that is not
    orthonormal. Directions that many samples leave empty are none worse than others.
    """
    eps = jnp.finfo(pairs.basis.dtype).eps
    gram = subspace.rotation(pairs.basis, pairs.basis)
    orthonormal = jnp.max(jnp.abs(gram - jnp.eye(len(gram)))) < jnp.sqrt(eps)
    leading, last = pairs.eigenvalues[0], pairs.eigenvalues[-1]
    enough = operator.count >= len(gram)
    enough |= last > _RANK_TOLERANCE * eps * leading
    finite = jnp.isfinite(leading) & jnp.isfinite(operator.trace)
    finite &= jnp.isfinite(pairs.residual)
    return (operator.count > 0) & (leading > 0) & finite & enough & orthonormal


def to_int(value: Any) -> Any:
    """Traced hyperparameters may arrive as floats."""
    return value if isinstance(value, int) else jnp.asarray(value).astype(jnp.int32)
