"""What the parts of a rule are worth: the rule against itself without one of them."""

import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import cli, controls
from benchmarks.core import campaign, records
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Order, Program, build, carry_out, key_of
from benchmarks.optimizers import CONTENDERS
from benchmarks.report import tables
from benchmarks.report.entries import entries
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import DataError, Workload


def file_of(out: Path, workload: Workload) -> Path:
    """Of the controls on one workload."""
    return out / "controls" / f"{workload.name}.jsonl"


def known(out: Path, workload: Workload, rule: str) -> list[Record]:
    """Final runs of a rule and of its controls."""
    found = records.read(file_of(out, workload))
    own = campaign.finals(workload, CONTENDERS[rule], out)
    return own + [one for one in found if one["optimizer"].startswith(f"{rule}, ")]


@cli.app.command("controls")
def command(
    workload: cli.WorkloadName,
    of: Annotated[str, typer.Option(help="the rule; see `list`")] = "projected_muon",
    data_dir: cli.DataDir = None,
    out: cli.Out = RESULTS,
    hours: cli.Hours = 1.0,
    seeds: cli.Seeds = 3,
    quick: cli.Quick = False,
    quiet: cli.Quiet = False,
) -> None:
    """A rule with one part taken away at a time, at its own rate; can be continued."""
    deadline = time.monotonic() + 3600 * hours
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    mine = [control for control in controls.CONTROLS if control.of == of]
    cli.lookup({control.of: control for control in controls.CONTROLS}, of, "--of")
    rate, _ = campaign.rate_for(chosen, CONTENDERS[of], out)
    steps = chosen.quick_steps if quick else chosen.steps
    file = file_of(out, chosen)
    with cli.bars(quiet) as progress:
        if not campaign.finals(chosen, CONTENDERS[of], out):
            raise DataError(
                f"{out}: got no final record of {of} on {workload}, expected those of "
                f"the rule itself. Remedy: campaign {workload} --optimizer {of} first."
            )
        data, advance = chosen.load(data_dir), cli.bar(progress, of, seeds * len(mine))
        for control in mine:
            program: Program | None = None
            name = control.contender.name
            made = {key_of(one) for one in records.read(file, optimizer=name)}
            for seed in range(seeds):
                source = f"that of {of}"
                order = Order("final", rate, seed, steps, quick, source=source)
                if order.key not in made and time.monotonic() < deadline:
                    program = program or build(chosen, control.contender)
                    record, _ = carry_out(program, data, order)
                    records.append(file, "controls", [record])
                advance()
    found = entries(chosen.metric, known(out, chosen, of))
    cli.show(quiet, (f"{workload}: {of} and its controls", tables.controls(found)))
