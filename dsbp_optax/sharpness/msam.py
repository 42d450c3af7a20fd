"""Sharpness-aware training along the momentum: no second gradient."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import coordinates, paths, sharding
from dsbp_optax.core.state import SpectralState
from dsbp_optax.core.transform import value_at
from dsbp_optax.linalg.types import Array, PyTree
from dsbp_optax.rules import transport
from dsbp_optax.sharpness import subspace

Parts: TypeAlias = dict[str, Array]

_WHO = "subspace_msam"


class SubspaceMsamState(NamedTuple):
    """State of `subspace_msam`.

    Attributes:
      step: int32, updates seen.
      radius: ``()``, length of the step away that the parameters carry.
      optimizer: state of the wrapped optimizer.
    """

    step: Array
    radius: Array
    optimizer: PyTree


class Rule(NamedTuple):
    """Everything that the wrapper is told; see `subspace_msam`."""

    optimizer: optax.GradientTransformationExtraArgs
    radius: optax.ScalarOrSchedule


def subspace_msam(
    optimizer: optax.GradientTransformation,
    radius: optax.ScalarOrSchedule = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation along the momentum: no second gradient.

    The parameters that the optimizer hands out lie a step of length rho uphill along
    the momentum, where gradients are taken: ``W + rho V normalize(u)``, u the momentum
    in the eigenbasis. `evaluation_params` takes that step back; use it to evaluate, to
    export, and at the end of training. The step is a function of the state, so
    checkpoints need nothing else and schedules may change it.

    Args:
      optimizer: one that holds a `scale_by_spectral_projection` whose inner optimizer
        keeps a first moment.
      radius: rho, length of the step over all projected kernels; a number or a
        schedule.

    Returns:
      An optimizer, called as the one it wraps.

    Raises:
      ValueError: without a projection, or where its inner optimizer has no momentum.

    Cost: two lifts, ``4 d k m`` FLOPs a kernel; two numbers of state.

    Reference: Becker et al., Momentum-SAM, arXiv 2401.12033.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_optax
      >>> tx = dsbp_optax.subspace_msam(dsbp_optax.dsbp_sgd(0.1, rank=2))
      >>> params = {"kernel": jnp.ones((16, 16))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> final = dsbp_optax.evaluation_params(state, params)
    """
    subspace.check_radius(_WHO, radius)
    rule = Rule(optax.with_extra_args_support(optimizer), radius)
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, rule),
        lambda updates, state, params=None, **extra: _update(
            rule, updates, state, params, **extra
        ),
    )


def evaluation_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The parameters to evaluate: without the uphill step of `subspace_msam`.

    Args:
      opt_state: the optimizer state that belongs to `params`, any nest of optax states.
      params: the parameters in training.

    Returns:
      Shaped as `params`; `params` itself where the state holds no `subspace_msam`.

    Cost: ``2 d k m`` FLOPs a kernel.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.subspace_msam(dsbp_optax.dsbp_sgd(0.1, rank=2))
      >>> params = {"kernel": jnp.ones((16, 16))}
      >>> final = dsbp_optax.evaluation_params(tx.init(params), params)
    """
    states: list[SubspaceMsamState] = []

    def note(node: Any) -> Any:
        if isinstance(node, SubspaceMsamState):
            states.append(node)
        return node

    jax.tree.map(note, opt_state, is_leaf=lambda x: isinstance(x, SubspaceMsamState))
    for state in states:
        away = _step_away(state.optimizer, params, state.radius)
        params = subspace.add(params, away, -1)
    return params


def _init(rule: Rule, params: PyTree) -> SubspaceMsamState:
    held = rule.optimizer.init(params)
    radius = jnp.zeros([], jnp.float32)
    _step_away(held, params, radius)  # Raises for what it cannot wrap.
    return SubspaceMsamState(jnp.zeros([], jnp.int32), radius, held)


def _update(
    rule: Rule,
    updates: PyTree,
    state: SubspaceMsamState,
    params: PyTree | None,
    **extra: Any,
) -> tuple[PyTree, SubspaceMsamState]:
    if params is None:
        coordinates.refuse(coordinates.find(updates), f"{_WHO} without parameters")
    shapes = updates if params is None else params
    before = _step_away(state.optimizer, shapes, state.radius)
    if params is not None:
        params = subspace.add(params, before, -1)
    steps, held = rule.optimizer.update(updates, state.optimizer, params, **extra)
    radius = jnp.asarray(value_at(rule.radius, state.step)).astype(jnp.float32)
    after = _step_away(held, shapes, radius)
    moved = {path: after[path] - before[path] for path in after}
    count = optax.safe_increment(state.step)
    return subspace.add(steps, moved), SubspaceMsamState(count, radius, held)


def _step_away(held: PyTree, tree: PyTree, radius: Array) -> Parts:
    """``rho V normalize(u)`` of every projected kernel, by path."""
    leaves, _ = paths.flatten(tree)
    spaces = subspace.subspaces(subspace.projections(held, _WHO), leaves)

    def step(held: PyTree, kernels: Parts, radius: Array) -> Parts:
        states = subspace.projections(held, _WHO)
        momentum: dict[str, Array] = {}
        for state in states:
            momentum |= _momentum(state)
        spaces = subspace.subspaces(states, kernels)
        wide = {p: u.astype(spaces[p].basis.dtype) for p, u in momentum.items()}
        return subspace.lifted(subspace.scaled_to(radius, wide), spaces)

    kernels = {path: leaves[path] for path in spaces}
    return sharding.in_place(step, kernels, held, kernels, radius)


def _momentum(state: SpectralState) -> dict[str, Array]:
    """The first moment in coordinates ``(count, k, m)``, by path."""
    found: dict[str, Array] = {}
    for stack in state.stacks:
        if not stack.first.rank:
            continue
        moments, _ = state.inner[stack.name]
        moment = None
        if jax.tree.leaves(moments):
            moment = jax.vmap(transport.first_moment)(moments)
        if moment is None:
            raise ValueError(
                "subspace_msam: the optimizer in the subspace keeps no momentum that "
                "is known here. "
                "Remedy: optax.trace, optax.scale_by_adam or another with a first "
                "moment as `inner`, or subspace_sam."
            )
        found |= {one.path: moment[stack.rows(one.path)] for one in stack.kernels}
    return found
