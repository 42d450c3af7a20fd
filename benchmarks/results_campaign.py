"""Sections of the page of results: one for each workload of the campaign."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks import compare, controls, markdown, report_campaign
from benchmarks.compare import Entry
from benchmarks.found import CAMPAIGN, Found, Record, Section, titled
from benchmarks.markdown import Provenance
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS, Workload


def campaign_sections(
    found: Sequence[Found], entries: Mapping[str, list[Entry]], origin: Provenance
) -> Iterator[Section]:
    """Of the workloads that have final runs."""
    for name, known in entries.items():
        here = [one for one in found if one.path.parts[:2] == (CAMPAIGN, name)]
        yield _workload_section(WORKLOADS[name], known, here, origin)


def _workload_section(
    workload: Workload,
    entries: list[Entry],
    here: Sequence[Found],
    origin: Provenance,
) -> Section:
    made = [one for one in here if one.is_run]
    runs = [one for one in made if one.path.parts[2] in CONTENDERS]
    taken = [one for one in made if one.path.parts[2] == controls.FOLDER]
    first = entries[0].records[0]
    title = f"{first['steps']} steps, batch {first['batch_size']}, {first['schedule']}"
    parts = [
        f"## {workload.name}",
        f"{workload.summary}; {title}.",
        titled(report_campaign.results_table("", entries), "Equal steps"),
        titled(report_campaign.cost_table("", entries), "Cost"),
    ]
    timed = report_campaign.time_table("", entries)
    parts += [] if timed is None else [titled(timed, "Equal time")]
    parts += ["### Tuning", tuning(workload, runs)]
    parts += _replaced(workload, entries, runs)
    parts += ["### Where from", origins(runs, origin)]
    shown = list(runs)
    for one in here:
        if one.path.name == "speed.json" and len(one.path.parts) == 3:
            table = report_campaign.steps_table("", one.record["rows"])
            parts += [titled(table, "Steps in turns"), origin.line(one.runs)]
            shown.append(one)
    for rule, some in _by_rule(taken, entries):
        known = [entry for entry in entries if entry.name == rule]
        known += compare.entries(workload, [one.record for one in some])
        table = report_campaign.controls_table("", known)
        parts += [titled(table, f"Controls of {rule}")]
        parts += ["Each is of the rule as it was at the commit below."]
        parts += [origin.line([one.record for one in some])]
        shown += some
    return Section("\n\n".join(parts), frozenset(one.path for one in shown))


def _by_rule(
    taken: Sequence[Found], entries: Sequence[Entry]
) -> Iterator[tuple[str, list[Found]]]:
    """Controls of each rule that has entries of its own."""
    for entry in entries:
        some = [
            one for one in taken if one.record["optimizer"].startswith(f"{entry.name},")
        ]
        if some:
            yield entry.name, some


def tuning(workload: Workload, runs: Sequence[Found]) -> str:
    """Validation figures by rate, all rounds."""
    rows = []
    for name in _names(runs):
        tried = [
            one.record
            for one in runs
            if one.path.parts[2] == name and one.record["phase"] == "tune"
        ]
        tried.sort(key=lambda record: (record["round"], record["learning_rate"]))
        for number in dict.fromkeys(record["round"] for record in tried):
            some = [record for record in tried if record["round"] == number]
            texts = (_rate(workload, record) for record in some)
            rows.append((name, str(number), str(some[0]["steps"]), ", ".join(texts)))
    headings = ("optimizer", "round", "steps", "rate: validation figure")
    return markdown.table(headings, rows)


def _rate(workload: Workload, record: Record) -> str:
    value = record[workload.metric.tuning_key]
    shown = "bad" if value is None else workload.metric.show(value)
    return f"{record['learning_rate']:g}: {shown}"


def _replaced(
    workload: Workload, entries: Sequence[Entry], runs: Sequence[Found]
) -> list[str]:
    """Final runs at rates that later tuning replaced; none is hidden."""
    rates = {entry.name: entry.records[0]["learning_rate"] for entry in entries}
    groups: dict[tuple[str, float], list[Record]] = {}
    for one in runs:
        name, rate = one.path.parts[2], one.record["learning_rate"]
        if one.record["phase"] == "final" and rate != rates.get(name):
            groups.setdefault((name, rate), []).append(one.record)
    if not groups:
        return []
    rows = []
    for (name, rate), some in groups.items():
        (entry,) = compare.entries(workload, some)
        result = workload.metric.show(entry.mean)
        rows.append((name, f"{rate:g}", result, markdown.seeds(some)))
    headings = ("optimizer", "rate", workload.metric.label, "seeds")
    return ["### At rates that tuning replaced", markdown.table(headings, rows)]


def origins(runs: Sequence[Found], origin: Provenance) -> str:
    """Machines, versions, commits, dates and seeds, by optimizer and phase."""
    rows = []
    for name in _names(runs):
        for phase in ("tune", "final"):
            some = [
                one.record
                for one in runs
                if one.path.parts[2] == name and one.record["phase"] == phase
            ]
            if some:
                rows.append((name, phase, str(len(some)), *origin.cells(some)))
    headings = ("optimizer", "phase", "runs", *markdown.HEADINGS)
    return markdown.table(headings, rows)


def _names(runs: Iterable[Found]) -> list[str]:
    """In the order of `CONTENDERS`, then the others."""
    known = dict.fromkeys(one.path.parts[2] for one in runs)
    return [*(n for n in CONTENDERS if n in known), *sorted(known.keys() - CONTENDERS)]
