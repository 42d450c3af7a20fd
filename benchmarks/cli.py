"""The command line: demo, run, tune, list, speed."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from benchmarks import records, report, speed, tune
from benchmarks.data import DataError, Split
from benchmarks.experiment import Result, Settings, run_experiment, to_record
from benchmarks.optimizers import CONTENDERS
from benchmarks.plots import plot_curves, plot_memory
from benchmarks.workloads import WORKLOADS, Workload

app = typer.Typer(
    help="Benchmarks of dsbp_optax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()

_RUNS = Path("runs")
_Entry = TypeVar("_Entry")

WorkloadName = Annotated[str, typer.Argument(help="see `list`")]
OptimizerName = Annotated[str, typer.Option("--optimizer", help="see `list`")]
DataDir = Annotated[Path | None, typer.Option(help="folder of the data files")]
Epochs = Annotated[int | None, typer.Option(min=1, help="default: the workload's")]
Seeds = Annotated[int, typer.Option(min=1, help="runs, from seed 0 upwards")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="default: the workload's")]
Rate = Annotated[float | None, typer.Option(min=0, help="default: the tuned one")]
Limit = Annotated[int | None, typer.Option(min=1, help="train on the first N samples")]
Json = Annotated[Path | None, typer.Option("--json", help="write a record here")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar, no table")]


@app.command()
def demo(
    seeds: Seeds = 3,
    epochs: Epochs = None,
    out: Annotated[Path, typer.Option(help="folder of the record and plots")] = _RUNS,
    quiet: Quiet = False,
) -> None:
    """All optimizers on the embedded digits: table, plots and record in `runs/`."""
    workload = WORKLOADS["digits_cnn"]
    settings = _settings(workload, epochs, seeds)
    split = workload.load(None)
    results = _train(workload, list(CONTENDERS), split, settings, quiet)
    files = [out / f"demo{end}" for end in (".json", "-curves.png", "-memory.png")]
    records.write(files[0], to_record(workload, settings, split, results))
    title = (
        f"{workload.name}: {settings.epochs} epochs, batch {settings.batch_size}, "
        f"{seeds} seed{'s' * (seeds > 1)}"
    )
    plot_curves(results, f"{title} (band: range over seeds)", files[1])
    plot_memory(results, f"{title} (bar: range over seeds)", files[2])
    if not quiet:
        _show(title, results)
        report.written(console, files)


@app.command()
def run(
    workload: WorkloadName,
    optimizer: OptimizerName = "dsbp_sgd",
    data_dir: DataDir = None,
    epochs: Epochs = None,
    seeds: Seeds = 1,
    json: Json = None,
    batch_size: BatchSize = None,
    learning_rate: Rate = None,
    limit: Limit = None,
    quiet: Quiet = False,
) -> None:
    """Train one optimizer on one workload."""
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    _lookup(CONTENDERS, optimizer, "--optimizer")
    settings = _settings(chosen, epochs, seeds, batch_size, learning_rate, limit)
    split = _load(chosen, data_dir)
    results = _train(chosen, [optimizer], split, settings, quiet)
    _save(json, to_record(chosen, settings, split, results), quiet)
    if not quiet:
        _show(f"{workload}: {settings.epochs} epochs", results)


@app.command("tune")
def tune_command(
    workload: WorkloadName,
    optimizer: OptimizerName = "dsbp_sgd",
    data_dir: DataDir = None,
    epochs: Epochs = None,
    seeds: Seeds = 2,
    json: Json = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    quiet: Quiet = False,
) -> None:
    """Try an optimizer's whole grid of learning rates on held-out training data."""
    chosen = _lookup(WORKLOADS, workload, "WORKLOAD")
    contender = _lookup(CONTENDERS, optimizer, "--optimizer")
    settings = _settings(chosen, epochs, seeds, batch_size, None, limit)
    split = _load(chosen, data_dir)
    try:
        with report.make_progress(console, quiet) as progress:
            rows = tune.run_grid(chosen, contender, split, settings, progress)
    except DataError as error:
        raise _failure(error) from error
    record = {
        **records.environment(),
        "workload": workload,
        "optimizer": optimizer,
        "hyperparameters": contender.hyperparameters(),
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "seeds": settings.seeds,
        "held_out_share": tune.HELD_OUT,
        "grid": rows,
    }
    _save(json, record, quiet)
    if not quiet:
        title = f"{optimizer} on {workload}: {settings.epochs} epochs"
        console.print(report.tuning_table(title, rows, tune.HELD_OUT))


@app.command("list")
def list_command() -> None:
    """Workloads and optimizers, one line each."""
    report.list_names(console)


@app.command("speed")
def speed_command(json: Json = None, quiet: Quiet = False) -> None:
    """Three figures of speed against plain Adam and SGD."""
    rows: list[speed.Row] = []
    with report.make_progress(console, quiet) as progress:
        task = progress.add_task("", total=len(speed.FIGURES))
        for name, (measure, rounds) in speed.FIGURES.items():
            progress.update(task, description=f"figure {name}")
            rows += measure(rounds)
            progress.advance(task)
    _save(json, {**records.environment(), "rows": rows}, quiet)
    if not quiet:
        console.print(report.speed_table(rows))


def _settings(
    workload: Workload,
    epochs: int | None,
    seeds: int,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    limit: int | None = None,
) -> Settings:
    return Settings(
        epochs or workload.epochs,
        batch_size or workload.batch_size,
        tuple(range(seeds)),
        learning_rate,
        limit,
    )


def _train(
    workload: Workload,
    names: list[str],
    split: Split,
    settings: Settings,
    quiet: bool,
) -> list[Result]:
    contenders = [CONTENDERS[name] for name in names]
    try:
        with report.make_progress(console, quiet) as progress:
            return run_experiment(workload, contenders, split, settings, progress)
    except DataError as error:
        raise _failure(error) from error


def _load(workload: Workload, data_dir: Path | None) -> Split:
    try:
        return workload.load(data_dir)
    except DataError as error:
        raise _failure(error) from error


def _failure(error: DataError) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


def _lookup(table: dict[str, _Entry], name: str, argument: str) -> _Entry:
    if name not in table:
        raise typer.BadParameter(
            f"got '{name}', expected one of {', '.join(table)}.", param_hint=argument
        )
    return table[name]


def _save(path: Path | None, record: dict[str, Any], quiet: bool) -> None:
    if path is None:
        return
    records.write(path, record)
    if not quiet:
        report.written(console, [path])


def _show(title: str, results: list[Result]) -> None:
    console.print(report.results_table(title, results))
    for result in results:
        console.print(
            f"{result.name}: learning rate {result.program.learning_rate:g}, "
            f"{result.source}",
            style="dim",
        )
