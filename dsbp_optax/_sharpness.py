"""The paper's spectral sharpness term as a transformation of its own.

    update <- update + beta lambda_1 / tr(C) e_1 e_1^T W

the gradient of ``beta/2 lambda_1 / tr(C) |e_1^T W|^2``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from dsbp_optax import (
    _basis,
    _checks,
    _coordinates,
    _eigenbasis,
    _layout,
    _plan,
    _sharding,
    _spectral,
    _subspace,
)
from dsbp_optax._eigenbasis import Refresh
from dsbp_optax._gate import gate
from dsbp_optax._layout import AxesRule, PerPath
from dsbp_optax._plan import Choices
from dsbp_optax._refresh import (
    RefreshStep,
    begin_step,
    end_step,
    make_refresh,
    no_updates,
    sharpness_rows,
    to_updates,
)
from dsbp_optax._schedule import Every, Rank
from dsbp_optax._spectral import SpectralSharpnessState
from dsbp_optax._types import PyTree, Scalar, Side, Solver


class Rule(NamedTuple):
    """Everything that the transformation is told; see `add_spectral_sharpness`."""

    sharpness: optax.ScalarOrSchedule
    choices: Choices
    refresh: Refresh
    refresh_step: RefreshStep
    statistics_in_state: bool


def add_spectral_sharpness(
    sharpness: optax.ScalarOrSchedule = 0.1,
    *,
    rank: PerPath[Rank] = 4,
    side: PerPath[Side] = "input",
    update_every: Every = 100,
    power_iterations: Scalar = 5,
    solver: Solver | None = None,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Add the gradient of ``sharpness/2 lambda_1 / tr(C) |e_1^T W|^2``.

    Keeps a small eigenbasis of its own, so it chains with any optimizer. The paper
    writes the update ``-beta lambda_1 e_1 e_1^T``: it does not conform to ``W``
    (``d x d`` against ``d x m``), is no gradient of anything, and grows with the
    batch. This is the conformable reading: applied to ``W``, divided by the trace so
    that it lies in [0, beta], and scaled by the learning rate that follows.

    Args:
      sharpness: beta, a number or a schedule.
      rank: basis vectors used to find ``e_1``; only the first enters the term.
      side: "input" or "output" (the paper's).
      update_every: p, steps between refreshes, as in `scale_by_spectral_projection`.
      power_iterations: q, power iterations a refresh.
      solver: as in `scale_by_spectral_projection`.
      decay: share of the past kept in the statistic.
      axes: as in `scale_by_spectral_projection`.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      A transformation whose ``update`` needs ``params`` and takes ``statistics=``.
      Kernels without statistics get no term: it speaks of activations.

    Raises:
      ValueError, TypeError: as `scale_by_spectral_projection`.

    Cost: ``d rank`` numbers a kernel; ``4 d m`` FLOPs a step.

    Reference: Dynamic Spectral Backpropagation, arXiv 2505.23369.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = optax.chain(
      ...     dsbp_optax.add_spectral_sharpness(0.1), optax.sgd(0.1, momentum=0.9)
      ... )
    """
    solver = solver or _basis.power_iteration
    refresh = _eigenbasis.check_refresh(
        Refresh(update_every, power_iterations, solver, decay)
    )
    rule = Rule(
        sharpness=_checks.check_number("sharpness", sharpness, 0.0),
        choices=_plan.check_choices(Choices(rank, side, axes, "always")),
        refresh=refresh,
        refresh_step=make_refresh(refresh),
        statistics_in_state=statistics_in_state,
    )
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, rule),
        _sharding.update_in_place(functools.partial(_update, rule)),
    )


def _init(rule: Rule, params: PyTree) -> SpectralSharpnessState:
    if not jax.tree.leaves(params):
        return SpectralSharpnessState(**_spectral.empty_fields())
    _, fields = _spectral.init_fields(
        params, rule.choices, rule.refresh, rule.statistics_in_state, optax.identity()
    )
    return SpectralSharpnessState(**fields)


def _update(
    rule: Rule,
    updates: PyTree,
    state: SpectralSharpnessState,
    params: PyTree | None,
    *,
    statistics: Mapping[str, Any] | None = None,
    **extra: Any,
) -> tuple[PyTree, SpectralSharpnessState]:
    if not jax.tree.leaves(updates):
        return updates, state
    _coordinates.refuse(_coordinates.find(updates), "add_spectral_sharpness")

    def take(state: Any) -> tuple[PyTree, Any]:
        step = begin_step(rule.choices, rule.refresh_step, state, updates, statistics)
        changes = dict(step.gradients)
        rows = sharpness_rows(rule.sharpness, step, params, state.step)
        for path, view in step.views.items():
            leading = step.bases[path][..., :1]
            term = _subspace.lift(leading, rows[path], view.flipped)
            changes[path] = changes[path] + _layout.from_matrices(term, view)
        fields = end_step(state, step, rule.refresh)
        return to_updates(step, changes), SpectralSharpnessState(**fields)

    def skip(state: Any) -> tuple[PyTree, Any]:
        step = begin_step(
            *(rule.choices, rule.refresh_step, state, updates, statistics), taken=False
        )
        fields = end_step(state, step, rule.refresh, taken=False)
        return no_updates(step), SpectralSharpnessState(**fields)

    return gate(take, skip, updates, state)
