"""Sections of the page of results: one for each record that stands alone."""

from collections.abc import Callable

from rich.table import Table

from benchmarks import (
    generic,
    markdown,
    report_campaign,
    report_rules,
    report_scale,
)
from benchmarks.found import Found, Record, Section
from benchmarks.markdown import Provenance


def _rows_with(*keys: str) -> Callable[[Record], bool]:
    def matches(record: Record) -> bool:
        rows = record.get("rows") or ()
        return bool(rows) and all(key in row for row in rows for key in keys)

    return matches


#: What tells a kind of record, its heading, and its table; the first match counts.
_KINDS: tuple[tuple[Callable[[Record], bool], str, Callable[[Record], Table]], ...] = (
    (
        _rows_with("figure", "seconds_against", "ratio"),
        "Speed, fixed figures",
        lambda record: report_rules.speed_table(record["rows"]),
    ),
    (
        _rows_with("dearest", "step_seconds", "compile_seconds"),
        "Steps in turns",
        lambda record: report_campaign.steps_table("", record["rows"]),
    ),
    (
        _rows_with("losses_against", "skipped"),
        "Stability: final training loss against the plain optimizer's",
        lambda record: report_rules.stability_table(record["rows"]),
    ),
    (
        _rows_with("rule", "ratios", "ratio_to_oracle"),
        "Transport: mean loss over the second half of a stream that turns",
        lambda record: report_rules.transport_table(record["rows"]),
    ),
    (
        lambda record: {"coordinates", "others", "refresh", "share"} <= record.keys(),
        "Communication: numbers sent in a step",
        lambda record: report_scale.communication_table("", record),
    ),
    (
        _rows_with("cap_mib", "way", "artifact_bytes"),
        "One core and little memory: the smallest cap that trains",
        lambda record: report_scale.constrained_table("", record),
    ),
)


def file_section(one: Found, origin: Provenance) -> Section:
    """A record of its own: by its kind, else by its shape."""
    kind = next((kind for kind in _KINDS if kind[0](one.record)), None)
    if kind is None:
        parts = [f"## `{_name(one)}`", generic.tables(one.record)]
    else:
        _, heading, make = kind
        table = markdown.of_rich(make(one.record))
        parts = [f"## {heading} (`{_name(one)}`)", *_about(one), table]
    return Section("\n\n".join([*parts, origin.line(one.runs)]), frozenset({one.path}))


def _name(one: Found) -> str:
    return one.path.with_suffix("").as_posix()


def _about(one: Found) -> list[str]:
    """Single values beside the table."""
    plain = {
        key: value
        for key, value in one.record.items()
        if isinstance(value, str | int | float) and key not in ("date", "share")
    }
    words = "; ".join(f"{key} {generic.cell(value)}" for key, value in plain.items())
    return [f"{words}."] if words else []
