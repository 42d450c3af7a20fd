"""Fine-tune: LoRA against gradients in coordinates."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import (
    finetuning,
    pretraining,
    records,
    report,
    results_finetuning,
    speed,
)
from benchmarks.campaign import Lane, Runner, remaining
from benchmarks.commands.shared import (
    RUNS,
    DataDir,
    OptimizerNames,
    Quiet,
    Records,
    Seeds,
    app,
    console,
    failures,
    lookup,
    several,
)
from benchmarks.compare import speed_path
from benchmarks.finetuning import Task
from benchmarks.finetuning_tasks import TASKS

Rounds = Annotated[int, typer.Option(min=0, help="steps in turns at the end; 0: none")]


@app.command("finetune")
def finetune_command(
    workload: Annotated[str, typer.Argument(help=" or ".join(TASKS))],
    optimizer: OptimizerNames = None,
    data_dir: DataDir = None,
    out: Records = finetuning.RESULTS,
    runs: Annotated[Path, typer.Option(help="folder of pretrained weights")] = RUNS,
    hours: Annotated[float, typer.Option(min=0, help="start no run after")] = 1.0,
    seeds: Seeds = 3,
    rounds: Rounds = 10,
    quiet: Quiet = False,
) -> None:
    """LoRA against gradients in coordinates, as many trained numbers; resumable."""
    deadline = time.monotonic() + 3600 * hours
    task = lookup(TASKS, workload, "WORKLOAD")
    known = finetuning.entrants(task)
    names = [c.name for _, c in several(known, optimizer, "--optimizer")]
    weights = runs / f"{task.name}.npz"
    lanes = finetuning.lanes(task, out, weights, seeds, names)
    with failures(), report.make_progress(console, quiet) as progress:
        if task.pretrained:
            bar = progress.add_task("pretraining", total=pretraining.WORKLOAD.steps)
            path = out / task.name / results_finetuning.PRETRAINING
            after_step = functools.partial(progress.advance, bar)
            _pretrain(task, data_dir, weights, path, after_step)
        runner = Runner(data_dir, deadline, progress, finetuning.build_counted)
        done = all(runner.run(lane) for lane in lanes)
        if done and rounds and not optimizer:
            bar = progress.add_task("steps in turns", total=rounds)
            _time(task, lanes, out, rounds, functools.partial(progress.advance, bar))
    if not quiet:
        _show(task, lanes, out)


def _pretrain(
    task: Task,
    data_dir: Path | None,
    weights: Path,
    path: Path,
    after_step: Callable[[], None],
) -> None:
    """What is missing: the weights, and the record of what they are worth."""
    if not weights.is_file():
        params = pretraining.pretrain(data_dir, after_step=after_step)
        pretraining.write(weights, params)
    if not path.is_file():
        found = pretraining.describe(weights, data_dir, task.with_weights(weights))
        records.write(path, found)


def _time(
    task: Task,
    lanes: list[Lane],
    out: Path,
    rounds: int,
    after_round: Callable[[], None],
) -> None:
    """Steps in turns, against LoRA; once."""
    path = speed_path(out, task.name)
    if path.exists():
        return
    pairs = {lane.contender.name: (lane.workload, lane.contender) for lane in lanes}
    against = dict.fromkeys(pairs, pairs[finetuning.PEER][1])
    rows = speed.in_turns(pairs, against, rounds, after_round)
    records.write(path, {**records.environment(), "workload": task.name, "rows": rows})


def _show(task: Task, lanes: list[Lane], out: Path) -> None:
    entries = results_finetuning.read_entries(task, out)
    if entries:
        console.print(results_finetuning.quality_table(entries))
        console.print(results_finetuning.cost_table(entries))
    for line in remaining(lanes) or ["all done"]:
        console.print(line, soft_wrap=True)
