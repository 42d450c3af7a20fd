"""Tables for people."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from benchmarks.data.packages import ELSEWHERE, PACKAGES, Packaged
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS


def make_progress(console: Console, quiet: bool) -> Progress:
    """A live bar: what runs now, how far, how long, how long still."""
    return _progress(console, quiet, MofNCompleteColumn(), TimeElapsedColumn())


def make_download_progress(console: Console, quiet: bool) -> Progress:
    """A live bar of bytes."""
    return _progress(console, quiet, DownloadColumn(), TransferSpeedColumn())


def _progress(console: Console, quiet: bool, *columns: ProgressColumn) -> Progress:
    """A bar between what it is of and the time that remains."""
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=quiet,
    )


def list_data(console: Console, data_dir: Path) -> None:
    """Data sets: what each is, where from, and whether it is there."""
    console.print(f"data sets; * is in {data_dir}", style="bold", soft_wrap=True)
    for name, source in PACKAGES.items():
        packed = isinstance(source, Packaged)
        origin = source.archive.registry if packed else "a system package"
        mark = "*" if (data_dir / name).is_dir() else " "
        console.print(f"{mark} {name:15} {source.summary} ({origin})", soft_wrap=True)
    console.print("in no package registry", style="bold")
    for name, words in ELSEWHERE.items():
        console.print(f"  {name:15} {words}", soft_wrap=True)


def list_names(console: Console) -> None:
    """Workloads and optimizers, one line each."""
    for heading, table in (("workloads", WORKLOADS), ("optimizers", CONTENDERS)):
        console.print(heading, style="bold")
        for name, entry in table.items():
            console.print(f"  {name:21} {entry.summary}", soft_wrap=True)


def written(console: Console, paths: Sequence[Path]) -> None:
    """Say which files were written."""
    for path in paths:
        console.print(f"wrote {path}", style="dim", soft_wrap=True)
