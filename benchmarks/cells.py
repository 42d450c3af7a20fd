"""Pieces of tables for people: headings, means with their spread, differences."""

from collections.abc import Mapping

import numpy as np
from rich import box
from rich.table import Table

from benchmarks import compare
from benchmarks.compare import Entry


def table(title: str, first: str = "optimizer") -> Table:
    """A table that prints well; its first column names the rows."""
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column(first, no_wrap=True)
    return table


def columns(table: Table, *headings: str) -> None:
    """Further columns, of numbers."""
    for heading in headings:
        table.add_column(heading, justify="right")


def spread(entry: Entry) -> str:
    """Mean, and standard deviation where there are several seeds."""
    metric, finals = entry.metric, list(entry.finals.values())
    text = metric.show(entry.mean)
    if len(finals) > 1:
        text += f" ± {metric.show(float(np.std(finals, ddof=1)))}"
    return text


def difference(entry: Entry, peer: Entry | None) -> str:
    """Mean difference paired by seed, with its 95 % interval."""
    if peer is None or entry is peer:
        return "-"
    gap = compare.difference(entry, peer)
    if gap is None:
        return "-"
    mean, low, high = (entry.metric.factor * x for x in gap)
    digits = entry.metric.digits
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def interval(ratio: Mapping[str, float] | None) -> str:
    """A ratio and its interval."""
    if ratio is None:
        return "-"
    return f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(factor * value, form)
