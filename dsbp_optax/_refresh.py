"""One step of a spectral transformation: what it refreshes, sees and leaves behind."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _adapt, _eigenbasis, _known, _layout, _plan, _spectral, _subspace
from dsbp_optax._adapt import Now, Rules
from dsbp_optax._eigenbasis import Layer, Refresh
from dsbp_optax._layout import Coordinates, MatrixView
from dsbp_optax._schedule import AutoRank
from dsbp_optax._spectral import SpectralState
from dsbp_optax._transport import Field, Moments, Rotation, rotate
from dsbp_optax._types import Array, PyTree

T = TypeVar("T")
Layers: TypeAlias = dict[str, Layer]
RefreshStep: TypeAlias = Callable[..., tuple[Layers, list[Moments]]]

#: Gradients that come as coordinates turn with the basis like a first moment.
_GIVEN = Field("first", "given")
#: What a refresh is told that holds no arrays.
_STATIC = ("views", "ranks", "kinds", "owners")


class Step(NamedTuple):
    """What is known once the bases of a step stand.

    Attributes:
      gradients: path -> incoming update, as it came: an array or `Coordinates`.
      treedef: structure of the incoming updates.
      views: path -> view, of the projected parameters.
      matrices: path -> gradient ``(*batch, d, m)``, flipped ``(*batch, m, d)``; of
        those that came whole.
      given: path -> coordinates of those that came so, in the bases of this step.
      layers: path -> layer, kernel form; kernels that share a basis have one layer.
      bases: path -> basis ``(*batch, d, k)``, zero beyond the rank in use.
      moments: of the inner optimizer, in the coordinates of the bases.
    """

    gradients: dict[str, Any]
    treedef: Any
    views: dict[str, MatrixView]
    matrices: dict[str, Array]
    given: dict[str, Array]
    layers: Layers
    bases: dict[str, Array]
    moments: list[Moments]


def begin_step(
    choices: _plan.Choices,
    refresh_step: RefreshStep,
    state: SpectralState,
    updates: PyTree,
    statistics: Mapping[str, Any] | None,
    kinds: Sequence[Field] = (),
    moments: Sequence[Moments] = (),
    taken: bool = True,
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
      taken: whether bases may be refreshed; a step that is skipped lets time pass.
    """
    _spectral.check_version(state)
    leaves, treedef = _layout.flatten_with_paths(updates)
    gradients = {
        p: x if hasattr(x, "dtype") else jnp.asarray(x) for p, x in leaves.items()
    }
    owners = _spectral.owners_of(state)
    views = _plan.views(updates, choices, state.basis, owners)
    known = _known.known_paths(updates)
    seen = _spectral.gather_statistics(statistics, state, views, known)
    matrices = _spectral.matrices(gradients, views)
    given = _given_coordinates(gradients, views)
    layers, (*turned, given) = refresh_step(
        _spectral.split_layers(state),
        [*moments, given],
        seen,
        gradients,
        state.step,
        views=views,
        ranks=_spectral.rank_rules(choices, views),
        kinds=[*kinds, _GIVEN],
        owners=owners,
        taken=taken,
    )
    layers = {path: layers[owners[path]] for path in views}
    bases = {
        p: _layout.from_kernel_form(_adapt.basis_in_use(layers[p]), v)
        for p, v in views.items()
    }
    return Step(gradients, treedef, views, matrices, given, layers, bases, turned)


def _given_coordinates(
    gradients: Mapping[str, Array | Coordinates], views: Mapping[str, MatrixView]
) -> dict[str, Array]:
    """Incoming coordinates ``(*batch, k, m)``; they turn with the basis."""
    given = {}
    for path, gradient in gradients.items():
        if isinstance(gradient, Coordinates):
            if path not in views:
                raise ValueError(
                    f"updates: got Coordinates for '{path}', for which this state "
                    "keeps no basis. Remedy: take them with project_gradients from "
                    "the state that update is given."
                )
            given[path] = _layout.to_coordinates(gradient.values, views[path])
    return given


def end_step(
    state: SpectralState, step: Step, refresh: Refresh, taken: bool = True
) -> dict[str, Any]:
    """The fields that the states of both transformations share, after the step."""
    count = optax.safe_increment(state.step)
    return {
        "step": count,
        "skipped": state.skipped + (0 if taken else 1),
        "collect": _adapt.any_collects(refresh, step.layers, count),
        **_spectral.join_layers(_only(state.basis, step.layers)),
        "shared": state.shared,
        "version": state.version,
        "statistics": jax.tree.map(jnp.zeros_like, state.statistics),
    }


def to_updates(step: Step, changes: Mapping[str, Array]) -> PyTree:
    """`changes` by path as the incoming tree, dtypes kept."""
    return step.treedef.unflatten(
        changes[path].astype(jnp.result_type(*jax.tree.leaves(gradient)))
        for path, gradient in step.gradients.items()
    )


def no_updates(step: Step) -> PyTree:
    """Zeros in the place of `to_updates`; whole kernels for those in coordinates."""
    nothing = {
        path: jnp.zeros(step.views[path].shape)
        if isinstance(gradient, Coordinates)
        else jnp.zeros_like(gradient)
        for path, gradient in step.gradients.items()
    }
    return to_updates(step, nothing)


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
      ``(layers, moments, statistics, gradients, step, views=, ranks=, kinds=,
      owners=, taken=) -> (layers, moments)``, see `refresh_layers`.
    """

    @functools.partial(jax.jit, static_argnames=(*_STATIC, "taken"))
    def step(*args: Any, taken: bool, **static: Any) -> Any:
        views, ranks, kinds, owners = (static[name] for name in _STATIC)
        rules = Rules(refresh, dict(views), dict(ranks), dict(owners))
        return refresh_layers(rules, list(kinds), taken, *args)

    def call(
        *args: Any,
        views: Mapping[str, MatrixView],
        ranks: Mapping[str, AutoRank],
        kinds: Sequence[Field],
        owners: Mapping[str, str],
        taken: bool,
    ) -> tuple[Layers, list[Moments]]:
        done: tuple[Layers, list[Moments]] = step(
            *args,
            views=tuple(views.items()),
            ranks=tuple(ranks.items()),
            kinds=tuple(kinds),
            owners=tuple(owners.items()),
            taken=taken,
        )
        return done

    return call


def refresh_layers(
    rules: Rules,
    kinds: list[Field],
    taken: bool,
    layers: Layers,
    moments: list[Moments],
    statistics: Mapping[str, Any],
    gradients: Mapping[str, Array | Coordinates],
    step: Array,
) -> tuple[Layers, list[Moments]]:
    """Every layer whose turn it is, one `lax.cond` for each group of layers.

    Layers with sketches (or with nothing, which use their gradient) take one power
    iteration on each step of a window; layers with a whole matrix take all of them on
    the first, and none by the gradient on the rest of it. Several groups lie in one
    branch more, which most steps do not enter. A basis whose gradients came as
    coordinates waits for a statistic.

    Args:
      rules: of the refresh.
      kinds: how each field of `moments` follows a basis.
      taken: whether this step may refresh; one that is skipped lets time pass.
      layers: path -> layer, kernel form.
      moments: of the inner optimizer; they move with the bases.
      statistics: path -> statistic.
      gradients: path -> gradient, of all parameters.
      step: int32.

    Returns:
      The layers and their moments.
    """
    waiting = _waiting(rules.owners, gradients, statistics)
    if not layers.keys() - waiting:
        return layers, moments
    _adapt.check_schedules(rules, layers)
    groups = _adapt.plan_groups(rules, layers, waiting, statistics, step)
    if not taken:
        return _adapt.note_collects(rules, layers, groups, step), moments
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
    kinds: list[Field],
    members: list[frozenset[str]],
    layers: Layers,
    moments: list[Moments],
    statistics: Mapping[str, Any],
    gradients: Mapping[str, Any],
    turns: list[Array],
    nows: list[Now],
) -> tuple[Layers, list[Moments]]:
    """The branch of a step that refreshes: each group in a branch of its own."""
    for paths, turn, now in zip(members, turns, nows, strict=True):
        kernels = {path for path, owner in rules.owners.items() if owner in paths}
        branch = functools.partial(_refresh_group, rules, kinds)
        operands = (
            _only(paths, layers),
            [_only(kernels, held) for held in moments],
            _only(paths, statistics),
            _only(kernels, gradients),
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
    kinds: list[Field],
    group: Layers,
    moments: list[Moments],
    seen: Mapping[str, Any],
    gradients: Mapping[str, Any],
    now: Now,
) -> tuple[Layers, list[Moments]]:
    """One refresh of each layer; the coordinates of its kernels turn with it."""
    new: Layers = {}
    rotations: dict[str, Rotation] = {}
    for path, layer in group.items():
        view = rules.views[path]
        kernels = {p: v for p, v in rules.views.items() if rules.owners[p] == path}
        gradient = _joined(gradients, kernels)
        done, turned = _eigenbasis.refresh_layer(
            layer, seen.get(path), gradient, view, rules.refresh
        )
        if gradient.size == 0:  # coordinates do not tell the energy outside
            spectrum = done.spectrum._replace(energy=layer.spectrum.energy)
            done = done._replace(spectrum=spectrum)
        if path not in seen:
            done, turned = _adapt.keep_observed(rules, path, layer, done, turned, now)
        new[path], turned = _adapt.adapt(rules, path, layer, done, turned, now)
        rotation = Rotation(turned, view.flipped)
        rotations |= dict.fromkeys(kernels, rotation)
    turned_moments = rotate(kinds, moments, rotations)
    return _spectral.cast_like((new, turned_moments), (group, moments))


def _waiting(
    owners: Mapping[str, str], gradients: Mapping[str, Any], seen: Mapping[str, Any]
) -> set[str]:
    """Layers that cannot be refreshed: coordinates only, and no statistic."""
    given = {o for p, o in owners.items() if isinstance(gradients[p], Coordinates)}
    return given - seen.keys()


def _joined(
    gradients: Mapping[str, Array | Coordinates], views: Mapping[str, MatrixView]
) -> Array:
    """Gradients of kernels that share a basis, side by side: ``(*batch, d, sum m)``.

    Without columns where one of them came as coordinates.
    """
    matrices = list(_spectral.matrices(gradients, views).values())
    view = next(iter(views.values()))
    if len(matrices) < len(views):
        size = (0, view.size) if view.flipped else (view.size, 0)
        return jnp.zeros((*view.batch_shape, *size))
    if len(matrices) == 1:
        return matrices[0]
    return jnp.concatenate(matrices, axis=-2 if view.flipped else -1)


def _keep_branch(
    group: Layers, moments: list[Moments], *rest: Any
) -> tuple[Layers, list[Moments]]:
    del rest
    return group, moments


def _only(paths: Collection[str], values: Mapping[str, T]) -> dict[str, T]:
    return {path: value for path, value in values.items() if path in paths}
