"""What the records of fine-tuning say: tables, and a section of the page of results."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks import cells, compare, generic
from benchmarks.compare import Entry
from benchmarks.finetuning import PEER, WHOLE, WIDE, Task, entrants
from benchmarks.finetuning_tasks import TASKS
from benchmarks.found import Found, Section, titled
from benchmarks.markdown import Provenance
from benchmarks.results_campaign import origins, tuning

#: Below the folder of all records; of a task's, the record of its pretraining.
FOLDER, PRETRAINING = "finetune", "pretraining.json"


def read_entries(task: Task, out: Path) -> list[Entry]:
    """Final runs at tuned rates, in the order of the contenders."""
    known = {name: contender for name, (_, contender) in entrants(task).items()}
    return compare.read_entries(task.workload, out, contenders=known)


def all_entries(root: Path) -> dict[str, list[Entry]]:
    """Task -> its entries, where there are any below the folder of all records."""
    read = {
        name: read_entries(task, root / FOLDER)
        for name, task in TASKS.items()
        if (root / FOLDER / name).is_dir()
    }
    return {name: entries for name, entries in read.items() if entries}


def quality_table(entries: Sequence[Entry]) -> Table:
    """The metric, and what it is against LoRA and against training everything."""
    metric, by_name = entries[0].metric, {entry.name: entry for entry in entries}
    table = cells.table("Quality")
    others = [by_name.get(name) for name in (PEER, WHOLE)]
    headings = (f"against {name} (95 %)" for name in (PEER, WHOLE))
    cells.columns(table, "rate", metric.label, "runs", *headings, "train loss")
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.records[0]['learning_rate']:g}",
            cells.spread(entry),
            str(len(entry.records)) + f", {entry.diverged} bad" * (entry.diverged > 0),
            *(cells.difference(entry, other) for other in others),
            f"{entry.median('train_loss') or float('nan'):.4f}",
        )
    return table


def cost_table(entries: Sequence[Entry]) -> Table:
    """What is trained, kept and computed; times are medians of steps in turns."""
    table = cells.table("Cost")
    cells.columns(table, "trained numbers", "state KiB", "temp MiB", "GFLOP")
    cells.columns(table, "step ms", "refresh ms", "against lora (95 %)")
    for entry in entries:
        figures = ("trained_numbers", "state_bytes", "temporary_bytes", "flops")
        trained, state, temporary, flops = (entry.median(key) for key in figures)
        ratio = None if entry.speed is None else entry.speed["ratio"]
        times = entry.milliseconds
        table.add_row(
            entry.name,
            f"{trained or 0:,.0f}",
            f"{(state or 0) / 2**10:,.1f}",
            f"{(temporary or 0) / 2**20:,.1f}",
            f"{(flops or 0) / 1e9:,.2f}",
            *("-" if times[k] is None else f"{times[k]:.0f}" for k in _TIMES),
            "-" if ratio is None or entry.name == PEER else generic.cell(ratio),
        )
    return table


_TIMES = ("step", "refresh")


def sections(
    found: Sequence[Found], entries: Mapping[str, list[Entry]], origin: Provenance
) -> Iterator[Section]:
    """One for each task that was begun."""
    for name, task in TASKS.items():
        here = [one for one in found if one.path.parts[:2] == (FOLDER, name)]
        if name in entries:
            yield _section(task, entries[name], here, origin)
        elif here:
            yield _begun(task, here, origin)


def _begun(task: Task, here: Sequence[Found], origin: Provenance) -> Section:
    """What is there before any final run."""
    runs = [one for one in here if len(one.path.parts) == 4]
    parts = [f"## Fine-tuning: {task.name}, begun", "No final run was made yet."]
    parts += [_before(task, one) for one in here if one.path.name == PRETRAINING]
    if runs:
        parts += ["### Tuning", tuning(task.workload, runs), origins(runs, origin)]
    parts.append(origin.line([run for one in here for run in one.runs]))
    return Section("\n\n".join(parts), frozenset(one.path for one in here))


def _section(
    task: Task, entries: Sequence[Entry], here: Sequence[Found], origin: Provenance
) -> Section:
    runs = [one for one in here if len(one.path.parts) == 4]
    alone = [one for one in here if len(one.path.parts) == 3]
    first = entries[0].records[0]
    title = f"{first['steps']} steps, batch {first['batch_size']}, {first['schedule']}"
    ranks = (
        f"LoRA of rank {task.lora_rank}, coordinates in {task.rank} directions, "
        f"{WIDE} in {task.wide_rank}"
    )
    parts = [
        f"## Fine-tuning: {task.name}",
        f"{task.workload.summary}; {title}; {ranks}; temporary memory "
        "and FLOPs are the compiler's, refreshes counted as if in every step.",
        titled(quality_table(entries), "Quality"),
        titled(cost_table(entries), "Cost"),
        *("### Tuning", tuning(task.workload, runs)),
        *("### Where from", origins(runs, origin)),
    ]
    for one in alone:
        if one.path.name == PRETRAINING:
            parts.append(_before(task, one))
        parts.append(origin.line(one.runs))
    return Section("\n\n".join(parts), frozenset(one.path for one in here))


def _before(task: Task, one: Found) -> str:
    metric, record = task.workload.metric, one.record
    return (
        f"Pretrained by {record['optimizer']} on {record['workload']}, "
        f"{record['steps']} steps: {metric.show(record['pretraining'])} there, and "
        f"{metric.show(record['before_adaptation'])} here before any adaptation."
    )
