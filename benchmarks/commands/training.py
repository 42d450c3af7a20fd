"""Train: the demo, single runs, campaigns and what they gave."""

import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import (
    compare,
    records,
    report,
    results_page,
    workers,
)
from benchmarks.campaign import RESULTS, Lane, Runner, remaining
from benchmarks.commands.shared import (
    DEMO,
    RUNS,
    USUAL,
    DataDir,
    Json,
    Limit,
    OptimizerName,
    OptimizerNames,
    Quick,
    Quiet,
    Rate,
    Records,
    Seeds,
    Steps,
    WorkloadName,
    WorkloadNames,
    app,
    console,
    failures,
    lookup,
    save,
    several,
    show,
    train_finals,
)
from benchmarks.optimizers import CONTENDERS
from benchmarks.plots import plot_comparison
from benchmarks.workloads import WORKLOADS


@app.command()
def demo(
    seeds: Seeds = 3,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help="folder of the record and plot")] = RUNS,
    quiet: Quiet = False,
) -> None:
    """Train eight optimizers on the digits: tables, a plot and a record in `runs/`."""
    workload = WORKLOADS["digits_cnn"]
    with failures():
        data = workload.load(None)
        found = [
            record
            for name in DEMO
            for record in train_finals(workload, name, data, seeds, steps, quiet=quiet)
        ]
    files = [out / "demo.json", out / "demo.png"]
    records.write(files[0], {"records": found})
    entries = compare.entries(workload, found)
    title = f"{workload.name}: {found[0]['steps']} steps, {seeds} seed(s)"
    plot_comparison(entries, title, files[1])
    if not quiet:
        show(title, entries)
        report.written(console, files)


@app.command()
def run(
    workload: WorkloadName,
    optimizer: OptimizerName = "dsbp_sgd",
    data_dir: DataDir = None,
    steps: Steps = None,
    seeds: Seeds = 1,
    json: Json = None,
    learning_rate: Rate = None,
    limit: Limit = None,
    quick: Quick = False,
    tuned: Records = RESULTS,
    quiet: Quiet = False,
) -> None:
    """Train one optimizer on one workload, judged on its test samples."""
    chosen = lookup(WORKLOADS, workload, "WORKLOAD")
    lookup(CONTENDERS, optimizer, "--optimizer")
    with failures():
        data = chosen.load(data_dir).limited(limit)
        found = train_finals(
            *(chosen, optimizer, data, seeds, steps, learning_rate, quick, tuned),
            quiet=quiet,
        )
    save(json, {"records": found}, quiet)
    if not quiet:
        show(f"{workload}: {found[0]['steps']} steps", compare.entries(chosen, found))


@app.command()
def campaign(
    workload: WorkloadNames = None,
    optimizer: OptimizerNames = None,
    data_dir: DataDir = None,
    out: Records = RESULTS,
    hours: Annotated[float, typer.Option(min=0, help="start no run after")] = 1.0,
    seeds: Seeds = 3,
    quick: Quick = False,
    worker_count: Annotated[
        int, typer.Option("--workers", min=1, help="processes, one core each")
    ] = 1,
    quiet: Quiet = False,
) -> None:
    """Tune on validation samples, then train from fresh seeds; resumable."""
    deadline = time.monotonic() + 3600 * hours
    lanes = [
        Lane(out, chosen, contender, seeds, quick)
        for chosen in several(WORKLOADS, workload or USUAL, "WORKLOAD")
        for contender in several(CONTENDERS, optimizer, "--optimizer")
    ]
    failed: list[str] = []
    with failures(), report.make_progress(console, quiet) as progress:
        if worker_count > 1:
            failed = workers.run_lanes(
                lanes, worker_count, data_dir, deadline, progress
            )
        else:
            runner = Runner(data_dir, deadline, progress)
            for lane in lanes:
                if not runner.run(lane):
                    break
    if not quiet:
        for line in remaining(lanes) or ["all done"]:
            console.print(line, soft_wrap=True)
    if failed:
        typer.echo(f"error: failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


@app.command("report")
def report_command(
    workload: WorkloadNames = None,
    optimizer: OptimizerNames = None,
    out: Records = RESULTS,
    plots: Annotated[Path, typer.Option(help="folder of the PNG files")] = RUNS,
) -> None:
    """Write tables and a picture for each workload that has final records."""
    names = [c.name for c in several(CONTENDERS, optimizer, "--optimizer")]
    for chosen in several(WORKLOADS, workload or USUAL, "WORKLOAD"):
        with failures():
            entries = compare.read_entries(chosen, out, names)
        if not entries:
            console.print(f"{chosen.name}: no final records in {out}", soft_wrap=True)
            continue
        first = entries[0].records[0]
        title = f"{chosen.name}: {first['steps']} steps, batch {first['batch_size']}"
        path = plots / f"{chosen.name}.png"
        plot_comparison(entries, f"{title} (bands and bars: range over seeds)", path)
        show(title, entries)
        report.written(console, [path])


@app.command("results")
def results_command(
    records_in: Annotated[
        Path, typer.Option("--records", help="folder of all records")
    ] = results_page.RESULTS,
    write: Annotated[
        Path, typer.Option(help="the page; its picture lies beside it")
    ] = results_page.PAGE,
) -> None:
    """Write RESULTS.md and its pictures from the records alone."""
    with failures():
        report.written(console, results_page.write(write, records_in))


@app.command("list")
def list_command() -> None:
    """List workloads and optimizers, one line each."""
    report.list_names(console)
