"""What was found: flat minima, robust ones."""

import time
from typing import Annotated

import typer

from benchmarks import minima, report, report_minima
from benchmarks.campaign import RESULTS
from benchmarks.commands.shared import (
    DataDir,
    OptimizerNames,
    Quick,
    Quiet,
    Rate,
    Records,
    Steps,
    WorkloadName,
    app,
    console,
    entrants,
    failures,
    lookup,
)


@app.command("minima")
def minima_command(
    workload: WorkloadName,
    optimizer: OptimizerNames = None,
    looks: Annotated[
        list[str] | None,
        typer.Option(
            "--look", help="repeat it; curvature, attacks, corruptions, bound"
        ),
    ] = None,
    learning_rate: Rate = None,
    rho: Annotated[
        float | None, typer.Option(min=0, help="radius, of those that have one")
    ] = None,
    data_dir: DataDir = None,
    steps: Steps = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each")] = 3,
    first: Annotated[int, typer.Option(min=0, help="their first seed")] = 0,
    hours: Annotated[float, typer.Option(min=0, help="start no run after")] = 1.0,
    out: Records = minima.RESULTS,
    quick: Quick = False,
    tuned: Records = RESULTS,
    quiet: Quiet = False,
) -> None:
    """Train, then measure curvature, robustness and bounds at the end; resumable."""
    deadline = time.monotonic() + 3600 * hours
    chosen, entered = entrants(workload, optimizer, steps, quick, tuned, learning_rate)
    for name in looks or ():
        lookup(minima.LOOKS, name, "--look")
    plans = [
        minima.Plan(
            *(chosen, minima.with_radius(contender, rho)),
            *(order, range(first, first + seeds), looks or ()),
        )
        for contender, order in entered
    ]
    with failures(), report.make_progress(console, quiet) as progress:
        data = chosen.load(data_dir)
        task = progress.add_task("runs", total=seeds * len(plans))
        minima.carry_out(plans, out, data, deadline, lambda: progress.advance(task))
    if not quiet:
        for table in report_minima.tables(f"{workload}: ", minima.made(plans, out)):
            console.print(table)
