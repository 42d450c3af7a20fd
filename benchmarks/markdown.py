"""Tables and provenance as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

Record = Mapping[str, Any]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of numbers to the right, others to the left."""
    rows = list(rows)
    marks = [
        "---:" if _numeric(column) else "---" for column in zip(*rows, strict=True)
    ]
    rule = "|" + "|".join(marks or ["---"] * len(headings)) + "|"
    return "\n".join([_row(headings), rule, *(_row(row) for row in rows)])


def _numeric(column: Sequence[str]) -> bool:
    known = [cell for cell in column if cell not in ("", "inf", "nan")]
    return bool(known) and all(cell[0] in "0123456789+-" for cell in known)


def of_rich(found: Table) -> str:
    """A table of `benchmarks.report`, its caption behind it."""
    headings = [str(column.header) for column in found.columns]
    cells = [[str(cell) for cell in column.cells] for column in found.columns]
    text = table(headings, zip(*cells, strict=True))
    return f"{text}\n\n{found.caption}." if found.caption else text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


class Provenance:
    """Machines and versions under letters, so that each is written once.

    Args:
      records: all of the page.
    """

    def __init__(self, records: Iterable[Record]):
        known = list(records)
        self.machines = _lettered({_machine(record) for record in known}, "M")
        self.versions = _lettered({_versions(record) for record in known}, "V")

    def legend(self) -> str:
        """What the letters stand for."""
        rows = [*self.machines.items(), *self.versions.items()]
        return table(("", "what"), ((label, text) for text, label in rows))

    def cells(self, records: Sequence[Record]) -> tuple[str, str, str, str, str]:
        """Machine, versions, commits, dates and seeds of some records."""
        return (
            _joined(self.machines[_machine(record)] for record in records),
            _joined(self.versions[_versions(record)] for record in records),
            _joined(map(_commit, records)),
            span([str(record.get("date", "no date"))[:10] for record in records]),
            seeds(records),
        )

    def line(self, records: Sequence[Record]) -> str:
        """The same as one line."""
        machine, versions, commits, dates, found = self.cells(records)
        words = f"Machine {machine}; versions {versions}; commit {commits}; {dates}"
        return f"{words}; seeds {found}." if found != "-" else f"{words}."


HEADINGS = ("machine", "versions", "commit", "dates", "seeds")


def span(found: Sequence[str]) -> str:
    """The first and the last."""
    first, last = min(found), max(found)
    return first if first == last else f"{first} to {last}"


def seeds(records: Sequence[Record]) -> str:
    """Seeds as ranges; where rows have counts alone, those."""
    numbers = sorted({r["seed"] for r in records if isinstance(r.get("seed"), int)})
    counts = {
        row["seeds"]
        for record in records
        for row in record.get("rows") or ()
        if isinstance(row, Mapping) and isinstance(row.get("seeds"), int)
    }
    if not numbers:
        named = {str(r["seeds"])[1:-1] for r in records if r.get("seeds")}
        return ", ".join(sorted(named)) or _joined(f"{n} a row" for n in sorted(counts))
    ranges = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def _joined(words: Iterable[str]) -> str:
    return ", ".join(sorted(set(words))) or "-"


def _lettered(found: set[str], letter: str) -> dict[str, str]:
    return {text: f"{letter}{n}" for n, text in enumerate(sorted(found), 1)}


def _machine(record: Record) -> str:
    machine = record.get("machine")
    if not machine:
        return "not recorded"
    where = f"{machine['system']} {machine['architecture']}, {machine['processor']}"
    device = f"{machine['backend']}: {machine['device']}"
    return f"{where}, {machine['cores']} core(s), {device}"


def _versions(record: Record) -> str:
    versions = record.get("versions")
    if not versions:
        return "not recorded"
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _commit(record: Record) -> str:
    """Seven digits; a star where the work tree had changes."""
    git = record.get("git")
    if not git:
        return "not recorded"
    return git["commit"][:7] + "*" * bool(git.get("modified"))
