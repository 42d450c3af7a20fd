"""Sections of the page of results: few-shot episodes, one for each number of shots."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from benchmarks import cells, compare, fewshot, markdown
from benchmarks.compare import Entry
from benchmarks.fitting import QUERIES, TASKS, WAYS
from benchmarks.found import Found, Record, Section, titled
from benchmarks.markdown import Provenance
from benchmarks.metrics import ACCURACY


def learners(found: Sequence[Found]) -> list[Found]:
    """The files that hold runs of a learner."""
    files = [one for one in found if one.record.keys() >= {"learner", "shots"}]
    return [one for one in files if all("phase" in run for run in one.runs)]


def fewshot_sections(found: Sequence[Found], origin: Provenance) -> Iterator[Section]:
    """One for each number of shots."""
    files = learners(found)
    for shots in sorted({one.record["shots"] for one in files}):
        yield _section(
            shots, [one for one in files if one.record["shots"] == shots], origin
        )


def _section(shots: int, here: Sequence[Found], origin: Provenance) -> Section:
    runs = [run for one in here for run in one.runs]
    title = (
        f"Omniglot-small (242 of 1 623 characters), {WAYS}-way, {shots} "
        f"labelled drawing(s) and {QUERIES} queries of each in judging; {TASKS} tasks "
        f"an outer step, {runs[0]['full_steps']} steps"
    )
    parts = [f"## Few-shot episodes, {shots} shot(s)", f"{title}."]
    entries = fewshot.entries([one.record for one in here])
    if entries:
        parts.append(titled(fewshot_table("", entries), "Test alphabets"))
    rows = [row for one in here for row in _tuning(one.record)]
    if rows:
        headings = ("learner", "round", "steps", "rate / inner rate: validation %")
        parts += ["### Tuning", markdown.table(headings, rows)]
    parts += ["### Where from", origin.line(runs)]
    return Section("\n\n".join(parts), frozenset(one.path for one in here))


def _tuning(record: Record) -> Iterator[tuple[str, ...]]:
    tried = [run for run in record["records"] if run["phase"] == "tune"]
    for number in sorted({run["round"] for run in tried}):
        some = [run for run in tried if run["round"] == number]
        some.sort(key=lambda run: (run["learning_rate"], run["inner_rate"]))
        steps = str(some[0]["steps"])
        yield record["learner"], str(number), steps, ", ".join(map(_tried, some))


def _tried(run: dict[str, Any]) -> str:
    value = run[ACCURACY.tuning_key]
    shown = "bad" if value is None else ACCURACY.show(value)
    return f"{run['learning_rate']:g} / {run['inner_rate']:g}: {shown}"


def fewshot_table(title: str, found: Sequence[Entry]) -> Table:
    """Learners of few-shot episodes, against the first of them."""
    table = cells.table(title, "learner")
    label = f"{found[0].metric.label}, 95 %"
    cells.columns(table, "rate", "inner", label, "runs", f"against {found[0].name}")
    cells.columns(table, "state KiB")
    for entry in found:
        first = entry.records[0]
        table.add_row(
            entry.name,
            f"{first['learning_rate']:g}",
            f"{first['inner_rate']:g}",
            _mean_and_reach(entry),
            f"{len(entry.records)}" + f", {entry.diverged} bad" * (entry.diverged > 0),
            cells.difference(entry, found[0]),
            cells.number(entry.median("state_bytes"), ",.1f", 1 / 2**10),
        )
    return table


def _mean_and_reach(entry: Entry) -> str:
    """Mean over seeds, and its 95 % t interval where there are several."""
    found = compare.mean_interval(list(entry.finals.values()))
    if found is None:
        return entry.metric.show(entry.mean)
    mean, low, high = map(entry.metric.show, found)
    return f"{mean} [{low}, {high}]"
