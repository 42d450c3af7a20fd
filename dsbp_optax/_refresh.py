"""One step of a spectral transformation: what it refreshes, sees and leaves behind."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _adapt, _eigenbasis, _layout, _plan, _spectral, _subspace
from dsbp_optax._adapt import Now, Rules
from dsbp_optax._eigenbasis import Layer, Refresh
from dsbp_optax._layout import MatrixView
from dsbp_optax._schedule import AutoRank
from dsbp_optax._spectral import SpectralState
from dsbp_optax._transport import Kind, Moments, Rotation, rotate
from dsbp_optax._types import Array, PyTree

T = TypeVar("T")
Layers: TypeAlias = dict[str, Layer]
RefreshStep: TypeAlias = Callable[..., tuple[Layers, list[Moments]]]


class Step(NamedTuple):
    """What is known once the bases of a step stand.

    Attributes:
      gradients: path -> incoming update, as it came.
      treedef: structure of the incoming updates.
      views: path -> view, of the projected parameters.
      matrices: path -> gradient ``(*batch, d, m)``, flipped ``(*batch, m, d)``.
      layers: path -> layer, kernel form.
      bases: path -> basis ``(*batch, d, k)``, zero beyond the rank in use.
      moments: of the inner optimizer, in the coordinates of the bases.
    """

    gradients: dict[str, Array]
    treedef: Any
    views: dict[str, MatrixView]
    matrices: dict[str, Array]
    layers: Layers
    bases: dict[str, Array]
    moments: list[Moments]


def begin_step(
    choices: _plan.Choices,
    refresh_step: RefreshStep,
    state: SpectralState,
    updates: PyTree,
    statistics: Mapping[str, Any] | None,
    kinds: Sequence[Kind] = (),
    moments: Sequence[Moments] = (),
) -> Step:
    """Check what came in, refresh the bases whose turn it is.

    Args:
      choices: what the user asked for.
      refresh_step: of `make_refresh`.
      state: before the step.
      updates: incoming gradients.
      statistics: path -> statistic, or None.
      kinds: how each field of `moments` follows a basis.
      moments: of the inner optimizer.
    """
    leaves, treedef = _layout.flatten_with_paths(updates)
    gradients = {
        p: x if hasattr(x, "dtype") else jnp.asarray(x) for p, x in leaves.items()
    }
    views = _plan.views(updates, choices, state.basis)
    known = _plan.known_paths(updates)
    seen = _spectral.gather_statistics(statistics, state, views, known)
    matrices = _spectral.matrices(gradients, views)
    layers, turned = refresh_step(
        _spectral.split_layers(state),
        list(moments),
        seen,
        gradients,
        state.step,
        views=views,
        ranks=_spectral.rank_rules(choices, views),
        kinds=kinds,
    )
    bases = {
        p: _layout.from_kernel_form(_adapt.basis_in_use(layers[p]), v)
        for p, v in views.items()
    }
    return Step(gradients, treedef, views, matrices, layers, bases, turned)


def end_step(
    state: SpectralState, step: Step, refresh: Refresh, finite: Array
) -> dict[str, Any]:
    """The fields that the states of both transformations share, after the step."""
    count = optax.safe_increment(state.step)
    return {
        "step": count,
        "skipped": state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
        "collect": _adapt.any_collects(refresh, step.layers, count),
        **_spectral.join_layers(step.layers),
        "statistics": jax.tree.map(jnp.zeros_like, state.statistics),
    }


def to_updates(step: Step, changes: Mapping[str, Array], finite: Array) -> PyTree:
    """`changes` by path as the incoming tree, dtypes kept, zero if not finite."""
    return step.treedef.unflatten(
        jnp.where(finite, changes[path], 0).astype(jnp.result_type(gradient))
        for path, gradient in step.gradients.items()
    )


def sharpness_rows(
    sharpness: optax.ScalarOrSchedule, step: Step, params: PyTree | None, count: Array
) -> dict[str, Array]:
    """``beta lambda_1 / tr(C) e_1^T W`` of each layer; along ``e_1`` it is the term.

    Zero for a layer whose basis has not come from activations: the term is theirs.

    Args:
      sharpness: beta, a number or a schedule.
      step: the step.
      params: parameters.
      count: int32, argument of the schedule.

    Returns:
      Path -> ``(*batch, 1, m)``, flipped ``(*batch, m, 1)``.

    Raises:
      ValueError: when the parameters were not passed to ``update``.
    """
    if params is None:
        raise ValueError(
            "the spectral sharpness term needs the parameters. Remedy: call "
            "tx.update(updates, state, params)."
        )
    beta = sharpness(count) if callable(sharpness) else sharpness
    kernels = _spectral.matrices(_layout.flatten_with_paths(params)[0], step.views)
    rows = {}
    for path, view in step.views.items():
        spectrum, basis = step.layers[path].spectrum, step.bases[path]
        trace = jnp.where(spectrum.trace > 0, spectrum.trace, 1)
        share = jnp.where(
            spectrum.activations > 0, spectrum.eigenvalues[..., :1] / trace, 0
        )
        weight = jnp.asarray(beta, share.dtype) * _layout.from_kernel_form(share, view)
        row = _subspace.project_leading(basis, kernels[path], view.flipped)
        rows[path] = weight * row
    return rows


def make_refresh(refresh: Refresh) -> RefreshStep:
    """The refresh of one transformation.

    Compiled on its own, so that a step outside of `jax.jit` does not build the
    branches anew each time; inside one it is inlined.

    Args:
      refresh: settings.

    Returns:
      ``(layers, moments, statistics, gradients, step, views=, ranks=, kinds=) ->
      (layers, moments)``, see `refresh_layers`.
    """

    @functools.partial(jax.jit, static_argnames=("views", "ranks", "kinds"))
    def step(
        *args: Any, views: Any, ranks: Any, kinds: Any
    ) -> tuple[Layers, list[Moments]]:
        rules = Rules(refresh, dict(views), dict(ranks))
        return refresh_layers(rules, list(kinds), *args)

    def call(
        *args: Any,
        views: Mapping[str, MatrixView],
        ranks: Mapping[str, AutoRank],
        kinds: Sequence[Kind],
    ) -> tuple[Layers, list[Moments]]:
        done: tuple[Layers, list[Moments]] = step(
            *args,
            views=tuple(views.items()),
            ranks=tuple(ranks.items()),
            kinds=tuple(kinds),
        )
        return done

    return call


def refresh_layers(
    rules: Rules,
    kinds: list[Kind],
    layers: Layers,
    moments: list[Moments],
    statistics: Mapping[str, Any],
    gradients: Mapping[str, Array],
    step: Array,
) -> tuple[Layers, list[Moments]]:
    """Every layer whose turn it is, one `lax.cond` for each group of layers.

    Layers with sketches (or with nothing, which use their gradient) take one power
    iteration on each step of a window; layers with a whole matrix take all of them on
    the first. Gradients that are not finite change nothing; the branch tests them
    itself, so that other steps need not wait for the test. Several groups lie in one
    branch more, which most steps do not enter.

    Args:
      rules: of the refresh.
      kinds: how each field of `moments` follows a basis.
      layers: path -> layer, kernel form.
      moments: of the inner optimizer; they move with the bases.
      statistics: path -> statistic.
      gradients: path -> gradient, of all parameters.
      step: int32.

    Returns:
      The layers and their moments.
    """
    if not layers:
        return layers, moments
    _adapt.check_schedules(rules, layers)
    groups = _adapt.plan_groups(rules, layers, statistics, step)
    turns, nows = [g.turn for g in groups], [g.now for g in groups]
    layers, moments = jax.lax.cond(
        functools.reduce(jnp.logical_or, turns),
        functools.partial(_refresh_groups, rules, kinds, [g.paths for g in groups]),
        _keep_branch,
        layers,
        moments,
        dict(statistics),
        dict(gradients),
        turns,
        nows,
    )
    return _adapt.note_collects(rules, layers, groups, step), moments


def _refresh_groups(
    rules: Rules,
    kinds: list[Kind],
    members: list[frozenset[str]],
    layers: Layers,
    moments: list[Moments],
    statistics: Mapping[str, Any],
    gradients: Mapping[str, Array],
    turns: list[Array],
    nows: list[Now],
) -> tuple[Layers, list[Moments]]:
    """The branch of a step that refreshes: each group in a branch of its own."""
    finite = _spectral.all_finite(gradients)
    for paths, turn, now in zip(members, turns, nows, strict=True):
        branch = functools.partial(_refresh_group, rules, kinds)
        operands = (
            _only(paths, layers),
            [_only(paths, held) for held in moments],
            _only(paths, statistics),
            _only(paths, gradients),
            finite,
            now,
        )
        if len(members) == 1:  # it is its turn, or we were not here
            group, turned = branch(*operands)
        else:
            group, turned = jax.lax.cond(turn, branch, _keep_branch, *operands)
        layers = {**layers, **group}
        moments = [{**a, **b} for a, b in zip(moments, turned, strict=True)]
    return layers, moments


def _refresh_group(
    rules: Rules,
    kinds: list[Kind],
    group: Layers,
    moments: list[Moments],
    seen: Mapping[str, Any],
    gradients: Mapping[str, Array],
    finite: Array,
    now: Now,
) -> tuple[Layers, list[Moments]]:
    matrices = _spectral.matrices(gradients, _only(group, rules.views))
    new, rotations = {}, {}
    for path, layer in group.items():
        view = rules.views[path]
        done, turned = _eigenbasis.refresh_layer(
            layer, seen.get(path), matrices[path], view, rules.refresh
        )
        new[path], turned = _adapt.adapt(rules, path, layer, done, turned, now)
        rotations[path] = Rotation(turned, view.flipped)
    return _spectral.select(
        finite, (new, rotate(kinds, moments, rotations)), (group, moments)
    )


def _keep_branch(
    group: Layers, moments: list[Moments], *rest: Any
) -> tuple[Layers, list[Moments]]:
    del rest
    return group, moments


def _only(paths: Collection[str], values: Mapping[str, T]) -> dict[str, T]:
    return {path: value for path, value in values.items() if path in paths}
