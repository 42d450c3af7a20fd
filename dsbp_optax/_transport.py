"""Carries an inner optimizer's moments over a change of basis.

Shape does not tell a first from a second moment, so this is a table by state type
and field. It is open: pass ``transport={("MyState", "momentum"): FIRST}``.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _subspace
from dsbp_optax._types import Array, PyTree

Kind: TypeAlias = Literal["first", "second", "reset"]
Table: TypeAlias = Mapping[tuple[str, str], Kind]
#: Path -> moment of one field of the inner state.
Moments: TypeAlias = dict[str, Array]

#: (state type, field) -> how it follows the basis.
TABLE: Table = {
    ("TraceState", "trace"): "first",
    ("EmaState", "ema"): "first",
    ("ScaleByAdamState", "mu"): "first",
    ("ScaleByAdamState", "nu"): "second",
    ("ScaleByBeliefState", "mu"): "first",
    ("ScaleByBeliefState", "nu"): "second",
    ("ScaleByLionState", "mu"): "first",
    ("ScaleByRmsState", "nu"): "second",
    ("ScaleByRStdDevState", "mu"): "first",
    ("ScaleByRStdDevState", "nu"): "second",
    ("ScaleByRssState", "sum_of_squares"): "second",
    ("ScaleByAmsgradState", "mu"): "first",
    ("ScaleByAmsgradState", "nu"): "second",
    ("ScaleByAmsgradState", "nu_max"): "second",
}


class Rotation(NamedTuple):
    """How the coordinates of one layer change: ``R = V_new^T V_old (*batch, k, k)``."""

    matrix: Array
    flipped: bool


_RULES: Mapping[Kind, Callable[[Array, Rotation], Array]] = {
    "first": lambda m, by: _subspace.rotate_first_moment(by.matrix, m, by.flipped),
    "second": lambda v, by: _subspace.rotate_second_moment(by.matrix, v, by.flipped),
    "reset": lambda m, by: jnp.zeros_like(m),
}


def split(
    state: PyTree, paths: frozenset[str], table: Table
) -> tuple[list[Kind], list[Moments]]:
    """The moments of the layers in `paths`, field by field, and their kinds.

    Args:
      state: the inner optimizer's state; its moments are flat dicts by path.
      paths: of the projected parameters.
      table: (state type, field) -> kind.
    """
    kinds: list[Kind] = []
    found: list[Moments] = []

    def note(kind: Kind, held: Mapping[str, Array]) -> dict[str, Array]:
        kinds.append(kind)
        found.append({p: m for p, m in held.items() if p in paths})
        return dict(held)

    _map_moments(note, state, table, paths)
    return kinds, found


def rotate(
    kinds: list[Kind], moments: list[Moments], rotations: Mapping[str, Rotation]
) -> list[Moments]:
    """`moments` in the coordinates of the new bases: ``m <- R m``, ``v <- (R * R) v``.

    Layers that are not in `rotations` stay as they are.
    """
    return [
        {
            path: _RULES[kind](moment, rotations[path]) if path in rotations else moment
            for path, moment in held.items()
        }
        for kind, held in zip(kinds, moments, strict=True)
    ]


def restore(
    state: PyTree, moments: list[Moments], paths: frozenset[str], table: Table
) -> PyTree:
    """`state` with `moments` in their places."""
    remaining = iter(moments)

    def put(kind: Kind, held: Mapping[str, Array]) -> dict[str, Array]:
        return {**held, **next(remaining)}

    return _map_moments(put, state, table, paths)


def check_table(state: PyTree, paths: frozenset[str], table: Table) -> None:
    """Raise, by name, for a moment that the table does not know."""
    for pair, kind in table.items():
        if kind not in _RULES:
            raise ValueError(
                f"transport[{pair}]: got {kind!r}, expected one of {sorted(_RULES)}."
            )
    _map_moments(lambda _, moments: dict(moments), state, table, paths)


def _map_moments(
    carry: Callable[[Kind, Mapping[str, Array]], dict[str, Array]],
    node: PyTree,
    table: Table,
    paths: frozenset[str],
    where: tuple[str, str] = ("", ""),
) -> PyTree:
    """`carry` at every dict of moments inside a state of tuples and named tuples."""
    if isinstance(node, Mapping) and paths & node.keys():
        if where not in table:
            raise ValueError(
                f"the inner optimizer keeps {'.'.join(where)} for each kernel, and "
                "how it follows a change of basis is not known. Remedy: pass "
                f"transport={{{where!r}: 'first'}} (a mean of gradients), 'second' (a "
                "mean of squares) or 'reset' (start again at zero)."
            )
        return carry(table[where], node)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        kind = type(node).__name__
        values = (
            _map_moments(carry, child, table, paths, (kind, field))
            for field, child in zip(node._fields, node, strict=True)
        )
        return type(node)(*values)
    if isinstance(node, tuple | list):
        return type(node)(
            _map_moments(carry, child, table, paths, where) for child in node
        )
    if isinstance(node, Mapping):
        return {k: _map_moments(carry, v, table, paths, where) for k, v in node.items()}
    return node


def as_inner(inner: Any) -> optax.GradientTransformationExtraArgs:
    """`inner` with support for extra arguments; None is the identity."""
    if inner is None:
        inner = optax.identity()
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"inner: got {inner!r} of type {type(inner).__name__}, expected an "
            "optax.GradientTransformation such as optax.scale_by_adam()."
        )
    return optax.with_extra_args_support(inner)


def check_inner(inner: optax.GradientTransformation) -> None:
    """Refuse an inner optimizer that descends or that needs parameters.

    Probes it on one tiny gradient; skipped for hyperparameters that are traced.
    """
    probe = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]])}
    try:
        with jax.ensure_compile_time_eval():
            state = inner.init(probe)
            update, _ = inner.update(probe, state, None)
            product = jnp.vdot(update["kernel"], probe["kernel"])
    except (ValueError, AttributeError, TypeError) as error:
        if "params" not in str(error) and "NoneType" not in str(error):
            raise
        raise ValueError(
            "inner: needs the parameters, which have no coordinates in the subspace "
            f"({str(error).splitlines()[0]}). Remedy: keep weight decay and trust "
            "ratios outside, e.g. optax.chain(scale_by_spectral_projection(inner="
            "optax.scale_by_adam()), optax.add_decayed_weights(1e-4), "
            "optax.scale_by_learning_rate(1e-3))."
        ) from error
    if not isinstance(product, jax.core.Tracer) and product < 0:
        raise ValueError(
            "inner: its update points downhill already (it contains a learning "
            "rate), so the projected part would descend and the rest ascend. Remedy: "
            "pass a scale_by_* transformation and put the learning rate after: "
            "optax.chain(scale_by_spectral_projection(inner=optax.scale_by_adam()), "
            "optax.scale_by_learning_rate(lr))."
        )
