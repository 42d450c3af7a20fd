"""Records and where they lie; sections of a page that show them."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks import markdown, records

CAMPAIGN = "campaign"

Record = dict[str, Any]


class Found(NamedTuple):
    """A record and where it lies below the folder of results."""

    path: Path
    record: Record

    @property
    def is_run(self) -> bool:
        """Whether it is one run of a campaign."""
        return self.path.parts[0] == CAMPAIGN and (
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


def titled(table: Table, title: str) -> str:
    """Under a heading of the third level."""
    return f"### {title}\n\n{markdown.of_rich(table)}"
