"""Sections of the page of results: the minima that optimizers find, by workload."""

from collections.abc import Iterator, Sequence

from benchmarks import minima, report_minima
from benchmarks.found import Found, Section, titled
from benchmarks.markdown import Provenance
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS


def minima_sections(found: Sequence[Found], origin: Provenance) -> Iterator[Section]:
    """Of the workloads whose minima were looked at."""
    for name in WORKLOADS:
        here = [one for one in found if one.path.parts[:2] == (minima.FOLDER, name)]
        if here:
            yield _section(name, here, origin)


def _section(name: str, here: Sequence[Found], origin: Provenance) -> Section:
    order = list(CONTENDERS)
    runs = sorted(
        (one.record for one in here),
        key=lambda run: (order.index(run["optimizer"]), minima.label(run), run["seed"]),
    )
    finals = [run for run in runs if run["seed"] < minima.TUNING_SEED]
    tried = [run for run in runs if run["seed"] >= minima.TUNING_SEED]
    parts = [f"## Minima: {name}"]
    for some, heading in ((finals, ""), (tried, "one seed, to choose by validation: ")):
        for table in report_minima.tables(heading, some):
            parts.append(titled(table, str(table.title).capitalize()))
    text = "\n\n".join([*parts, origin.line(runs)])
    return Section(text, frozenset(one.path for one in here))
