"""How the axes of a kernel are inferred where nobody says what they are."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dsbp_optax.core import layout
from dsbp_optax.core.layout import Axes, MatrixView, Shape

#: Names of layers, or of their arrays, and what faces what, axis by axis: (i)nput or
#: (o)utput. Axes in front of these are stacks.
_ROLES: Mapping[str, str] = {
    r"query|key|value|[qkv]_proj": "ioo",
    r"out|o_proj|out_proj|attn_out_proj|attn_vec_einsum": "iio",
    r"q_einsum": "oio",
    r"(q?kv)_einsum": "ooio",
    r"(gate|up|down)_proj|dense(_\d+)?": "io",
}
#: The longest side of a square window, or patch, and the fewest outputs behind it.
_WINDOW = 16
#: Two matrices in one, (2, inputs, outputs) or (2, outputs, inputs): the layer after it
#: tells which.
_GATING, _AFTER_GATING = "gating_einsum", "linear"


class Reading(NamedTuple):
    """How the axes of a kernel were inferred.

    Attributes:
      axes: what they were taken for.
      sure: whether something told; else it is a guess.
    """

    axes: Axes
    sure: bool


def infer_axes(
    path: str,
    shape: Shape,
    bias: Shape | None,
    beside: Mapping[str, Shape] | None = None,
) -> Reading:
    """Read the axes off a kernel's shape, its bias, its name and its neighbours.

    In this order: a bias has the output axes behind the stacking axes, which leaves one
    way for most kernels; two axes are (input, output) unless the bias says otherwise;
    known names have known axes; convolutions go by name or by a square window. Whatever
    is left is a guess: a square window behind another axis is a stack of convolutions,
    else a kernel is a convolution from four axes on, a stack of matrices below. A
    user's `AxesRule` comes before all of this.

    Args:
      path: the parameter's path.
      shape: its shape, of two axes or more.
      bias: the shape of the bias beside it, or None.
      beside: name -> shape, of the kernels of the layers beside its own.
    """
    ndim, names = len(shape), path.lower().split("/")[-2:]
    ways = [] if bias is None else _by_bias(shape, bias)
    named = _by_name(names, shape, beside or {})
    convolution = "conv" in names[0]
    many = ndim >= 4 and "dense" not in names[0]
    stacked = convolution and ndim == 5 and shape[0] != shape[1] == shape[2] > 1
    flat = (convolution or many) and not stacked
    plain = _axes(ndim, 0 if flat else ndim - 4 if stacked else ndim - 2, 1)
    if named is not None and named.axes in ways:
        return Reading(named.axes, True)
    if plain in ways:
        return Reading(plain, convolution or len(ways) == 1)
    if ways:
        return Reading(ways[0], len(ways) == 1)
    if ndim == 2:
        return Reading(plain, True)
    sure = convolution and not stacked
    return named or Reading(plain, sure or _has_window(shape))


def _has_window(shape: Shape) -> bool:
    """Whether it begins with two small axes of one length, as no stack does."""
    return len(shape) == 4 and shape[0] == shape[1] <= _WINDOW <= shape[3]


def _by_bias(shape: Shape, bias: Shape) -> list[Axes]:
    """The axes that leave room for that bias, the usual ones first.

    Stacks lie in front, as they do in the bias; along the second axis, as they do in a
    bias of two axes or more; or nowhere, the kernel being transposed.
    """
    ndim = len(shape)
    ways = [
        _axes(ndim, b, o) for b, o in _splits(ndim) if shape[:b] + shape[-o:] == bias
    ]
    if not ways and ndim > 2 and len(bias) > 1 and shape[1] == bias[1]:
        rest = (shape[0], *shape[2:])
        outputs = len(bias) - 1
        if outputs < len(rest) and rest[-outputs:] == (bias[0], *bias[2:]):
            ways = [_stacked_second(_axes(ndim - 1, 0, outputs))]
    if not ways and ndim == 2 and shape[:1] == bias:
        ways = [Axes((1,), (0,))]
    return ways


def _by_name(
    names: Sequence[str], shape: Shape, beside: Mapping[str, Shape]
) -> Reading | None:
    """What a known name says; a stack lies in front unless the neighbours' does not.

    It is a guess where these have none.
    """
    others = [other for other in beside.values() if len(other) > 2]
    if _GATING in names:
        roles, told = _gating(shape, beside.get(_AFTER_GATING))
    elif _AFTER_GATING in names and _GATING in beside:
        roles, told = "io", True
    else:
        roles, told = next(filter(None, map(_roles_of, names)), ""), True
    extra = len(shape) - len(roles)
    if not roles or extra < 0 or len(shape) < 3:
        return None
    core = _of_roles(roles)
    if not extra:
        stack = any(_stack_of(shape, roles, *pair) for pair in beside.items())
        return Reading(_axes(3, 1, 1) if stack else core, told)
    first, second = (
        bool(others) and all(other[a] == shape[a] for other in others) for a in (0, 1)
    )
    if extra == 1 and second and not first:
        return Reading(_stacked_second(core), told)
    inputs, outputs = (tuple(a + extra for a in group) for group in core[:2])
    sure = told and (first or not others)
    return Reading(Axes(inputs, outputs, tuple(range(extra))), sure)


def _roles_of(name: str) -> str | None:
    found = (roles for known, roles in _ROLES.items() if re.fullmatch(known, name))
    return next(found, None)


def _stack_of(shape: Shape, roles: str, name: str, other: Shape) -> bool:
    """Whether the way into a head and the way out of it betray stacks of matrices.

    Heads have one width in front of the former and behind the latter; stacks one length
    in front of both.
    """
    pair, width = {roles, _roles_of(name)}, shape[0 if roles == "ioo" else -1]
    if pair != {"ioo", "iio"} or len(other) != 3:
        return False
    heads = width == other[-1 if roles == "ioo" else 0]
    return not heads and shape[0] == other[0]


def _gating(shape: Shape, after: Shape | None) -> tuple[str, bool]:
    """Which of its last two axes faces the input: the other one enters the next."""
    ways = {
        "oio": after is not None and after[-2:] == shape[:-3:-1],
        "ooi": after is not None and after[-2:] == shape[-2:],
    }
    fits = [roles for roles, fit in ways.items() if fit]
    return (fits[0], True) if len(fits) == 1 else ("oio", False)


def _of_roles(roles: str) -> Axes:
    inputs, outputs = (tuple(i for i, r in enumerate(roles) if r == c) for c in "io")
    return Axes(inputs, outputs)


def _stacked_second(axes: Axes) -> Axes:
    """The same axes of a kernel that has a stack as its second axis."""
    inputs, outputs = (tuple(a + (a > 0) for a in group) for group in axes[:2])
    return Axes(inputs, outputs, (1,))


def neighbours(path: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Name -> shape of the arrays of its layer, and of such arrays of those beside."""
    *layer, name = path.lower().split("/")
    found = {}
    for other, shape in shapes.items():
        *place, last = other.lower().split("/")
        if place == layer and last != name:
            found[last] = shape
        elif place and place != layer and place[:-1] == layer[:-1] and last == name:
            found[place[-1]] = shape
    return found


def tell_guesses(guesses: Mapping[str, tuple[MatrixView, Axes]]) -> str:
    """Says how kernels were read of which nothing tells how to."""
    each = [
        f"'{path}' {view.shape} as {layout.in_words(view)}"
        for path, (view, _) in guesses.items()
    ]
    entries = [f"'{path}': {layout.entry(axes)}" for path, (_, axes) in guesses.items()]
    return (
        f"the axes of kernels were guessed: {'; '.join(each)}. If that is wrong, their "
        "updates have another size and their bases another meaning. Remedy: say which "
        "axes face the layer's input and which its output; if this is right, "
        f"basis=dsbp_optax.Basis(axes={{{', '.join(entries)}}})."
    )


def _axes(ndim: int, batch: int, outputs: int) -> Axes:
    every = tuple(range(ndim))
    return Axes(every[batch : ndim - outputs], every[ndim - outputs :], every[:batch])


def _splits(ndim: int) -> list[tuple[int, int]]:
    """(stacking axes, output axes) that leave at least one input axis."""
    return [(b, o) for b in range(ndim - 1) for o in range(1, ndim - b)]
