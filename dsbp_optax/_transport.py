"""Carries an inner optimizer's moments over a change of basis.

Shape does not tell a first from a second moment, so this is a table by state type
and field. It is open: pass ``transport={("MyState", "momentum"): FIRST}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from dsbp_optax import _subspace
from dsbp_optax._types import Array, PyTree

#: Path -> moment of one field of the inner state.
Moments: TypeAlias = dict[str, Array]


class Rotation(NamedTuple):
    """How the coordinates of one layer change.

    Attributes:
      matrix: ``R = V_new^T V_old (*batch, k, k)``.
      flipped: whether the moments are ``(*batch, m, k)``.
    """

    matrix: Array
    flipped: bool


Kind: TypeAlias = Literal["first", "second", "invariant", "reset"]
Table: TypeAlias = Mapping[tuple[str, str], Kind]
Additions: TypeAlias = Table | Literal["reset"] | None


class Field(NamedTuple):
    """One field of the inner state that holds a moment for each kernel.

    Attributes:
      kind: how it follows the basis.
      name: of the field.
    """

    kind: Kind
    name: str


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

_RULES: Mapping[Kind, Callable[[Array, Rotation], Array]] = {
    "first": lambda m, by: _subspace.rotate_first_moment(by.matrix, m, by.flipped),
    "second": lambda v, by: _subspace.rotate_second_moment(by.matrix, v, by.flipped),
    "invariant": lambda m, by: m,
    "reset": lambda m, by: jnp.zeros_like(m),
}


def split(
    state: PyTree, paths: frozenset[str], table: Table
) -> tuple[list[Field], list[Moments]]:
    """The moments of the layers in `paths`, field by field, and what they are.

    Args:
      state: the inner optimizer's state; its moments are flat dicts by path.
      paths: of the projected parameters.
      table: (state type, field) -> kind.
    """
    fields: list[Field] = []
    found: list[Moments] = []

    def note(field: Field, held: Mapping[str, Array]) -> dict[str, Array]:
        fields.append(field)
        found.append({p: m for p, m in held.items() if p in paths})
        return dict(held)

    _map_moments(note, state, table, paths)
    return fields, found


def rotate(
    fields: list[Field], moments: list[Moments], rotations: Mapping[str, Rotation]
) -> list[Moments]:
    """`moments` in the coordinates of the new bases: ``m <- R m``, ``v <- (R * R) v``.

    Layers that are not in `rotations` stay as they are.
    """

    def turned(field: Field, path: str, moment: Array) -> Array:
        if path not in rotations:
            return moment
        return _RULES[field.kind](moment, rotations[path]).astype(moment.dtype)

    return [
        {path: turned(field, path, moment) for path, moment in held.items()}
        for field, held in zip(fields, moments, strict=True)
    ]


def restore(
    state: PyTree, moments: list[Moments], paths: frozenset[str], table: Table
) -> PyTree:
    """`state` with `moments` in their places."""
    remaining = iter(moments)

    def put(field: Field, held: Mapping[str, Array]) -> dict[str, Array]:
        return {**held, **next(remaining)}

    return _map_moments(put, state, table, paths)


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


def check_table(state: PyTree, paths: frozenset[str], table: Table) -> None:
    """Raise, by name, for a moment that the table does not know."""
    _map_moments(lambda _, moments: dict(moments), state, table, paths)


def _map_moments(
    carry: Callable[[Field, Mapping[str, Array]], dict[str, Array]],
    node: PyTree,
    table: Table,
    paths: frozenset[str],
) -> PyTree:
    """`carry` at every dict of moments inside a state of tuples and named tuples."""

    def visit(node: PyTree, where: tuple[str, str]) -> PyTree:
        if isinstance(node, Mapping) and paths & node.keys():
            if where not in table:
                raise ValueError(_unknown(where))
            return carry(Field(table[where], where[1]), node)
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            kind = type(node).__name__
            values = (
                visit(child, (kind, field))
                for field, child in zip(node._fields, node, strict=True)
            )
            return type(node)(*values)
        if isinstance(node, tuple | list):
            return type(node)(visit(child, where) for child in node)
        if isinstance(node, Mapping):
            return {k: visit(v, where) for k, v in node.items()}
        return node

    return visit(node, ("", ""))


def _unknown(where: tuple[str, str]) -> str:
    return (
        f"the inner optimizer keeps {'.'.join(where)} for each kernel, and how it "
        "follows a change of basis is not known. Remedy: pass transport="
        f"{{{where!r}: 'first'}} (a mean of gradients), 'second' (a mean of squares), "
        "'invariant' (not in coordinates) or 'reset' (start again at zero)."
    )
