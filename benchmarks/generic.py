"""Tables of any record, by its shape: no kind of record needs code to be shown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import markdown

_APART = {
    *("date", "machine", "versions", "git", "hyperparameters", "schedule"),
    *("projected_state_counts", "learning_rate_grid"),
}
_MOST_SHOWN = 12
_GIVEN = (str | bool, str | bool | int)

Row = dict[str, str]


def tables(record: Mapping[str, Any]) -> str:
    """Everything a record holds but its provenance.

    Lists of mappings, and mappings of them, become tables of their own; so do runs
    that differ by seed alone, as mean and standard deviation. Lists of numbers become
    mean and range.
    """
    plain: dict[str, Any] = {}
    parts = []
    for key, value in record.items():
        rows = _rows(value)
        if key in _APART:
            continue
        if rows:
            parts.append((key, _table(rows)))
        else:
            plain |= _flat(value, key) if isinstance(value, Mapping) else {key: value}
    shown = [(key, text) for key, value in plain.items() if (text := cell(value))]
    texts = [markdown.table(("what", "value"), shown)] if shown else []
    texts += [f"{key}:\n\n{text}" if len(parts) > 1 else text for key, text in parts]
    return "\n\n".join(texts)


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return _interval(value)
    if all(isinstance(item, int | float | None) for item in value):
        return _numbers(value)
    if any(isinstance(item, Mapping | list) for item in value):
        return f"{len(value)} entries"
    words = [str(item) for item in value]
    return ", ".join(words[:_MOST_SHOWN]) + ", ..." * (len(words) > _MOST_SHOWN)


def _numbers(values: Sequence[float | None]) -> str:
    """Few as they are; many as mean and range."""
    known = [value for value in values if value is not None]
    if len(values) <= 3 or not known:
        return ", ".join(cell(value) for value in values) or "none"
    lost = f", {len(values) - len(known)} not finite" * (len(known) < len(values))
    low, high = cell(min(known)), cell(max(known))
    return f"{np.mean(known):.4g} ({low} to {high}, {len(values)} numbers{lost})"


def _interval(value: Mapping[str, Any]) -> str:
    if {"value", "low", "high"} <= value.keys():
        value_, low, high = (cell(value[key]) for key in ("value", "low", "high"))
        return f"{value_} [{low}, {high}]"
    return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or "none"


def _rows(value: Any) -> list[dict[str, Any]]:
    """Rows, where a value is a list of mappings or a mapping of mappings."""
    if isinstance(value, Mapping) and value:
        items = value.values()
        if all(isinstance(item, Mapping) for item in items):
            return [{"name": key, **_flat(item)} for key, item in value.items()]
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return [_flat(item) for item in value]
    return []


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings become columns; an interval stays one."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}, {key}" if prefix else key
        nested = isinstance(value, Mapping) and "value" not in value
        if key in _APART:
            continue
        if nested:
            found |= _flat(value, name)
        else:
            found[name] = value
    return found


def _table(rows: Sequence[dict[str, Any]]) -> str:
    rows = _over_seeds(rows) if all("seed" in row for row in rows) else rows
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [{n: cell(row[n]) if n in row else "" for n in names} for row in rows]
    same = [n for n in names if len(rows) > 2 and len({t[n] for t in texts}) == 1]
    shown = [name for name in names if name not in same] or names
    text = markdown.table(shown, [[row[name] for name in shown] for row in texts])
    if not same or shown == names:
        return text
    words = "; ".join(f"{name} {texts[0][name]}" for name in same)
    return f"{text}\n\nIn all rows: {words}."


def _over_seeds(
    rows: Sequence[dict[str, Any]], kinds: Sequence[Any] = _GIVEN
) -> list[dict[str, Any]]:
    """One row for all seeds of what is otherwise alike but for measured numbers.

    Whole numbers count as measured, unless a seed would come twice then.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike = {k: v for k, v in row.items() if k != "seed" and _given(k, v, kinds[0])}
        groups.setdefault(tuple(alike.items()), []).append(row)
    found: list[dict[str, Any]] = []
    for group in groups.values():
        if len({row["seed"] for row in group}) == len(group):
            found.append(_merged(group))
        elif len(kinds) > 1:
            found += _over_seeds(group, kinds[1:])
        else:
            found += [_merged([row]) for row in group]
    return found


def _given(name: str, value: Any, kind: Any = _GIVEN[0]) -> bool:
    """Whether a value was asked for, not measured."""
    return name in ("learning_rate", "steps") or isinstance(value, kind)


def _merged(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in group for name in row):
        values = [row[name] for row in group if name in row]
        if name == "seed":
            merged["seeds"] = markdown.seeds(group)
        elif len(group) == 1 or _given(name, values[0]):
            merged[name] = values[0]
        else:
            merged[name] = _spread(values)
    return merged


def _spread(values: Sequence[Any]) -> str:
    """Mean and standard deviation of numbers; else how many there are."""
    if not all(isinstance(value, int | float | None) for value in values):
        return f"{len(values)} entries"
    known = [value for value in values if value is not None]
    lost = f", {len(values) - len(known)} not finite" * (len(known) < len(values))
    if len(set(known)) > 1:
        return f"{np.mean(known):.5g} ± {np.std(known, ddof=1):.2g}{lost}"
    return (cell(known[0]) if known else "-") + lost
