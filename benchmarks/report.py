"""Tables for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmarks.experiment import Result
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS


def make_progress(console: Console, quiet: bool) -> Progress:
    """A live bar: what runs now, how far, how long, how long still."""
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet,
    )


def spread(values: np.ndarray) -> str:
    """Percent, mean +- standard deviation."""
    text = f"{100 * values.mean():.1f}"
    if len(values) > 1:
        text += f" ± {100 * values.std(ddof=1):.1f}"
    return text


def results_table(title: str, results: Sequence[Result]) -> Table:
    """One row a contender, in the order given."""
    table = _table(title)
    table.add_column("optimizer", no_wrap=True)
    for heading in (
        "rate",
        "test acc. %",
        "loss",
        "step ms",
        "refresh ms",
        "compile s",
        "state B",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        losses = [run.train_loss[-1] for run in result.runs]
        diverged = any(run.diverged for run in result.runs)
        table.add_row(
            result.name,
            f"{result.program.learning_rate:g}",
            spread(result.final_accuracies()),
            "diverged" if diverged else f"{np.mean(losses):.4f}",
            _milliseconds(result.step_median(False)),
            _milliseconds(result.step_median(True)),
            f"{result.program.compile_seconds:.1f}",
            f"{result.program.state_bytes:,}",
        )
    return table


def tuning_table(title: str, rows: Sequence[Mapping[str, Any]], share: float) -> Table:
    """One row a learning rate.

    Args:
      title: above the table.
      rows: as `tune.run_grid` gives them.
      share: of the training set that was held out.
    """
    table = _table(title)
    table.add_column("learning rate", justify="right")
    table.add_column(f"accuracy % on {share:.0%} held out", justify="right")
    table.add_column("final loss", justify="right")
    best = max(row["accuracy_mean"] for row in rows)
    for row in rows:
        mark = " *" if row["accuracy_mean"] == best else ""
        table.add_row(
            f"{row['learning_rate']:g}",
            spread(np.asarray(row["accuracies"])) + mark,
            "diverged" if row["diverged"] else f"{row['final_loss']:.4f}",
        )
    return table


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a comparison of `benchmarks.speed`."""
    table = _table("Speed: times are medians, ratios have a 95 % bootstrap interval")
    table.add_column("figure", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    table.add_column("against", no_wrap=True)
    for heading in ("ms", "vs ms", "ratio", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
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


def list_names(console: Console) -> None:
    """Workloads and optimizers, one line each."""
    for heading, table in (("workloads", WORKLOADS), ("optimizers", CONTENDERS)):
        console.print(heading, style="bold")
        for name, entry in table.items():
            console.print(f"  {name:18} {entry.summary}", soft_wrap=True)


def written(console: Console, paths: Sequence[Path]) -> None:
    """Say which files were written."""
    for path in paths:
        console.print(f"wrote {path}", style="dim", soft_wrap=True)


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"
