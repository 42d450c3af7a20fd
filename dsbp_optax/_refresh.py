"""One step's refresh: every layer whose turn it is, and its moments."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, TypeVar

import jax

from dsbp_optax import _eigenbasis
from dsbp_optax._eigenbasis import Layer, Refresh
from dsbp_optax._layout import MatrixView
from dsbp_optax._transport import Kind, Moments, Rotation, rotate
from dsbp_optax._types import Array

T = TypeVar("T")
Layers: TypeAlias = dict[str, Layer]
RefreshStep: TypeAlias = Callable[..., tuple[Layers, list[Moments]]]


def make_refresh(refresh: Refresh) -> RefreshStep:
    """The refresh of one transformation.

    Compiled on its own, so that a step outside of `jax.jit` does not build the
    branches anew each time; inside one it is inlined.

    Args:
      refresh: settings.

    Returns:
      ``(layers, moments, statistics, matrices, step, allowed, views=, kinds=) ->
      (layers, moments)``, see `refresh_layers`.
    """

    @functools.partial(jax.jit, static_argnames=("views", "kinds"))
    def step(*args: Any, views: Any, kinds: Any) -> tuple[Layers, list[Moments]]:
        return refresh_layers(refresh, dict(views), list(kinds), *args)

    def call(
        *args: Any, views: Mapping[str, MatrixView], kinds: list[Kind]
    ) -> tuple[Layers, list[Moments]]:
        done: tuple[Layers, list[Moments]] = step(
            *args, views=tuple(views.items()), kinds=tuple(kinds)
        )
        return done

    return call


def refresh_layers(
    refresh: Refresh,
    views: Mapping[str, MatrixView],
    kinds: list[Kind],
    layers: Layers,
    moments: list[Moments],
    statistics: Mapping[str, Any],
    matrices: Mapping[str, Array],
    step: Array,
    allowed: Array,
) -> tuple[Layers, list[Moments]]:
    """Every layer whose turn it is, one `lax.cond` for each group of layers.

    Layers with sketches (or with nothing, which use their gradient) take one power
    iteration on each of the first q steps of a period; layers with a whole matrix
    take all of them on the first.

    Args:
      refresh: settings.
      views: path -> view.
      kinds: how each field of `moments` follows a basis.
      layers: path -> layer, kernel form.
      moments: of the inner optimizer; they move with the bases.
      statistics: path -> statistic.
      matrices: path -> gradient ``(*batch, d, m)``, flipped ``(*batch, m, d)``.
      step: int32.
      allowed: bool, false on a step that must change nothing.

    Returns:
      The layers and their moments.
    """

    def refresh_branch(
        group: Layers, moments: list[Moments], seen: Any, gradients: Any
    ) -> tuple[Layers, list[Moments]]:
        new, rotations = {}, {}
        for path, layer in group.items():
            new[path], turned = _eigenbasis.refresh_layer(
                layer, seen.get(path), gradients[path], views[path], refresh
            )
            rotations[path] = Rotation(turned, views[path].flipped)
        return new, rotate(kinds, moments, rotations)

    def keep_branch(
        group: Layers, moments: list[Moments], seen: Any, gradients: Any
    ) -> tuple[Layers, list[Moments]]:
        del seen, gradients
        return group, moments

    instant = {p for p in layers if _eigenbasis.is_instant(statistics.get(p))}
    first = step % _eigenbasis.to_int(refresh.every) == 0
    spread = _eigenbasis.collects(step, refresh)
    for paths, turn in ((instant, first), (layers.keys() - instant, spread)):
        if paths:
            group, turned = jax.lax.cond(
                turn & allowed,
                refresh_branch,
                keep_branch,
                _only(paths, layers),
                [_only(paths, held) for held in moments],
                _only(paths, statistics),
                _only(paths, matrices),
            )
            layers = {**layers, **group}
            moments = [{**a, **b} for a, b in zip(moments, turned, strict=True)]
    return layers, moments


def _only(paths: Collection[str], values: Mapping[str, T]) -> dict[str, T]:
    return {path: value for path, value in values.items() if path in paths}
