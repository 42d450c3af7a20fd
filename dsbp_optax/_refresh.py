"""One step's refresh: every layer whose turn it is, and what moves with its basis."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from dsbp_optax import _eigenbasis
from dsbp_optax._eigenbasis import Layer, Refresh
from dsbp_optax._layout import MatrixView
from dsbp_optax._transport import Rotation
from dsbp_optax._types import Array, PyTree

Layers: TypeAlias = dict[str, Layer]
Transport: TypeAlias = Callable[[PyTree, Mapping[str, Rotation]], PyTree]
RefreshStep: TypeAlias = Callable[..., tuple[Layers, PyTree]]


def make_refresh(refresh: Refresh, transport: Transport) -> RefreshStep:
    """The refresh of one transformation.

    Compiled on its own, so that a step outside of `jax.jit` does not build the
    branches anew each time; inside one it is inlined.

    Args:
      refresh: settings.
      transport: ``(carried, rotations) -> carried``.

    Returns:
      ``(layers, carried, statistics, matrices, step, allowed, views) -> (layers,
      carried)``, see `refresh_layers`.
    """

    @functools.partial(jax.jit, static_argnames="views")
    def step(
        *args: Any, views: tuple[tuple[str, MatrixView], ...]
    ) -> tuple[Layers, PyTree]:
        return refresh_layers(refresh, transport, dict(views), *args)

    def call(*args: Any, views: Mapping[str, MatrixView]) -> tuple[Layers, PyTree]:
        done: tuple[Layers, PyTree] = step(*args, views=tuple(views.items()))
        return done

    return call


def refresh_layers(
    refresh: Refresh,
    transport: Transport,
    views: Mapping[str, MatrixView],
    layers: Layers,
    carried: PyTree,
    statistics: Mapping[str, Any],
    matrices: Mapping[str, Array],
    step: Array,
    allowed: Array,
) -> tuple[Layers, PyTree]:
    """Every layer whose turn it is, one `lax.cond` for each group of layers.

    Layers with sketches (or with nothing, which use their gradient) take one power
    iteration on each of the first q steps of a period; layers with a whole matrix
    take all of them on the first.

    Args:
      refresh: settings.
      transport: ``(carried, rotations) -> carried``.
      views: path -> view.
      layers: path -> layer, kernel form.
      carried: what moves with the bases: the inner optimizer's state.
      statistics: path -> statistic.
      matrices: path -> gradient ``(*batch, d, m)``, flipped ``(*batch, m, d)``.
      step: int32.
      allowed: bool, false on a step that must change nothing.

    Returns:
      The layers and what was carried.
    """

    def refresh_branch(
        group: Layers, carried: PyTree, seen: Any, gradients: Any
    ) -> tuple[Layers, PyTree]:
        new, rotations = {}, {}
        for path, layer in group.items():
            new[path], turned = _eigenbasis.refresh_layer(
                layer, seen.get(path), gradients[path], views[path], refresh
            )
            rotations[path] = Rotation(turned, views[path].flipped)
        return new, transport(carried, rotations)

    def keep_branch(
        group: Layers, carried: PyTree, seen: Any, gradients: Any
    ) -> tuple[Layers, PyTree]:
        del seen, gradients
        return group, carried

    instant = [p for p in layers if _eigenbasis.is_instant(statistics.get(p))]
    spread = [p for p in layers if p not in instant]
    first = step % _eigenbasis.to_int(refresh.every) == 0
    layers = dict(layers)
    turns = ((instant, first), (spread, _eigenbasis.collects(step, refresh)))
    for paths, turn in turns:
        if paths:
            group, carried = jax.lax.cond(
                turn & allowed,
                refresh_branch,
                keep_branch,
                {p: layers[p] for p in paths},
                carried,
                {p: statistics[p] for p in paths if p in statistics},
                {p: matrices[p] for p in paths},
            )
            layers.update(group)
    return layers, carried
