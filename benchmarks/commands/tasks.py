"""Learn from few drawings."""

import functools
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import fewshot, report, results_fewshot
from benchmarks.commands.shared import (
    DataDir,
    Quiet,
    Seeds,
    app,
    console,
    failures,
    several,
)
from benchmarks.learners import LEARNERS


@app.command("fewshot")
def fewshot_command(
    learner: Annotated[
        list[str] | None, typer.Option("--learner", help="repeat it; default: all")
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="folder of the records")] = fewshot.RESULTS,
    hours: Annotated[float, typer.Option(min=0, help="start no run after")] = 1.0,
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=3, help="outer steps")] = fewshot.STEPS,
    quiet: Quiet = False,
) -> None:
    """MAML and its like on 5-way episodes of Omniglot-small; can be continued."""
    deadline = time.monotonic() + 3600 * hours
    chosen = several(LEARNERS, learner, "--learner")
    load = functools.cache(lambda: fewshot.load(data_dir))
    with failures(), report.make_progress(console, quiet) as progress:
        task = progress.add_task("runs", total=None)
        for lane in fewshot.lanes(chosen, out, seeds, steps):
            progress.update(task, description=lane.name)
            advance = functools.partial(progress.advance, task)
            if not fewshot.carry_on(lane, load, deadline, advance):
                break
    if not quiet:
        for shots in fewshot.SHOTS:
            found = fewshot.entries(fewshot.read(out, shots))
            if found:
                console.print(
                    results_fewshot.fewshot_table(f"5-way, {shots} shot(s)", found)
                )
