"""Sections of the page of results: the minima that optimizers find, by workload."""

from collections.abc import Iterator, Sequence

from benchmarks import minima, report_minima
from benchmarks.found import Found, Record, Section, titled
from benchmarks.markdown import Provenance
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS


def minima_sections(found: Sequence[Found], origin: Provenance) -> Iterator[Section]:
    """Of the workloads whose minima were looked at."""
    for name, here in _by_workload(found).items():
        yield _section(name, here, origin)


def final_records(found: Sequence[Found]) -> dict[str, list[Record]]:
    """Workload -> its final records."""
    return {
        name: _split([one.record for one in here])[0]
        for name, here in _by_workload(found).items()
    }


def _by_workload(found: Sequence[Found]) -> dict[str, list[Found]]:
    groups = {
        name: [one for one in found if one.path.parts[:2] == (minima.FOLDER, name)]
        for name in WORKLOADS
    }
    return {name: here for name, here in groups.items() if here}


def _split(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """In the order of contenders: final runs, and those that chose a radius."""
    order = list(CONTENDERS)
    runs = sorted(
        records,
        key=lambda run: (order.index(run["optimizer"]), minima.label(run), run["seed"]),
    )
    finals = [run for run in runs if run["seed"] < minima.TUNING_SEED]
    return finals, [run for run in runs if run["seed"] >= minima.TUNING_SEED]


def _section(name: str, here: Sequence[Found], origin: Provenance) -> Section:
    finals, tried = _split([one.record for one in here])
    parts = [f"## Minima: {name}"]
    for some, heading in ((finals, ""), (tried, "one seed, to choose by validation: ")):
        for table in report_minima.tables(heading, some):
            title = str(table.title)
            parts.append(titled(table, title[0].upper() + title[1:]))
    text = "\n\n".join([*parts, origin.line([*finals, *tried])])
    return Section(text, frozenset(one.path for one in here))
