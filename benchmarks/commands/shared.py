"""What all commands share: the application, its options, and how they fail."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from benchmarks import (
    records,
    report,
    report_campaign,
)
from benchmarks.campaign import RESULTS, learning_rate_for
from benchmarks.compare import Entry
from benchmarks.data import Data, DataError
from benchmarks.experiment import Order, Record, carry_out
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.train import build
from benchmarks.workloads import WORKLOADS, Workload

app = typer.Typer(
    help="Benchmarks of dsbp_optax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()

RUNS, DATA = Path("runs"), Path("data")
DEMO = (
    *("dsbp", "dsbp_sgd", "dsbp_adamw", "dsbp_muon"),
    *("sgd", "adamw", "galore", "muon"),
)
USUAL = [name for name, entry in WORKLOADS.items() if not entry.heavy]
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


def entrants(
    workload: str,
    optimizer: list[str] | None,
    steps: int | None,
    quick: bool,
    tuned: Path,
    rate: float | None = None,
) -> tuple[Workload, list[tuple[Contender, Order]]]:
    """The workload, and each contender with the rate and length of its runs."""
    chosen = lookup(WORKLOADS, workload, "WORKLOAD")
    steps = steps or (chosen.quick_steps if quick else chosen.steps)
    found = []
    for contender in several(CONTENDERS, optimizer, "--optimizer"):
        used, source = rate, "given"
        if used is None:
            used, source = learning_rate_for(chosen, contender, tuned)
        order = Order("final", used, 0, steps, quick, source=source)
        found.append((contender, order))
    return chosen, found


def train_finals(
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
def failures() -> Iterator[None]:
    """What is wrong with the data ends the command with one line, not a trace."""
    try:
        yield
    except DataError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def lookup(table: Mapping[str, _Entry], name: str, argument: str) -> _Entry:
    """The entry of that name, or an error that lists them all."""
    if name not in table:
        raise typer.BadParameter(
            f"got '{name}', expected one of {', '.join(table)}.", param_hint=argument
        )
    return table[name]


def several(
    table: Mapping[str, _Entry], names: Sequence[str] | None, argument: str
) -> list[_Entry]:
    """Entries by name; all of them without names."""
    return [lookup(table, name, argument) for name in names or table]


def save(path: Path | None, record: dict[str, Any], quiet: bool) -> None:
    """Write a record where one is asked for."""
    if path is None:
        return
    records.write(path, record)
    if not quiet:
        report.written(console, [path])


def show(title: str, entries: list[Entry]) -> None:
    """All tables, and where the learning rates come from."""
    console.print(report_campaign.results_table(title, entries))
    console.print(report_campaign.cost_table(title, entries))
    timed = report_campaign.time_table(title, entries)
    if timed is not None:
        console.print(timed)
    for entry in entries:
        source = entry.records[0]["learning_rate_source"]
        rate = entry.records[0]["learning_rate"]
        console.print(f"{entry.name}: learning rate {rate:g}, {source}", style="dim")
