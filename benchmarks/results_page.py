"""The page of results: every record below one folder, as tables.

The page is a function of the records alone. A record that no section knows is shown by
its shape, so that none is left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks import (
    compare,
    controls,
    generic,
    markdown,
    plots,
    reaches,
    records,
    report,
)
from benchmarks.compare import Entry
from benchmarks.markdown import Provenance
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"
_CAMPAIGN = "campaign"
_PICTURE = {
    "shakespeare_gpt": "small GPT on Tiny Shakespeare",
    "fashion_mnist_cnn": "small CNN on Fashion-MNIST",
}

Record = dict[str, Any]

_HEAD = """# Results

Written by `python -m benchmarks results` from the records in `results/`, and from
nothing else; a test compares it byte for byte. What the numbers mean, and what was
tried without success, is in [FINDINGS.md](FINDINGS.md).

- Rates are tuned alike for all on validation samples, from a seed of its own; results
  are of test samples, mean ± standard deviation over seeds. Differences are paired by
  seed, with a 95 % t interval. Ratios of times have 95 % bootstrap intervals.
- *kernels* is the state of the kernels, *ratio* is to that of the best peer; *temp* is
  what the compiled step needs beside its arguments. Runs that were lost count as *bad*.
- A star behind a commit: its work tree had changes."""


class Found(NamedTuple):
    """A record and where it lies below the folder of results."""

    path: Path
    record: Record

    @property
    def is_run(self) -> bool:
        """Whether it is one run of a campaign."""
        return self.path.parts[0] == _CAMPAIGN and (
            self.record.keys() >= {"seed", "phase", "optimizer", "learning_rate"}
        )

    @property
    def runs(self) -> list[Record]:
        """The records with provenance in it: itself, or those it collects."""
        inner = self.record.get("records")
        return list(inner) if isinstance(inner, list) and inner else [self.record]


class Section(NamedTuple):
    """A part of the page, and the records it shows."""

    text: str
    paths: frozenset[Path]


def read_all(root: Path) -> list[Found]:
    """Every record below a folder, by path.

    Raises:
      DataError: when one is unreadable.
    """
    paths = sorted(root.rglob("*.json"), key=lambda path: path.as_posix())
    return [Found(path.relative_to(root), records.read(path)) for path in paths]


def campaign_entries(root: Path) -> dict[str, list[Entry]]:
    """Workload -> final runs at tuned rates, where there are any."""
    read = {
        name: compare.read_entries(workload, root / _CAMPAIGN)
        for name, workload in WORKLOADS.items()
        if (root / _CAMPAIGN / name).is_dir()
    }
    return {name: entries for name, entries in read.items() if entries}


def document(root: Path = RESULTS) -> str:
    """The whole page."""
    found, entries = read_all(root), campaign_entries(root)
    origin = Provenance(run for one in found for run in one.runs)
    sections = list(_campaign_sections(found, entries, origin))
    shown = frozenset[Path]().union(*(section.paths for section in sections))
    rest = [one for one in found if one.path not in shown]
    sections += [_file_section(one, origin) for one in rest if not one.is_run]
    parts = [
        _HEAD,
        "## Reached and missed\n\n" + reaches.table(_reaches(found, entries)),
        *(section.text for section in sections),
        *_rest([one for one in rest if one.is_run], origin),
        "## Machines and versions\n\n" + origin.legend(),
        _listing(found),
    ]
    return "\n\n".join(parts) + "\n"


def _reaches(
    found: Sequence[Found], entries: Mapping[str, list[Entry]]
) -> list[reaches.Line]:
    speeds = {
        one.record["workload"]: one.record["rows"]
        for one in found
        if one.path.name == "speed.json"
    }
    stability = [one.record for one in found if _is_stability(one.record)]
    stability.sort(key=lambda record: str(record["date"]))
    return reaches.lines(entries, speeds, stability)


def write(page: Path, root: Path = RESULTS) -> list[Path]:
    """The page, and beside it the picture of the same name.

    Returns:
      What was written; no picture without entries.
    """
    text, entries = document(root), campaign_entries(root)
    page.write_text(text, encoding="utf-8", newline="\n")
    panels = {
        title: entries[name] for name, title in _PICTURE.items() if name in entries
    }
    if not panels:
        return [page]
    picture = page.with_suffix(".png")
    plots.plot_against_state(panels, picture)
    return [page, picture]


# The campaign.


def _campaign_sections(
    found: Sequence[Found], entries: Mapping[str, list[Entry]], origin: Provenance
) -> Iterator[Section]:
    for name, known in entries.items():
        here = [one for one in found if one.path.parts[:2] == (_CAMPAIGN, name)]
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
        _titled(report.results_table("", entries), "Equal steps"),
        _titled(report.cost_table("", entries), "Cost"),
    ]
    timed = report.time_table("", entries)
    parts += [] if timed is None else [_titled(timed, "Equal time")]
    parts += ["### Tuning", _tuning(workload, runs)]
    parts += _replaced(workload, entries, runs)
    parts += ["### Where from", _origins(runs, origin)]
    shown = list(runs)
    for one in here:
        if one.path.name == "speed.json" and len(one.path.parts) == 3:
            table = report.steps_table("", one.record["rows"])
            parts += [_titled(table, "Steps in turns"), origin.line(one.runs)]
            shown.append(one)
    for rule, some in _by_rule(taken, entries):
        known = [entry for entry in entries if entry.name == rule]
        known += compare.entries(workload, [one.record for one in some])
        table = report.controls_table("", known)
        parts += [_titled(table, f"Controls of {rule}")]
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


def _tuning(workload: Workload, runs: Sequence[Found]) -> str:
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


def _origins(runs: Sequence[Found], origin: Provenance) -> str:
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
    known = {one.path.parts[2] for one in runs}
    return [name for name in CONTENDERS if name in known]


# Records that stand alone.


def _is_stability(record: Record) -> bool:
    return any("losses_against" in row for row in record.get("rows") or ())


def _rows_with(*keys: str) -> Callable[[Record], bool]:
    def matches(record: Record) -> bool:
        rows = record.get("rows") or ()
        return bool(rows) and all(key in row for row in rows for key in keys)

    return matches


def _runs_with(*keys: str) -> Callable[[Record], bool]:
    def matches(record: Record) -> bool:
        runs = record.get("records") or ()
        return bool(runs) and all(key in run for run in runs for key in keys)

    return matches


#: What tells a kind of record, its heading, and its table; the first match counts.
_KINDS: tuple[tuple[Callable[[Record], bool], str, Callable[[Record], Table]], ...] = (
    (
        _rows_with("figure", "seconds_against", "ratio"),
        "Speed, fixed figures",
        lambda record: report.speed_table(record["rows"]),
    ),
    (
        _rows_with("dearest", "step_seconds", "compile_seconds"),
        "Steps in turns",
        lambda record: report.steps_table("", record["rows"]),
    ),
    (
        _rows_with("losses_against", "skipped"),
        "Stability: final training loss against the plain optimizer's",
        lambda record: report.stability_table(record["rows"]),
    ),
    (
        _rows_with("rule", "ratios", "ratio_to_oracle"),
        "Transport: mean loss over the second half of a stream that turns",
        lambda record: report.transport_table(record["rows"]),
    ),
    (
        lambda record: {"coordinates", "others", "refresh", "share"} <= record.keys(),
        "Communication: numbers sent in a step",
        lambda record: report.communication_table("", record),
    ),
    (
        _runs_with("hessian_eigenvalues", "m_sharpness"),
        "Flatness",
        lambda record: report.flatness_table("", record["records"]),
    ),
    (
        _runs_with("attacks", "corruptions"),
        "Robustness: accuracy, %",
        lambda record: report.robustness_table("", record["records"]),
    ),
)


def _file_section(one: Found, origin: Provenance) -> Section:
    """A record of its own: by its kind, else by its shape."""
    kind = next((kind for kind in _KINDS if kind[0](one.record)), None)
    if kind is None:
        parts = [f"## `{_name(one)}`", generic.tables(one.record)]
    else:
        _, heading, make = kind
        table = markdown.of_rich(make(one.record))
        parts = [f"## {heading} (`{_name(one)}`)", *_about(one), table]
    return Section("\n\n".join([*parts, origin.line(one.runs)]), frozenset({one.path}))


def _name(one: Found) -> str:
    return one.path.with_suffix("").as_posix()


def _about(one: Found) -> list[str]:
    """Single values beside the table."""
    plain = {
        key: value
        for key, value in one.record.items()
        if isinstance(value, str | int | float) and key not in ("date", "share")
    }
    words = "; ".join(f"{key} {generic.cell(value)}" for key, value in plain.items())
    return [f"{words}."] if words else []


def _rest(rest: Sequence[Found], origin: Provenance) -> Iterator[str]:
    """Runs in folders that no section knows, one table a folder."""
    for folder in dict.fromkeys(one.path.parent for one in rest):
        some = [one for one in rest if one.path.parent == folder]
        rows = [{"file": one.path.name, **one.record} for one in some]
        yield f"## Other runs (`{folder.as_posix()}`)"
        yield generic.tables({"records": rows})
        yield origin.line([run for one in some for run in one.runs])


def _titled(table: Table, title: str) -> str:
    return f"### {title}\n\n{markdown.of_rich(table)}"


def _listing(found: Sequence[Found]) -> str:
    lines = "\n".join(f"- `results/{one.path.as_posix()}`" for one in found)
    summary = f"<summary>{len(found)} files</summary>"
    return f"## Records\n\n<details>{summary}\n\n{lines}\n\n</details>"
