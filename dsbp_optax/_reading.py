"""Whether the optimizer reads a kernel as its layer uses it; knows no framework."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from dsbp_optax import _layout
from dsbp_optax._layout import Axes, MatrixView, Shape
from dsbp_optax._rider import LinearMap, Rider


class Misread(NamedTuple):
    """A kernel that the optimizer reads as other matrices than its layer does.

    Attributes:
      kernel: its shape.
      read: as the optimizer reads it.
      used: as its layer uses it.
    """

    kernel: Shape
    read: MatrixView
    used: Axes


def compare(
    rider: Rider, linear: LinearMap, inner: Shape, kernel: Shape
) -> Misread | None:
    """What a layer says of its kernel, where that is not what the optimizer reads.

    Args:
      rider: on the whole kernel.
      linear: how the layer acts.
      inner: shape of the kernel in the layer, inside of the transformations around it.
      kernel: shape of the whole kernel, their stacks included.
    """
    view = _layout.view_of(kernel, rider.basis.shape[:-1], rider.count.shape[:-1])
    ways = layer_axes(linear, inner, kernel)
    if not ways or any(_same(view, axes) for axes in ways):
        return None
    return Misread(kernel, view, ways[0])


def layer_axes(linear: LinearMap, inner: Shape, kernel: Shape) -> list[Axes]:
    """Axes of the whole kernel, as a layer uses them that sees `inner` of it.

    More than one where the lengths do not tell which axis a transformation stacked;
    none where `inner` is no slice of the kernel.
    """
    found, every = [], range(len(kernel))
    for stacked in itertools.combinations(every, len(kernel) - len(inner)):
        kept = [a for a in every if a not in stacked]
        if tuple(kernel[a] for a in kept) == tuple(inner):
            first, split = linear.batch, linear.batch + linear.inputs
            batch = tuple(sorted((*stacked, *kept[:first])))
            found.append(Axes(tuple(kept[first:split]), tuple(kept[split:]), batch))
    return found


def tell(found: Mapping[str, Misread]) -> str:
    """Says of all misread kernels what comes of it, and what mends it."""
    each = [
        f"'{path}' {one.kernel} is read as {_layout.in_words(one.read)}, but its layer "
        f"sums over axes {one.used.inputs}, gives axes {one.used.outputs}"
        + (f" and is stacked along axes {one.used.batch}" if one.used.batch else "")
        for path, one in found.items()
    ]
    entries = [f"'{p}': {_layout.entry(one.used)}" for p, one in found.items()]
    return (
        f"kernels read otherwise than their layers use them: {'; '.join(each)}. They "
        "have no statistic, their bases come from gradients, and their updates another "
        f"size. Remedy: axes={{{', '.join(entries)}}} in the optimizer, and init again."
    )


def _same(view: MatrixView, axes: Axes) -> bool:
    """Whether both name the same axes; those of length 1 belong to any side."""

    def long(group: Shape) -> set[int]:
        return {a for a in group if view.shape[a] > 1}

    sides = [long(axes.inputs), long(axes.outputs)]
    read = [long(view.rows), long(view.columns)]
    return long(view.batch) == long(axes.batch) and read in (sides, sides[::-1])
