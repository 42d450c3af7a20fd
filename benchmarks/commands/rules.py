"""What the parts of a rule do: time, transport, stability, controls."""

import functools
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import (
    ablation,
    compare,
    controls,
    records,
    report,
    report_campaign,
    report_rules,
    speed,
    stability,
    transport,
)
from benchmarks.campaign import RESULTS, learning_rate_for
from benchmarks.commands.shared import (
    DataDir,
    Json,
    OptimizerNames,
    Quick,
    Quiet,
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
)
from benchmarks.data import DataError
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS


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
        table = report_rules.speed_table(rows)
    else:
        chosen = lookup(WORKLOADS, workload, "WORKLOAD")
        against = lookup(CONTENDERS, baseline, "--baseline") if baseline else None
        contenders = several(CONTENDERS, optimizer, "--optimizer")
        with report.make_progress(console, quiet) as progress:
            task = progress.add_task(f"steps of {workload}", total=rounds)
            rows = speed.whole_steps(
                chosen, contenders, against, rounds, lambda: progress.advance(task)
            )
        table = report_campaign.steps_table(f"{workload}: whole steps", rows)
    save(json, {**records.environment(), "workload": workload, "rows": rows}, quiet)
    if not quiet:
        console.print(table)


def _fixed_figures(quiet: bool) -> list[speed.Row]:
    rows: list[speed.Row] = []
    with report.make_progress(console, quiet) as progress:
        task = progress.add_task("", total=len(speed.FIGURES))
        for name, (measure, rounds) in speed.FIGURES.items():
            progress.update(task, description=f"figure {name}")
            rows += measure(rounds)
            progress.advance(task)
    return rows


@app.command("transport")
def transport_command(
    seeds: Seeds = 10, json: Json = None, quiet: Quiet = False
) -> None:
    """Compare ways in which moments follow a turning basis, against an oracle."""
    with report.make_progress(console, quiet) as progress:
        task = progress.add_task("streams", total=seeds)
        rows = transport.compare(range(seeds), after=lambda: progress.advance(task))
    save(json, {**records.environment(), "rows": rows}, quiet)
    if not quiet:
        console.print(report_rules.transport_table(rows))


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
    """Compare training losses with the plain optimizers' at each of their rates."""
    chosen = lookup(WORKLOADS, workload, "WORKLOAD")
    ours = {name: c for name, c in CONTENDERS.items() if c.plain}
    contenders = several(ours, optimizer, "--optimizer")
    steps = steps or (chosen.quick_steps if quick else chosen.steps)
    with failures(), report.make_progress(console, quiet) as progress:
        data = chosen.load(data_dir)
        task = progress.add_task("runs", total=stability.count(contenders, seeds))
        rows = stability.compare(
            *(chosen, data, contenders, range(seeds), steps),
            lambda: progress.advance(task),
        )
    record = {**records.environment(), "workload": workload, "steps": steps}
    save(json, {**record, "rows": rows}, quiet)
    if not quiet:
        console.print(report_rules.stability_table(rows))


@app.command("controls")
def controls_command(
    workload: WorkloadName,
    of: Annotated[str, typer.Option(help="the rule; see `list`")] = "projected_muon",
    data_dir: DataDir = None,
    out: Records = RESULTS,
    hours: Annotated[float, typer.Option(min=0, help="start no run after")] = 1.0,
    seeds: Seeds = 3,
    quick: Quick = False,
    quiet: Quiet = False,
) -> None:
    """Train a rule with one part taken away at a time, at its own rate; resumable."""
    deadline = time.monotonic() + 3600 * hours
    chosen = lookup(WORKLOADS, workload, "WORKLOAD")
    known = {control.of: CONTENDERS[control.of] for control in controls.CONTROLS}
    rule = lookup(known, of, "--of")
    rate, _ = learning_rate_for(chosen, rule, out)
    plan = [
        (control, controls.orders(chosen, control, rate, seeds, quick))
        for control in controls.CONTROLS
        if control.of == of
    ]
    entries = compare.read_entries(chosen, out, [of])
    with failures(), report.make_progress(console, quiet) as progress:
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
        console.print(report_campaign.controls_table(f"{workload}: {of}", entries))


@app.command("ablation")
def ablation_command(
    workload: WorkloadNames = None,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="folder of records")] = ablation.RESULTS,
    hours: Annotated[float, typer.Option(min=0, help="start no cell after")] = 1.0,
    seeds: Seeds = 3,
    steps: Steps = None,
    quiet: Quiet = False,
) -> None:
    """Train each combination of the parts of a rule; resumable.

    Default workloads: digits_cnn, fashion_mnist_mlp, at their quick lengths.
    """
    deadline = time.monotonic() + 3600 * hours
    names = workload or list(ablation.USUAL)
    plans = [
        ablation.Plan(
            *(chosen, out / f"{chosen.name}.json", seeds),
            *(steps or chosen.quick_steps, deadline),
        )
        for chosen in several(WORKLOADS, names, "WORKLOAD")
    ]
    with failures(), report.make_progress(console, quiet) as progress:
        for plan in plans:
            name = plan.workload.name
            task = progress.add_task(name, total=plan.runs)
            advance = functools.partial(progress.advance, task)
            if not ablation.run(plan, plan.workload.load(data_dir), advance):
                break
    if not quiet:
        for plan in plans:
            console.print(report_rules.ablation_table(plan.workload.name, plan.found()))
