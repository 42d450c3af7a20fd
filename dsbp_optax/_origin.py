"""Where an array that a layer uses as its kernel comes from; knows no framework.

Names and shapes do not tell: a teacher has those of its student, a table that serves as
a head, ``table.T``, may have those of another kernel. A jaxpr does: an array is a
parameter if nothing but casts and elementwise arithmetic lie between the two.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from dsbp_optax._types import Array

#: Begins the names that `label` gives.
_NAME = "dsbp_optax origin "
#: What leaves the numbers of a parameter, hence its gradient, as they are to rounding.
_SAME = re.compile(
    "convert_element_type|copy|copy_p|device_put|mesh_cast|name|optimization_barrier|"
    "pcast|pvary|reduce_precision|reshard|sharding_constraint"
)
#: What leaves each number in its place.
_ELEMENTWISE = re.compile(
    "abs|add|add_any|broadcast_in_dim|ceil|clamp|cos|div|erf|exp|expm1|floor|"
    "integer_pow|log|log1p|logistic|max|min|mul|neg|nextafter|pow|rem|round|rsqrt|"
    "select_n|sign|sin|sqrt|square|sub|tanh"
)
#: Functions with a derivative of the user's own, which need not be that of their value.
_CUSTOM = ("custom_jvp", "custom_vjp")
#: In the key of jax's trace caches, where this jax has one for users.
_APART = getattr(jax, "make_user_context", lambda _: None)(None)
_COUNT = itertools.count()


class Origin(NamedTuple):
    """The parameter that an array is.

    Attributes:
      path: of the parameter.
      exact: whether the array is the parameter itself, but for casts. Else it is the
        parameter rewritten number by number (scaled, masked, after an inner step), and
        has a gradient of its own.
    """

    path: str
    exact: bool


_Found: TypeAlias = dict[str, Origin | None]


class Unsettled(Exception):  # noqa: N818  # no error: it asks for `trace_origins`
    """Whether an array is some parameter cannot be told without a jaxpr."""


def label(array: Array, name: str) -> Array:
    """`array` itself, found by `trace_origins` under that name."""
    named: Array = checkpoint_name(array, _NAME + name)
    return named


def trace_origins(
    function: Callable[[dict[str, Any]], Any], leaves: Mapping[str, Any]
) -> _Found:
    """What the arrays are that `function` labels: parameters, or None for others.

    An array that is labelled twice under one name, as in a function that is traced once
    and called with two sets of parameters, is what both are, or None.

    Args:
      function: of the parameters by path; it is traced, nothing is computed.
      leaves: path -> parameter.
    """
    found: _Found = {}
    with apart():
        closed = jax.make_jaxpr(
            lambda values: function(dict(zip(leaves, values, strict=True)))
        )(list(leaves.values()))
    _walk(closed, [Origin(path, True) for path in leaves], found)
    return found


@contextlib.contextmanager
def apart() -> Any:
    """Functions that are traced meanwhile are not found in jax's caches, nor later."""
    with contextlib.nullcontext() if _APART is None else _APART(next(_COUNT)):
        yield


def _walk(
    jaxpr: Any, origins: Sequence[Origin | None], found: _Found
) -> list[Origin | None]:
    """The origins of a jaxpr's results, given those of its arguments."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    known = dict(zip(jaxpr.invars, origins, strict=True))

    def of(variable: Any) -> Origin | None:
        return None if isinstance(variable, Literal) else known.get(variable)

    for eqn in jaxpr.eqns:
        operands = [of(variable) for variable in eqn.invars]
        name = eqn.params.get("name")
        if eqn.primitive.name == "name" and name.startswith(_NAME):
            key = name.removeprefix(_NAME)
            found[key] = _join(found.get(key, operands[0]), operands[0])
        known.update(zip(eqn.outvars, _outcome(eqn, operands, found), strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def _outcome(
    eqn: Any, operands: list[Origin | None], found: _Found
) -> list[Origin | None]:
    """The origins of an equation's results."""
    name, lost = eqn.primitive.name, _lost(eqn.outvars)
    if _SAME.fullmatch(name):
        return operands if len(operands) == len(lost) else lost
    if _ELEMENTWISE.fullmatch(name):
        paths = {origin.path for origin in operands if origin is not None}
        return [Origin(paths.pop(), False)] if len(paths) == 1 else lost
    if name == "scan":
        fixed, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        state, rest = operands[fixed : fixed + carry], operands[fixed + carry :]
        body, slices = eqn.params["jaxpr"], _lost(rest)
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
    inner = [x for x in eqn.params.values() if isinstance(x, Jaxpr | ClosedJaxpr)]
    if len(inner) != 1 or len(_arguments(inner[0])) != len(operands):
        return lost
    outcome = _walk(inner[0], operands, found)
    if name.startswith(_CUSTOM):
        outcome = [one and one._replace(exact=False) for one in outcome]
    return outcome if len(outcome) == len(lost) else lost


def _loop(
    body: Any,
    fixed: list[Origin | None],
    state: list[Origin | None],
    rest: list[Origin | None],
    found: _Found,
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


def _arguments(jaxpr: Any) -> Sequence[Any]:
    variables: Sequence[Any] = getattr(jaxpr, "jaxpr", jaxpr).invars
    return variables


def _all(origins: Sequence[Origin | None]) -> Origin | None:
    first, *others = origins
    for other in others:
        first = _join(first, other)
    return first


def _join(one: Origin | None, two: Origin | None) -> Origin | None:
    """What an array is that is sometimes the one and sometimes the other."""
    if one is None or two is None or one.path != two.path:
        return None
    return Origin(one.path, one.exact and two.exact)
