"""Tables of what tells rules apart: ablation, speed, transport, stability."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import cells
from benchmarks.effects import Effect


def effects_table(
    title: str, found: Mapping[str, tuple[Sequence[Effect], Sequence[Effect]]]
) -> Table:
    """One row an effect; of each workload, on test error and training loss."""
    table = cells.table(title, "effect")
    for workload in found:
        cells.columns(table, f"{workload}: error times", f"{workload}: loss times")
    columns = [effects for pair in found.values() for effects in pair]
    for row in zip(*columns, strict=True):
        table.add_row(row[0].name, *map(_factor, row))
    return table


def _factor(effect: Effect) -> str:
    """Of an effect in decades."""
    value, low, high = (10**x for x in (effect.value, effect.low, effect.high))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def ablation_table(title: str, grid: Sequence[Mapping[str, Any]]) -> Table:
    """One row a cell of `benchmarks.ablation`; means over the runs that ended."""
    table = cells.table(title, "outside")
    for heading in ("filter", "side", "sharpness"):
        table.add_column(heading)
    cells.columns(
        table, "rank", "period", "rate", "test accuracy, %", "train loss", "lost"
    )
    for cell in grid:
        ended = [100 * value for value in cell["accuracy"] if value is not None]
        losses = [value for value in cell["train_loss"] if value is not None]
        spread = f" ± {np.std(ended, ddof=1):.2f}" if len(ended) > 1 else ""
        table.add_row(
            *(cell[key] for key in ("outside", "filter", "side", "sharpness")),
            *(f"{cell[key]:g}" for key in ("rank", "period", "rate")),
            f"{np.mean(ended):.2f}{spread}" if ended else "-",
            _loss(np.mean(losses)) if losses else "-",
            f"{cell['accuracy'].count(None)}",
        )
    return table


def _loss(value: float) -> str:
    return f"{value:.4f}" if value < _EXPLODED else f"{value:.0e}"


#: A mean loss above this has a run in it that went astray.
_EXPLODED = 1e3


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a comparison of `benchmarks.speed`."""
    table = cells.table(
        "Speed: times are medians, ratios have a 95 % bootstrap interval", "figure"
    )
    for heading in ("contender", "against"):
        table.add_column(heading, no_wrap=True)
    cells.columns(table, "ms", "vs ms", "ratio", "95 % interval")
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["figure"],
            row["contender"],
            row["against"],
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['seconds_against']:.2f}",
            f"{ratio['value']:.2f}",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}",
        )
    return table


def transport_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a rule of `benchmarks.transport`."""
    table = cells.table(
        "Mean loss over the second half of a stream that turns", "moments"
    )
    cells.columns(table, "mean loss", "against the oracle", "range over seeds")
    for row in rows:
        low, high = min(row["ratios"]), max(row["ratios"])
        table.add_row(
            row["rule"],
            f"{row['mean']:.3f}",
            f"{row['ratio_to_oracle']:.3f}",
            f"{low:.3f}-{high:.3f}",
        )
    return table


def stability_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a rate of `benchmarks.stability`."""
    table = cells.table("Stability: final training loss against the plain optimizer's")
    cells.columns(
        table, "against", "rate", "loss", "loss against", "ratio", "95 % interval"
    )
    cells.columns(table, "not finite", "against", "skipped")
    for row in rows:
        ratio = row["ratio"] or {}
        table.add_row(
            row["contender"],
            row["against"],
            f"{row['learning_rate']:g}",
            *(_mean_loss(row[key]) for key in ("losses", "losses_against")),
            cells.number(ratio.get("value"), ".2f"),
            f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "-",
            *(str(row[key]) for key in ("diverged", "diverged_against", "skipped")),
        )
    return table


def _mean_loss(losses: Sequence[float | None]) -> str:
    """Records have null for what is not finite."""
    return f"{np.mean([np.inf if loss is None else loss for loss in losses]):.4f}"
