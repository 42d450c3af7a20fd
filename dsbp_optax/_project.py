"""The projection of gradients onto each layer's eigenbasis, as one transformation.

P = V^T G                                coordinates, (k, m)
u = inner(P)                             any scale_by_*, its state in (k, m)
update = V u + s (G - V P)               s from the residual rule
         + beta lambda_1 / tr(C) e_1 e_1^T W
"""

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
from dsbp_optax._eigenbasis import Layer, Refresh
from dsbp_optax._layout import AxesRule, MatrixView, PerPath
from dsbp_optax._plan import Choices, When
from dsbp_optax._refresh import RefreshStep, make_refresh
from dsbp_optax._spectral import SpectralProjectionState
from dsbp_optax._types import Array, PyTree, Scalar, Side, Solver


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
    rank: PerPath[int] = 16,
    side: PerPath[Side] = "input",
    update_every: Scalar = 100,
    power_iterations: Scalar = 5,
    solver: Solver | None = None,
    residual: _residual.Residual | None = None,
    sharpness: optax.ScalarOrSchedule = 0.0,
    centered: bool = False,
    decay: Scalar = 0.0,
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
      rank: k; an integer, a mapping from glob pattern to integer, or a callable
        ``(path, shape) -> int | None`` (None: do not project).
      side: "input" (``V`` on the axes that face the layer's input) or "output".
      update_every: p, steps between refreshes of the basis.
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
    choices = _plan.check_choices(Choices(rank, side, axes, project))
    refresh = Refresh(
        update_every,
        power_iterations,
        solver or _basis.power_iteration,
        centered,
        decay,
    )
    _eigenbasis.check_refresh(refresh)
    rule = Rule(
        inner=optax.with_extra_args_support(inner or optax.identity()),
        choices=choices,
        refresh=refresh,
        refresh_step=make_refresh(refresh),
        residual=residual,
        sharpness=_plan.check_number("sharpness", sharpness, 0.0),
        project_cold=project_cold,
        transport={**_transport.TABLE, **(transport or {})},
        statistics_in_state=statistics_in_state,
    )
    return optax.GradientTransformationExtraArgs(
        lambda params: _init(rule, params),
        lambda updates, state, params=None, **extra: _update(
            rule, updates, state, params, **extra
        ),
    )


def _init(rule: Rule, params: PyTree) -> SpectralProjectionState:
    leaves, _ = _layout.flatten_with_paths(params)
    step, skipped, collect = _spectral.counters(rule.refresh)
    if not leaves:
        # Nothing to project: also what optax.tree.map_params asks, which wants one
        # leaf in the place of everything that is not a copy of the parameters.
        none = jnp.zeros([])
        return SpectralProjectionState(step, skipped, collect, none, none, none, none)
    _transport.check_inner(rule.inner)
    decisions = _plan.plan(params, rule.choices, rule.inner)
    layers = _spectral.init_layers(params, decisions)
    coordinates = {
        path: jnp.zeros(choice.view.coordinate_shape(choice.rank), basis.dtype)
        for path, choice in decisions.items()
        if choice.view is not None and choice.projected
        for basis in [layers[path].basis]
    }
    inner = rule.inner.init({**leaves, **coordinates})
    _transport.check_table(inner, frozenset(layers), rule.transport)
    return SpectralProjectionState(
        step=step,
        skipped=skipped,
        collect=collect,
        basis={path: layer.basis for path, layer in layers.items()},
        spectrum={path: layer.spectrum for path, layer in layers.items()},
        statistics=_spectral.empty_statistics(layers)
        if rule.statistics_in_state
        else {},
        inner=inner,
    )


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
    gradients, treedef = _layout.flatten_with_paths(updates)
    if not gradients:
        return updates, state
    views = _plan.views(updates, rule.choices, state.basis)
    seen = _spectral.gather_statistics(
        statistics, state, views, _plan.known_paths(updates)
    )
    finite = _spectral.all_finite(gradients)
    matrices = _spectral.matrices(gradients, views)
    paths = frozenset(views)
    kinds, moments = _transport.split(state.inner, paths, rule.transport)
    layers, moments = rule.refresh_step(
        _spectral.split_layers(state),
        moments,
        seen,
        matrices,
        state.step,
        finite,
        views=views,
        kinds=kinds,
    )
    carried = _transport.restore(state.inner, moments, paths, rule.transport)
    bases = {p: _layout.from_kernel_form(layers[p].basis, v) for p, v in views.items()}
    coordinates = {
        p: _subspace.project(bases[p], matrices[p], v.flipped) for p, v in views.items()
    }
    steps, inner = _inner_update(
        rule, finite, {**gradients, **coordinates}, carried, extra
    )
    lifted = {
        path: _combine(
            rule,
            bases[path],
            layers[path],
            view,
            steps[path],
            coordinates[path],
            matrices[path],
        )
        for path, view in views.items()
    }
    steps = steps | {p: _layout.from_matrices(lifted[p], v) for p, v in views.items()}
    steps = _add_sharpness(rule, steps, layers, bases, views, params, state.step)
    steps = {
        path: jnp.where(finite, steps[path], 0).astype(jnp.result_type(gradient))
        for path, gradient in gradients.items()
    }
    new_state = SpectralProjectionState(
        **_spectral.advance(state, finite, rule.refresh),
        basis={path: layer.basis for path, layer in layers.items()},
        spectrum={path: layer.spectrum for path, layer in layers.items()},
        statistics=_spectral.cleared(state.statistics),
        inner=inner,
    )
    return treedef.unflatten(steps[path] for path in gradients), new_state


def _inner_update(
    rule: Rule,
    finite: Array,
    gradients: dict[str, Array],
    inner: PyTree,
    extra: Mapping[str, Any],
) -> tuple[dict[str, Array], PyTree]:
    """The inner optimizer's step, or none where the gradients are not finite.

    A `lax.cond` and not a `where`, which would copy the moments of large unprojected
    parameters. Outside of a trace Python decides, so that nothing is compiled anew.
    """

    def take(gradients: dict[str, Array], old: PyTree) -> tuple[Any, PyTree]:
        steps, new = rule.inner.update(gradients, old, None, **extra)
        return _spectral.cast_like(steps, gradients), _spectral.cast_like(new, old)

    def skip(gradients: dict[str, Array], old: PyTree) -> tuple[Any, PyTree]:
        return jax.tree.map(jnp.zeros_like, gradients), old

    if isinstance(finite, jax.core.Tracer):
        done: tuple[dict[str, Array], PyTree]
        done = jax.lax.cond(finite, take, skip, gradients, inner)
        return done
    return (take if finite else skip)(gradients, inner)


def _combine(
    rule: Rule,
    basis: Array,
    layer: Layer,
    view: MatrixView,
    step: Array,
    coordinates: Array,
    matrix: Array,
) -> Array:
    """``V u + s (G - V P)`` with a single lift; a cold layer passes ``s G``."""
    if rule.residual is None and rule.project_cold:
        return _subspace.lift(basis, step, view.flipped)
    energy = _subspace.squared_norm(matrix)
    factor = jnp.zeros_like(energy)
    if rule.residual is not None:
        factor = rule.residual(step, coordinates, energy)
    inside = step - factor * coordinates
    if not rule.project_cold:
        done = _layout.from_kernel_form(layer.spectrum.iterations, view)
        warm = done >= _eigenbasis.to_int(rule.refresh.iterations)
        cold = _residual.pass_through(step, coordinates, energy)
        factor = jnp.where(warm, factor, cold)
        inside = jnp.where(warm, inside, 0)
    return _subspace.lift(basis, inside, view.flipped) + factor * matrix


def _add_sharpness(
    rule: Rule,
    steps: dict[str, Array],
    layers: Mapping[str, Layer],
    bases: Mapping[str, Array],
    views: Mapping[str, MatrixView],
    params: PyTree | None,
    count: Array,
) -> dict[str, Array]:
    """``beta lambda_1 / tr(C) e_1 e_1^T W`` where activations were observed."""
    if isinstance(rule.sharpness, int | float) and rule.sharpness == 0:
        return steps
    terms = _spectral.sharpness_terms(
        rule.sharpness, layers, bases, views, params, count
    )
    return steps | {path: steps[path] + term for path, term in terms.items()}
