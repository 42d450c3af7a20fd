"""Carries an inner optimizer's moments over a change of basis.

Shape does not tell a first from a second moment, so this is a table by state type
and field. It is open: pass ``transport={("MyState", "momentum"): "first"}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from dsbp_optax.linalg.subspace import rotate_first_moment, rotate_second_moment
from dsbp_optax.linalg.types import Array, PyTree

Kind: TypeAlias = Literal["first", "second", "invariant", "reset"]
Table: TypeAlias = Mapping[tuple[str, str], Kind]
Additions: TypeAlias = Table | Literal["reset"] | None

#: (state type, field) -> how it follows the basis.
TABLE: Table = {
    ("TraceState", "trace"): "first",
    ("EmaState", "ema"): "first",
    ("ScaleByAdamState", "mu"): "first",
    ("ScaleByAdamState", "nu"): "second",
    ("ScaleByAdanState", "m"): "first",
    ("ScaleByAdanState", "v"): "first",
    ("ScaleByAdanState", "n"): "second",
    ("ScaleByAdanState", "g"): "first",
    ("ScaleByAdemamixState", "m1"): "first",
    ("ScaleByAdemamixState", "m2"): "first",
    ("ScaleByAdemamixState", "nu"): "second",
    ("ScaleByBeliefState", "mu"): "first",
    ("ScaleByBeliefState", "nu"): "second",
    ("ScaleByLionState", "mu"): "first",
    ("ScaleByOptimisticGradientState", "previous_gradient"): "first",
    ("ScaleByRmsState", "nu"): "second",
    ("ScaleByRmsWithCountState", "nu"): "second",
    ("ScaleByRStdDevState", "mu"): "first",
    ("ScaleByRStdDevState", "nu"): "second",
    ("ScaleByRStdDevWithCountState", "mu"): "first",
    ("ScaleByRStdDevWithCountState", "nu"): "second",
    ("ScaleByRssState", "sum_of_squares"): "second",
    ("ScaleByAmsgradState", "mu"): "first",
    ("ScaleByAmsgradState", "nu"): "second",
    ("ScaleByAmsgradState", "nu_max"): "second",
    ("ScaleBySimplifiedAdEMAMixState", "m"): "first",
    ("ScaleBySimplifiedAdEMAMixState", "n"): "second",
}

_RULES: Mapping[Kind, Callable[[Array, Array], Array]] = {
    "first": lambda m, rotation: rotate_first_moment(rotation, m),
    "second": lambda v, rotation: rotate_second_moment(rotation, v),
    "invariant": lambda m, rotation: m,
    "reset": lambda m, rotation: jnp.zeros_like(m),
}


def rotate(state: PyTree, rotation: Array, table: Table) -> PyTree:
    """A matrix's moments in the coordinates of a new basis: ``m <- R m``.

    Args:
      state: the inner optimizer's state for one matrix of coordinates ``(k, m)``.
      rotation: ``R = V_new^T V_old (k, k)``.
      table: (state type, field) -> kind.
    """
    return map_moments(lambda m, kind, _: _RULES[kind](m, rotation), state, table)


def map_moments(
    function: Callable[[Array, Kind, str], Array], state: PyTree, table: Table
) -> PyTree:
    """`function` of (moment, kind, field) at every matrix in a state of tuples.

    Raises:
      ValueError: by name, for a matrix that the table does not know.
    """

    def visit(node: PyTree, where: tuple[str, str]) -> PyTree:
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            kind = type(node).__name__
            pairs = zip(node._fields, node, strict=True)
            return type(node)(*(visit(child, (kind, field)) for field, child in pairs))
        if isinstance(node, tuple | list):
            return type(node)(visit(child, where) for child in node)
        if isinstance(node, Mapping):
            return {key: visit(child, where) for key, child in node.items()}
        if getattr(node, "ndim", 0) < 2:
            return node
        if where not in table:
            raise ValueError(_unknown(where))
        return function(node, table[where], where[1])

    return visit(state, ("", ""))


def make_table(additions: Additions) -> Table:
    """The table with the user's additions; "reset" starts every moment anew.

    Args:
      additions: (state type, field) -> kind, or "reset", or None.

    Raises:
      ValueError: for an unknown kind.
    """
    if additions == "reset":
        return dict.fromkeys(TABLE, "reset")
    if isinstance(additions, str):
        raise ValueError(
            f"transport: got {additions!r}, expected 'reset' or a mapping "
            "{('StateType', 'field'): kind}."
        )
    for pair, kind in (additions or {}).items():
        if kind not in _RULES:
            raise ValueError(
                f"transport[{pair}]: got {kind!r}, expected one of {sorted(_RULES)}."
            )
    return {**TABLE, **(additions or {})}


def first_moment(state: PyTree, table: Table = TABLE) -> Any:
    """The first matrix of a state that is a mean of gradients, or None."""
    found: list[Array] = []

    def note(moment: Array, kind: Kind, field: str) -> Array:
        del field
        if kind == "first":
            found.append(moment)
        return moment

    try:
        map_moments(note, state, table)
    except ValueError:  # Of a type that the table does not know.
        return None
    return found[0] if found else None


def _unknown(where: tuple[str, str]) -> str:
    return (
        f"the inner optimizer keeps {'.'.join(where)} for each kernel, and how it "
        "follows a change of basis is not known. Remedy: pass transport="
        f"{{{where!r}: 'first'}} (a mean of gradients), 'second' (a mean of squares), "
        "'invariant' (not in coordinates) or 'reset' (start again at zero)."
    )
