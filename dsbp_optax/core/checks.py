"""Checks of what users pass; messages say got, expected, where and remedy."""

import contextlib
import difflib
import operator
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_optax.linalg.types import Side

#: Packages whose lines are none of the user's.
_LIBRARIES = ("dsbp_optax", "contextlib", "flax", "functools", "jax", "optax")
SIDES: tuple[Side, ...] = ("input", "output")


def missing(extra: str, package: str) -> ModuleNotFoundError:
    """The error for a package that is not installed, with the extra that brings it."""
    return ModuleNotFoundError(
        f"{package} is not installed. Remedy: pip install {package}, or install "
        f"dsbp_optax from a checkout with pip install -e '.[{extra}]'.",
        name=package,
    )


@contextlib.contextmanager
def brought_by(extra: str) -> Iterator[None]:
    """An import inside of it that fails says which extra it wants."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(extra, (error.name or "").partition(".")[0]) from error


def warn(text: str) -> None:
    """A warning that points at the user's own line, past the libraries in between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def check_side(side: Any, path: str = "") -> Side:
    """The side, or an error that says where."""
    for known in SIDES:
        if side == known:
            return known
    where = f" of '{path}'" if path else ""
    raise ValueError(
        f"side{where}: got {side!r}, expected 'input' (the side of the "
        "activations that enter the layer) or 'output' (the paper's)."
    )


def check_integer(name: str, value: Any, least: int, where: str = "") -> Any:
    """`value` as an int of at least `least`; traced values pass unseen."""
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}{where}: got {value!r} of type {type(value).__name__}, expected "
            f"an integer of at least {least}."
        ) from None
    if number < least:
        raise ValueError(f"{name}{where}: got {number}, expected at least {least}.")
    return number


def check_number(
    name: str,
    value: Any,
    least: float,
    below: float | None = None,
    schedule: bool = False,
) -> Any:
    """`value`, if a real number in range; traced values pass unseen.

    So do schedules, where one is allowed.
    """
    if isinstance(value, jax.core.Tracer) or (schedule and callable(value)):
        return value
    bound = f"at least {least}" + ("" if below is None else f" and below {below}")
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {value!r}, expected a number {bound}.") from None
    if not (number >= least and (below is None or number < below)):
        raise ValueError(f"{name}: got {value!r}, expected a number {bound}.")
    return value


def check_dtype(name: str, value: Any) -> Any:
    """`value`, if None or a floating dtype of float32's range, which squares need."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = jnp.dtype(bool)
    floating = jnp.issubdtype(dtype, jnp.floating)
    if not floating or jnp.finfo(dtype).minexp > jnp.finfo(jnp.bfloat16).minexp:
        raise TypeError(
            f"{name}: got {value!r}, expected None or a floating dtype with the range "
            "of float32: what others hold is rounded to zero. Remedy: "
            f"{name}=jnp.bfloat16, as small as float16."
        )
    return value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word, as a question."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean '{near[0]}'?" if near else ""


def some(paths: Any) -> str:
    """The first few of many paths."""
    listed = list(paths)
    shown = ", ".join(f"'{p}'" for p in listed[:6])
    return shown + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
