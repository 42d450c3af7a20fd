"""The section of the page of results that the scoreboard fills, and its picture.

Records of the scoreboard are lines of one file a board, so that they stand apart from
those that `benchmarks.found` reads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import markdown, plots_scoreboard, scoreboard
from benchmarks.boards import BOARDS, Board
from benchmarks.found import Record
from benchmarks.markdown import Provenance
from benchmarks.peers import CONTENDERS, Contender

#: Of the folder of all records.
FOLDER = "scoreboard"
#: The board of the picture, and the picture.
_SHOWN, PICTURE = "gpt_d128_b24", "SCOREBOARD.png"
#: Ends of the names of controls.
_CONTROLS = ("none", "random", "random_true")

_HEAD = """## Scoreboard

Runs of `python -m benchmarks.scoreboard`, 16 seeds of each contender, paired by seed.
Validation data chooses all settings, with seeds of their own. In the second table of
each board the rules of this package are held against the plain optimizer whose place
they take and against their own controls, tuned alike: without the metric (`_none`),
with random directions and the energies that activations have along them (`_random`),
and with random directions and the eigenvalues of the activations (`_random_true`).
*state* is that of the kernels. Less is better; a negative difference is in favour of
the rule."""
_BRIEF = (
    "Tuning is brief: rates of kernels and of the rest tuned (16 runs), no weight "
    "decay; the best auxiliary rate lies at the edge of its grid where marked (*)."
)


def read(root: Path) -> dict[str, list[Record]]:
    """Board -> its records, with the provenance of other records."""
    found = {}
    for name, board in BOARDS.items():
        rows = scoreboard.rows_of(board, root / FOLDER)
        if rows:
            found[name] = [{**row, "git": _git(row)} for row in rows]
    return found


def _git(row: Record) -> Record | None:
    if not row.get("commit"):
        return None
    return {"commit": row["commit"], "modified": row["clean"] is False}


def section(
    found: Mapping[str, Sequence[Record]], root: Path, origin: Provenance
) -> str:
    """All boards that have records."""
    parts = [_HEAD]
    for name, rows in found.items():
        board = BOARDS[name]
        parts += [scoreboard.report(board, root / FOLDER)]
        parts += [_BRIEF] * board.brief
        finals = finals_of(rows)
        differences = comparisons(board, finals)
        parts += [differences] if differences else []
        parts += unfinished(rows)
        parts += [f"{origin.line(rows)} Records: `results/{FOLDER}/{name}.jsonl`."]
    if panels(found):
        parts.insert(1, f"![Test loss against the state of kernels]({PICTURE})")
    return "\n\n".join(parts)


def finals_of(rows: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Contender -> seed -> its final run, of those that have one."""
    found: dict[str, dict[int, Record]] = {}
    for row in rows:
        if row["phase"] == "final":
            found.setdefault(row["contender"], {})[row["seed"]] = row
    return {name: found[name] for name in CONTENDERS if name in found}


def comparisons(board: Board, finals: Mapping[str, Mapping[int, Record]]) -> str:
    """Each rule of this package against its plain optimizer and its controls."""
    key = f"test_{board.judge}"
    rows = []
    for name in filter(_is_rule, finals):
        plain = CONTENDERS[name].plain
        others = (plain, *(f"{name}_{control}" for control in _CONTROLS))
        gaps = (scoreboard.gap(finals[name], finals.get(n), key) for n in others)
        state = _share(finals[name], finals.get(plain))
        rows.append((name, plain, state, *(gap or "-" for gap in gaps)))
    headings = ("rule", "plain", "state, of the plain one's", "to the plain one")
    headings += tuple(f"to `_{control}`" for control in _CONTROLS)
    return markdown.table(headings, rows) if rows else ""


def _is_rule(name: str) -> bool:
    """Whether it is of this package and no control."""
    return CONTENDERS[name].ours and not CONTENDERS[name].variant


def _share(found: Mapping[int, Record], plain: Mapping[int, Record] | None) -> str:
    share = share_of(found, plain)
    return "-" if share is None else f"{100 * share:.1f} %"


def share_of(
    found: Mapping[int, Record], plain: Mapping[int, Record] | None
) -> float | None:
    """State of the kernels as a share of the plain optimizer's."""
    if not plain:
        return None
    mine, theirs = (next(iter(runs.values())) for runs in (found, plain))
    return float(mine["kernel_state_bytes"] / theirs["kernel_state_bytes"])


def unfinished(rows: Sequence[Record]) -> list[str]:
    """One line that names those without all of their final runs, if there are any."""
    finals, words = finals_of(rows), []
    for name in dict.fromkeys(row["contender"] for row in rows):
        made = len(finals.get(name, ()))
        if made < len(scoreboard.FINAL):
            words.append(f"`{name}`" + f" ({made} made)" * bool(made))
    return [f"Final runs are lacking of {', '.join(words)}."] if words else []


def panels(found: Mapping[str, Sequence[Record]]) -> plots_scoreboard.Panels:
    """Plain optimizer -> the contenders that take its place, as points."""
    if _SHOWN not in found:
        return {}
    finals, key = finals_of(found[_SHOWN]), f"test_{BOARDS[_SHOWN].judge}"
    made: plots_scoreboard.Panels = {}
    for name, runs in finals.items():
        contender = CONTENDERS[name]
        share = share_of(runs, finals.get(contender.plain))
        values = [run[key] for run in runs.values()]
        if share is not None and None not in values:
            point = plots_scoreboard.Point(name, share, values, _kind(contender))
            made.setdefault(contender.plain, []).append(point)
    return made


def _kind(contender: Contender) -> str:
    if not contender.ours:
        return "peer"
    return "control" if contender.variant else "ours"


def write_picture(page: Path, found: Mapping[str, Sequence[Record]]) -> list[Path]:
    """Beside the page, where there is something to draw; what was written."""
    drawn = panels(found)
    if not drawn:
        return []
    path = page.with_name(PICTURE)
    plots_scoreboard.plot(drawn, path)
    return [path]
