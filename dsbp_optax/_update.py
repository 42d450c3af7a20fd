"""One step of the spectral projection: from a tree of gradients to one of updates."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import (
    _combine,
    _coordinates,
    _eigenbasis,
    _inner,
    _layout,
    _probe,
    _residual,
    _sharding,
    _spectral,
    _transport,
)
from dsbp_optax._gate import gate
from dsbp_optax._refresh import (
    RefreshStep,
    Step,
    begin_step,
    end_step,
    make_refresh,
    no_updates,
    sharpness_rows,
    to_updates,
)
from dsbp_optax._rule import Rule
from dsbp_optax._spectral import SpectralProjectionState
from dsbp_optax._types import Array, PyTree, compute_dtype


def transformation(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """The projection that `rule` describes."""
    refresh_step = make_refresh(rule.refresh)
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, rule),
        _sharding.update_in_place(functools.partial(_update, rule, refresh_step)),
    )


def _init(rule: Rule, params: PyTree) -> SpectralProjectionState:
    """The state before the first step."""
    leaves, _ = _layout.flatten_with_paths(params)
    if not leaves:
        nothing = {name: jnp.zeros([]) for name in ("inner", "residual", "fallback")}
        return SpectralProjectionState(**_spectral.empty_fields(), **nothing)
    _probe.check_inner(rule.inner)
    decisions, fields = _spectral.init_fields(
        params,
        rule.choices,
        rule.refresh,
        rule.statistics_in_state,
        rule.inner,
        rule.residual.init,
    )
    views = {
        path: choice.view
        for path, choice in decisions.items()
        if choice.view is not None and choice.projected
    }
    dtypes = {path: compute_dtype(jnp.result_type(leaves[path])) for path in views}
    coordinates = {
        path: jnp.zeros(view.coordinate_shape(decisions[path].rank), dtypes[path])
        for path, view in views.items()
    }
    kernels, others = _inner.divide(rule, leaves, params, views)
    if rule.fallback is not None:
        _probe.check_fallback(rule.fallback, others)
    inner = rule.inner.init({**kernels, **coordinates})
    paths = frozenset(coordinates)
    _transport.check_table(inner, paths, rule.transport)
    inner = _inner.map_moments(
        rule, inner, paths, lambda x, name: x.astype(rule.moment_dtype)
    )
    return SpectralProjectionState(
        **_spectral.store_bases(fields, rule.basis_dtype),
        inner=inner,
        residual=_init_residual(rule, views, dtypes),
        fallback=() if rule.fallback is None else rule.fallback.init(others),
    )


def _update(
    rule: Rule,
    refresh_step: RefreshStep,
    updates: PyTree,
    state: SpectralProjectionState,
    params: PyTree | None = None,
    *,
    statistics: Mapping[str, Any] | None = None,
    **extra: Any,
) -> tuple[PyTree, SpectralProjectionState]:
    """One step."""
    if not jax.tree.leaves(updates):
        return updates, state

    def take(state: Any) -> tuple[PyTree, Any]:
        step, inner = _begin(rule, refresh_step, updates, state, statistics)
        return _take(rule, step, inner, updates, state, params, extra)

    def skip(state: Any) -> tuple[PyTree, Any]:
        step = begin_step(
            *(rule.choices, refresh_step, state, updates, statistics), taken=False
        )
        fields = end_step(state, step, rule.refresh, taken=False)
        fields = _spectral.store_bases(fields, rule.basis_dtype)
        return no_updates(step), state._replace(**fields)

    return gate(take, skip, updates, state)


def _take(
    rule: Rule,
    step: Step,
    inner: PyTree,
    updates: PyTree,
    state: SpectralProjectionState,
    params: PyTree | None,
    extra: Mapping[str, Any],
) -> tuple[PyTree, SpectralProjectionState]:
    """The step once the bases stand, with gradients that are finite."""
    if rule.residual is not _residual.DROPPED:
        _coordinates.refuse(step.given, "a residual rule")
    coordinates = _combine.coordinates(step)
    gradients = _inner.divide(rule, step.gradients, updates, step.views)
    gradients.kernels.update(_combine.filtered(rule, step, coordinates))
    changes, held = _inner.inner_update(
        rule,
        gradients,
        _inner.Pair(inner, state.fallback),
        _inner.Pair(state.inner, state.fallback),
        params,
        _inner.store_moments(rule, frozenset(_spectral.owners_of(state)), state.step),
        extra,
    )
    rows = _sharpness(rule, step, params, state.step)
    combined = {
        path: _combine.combine(
            rule, step, path, changes[path], coordinates[path], state.residual, rows
        )
        for path in step.views
    }
    changes |= {path: matrix for path, (matrix, _) in combined.items()}
    residual = state.residual
    if residual:
        residual = {path: rest for path, (_, rest) in combined.items()}
    changes = _combine.directed(rule, step, changes, updates, rows)
    return to_updates(step, changes), SpectralProjectionState(
        **_spectral.store_bases(end_step(state, step, rule.refresh), rule.basis_dtype),
        inner=held.kernels,
        residual=residual,
        fallback=held.others,
    )


def _begin(
    rule: Rule,
    refresh_step: RefreshStep,
    updates: PyTree,
    state: SpectralProjectionState,
    statistics: Mapping[str, Any] | None,
) -> tuple[Step, PyTree]:
    """The step, and the inner optimizer's state in the coordinates of its bases."""
    paths = frozenset(_spectral.owners_of(state))
    widened = _inner.map_moments(rule, state.inner, paths, _inner.widened(updates))
    fields, moments = _transport.split(widened, paths, rule.transport)
    step = begin_step(
        rule.choices, refresh_step, state, updates, statistics, fields, moments
    )
    inner = _transport.restore(widened, step.moments, paths, rule.transport)
    return step, inner


def _sharpness(
    rule: Rule, step: Step, params: PyTree | None, count: Array
) -> dict[str, Array]:
    """The sharpness term's part along each ``e_1``, where the rule has one."""
    if _eigenbasis.is_zero(rule.sharpness):
        return {}
    return sharpness_rows(rule.sharpness, step, params, count)


def _init_residual(
    rule: Rule, views: Mapping[str, _layout.MatrixView], dtypes: Mapping[str, Any]
) -> dict[str, PyTree]:
    """State of the residual rule by path; empty where it keeps none."""
    held = {
        path: rule.residual.init(
            jnp.zeros((*view.batch_shape, *view.matrix_shape), dtypes[path])
        )
        for path, view in views.items()
    }
    return held if jax.tree.leaves(held) else {}
