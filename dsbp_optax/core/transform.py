"""The way of a gradient: one transformation, read from top to bottom.

gradients  ->  stacks of matrices alike                          `stacks.gather`
           ->  all of the step, or nothing where one is not finite      `gate`
                 V, lambda <- refreshed, on q of every p steps    `refresh`
                 update, moments <- rule(G, V, lambda, moments)   of each matrix
           ->  updates shaped as the parameters                  `stacks.scatter`

Every transformation of this package is this one with a `Rule` of its own: what is done
with one ``d x m`` matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import (
    checks,
    layout,
    paths,
    plan,
    refresh,
    sharding,
    stacks,
    state,
)
from dsbp_optax.core.coordinates import refuse
from dsbp_optax.core.gate import branch, gate
from dsbp_optax.core.layout import Coordinates
from dsbp_optax.core.plan import Choices, Kernel
from dsbp_optax.core.refresh import Bases
from dsbp_optax.core.stacks import Stack
from dsbp_optax.core.state import Kind, SpectralState, cast_like
from dsbp_optax.linalg.subspace import rotate_first_moment
from dsbp_optax.linalg.types import Array, PyTree, Scalar

_NO_STATISTICS = (
    "update: got no statistics=, expected those that an adapter's value_and_grad "
    "returns; the metric is that of the gradients' own directions. Remedy: "
    "tx.update(grads, state, params, statistics=statistics), or statistics={} where "
    "this is meant. If value_and_grad returned None for them, pass it all of what "
    "tx.init(params) gave, also of a chain; use the TrainState of dsbp_optax.linen; "
    "behind a wrapper that drops keywords, put_statistics."
)


class Seen(NamedTuple):
    """What a rule is shown of one matrix beside its gradient.

    Attributes:
      basis: ``V (d, k)``, or None without one.
      eigenvalues: ``(k,)``, or None.
      trace: ``()``, or None.
      activations: int32 ``()``, 1 where the basis comes from activations, or None.
      iterations: int32 ``()``, power iterations done so far, or None.
      coordinates: ``V^T G (k, m)`` where the gradient came so, else None.
      kernel: ``W (d, m)`` where the rule asks for it, else None.
      seed: uint32 ``()``, another for each matrix.
      step: int32 ``()``.
      fans: fan in and fan out.
      window: q.
      extra: further arguments of ``update``.
    """

    basis: Any
    eigenvalues: Any
    trace: Any
    activations: Any
    iterations: Any
    coordinates: Any
    kernel: Any
    seed: Any
    step: Any
    fans: tuple[int, int]
    window: Any
    extra: Mapping[str, Any]


class Rule(NamedTuple):
    """What is done with one matrix.

    Attributes:
      init: (zeros ``(d, m)``, rank) -> state.
      update: (gradient ``(d, m)``, `Seen`, state) -> (update ``(d, m)``, state); the
        gradient is zero where it came as coordinates.
      rotate: (state, ``R (k, k)``) -> state in the coordinates of another basis.
      incoming: (gradient ``(d, m)``, state) -> the matrix whose directions are the
        basis where nothing better is known; None for the gradient.
      whole: who needs the whole gradient, in words, or None where coordinates do.
      kernel: whether the rule wants the parameters.
    """

    init: Callable[[Array, int], PyTree]
    update: Callable[[Array, Seen, PyTree], tuple[Array, PyTree]]
    rotate: Callable[[PyTree, Array], PyTree] | None = None
    incoming: Callable[[Array, PyTree], Array] | None = None
    whole: str | None = None
    kernel: bool = False


def transformation(
    kind: Kind,
    rule: Rule,
    fallback: optax.GradientTransformationExtraArgs,
    asked: Choices,
    check: Callable[[Mapping[str, Any]], None] = lambda others: None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that does `rule` with each kernel, `fallback` with the rest.

    Args:
      kind: of its state.
      rule: of kernels.
      fallback: on a flat dict by path.
      asked: which parameters are kernels, and how their bases are kept.
      check: raises for parameters that are no kernels, at ``init``.
    """

    def init(params: PyTree) -> SpectralState:
        leaves, _ = paths.flatten(params)
        if not leaves:
            return state.empty_state()
        decisions = plan.decide(params, asked, _memory(rule))
        kernels = tuple(
            one.kernel for _, one in sorted(decisions.items()) if one.kernel is not None
        )
        others = {p: x for p, x in leaves.items() if decisions[p].kernel is None}
        check(others)
        basis, spectrum = state.init_bases(stacks.of_bases(kernels), asked.basis.dtype)
        fresh = SpectralState(
            step=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            collect=jnp.ones([], jnp.int32),
            basis=basis,
            spectrum=spectrum,
            statistics={},
            inner=init_inner(kernels),
            fallback=fallback.init(others),
            plan=plan.as_keys(kernels),
            form={state.VERSION: {kind: {}}},
        )
        if asked.basis.statistics_in_state:
            fresh = fresh._replace(statistics=state.empty_sketches(fresh))
        return fresh

    init_inner = jax.jit(functools.partial(_init_inner, rule), static_argnums=0)

    @functools.cache
    def shapes_of(size: int, other: int, rank: int) -> list[layout.Shape]:
        one = jax.eval_shape(lambda: rule.init(jnp.zeros((size, other)), rank))
        return [x.shape for x in jax.tree.leaves(one)]

    def update(
        updates: PyTree,
        held: SpectralState,
        params: PyTree | None = None,
        *,
        statistics: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, SpectralState]:
        leaves, treedef = paths.flatten(updates)
        if not leaves:
            return updates, held
        state.check_form(held, kind)
        if rule.whole is not None:
            short = (p for p, x in leaves.items() if isinstance(x, Coordinates))
            refuse(short, rule.whole)
        state.check_leaves(held, leaves)
        _check_places(held, leaves, asked)
        _check_inner(held, shapes_of)
        blind = statistics is None and not held.statistics
        if kind == "metric" and blind and held.basis:
            checks.warn(_NO_STATISTICS)
        known = paths.known_paths(updates)
        told = state.gather_statistics(statistics, held, known)
        kernels = held.kernels
        whole, given = _gathered(leaves, held)
        others = _others(leaves, kernels)
        there = None if params is None else paths.flatten(params)[0]
        weights = _weights(rule, (*whole, *given), there)
        rest = None if there is None else _others(there, kernels)
        below = dict(extra)
        if statistics is not None and state.find_states(held.fallback):
            below["statistics"] = state.statistics_of(others, statistics)

        def take(operands: Any) -> Any:
            held, whole, given, others = operands
            bases, inner, given = _refreshed(
                rule, asked, held, told, whole, given, statistics is None
            )
            changes = {}
            for stack in (*whole, *given):
                part = stacks.part(inner[stack.name], stack, held.stacks)
                changes[stack], part = _changed(
                    *(rule, asked, held, stack, bases, whole.get(stack)),
                    *(given.get(stack), weights.get(stack), part, extra),
                )
                inner[stack.name] = stacks.put_part(
                    inner[stack.name], part, stack, held.stacks
                )
            others, fell = fallback.update(others, held.fallback, rest, **below)
            count = optax.safe_increment(held.step)
            collects = refresh.turn_of(asked, count, instant=False)
            new = held._replace(
                step=count,
                collect=collects.now.astype(jnp.int32),
                basis=bases.basis,
                spectrum=bases.spectrum,
                statistics=jax.tree.map(jnp.zeros_like, held.statistics),
                inner=inner,
                fallback=fell,
            )
            return (changes, cast_like(others, _others(leaves, kernels))), cast_like(
                new, held
            )

        def skip(operands: Any) -> Any:
            held, whole, given, others = operands
            nothing = jax.tree.map(jnp.zeros_like, others)
            changes = {
                s: jnp.zeros(
                    (s.matrices, s.first.view.size, s.first.view.other), s.first.dtype
                )
                for s in (*whole, *given)
            }
            new = held._replace(
                skipped=held.skipped + 1,
                statistics=jax.tree.map(jnp.zeros_like, held.statistics),
            )
            return (changes, nothing), new

        arrived = whole, given, others
        (changes, others), new = gate(take, skip, arrived, (held, *arrived))
        done = dict(others)
        for stack, change in changes.items():
            done |= stacks.scatter(change, stack)
        return treedef.unflatten(
            done[path].astype(jnp.result_type(*jax.tree.leaves(leaf)))
            for path, leaf in leaves.items()
        ), new

    return optax.GradientTransformationExtraArgs(init, sharding.update_in_place(update))


def _check_places(
    held: SpectralState, leaves: Mapping[str, Any], asked: Choices
) -> None:
    """Raise for a kernel of which the state knows nothing."""
    known = {one.path for one in held.kernels}
    for path, leaf in leaves.items():
        if path not in known and plan.is_kernel(path, leaf, asked):
            raise ValueError(
                f"the state holds no place for '{path}' of shape {jnp.shape(leaf)}, "
                f"which is a kernel here; it has {checks.some(sorted(known))}. Remedy: "
                "pass the tree that init saw, or init again and carry over what there "
                "was, with_layers(tx.init(params), by_path(state))."
            )


def _check_inner(
    held: SpectralState, shapes_of: Callable[[int, int, int], list[layout.Shape]]
) -> None:
    """Raise for moments that another rule has made: read as its own they are noise."""
    for stack in held.stacks:
        view, rank = stack.first.view, stack.first.rank
        got = [jnp.shape(x)[1:] for x in jax.tree.leaves(held.inner[stack.name])]
        if got != (expected := shapes_of(view.size, view.other, rank)):
            raise ValueError(
                f"moments of '{stack.name}': got arrays of shapes {got}, expected "
                f"{expected}. Remedy: the settings that the state was made with (bits, "
                "inner, residual), or init again."
            )


def _refreshed(
    rule: Rule,
    asked: Choices,
    held: SpectralState,
    told: Mapping[str, Any],
    whole: Mapping[Stack, Array],
    given: Mapping[Stack, Array],
    unsure: bool,
) -> tuple[Bases, dict[str, Any], dict[Stack, Array]]:
    """Bases, states of rules and coordinates after what this step refreshes."""
    kernels, bases = held.kernels, held.bases
    dtypes = {one.name: one.first.dtype for one in bases}
    wide = {name: v.astype(dtypes[name]) for name, v in held.basis.items()}
    before = Bases(wide, dict(held.spectrum))
    if not bases:
        return before, dict(held.inner), dict(given)
    owners = [one.path for stack in bases for one in stack.kernels]
    instant = all(path in told and told[path].instant for path in owners)
    turn = refresh.turn_of(asked, held.step, instant)

    def now(operands: Any) -> Any:
        before, inner, given = operands

        def incoming(stack: Stack, gradients: Array) -> Array:
            if rule.incoming is None:
                return gradients
            part = stacks.part(operands[1][stack.name], stack, held.stacks)
            return jax.vmap(rule.incoming)(gradients, part)

        after, rotations = refresh.refreshed(
            asked, kernels, before, told, whole, held.step, turn, unsure, incoming
        )
        inner, given = dict(inner), dict(given)
        for stack in held.stacks:
            if not stack.first.rank:
                continue
            rotation = stacks.of_stack(stack, bases, rotations)
            if rule.rotate is not None:
                inner[stack.name] = jax.vmap(rule.rotate)(inner[stack.name], rotation)
        for stack, values in given.items():
            rotation = stacks.of_stack(stack, bases, rotations)
            given[stack] = rotate_first_moment(rotation, values)
        return cast_like((after, inner, given), operands)

    operands = before, dict(held.inner), dict(given)
    done: tuple[Bases, Any, Any] = branch(turn.now, now, lambda x: x, operands)
    return done


def _changed(
    rule: Rule,
    asked: Choices,
    held: SpectralState,
    stack: Stack,
    bases: Bases,
    whole: Array | None,
    given: Array | None,
    weights: Array | None,
    inner: PyTree,
    extra: Mapping[str, Any],
) -> tuple[Array, PyTree]:
    """The rule's update and state of all matrices of a stack."""
    first, count = stack.first, stack.matrices
    shape = (count, first.view.size, first.view.other)
    known: dict[str, Any] = dict.fromkeys(Seen._fields)
    if first.rank:
        shown = {
            name: (basis, *(getattr(bases.spectrum[name], field) for field in _SHOWN))
            for name, basis in bases.basis.items()
        }
        basis, *spectrum = stacks.of_stack(stack, held.bases, shown)
        known |= {"basis": basis, **dict(zip(_SHOWN, spectrum, strict=True))}
    seeds = [
        (plan.seed(one.path) + i) % 2**32
        for one in stack.kernels
        for i in range(one.view.matrices)
    ]
    known |= {"coordinates": given, "kernel": weights}
    known["seed"] = jnp.asarray(seeds, jnp.uint32)
    arrays = {name: x for name, x in known.items() if x is not None}
    fixed = {
        "step": held.step,
        "fans": first.fans,
        "window": refresh.to_int(asked.basis.power_iterations),
        "extra": extra,
    }

    def one(changed: Any, arrays: Any) -> Any:
        gradient, state = changed
        seen = Seen(**{**dict.fromkeys(Seen._fields), **arrays, **fixed})
        return cast_like(rule.update(gradient, seen, state), changed)

    if whole is None:
        whole = jnp.zeros(shape, first.dtype)
    changed = stacks.each(one, (whole, inner), arrays, stack)
    update, inner = changed
    return update, inner


#: Fields of `Spectrum` that rules are shown.
_SHOWN = ("eigenvalues", "trace", "activations", "iterations")


def _gathered(
    leaves: Mapping[str, Any], held: SpectralState
) -> tuple[dict[Stack, Array], dict[Stack, Array]]:
    """Gradients of kernels alike: those that came whole, and coordinates."""
    whole, given = {}, {}
    for stack in held.stacks:
        parts: dict[bool, list[Kernel]] = {False: [], True: []}
        for one in stack.kernels:
            parts[isinstance(leaves[one.path], Coordinates)].append(one)
        if parts[False]:
            part = Stack(stack.name, tuple(parts[False]))
            whole[part] = stacks.gather(leaves, part)
        if parts[True]:
            values = [
                layout.to_coordinates(leaves[one.path].values, one.view)
                for one in parts[True]
            ]
            found = jnp.concatenate(values).astype(stack.first.dtype)
            given[Stack(stack.name, tuple(parts[True]))] = found
    return whole, given


def _others(leaves: Mapping[str, Any], kernels: tuple[Kernel, ...]) -> dict[str, Array]:
    known = {one.path for one in kernels}
    return {p: jnp.asarray(x) for p, x in leaves.items() if p not in known}


def _weights(
    rule: Rule, parts: tuple[Stack, ...], leaves: Mapping[str, Any] | None
) -> dict[Stack, Array]:
    """The parameters as stacks, for a rule that wants them."""
    if not rule.kernel:
        return {}
    if leaves is None:
        raise ValueError(
            "the spectral sharpness term needs the parameters. Remedy: call "
            "tx.update(updates, state, params)."
        )
    return {s: stacks.gather(leaves, s) for s in parts if s.first.rank}


def _init_inner(rule: Rule, kernels: tuple[Kernel, ...]) -> dict[str, PyTree]:
    """The state of the rule of each matrix: all of a stack begin alike."""
    found = {}
    for stack in stacks.of_kernels(kernels):
        first = stack.first
        zeros = jnp.zeros((first.view.size, first.view.other), first.dtype)
        one = rule.init(zeros, first.rank)
        found[stack.name] = jax.tree.map(
            lambda x, n=stack.matrices: jnp.repeat(jnp.asarray(x)[None], n, axis=0), one
        )
    return found


def _memory(rule: Rule) -> Callable[[layout.Shape, int, Any], int]:
    """Bytes that a rule keeps for a matrix of this shape at that rank."""

    @functools.cache
    def count(shape: layout.Shape, rank: int, dtype: Any) -> int:
        return plan.bytes_of(lambda: rule.init(jnp.zeros(shape, dtype), rank))

    return count


def of_matrix(tx: optax.GradientTransformation) -> Rule:
    """`tx` run on each matrix by itself: norms and counters are those of a matrix."""
    wrapped = optax.with_extra_args_support(tx)

    def update(g: Array, seen: Seen, held: PyTree) -> tuple[Array, PyTree]:
        changed, held = wrapped.update(g, held, None, **seen.extra)
        return changed, held

    return Rule(lambda zeros, rank: wrapped.init(zeros), update)


def value_at(value: optax.ScalarOrSchedule, step: Array) -> Scalar:
    """A number, or what a schedule says at a step."""
    found: Scalar = value(step) if callable(value) else value
    return found
