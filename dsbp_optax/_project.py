"""The projection of gradients onto each layer's eigenbasis, as one transformation.

P = V^T G                                coordinates, (k, m)
u = inner(P)                             any scale_by_*, its state in (k, m)
update = V u + s (G - V P)               s from the residual rule
         + beta lambda_1 / tr(C) e_1 e_1^T W
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import (
    _basis,
    _eigenbasis,
    _layout,
    _plan,
    _residual,
    _spectral,
    _subspace,
    _transport,
)
from dsbp_optax._eigenbasis import Refresh
from dsbp_optax._layout import AxesRule, PerPath
from dsbp_optax._plan import Choices, When
from dsbp_optax._refresh import (
    RefreshStep,
    Step,
    begin_step,
    end_step,
    make_refresh,
    sharpness_rows,
    to_updates,
)
from dsbp_optax._schedule import Every, Rank
from dsbp_optax._spectral import SpectralProjectionState
from dsbp_optax._types import Array, PyTree, Scalar, Side, Solver, state_bytes

#: Bytes of inner state above which a skipped step is a branch.
_LARGE_STATE = 2**22


class Rule(NamedTuple):
    """Everything that one projection is told; see `scale_by_spectral_projection`."""

    inner: optax.GradientTransformationExtraArgs
    choices: Choices
    refresh: Refresh
    residual: _residual.Residual | None
    sharpness: optax.ScalarOrSchedule
    project_cold: bool
    refresh_step: RefreshStep
    transport: _transport.Table
    statistics_in_state: bool


def scale_by_spectral_projection(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: PerPath[Rank] = 16,
    side: PerPath[Side] = "input",
    update_every: Every = 100,
    power_iterations: Scalar = 5,
    solver: Solver | None = None,
    residual: _residual.Residual | None = None,
    sharpness: optax.ScalarOrSchedule = 0.0,
    centered: bool = False,
    decay: Scalar = 0.0,
    stagger: int | None = None,
    axes: AxesRule | None = None,
    project: When = "auto",
    project_cold: bool = False,
    transport: _transport.Table | None = None,
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` in the top eigenspace of each layer's activations.

        V = top-k eigenvectors of C = A^T A / n
        update = V inner(V^T G) + s (G - V V^T G)

    Parameters without a basis (biases, embeddings, kernels where projection saves
    no memory) go to the same `inner` in full space. Gradients in, ascent direction
    out: put the learning rate after it.

    Args:
      inner: a ``scale_by_*`` transformation whose state then has ``(k, m)``
        coordinates; None for the identity.
      rank: k; an integer, or "auto" or an `AutoRank`, which follow the spectrum; a
        mapping from glob pattern to one of these; or a callable ``(path, shape) ->
        one of these or None`` (None: do not project).
      side: "input" (``V`` on the axes that face the layer's input) or "output".
      update_every: p, steps between refreshes of the basis; "auto" or an
        `AutoInterval` let each layer find its own, for a branch a layer in the steps
        that refresh and half a basis more of memory.
      power_iterations: q, power iterations a refresh. A sketch gives one a step,
        on the first q of every p steps; matrices give all q at once.
      solver: ``(operator, basis, iterations) -> Eigenpairs``; None for
        `power_iteration`.
      residual: rule for what lies outside the subspace, see `normalize_residual`;
        None drops it.
      sharpness: beta, weight of ``lambda_1 / tr(C) e_1 e_1^T W``; a number or a
        schedule. Acts where the basis comes from activations.
      centered: use the covariance about the mean, not the second moment.
      decay: gamma in [0, 1), share of the past kept in the statistic.
      stagger: number of groups of layers, equally dear to refresh, that take turns
        after the first window, so that no step pays for all: group g of n is ``g p /
        n`` steps late. None: all together.
      axes: which axes of a kernel are inputs, outputs, stacked: a mapping from
        glob pattern to `Axes`, or a callable ``(path, shape) -> Axes | None``.
      project: "auto" projects a kernel only where the inner state then takes less
        memory, basis included; "always" wherever there is a rank.
      project_cold: whether to project before the first window of q iterations is
        complete; otherwise gradients pass through unprojected until then.
      transport: additions to the table of how moments follow the basis,
        ``{("StateType", "field"): "first" | "second" | "reset"}``.
      statistics_in_state: reserve a place for `put_statistics`, for wrappers that
        drop keywords.

    Returns:
      A transformation whose ``update`` takes ``statistics=``, a flat mapping from
      parameter path to `Sketch`, `Activations` or `Covariance`. Kernels without
      one use the basis of their own gradient.

    Raises:
      ValueError, TypeError: at construction, ``init`` or trace time, naming the
        argument and the parameter.

    Cost: ``d k`` numbers for a basis; ``4 d k m`` FLOPs a step; a refresh adds
    ``O(d k^2)`` and, without statistics, ``4 d k m``.

    Reference: Dynamic Spectral Backpropagation, arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_optax
      >>> tx = optax.chain(
      ...     dsbp_optax.scale_by_spectral_projection(optax.scale_by_adam(), rank=4),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
      >>> state = tx.init(params)
      >>> state[0].basis["dense/kernel"].shape
      (64, 1, 4)
      >>> updates, state = tx.update(params, state, params)
    """
    solver = solver or _basis.power_iteration
    refresh = _eigenbasis.check_refresh(
        Refresh(update_every, power_iterations, solver, centered, decay, stagger)
    )
    rule = Rule(
        inner=_transport.as_inner(inner),
        choices=_plan.check_choices(Choices(rank, side, axes, project)),
        refresh=refresh,
        refresh_step=make_refresh(refresh),
        residual=residual,
        sharpness=_plan.check_number("sharpness", sharpness, 0.0),
        project_cold=project_cold,
        transport={**_transport.TABLE, **(transport or {})},
        statistics_in_state=statistics_in_state,
    )
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, rule),
        lambda updates, state, params=None, **extra: _update(
            rule, updates, state, params, **extra
        ),
    )


def _init(rule: Rule, params: PyTree) -> SpectralProjectionState:
    leaves, _ = _layout.flatten_with_paths(params)
    if not leaves:
        fields = _spectral.empty_fields()
        return SpectralProjectionState(**fields, inner=jnp.zeros([]))
    _transport.check_inner(rule.inner)
    decisions, fields = _spectral.init_fields(
        params, rule.choices, rule.refresh, rule.inner, rule.statistics_in_state
    )
    coordinates = {
        path: jnp.zeros(choice.view.coordinate_shape(choice.rank), dtype)
        for path, choice in decisions.items()
        if choice.view is not None and choice.projected
        for dtype in [fields["basis"][path].dtype]
    }
    inner = rule.inner.init({**leaves, **coordinates})
    _transport.check_table(inner, frozenset(coordinates), rule.transport)
    return SpectralProjectionState(**fields, inner=inner)


def _update(
    rule: Rule,
    updates: PyTree,
    state: SpectralProjectionState,
    params: PyTree | None,
    *,
    statistics: Mapping[str, Any] | None = None,
    **extra: Any,
) -> tuple[PyTree, SpectralProjectionState]:
    _spectral.check_extra_args(extra)
    if not jax.tree.leaves(updates):
        return updates, state
    paths = frozenset(state.basis)
    moments = _transport.split(state.inner, paths, rule.transport)
    step = begin_step(
        rule.choices, rule.refresh_step, state, updates, statistics, *moments
    )
    coordinates = {
        p: _subspace.project(step.bases[p], step.matrices[p], v.flipped)
        for p, v in step.views.items()
    }
    inner = _transport.restore(state.inner, step.moments, paths, rule.transport)
    gradients = {**step.gradients, **coordinates}
    # A number that is not finite spreads into the coordinates: no pass of its own.
    finite = _spectral.all_finite(gradients)
    changes, inner = _inner_update(rule, finite, gradients, inner, extra)
    rows = {}
    if not _eigenbasis.is_zero(rule.sharpness):
        rows = sharpness_rows(rule.sharpness, step, params, state.step)
    lifted = {
        path: _combine(rule, step, path, changes[path], coordinates[path], rows)
        for path in step.views
    }
    fields = end_step(state, step, rule.refresh, finite)
    updates = to_updates(step, {**changes, **lifted}, finite)
    return updates, SpectralProjectionState(**fields, inner=inner)


def _inner_update(
    rule: Rule,
    finite: Array,
    gradients: dict[str, Array],
    inner: PyTree,
    extra: Mapping[str, Any],
) -> tuple[dict[str, Array], PyTree]:
    """The inner optimizer's step, or none where the gradients are not finite.

    A large state goes through `lax.cond`, since a `where` would copy it; a small one
    through `where`, since a branch would hold up the rest of the step. Outside of a
    trace Python decides, so that nothing is compiled anew.
    """

    def take(gradients: dict[str, Array], old: PyTree) -> tuple[Any, PyTree]:
        steps, new = rule.inner.update(gradients, old, None, **extra)
        return _spectral.cast_like(steps, gradients), _spectral.cast_like(new, old)

    def skip(gradients: dict[str, Array], old: PyTree) -> tuple[Any, PyTree]:
        return jax.tree.map(jnp.zeros_like, gradients), old

    if not isinstance(finite, jax.core.Tracer):
        return (take if finite else skip)(gradients, inner)
    if state_bytes(inner) > _LARGE_STATE:
        done: tuple[dict[str, Array], PyTree]
        done = jax.lax.cond(finite, take, skip, gradients, inner)
        return done
    steps, new = take(gradients, inner)
    return steps, _spectral.select(finite, new, inner)


def _combine(
    rule: Rule,
    step: Step,
    path: str,
    change: Array,
    coordinates: Array,
    rows: Mapping[str, Array],
) -> Array:
    """``V u + s (G - V P)`` with a single lift; a cold layer passes ``s G``.

    Args:
      rule: the rule.
      step: the step.
      path: of the kernel.
      change: ``u``, the inner optimizer's update of the coordinates.
      coordinates: ``P``.
      rows: the sharpness term's part along ``e_1``, where there is one.

    Returns:
      The update, shaped as the kernel.
    """
    view, basis, matrix = step.views[path], step.bases[path], step.matrices[path]
    energy = _subspace.squared_norm(matrix)
    inside, factor = change, None
    if rule.residual is not None:
        factor = rule.residual(change, coordinates, energy)
        inside = change - factor * coordinates
    if not rule.project_cold:
        done = _layout.from_kernel_form(step.layers[path].spectrum.iterations, view)
        warm = done >= _eigenbasis.to_int(rule.refresh.iterations)
        cold = _residual.pass_through(change, coordinates, energy)
        factor = jnp.where(warm, 0 if factor is None else factor, cold)
        inside = jnp.where(warm, inside, 0)
    if path in rows:
        inside = _subspace.add_leading(inside, rows[path], view.flipped)
    whole = _subspace.lift(basis, inside, view.flipped)
    whole = whole if factor is None else whole + factor * matrix
    return _layout.from_matrices(whole, view)
