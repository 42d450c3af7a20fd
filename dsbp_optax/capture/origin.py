"""What a loss does with its parameters, read off its jaxpr; knows no framework.

Names and shapes do not tell which parameter an array is: a teacher has those of its
student, a table that serves as a head, ``table.T``, may have those of another kernel.
A jaxpr does: an array is a parameter if nothing but casts, elementwise arithmetic,
transposes and loops over its slices lie between the two. It tells as well which axes
are summed over.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from dsbp_optax.core.layout import Axes, Shape
from dsbp_optax.linalg.types import Array

#: Begins the names that `label` gives.
_NAME = "dsbp_optax origin "
#: What leaves the numbers of a parameter, hence its gradient, as they are to rounding.
_SAME = re.compile(
    "convert_element_type|copy|copy_p|device_put|mesh_cast|name|optimization_barrier|"
    "pcast|pvary|reduce_precision|reshard|sharding_constraint"
)
#: What leaves each number in its place.
_ELEMENTWISE = re.compile(
    "abs|add|add_any|ceil|clamp|cos|div|erf|exp|expm1|floor|"
    "integer_pow|log|log1p|logistic|max|min|mul|neg|nextafter|pow|rem|round|rsqrt|"
    "select_n|sign|sin|sqrt|square|sub|tanh"
)
#: Functions with a derivative of the user's own, which need not be that of their value.
_CUSTOM = ("custom_jvp", "custom_vjp")
#: In the key of jax's trace caches.
_CONTEXT = jax.make_user_context(None)
_COUNT = itertools.count()


class Origin(NamedTuple):
    """The parameter that an array is.

    Attributes:
      path: of the parameter.
      exact: whether the array is the parameter itself, but for casts. Else it is the
        parameter rewritten number by number (scaled, masked, after an inner step), and
        has a gradient of its own.
      dims: the parameter's axes that the array's axes are, -1 for one that it has not
        (tasks that `jax.vmap` adapts it to, each for itself).
      stacked: those along which a loop has taken a slice of it.
    """

    path: str
    exact: bool
    dims: Shape
    stacked: Shape = ()

    @property
    def whole(self) -> bool:
        """Whether no axis is missing or moved."""
        own = tuple(axis for axis in self.dims if axis >= 0)
        return not self.stacked and own == tuple(range(len(own)))


class Trace(NamedTuple):
    """What one trace has told.

    Attributes:
      labels: what the labelled arrays are; None for no parameter, or now one and now
        another (a function that is traced once and called with two of them).
      uses: path -> the axes of each product in which the parameter is a factor, None
        for rows that are looked up in it.
      touched: paths of parameters that the function computes with.
      cast: paths of parameters that it turns into another dtype.
      custom: labels inside of functions with a derivative of the user's own.
    """

    labels: dict[str, Origin | None]
    uses: dict[str, list[Axes | None]]
    touched: set[str]
    cast: set[str]
    custom: set[str]


def label(array: Array, name: str) -> Array:
    """`array` itself, found by `trace` under that name."""
    named: Array = checkpoint_name(array, _NAME + name)
    return named


def trace(function: Callable[..., Any], leaves: Mapping[str, Any]) -> Trace:
    """What `function` does with its parameters, on shapes: nothing is computed.

    Args:
      function: of the parameters by path.
      leaves: path -> parameter.
    """
    found = Trace({}, {}, set(), set(), set())
    with apart():
        closed = jax.make_jaxpr(
            lambda values: function(dict(zip(leaves, values, strict=True)))
        )(list(leaves.values()))
    starts = [
        Origin(path, True, tuple(range(jnp.ndim(leaf))))
        for path, leaf in leaves.items()
    ]
    _walk(closed, starts, found)
    return found


@contextlib.contextmanager
def apart() -> Any:
    """Functions that are traced meanwhile are not found in jax's caches, nor later.

    A loss that is compiled with `jax.jit` holds our taps in this trace alone.
    """
    with _CONTEXT(next(_COUNT)):
        yield


def _walk(
    jaxpr: Any, origins: Sequence[Origin | None], found: Trace
) -> list[Origin | None]:
    """The origins of a jaxpr's results, given those of its arguments."""
    jaxpr = _open(jaxpr)
    known = dict(zip(jaxpr.invars, origins, strict=True))

    def of(variable: Any) -> Origin | None:
        return None if isinstance(variable, Literal) else known.get(variable)

    for eqn in jaxpr.eqns:
        operands = [of(variable) for variable in eqn.invars]
        name = eqn.params.get("name")
        if eqn.primitive.name == "name" and name.startswith(_NAME):
            key = name.removeprefix(_NAME)
            found.labels[key] = _join(found.labels.get(key, operands[0]), operands[0])
        known.update(zip(eqn.outvars, _outcome(eqn, operands, found), strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def _outcome(
    eqn: Any, operands: list[Origin | None], found: Trace
) -> list[Origin | None]:
    """The origins of an equation's results."""
    name, lost = eqn.primitive.name, _lost(eqn.outvars)
    mine = {origin.path for origin in operands if origin is not None}
    if name == "convert_element_type":
        found.cast.update(mine)
    if _SAME.fullmatch(name):
        return operands if len(operands) == len(lost) else lost
    if name == "transpose" and (one := operands[0]):
        dims = tuple(one.dims[a] for a in eqn.params["permutation"])
        return [one._replace(dims=dims)]
    if name in _USES:
        found.touched.update(mine)
        for position, one in enumerate(operands):
            if one is not None:
                found.uses.setdefault(one.path, []).append(
                    _USES[name](eqn, position, one)
                )
        return lost
    if name == "broadcast_in_dim" and (one := operands[0]):
        found.touched.update(mine)
        spread = [-1] * len(eqn.outvars[0].aval.shape)
        for axis, place in zip(
            one.dims, eqn.params["broadcast_dimensions"], strict=True
        ):
            spread[place] = axis
        return [one._replace(exact=False, dims=tuple(spread))]
    if _ELEMENTWISE.fullmatch(name):
        found.touched.update(mine)
        rank = len(eqn.outvars[0].aval.shape)
        known = {one._replace(exact=False) for one in operands if one is not None}
        one = known.pop() if len(known) == 1 else None
        return [one] if one and len(one.dims) == rank else lost
    if name == "scan":
        body = eqn.params["jaxpr"]
        held, carry = (  # What has an axis less in the body is taken slice by slice.
            sum(len(x.aval.shape) == len(y.aval.shape) for x, y in pairs)
            for pairs in (
                zip(eqn.invars, _open(body).invars, strict=True),
                zip(eqn.outvars, _open(body).outvars, strict=True),
            )
        )
        fixed, state = held - carry, operands[held - carry : held]
        slices = [_slice(one) for one in operands[held:]]
        outcome = _loop(body, operands[:fixed], state, slices, found)
        return [*outcome, *lost[carry:]]
    if name == "while":
        of_test, of_body = (eqn.params[f"{part}_nconsts"] for part in ("cond", "body"))
        fixed = of_test + of_body
        body, test = eqn.params["body_jaxpr"], eqn.params["cond_jaxpr"]
        outcome = _loop(body, operands[of_test:fixed], operands[fixed:], [], found)
        _walk(test, [*operands[:of_test], *outcome], found)
        return outcome
    if name == "cond":
        ways = [_walk(way, operands[1:], found) for way in eqn.params["branches"]]
        return [_all(pair) for pair in zip(*ways, strict=True)]
    inner = [x for x in eqn.params.values() if hasattr(x, "eqns")]
    if len(inner) != 1 or len(_open(inner[0]).invars) != len(operands):
        found.touched.update(mine)
        return lost
    outside = {*found.labels}
    outcome = _walk(inner[0], operands, found)
    if name.startswith(_CUSTOM):
        found.custom.update(found.labels.keys() - outside)
        outcome = [one and one._replace(exact=False) for one in outcome]
    return outcome if len(outcome) == len(lost) else lost


def _slice(one: Origin | None) -> Origin | None:
    """What a loop sees of an array in each round."""
    if one is None or not one.dims:
        return None
    stacked = one.dims[:1] if one.dims[0] >= 0 else ()
    return one._replace(dims=one.dims[1:], stacked=one.stacked + stacked)


def _of_dot(eqn: Any, position: int, one: Origin) -> Axes | None:
    contracted, batched = (pair[position] for pair in eqn.params["dimension_numbers"])
    inputs = tuple(one.dims[a] for a in contracted)
    batch = (*one.stacked, *(one.dims[a] for a in batched))
    outputs = tuple(a for a in one.dims if a not in inputs + batch)
    return Axes(*map(_sorted, (inputs, outputs, batch)))


def _of_convolution(eqn: Any, position: int, one: Origin) -> Axes | None:
    if position != 1 or eqn.params["feature_group_count"] != 1:
        return None
    to, *others = (one.dims[a] for a in eqn.params["dimension_numbers"].rhs_spec)
    return Axes(_sorted(others), (to,), _sorted(one.stacked))


def _sorted(axes: Sequence[int]) -> Shape:
    return tuple(sorted(axis for axis in axes if axis >= 0))


#: Products, and the axes of a parameter that is a factor; None where rows are taken.
_USES: Mapping[str, Callable[[Any, int, Origin], Axes | None]] = {
    "dot_general": _of_dot,
    "conv_general_dilated": _of_convolution,
    "gather": lambda eqn, position, one: None,
}


def _loop(
    body: Any,
    fixed: list[Origin | None],
    state: list[Origin | None],
    rest: list[Origin | None],
    found: Trace,
) -> list[Origin | None]:
    """What the state of a loop is in every one of its rounds."""
    while True:
        after = _walk(body, [*fixed, *state, *rest], found)[: len(state)]
        joined = [_join(a, b) for a, b in zip(state, after, strict=True)]
        if joined == state:
            return state
        state = joined


def _lost(values: Sequence[Any]) -> list[Origin | None]:
    """Origins of values that are no parameters."""
    return [None for _ in values]


def _open(jaxpr: Any) -> Any:
    """Without its constants: of older versions of jax, a closed one has it inside."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _all(origins: Sequence[Origin | None]) -> Origin | None:
    first, *others = origins
    for other in others:
        first = _join(first, other)
    return first


def _join(one: Origin | None, two: Origin | None) -> Origin | None:
    """What an array is that is sometimes the one and sometimes the other."""
    if one is None or two is None or one[:1] + one[2:] != two[:1] + two[2:]:
        return None
    return one._replace(exact=one.exact and two.exact)
