"""Large models and many devices: communication, coordinates, faults, estimates."""

import json as json_module
from pathlib import Path
from typing import Annotated

import jax
import typer

from benchmarks import (
    communication,
    constrained,
    coordinates,
    cost,
    distributed,
    estimate,
    faults,
    markdown,
    records,
    report,
    report_scale,
)
from benchmarks.campaign import RESULTS, learning_rate_for
from benchmarks.commands.shared import (
    DataDir,
    Json,
    OptimizerName,
    OptimizerNames,
    Quiet,
    WorkloadName,
    app,
    console,
    failures,
    lookup,
    save,
    several,
)
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS


@app.command("communication")
def communication_command(
    workload: WorkloadName = "shakespeare_gpt",
    devices: Annotated[int, typer.Option(min=2, help="that share the batch")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="of every basis")] = 16,
    route: Annotated[str, typer.Option(help="subspace, or whole")] = "subspace",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Count what a data-parallel step sends, by its compiled program; nothing runs."""
    chosen = lookup(WORKLOADS, workload, "WORKLOAD")
    lookup(communication.ROUTES, route, "--route")
    jax.config.update("jax_num_cpu_devices", devices)
    program = communication.compile_step(chosen, rank, route, devices)
    found = communication.account(*program)
    record = {**records.environment(), "workload": workload, "rank": rank}
    save(json, {**record, "devices": devices, "route": route, **found}, quiet)
    if not quiet:
        console.print(
            report_scale.communication_table(f"{workload}, {route} route", found)
        )


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
    """Compare gradients in coordinates with whole ones: time, memory, losses.

    Time and memory against `optax.adamw`, of dense layers on random numbers; memory
    also on the workload, and losses there against projecting whole gradients. Times
    mean most on one core: `taskset -c 0 python -m benchmarks coordinates`.
    """
    chosen = lookup(WORKLOADS, workload, "WORKLOAD")
    model = coordinates.Mlp(width, layers)
    with failures(), report.make_progress(console, quiet) as progress:
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
    save(json, {**record, "figures": figures, "times": times, "losses": losses}, quiet)
    if not quiet:
        for table in report_scale.coordinates_tables(workload, figures, times, losses):
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
    """Compare several processes with one, on the same global batches."""
    chosen = lookup(WORKLOADS, workload, "WORKLOAD")
    contender = lookup(CONTENDERS, optimizer, "--optimizer")
    rate, _ = learning_rate_for(chosen, contender, RESULTS)
    with failures():
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
    save(json, record, quiet)
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
    """Kill training at random moments and compare with a run that was not.

    Default optimizers: dsbp_muon, dsbp_adamw. The first is also put through torn
    checkpoints, a full disk and the loss of one process of two.
    """
    lookup(WORKLOADS, workload, "WORKLOAD")
    names = optimizer or ["dsbp_muon", "dsbp_adamw"]
    contenders = [lookup(CONTENDERS, name, "--optimizer") for name in names]
    where = None if data_dir is None else str(data_dir)
    orders = [
        faults.Order(workload, one.name, where, "", steps, every, one.default_rate)
        for one in contenders
    ]
    with failures(), report.make_progress(console, quiet) as progress:
        task = progress.add_task("kills", total=kills)
        found = faults.account(
            [order._replace(timeout=timeout) for order in orders],
            *(kills, seed, lanes, lambda: progress.advance(task)),
        )
    record = {**records.environment(), "workload": workload, "steps": steps}
    record |= {"every": every, "seed": seed, "timeout": timeout}
    record |= {"period": faults.PERIOD, "window": faults.WINDOW}
    save(json, {**record, **found}, quiet)
    if not quiet:
        for table in report_scale.faults_tables(f"{workload}: {steps} steps", found):
            console.print(table)
    if not found["passed"]:
        raise typer.Exit(1)


@app.command("constrained")
def constrained_command(
    size: Annotated[
        list[str] | None, typer.Option(help="small, wide; repeat it; default: both")
    ] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option("--optimizer", help="repeat it; default: all")
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="code, exported; default: both")
    ] = None,
    data_dir: DataDir = None,
    steps: Annotated[int, typer.Option(min=2, help="of each attempt")] = 20,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Find the smallest memory limit, on one core, under which each optimizer trains.

    Rows that the record of --json has are not made again.
    """
    sizes, ways = size or list(constrained.SIZES), way or list(constrained.WAYS)
    names = optimizer or list(constrained.ENTRANTS)
    for table, given, name in (
        (constrained.SIZES, sizes, "--size"),
        (constrained.ENTRANTS, names, "--optimizer"),
        (constrained.WAYS, ways, "--way"),
    ):
        several(table, given, name)
    record = {**records.environment(), "cap": constrained.CAP, "steps": steps}
    with failures(), report.make_progress(console, quiet) as progress:
        record |= constrained.resume(json, steps)
        task = progress.add_task(
            "optimizers", total=len(sizes) * len(names) * len(ways)
        )
        for one in sizes:
            found = constrained.measure(
                *(one, names, ways, data_dir, steps, record["rows"])
            )
            for row in found:
                record["rows"].append(row)
                save(json, record, True)
                progress.advance(task)
    if not quiet:
        console.print(report_scale.constrained_table("", record))


@app.command("cost")
def cost_command(
    figure: Annotated[
        list[str] | None, typer.Option(help="repeat it; default: all but caps")
    ] = None,
    caps: Annotated[bool, typer.Option("--caps", help="the smallest caps too")] = False,
    against: Annotated[
        Path | None, typer.Option(help="a checkout of another version, in turns")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="of each process")] = 3,
    width: Annotated[int, typer.Option(min=4, help="of the GPT")] = 128,
    blocks: Annotated[int, typer.Option(min=1, help="of the GPT")] = 4,
    wide: Annotated[int, typer.Option(min=1, help="of the update alone")] = 768,
    show: Annotated[
        Path | None, typer.Option("--report", help="Markdown of a record; runs nothing")
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure what a step costs to compile and run on a CPU, each figure on its own.

    With --against, the library of another checkout is measured beside this one.
    """
    if show is not None:
        with failures():
            table = report_scale.step_cost_table(records.read(show))
        console.print(markdown.of_rich(table), soft_wrap=True, highlight=False)
        return
    chosen = figure or [name for name in cost.FIGURES if name != "caps"]
    chosen = list(dict.fromkeys([*chosen, *(["caps"] if caps else [])]))
    several(cost.FIGURES, chosen, "--figure")
    roots = {"here": cost.HERE}
    if against is not None:
        roots = {"against": against.resolve(), **roots}
    sizes = {"width": width, "blocks": blocks}
    record = {**records.environment(), **sizes, "wide": wide, "repeats": repeats}
    record["libraries"] = {name: records.git(root) for name, root in roots.items()}
    record["rows"] = []
    with report.make_progress(console, quiet) as progress:
        for name in progress.track(chosen, description="figures"):
            record["rows"] += cost.measure(name, roots, repeats, sizes, wide)
            save(json, record, True)
    if not quiet:
        console.print(report_scale.step_cost_table(record))


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
    """Estimate state, FLOPs, traffic and time of a step of a large model."""
    chosen = model or list(estimate.MODELS)
    for name in chosen:
        lookup(estimate.MODELS, name, "--model")
    machine = estimate.Machine(devices, flops, memory, network)
    text = estimate.document(chosen, machine, rank, tokens)
    if write is None:
        console.print(text, markup=False, soft_wrap=True, highlight=False)
        return
    write.write_text(text)
    report.written(console, [write])
