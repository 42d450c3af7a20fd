"""The page of results: every record below one folder, as tables.

The page is a function of the records alone. A record that no section knows is shown by
its shape, so that none is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import (
    claims,
    compare,
    comparison,
    generic,
    hours,
    plots,
    plots_minima,
    reaches,
    reaches_minima,
    results_ablation,
    results_finetuning,
    results_scoreboard,
)
from benchmarks.compare import Entry
from benchmarks.found import CAMPAIGN, Found, Record, read_all
from benchmarks.markdown import Provenance
from benchmarks.results_campaign import campaign_sections
from benchmarks.results_fewshot import fewshot_sections
from benchmarks.results_files import file_section
from benchmarks.results_minima import final_records, minima_sections
from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"
_PICTURE = {
    "shakespeare_gpt": "small GPT on Tiny Shakespeare",
    "fashion_mnist_cnn": "small CNN on Fashion-MNIST",
}

_HEAD = """# Results

Written by `python -m benchmarks results` from the records in `results/`, and from
nothing else; a test compares it byte for byte. What the numbers mean, and what was
tried without success, is in [FINDINGS.md](FINDINGS.md).

- Rates are tuned alike for all on validation samples, from a seed of its own, but where
  a table says "given" or "default"; results are of test samples, mean ± standard
  deviation over seeds. Differences are paired by seed, with a 95 % t interval. Ratios
  of times have 95 % bootstrap intervals.
- *kernels* is the state of the kernels, *ratio* is to that of the best peer; *temp* is
  what the compiled step needs beside its arguments. Runs that were lost count as *bad*.
- A star behind a commit: its work tree had changes."""


def campaign_entries(root: Path) -> dict[str, list[Entry]]:
    """Workload -> final runs at tuned rates, where there are any."""
    read = {
        name: compare.read_entries(workload, root / CAMPAIGN)
        for name, workload in WORKLOADS.items()
        if (root / CAMPAIGN / name).is_dir()
    }
    return {name: entries for name, entries in read.items() if entries}


def document(root: Path = RESULTS) -> str:
    """The whole page."""
    finetuned = results_finetuning.all_entries(root)
    scored = results_scoreboard.read(root)
    return _document(root, read_all(root), campaign_entries(root), finetuned, scored)


def _document(
    root: Path,
    found: Sequence[Found],
    entries: Mapping[str, list[Entry]],
    finetuned: Mapping[str, list[Entry]],
    scored: Mapping[str, list[Record]],
) -> str:
    runs = [run for one in found for run in one.runs]
    origin = Provenance([*runs, *(row for rows in scored.values() for row in rows)])
    sections = [
        *campaign_sections(found, entries, origin),
        *results_finetuning.sections(found, finetuned, origin),
        *minima_sections(found, origin),
        *results_ablation.sections(found, origin),
        *fewshot_sections(found, origin),
    ]
    shown = frozenset[Path]().union(*(section.paths for section in sections))
    rest = [one for one in found if one.path not in shown]
    sections += [file_section(one, origin) for one in rest if not one.is_run]
    looked_at = final_records(found)
    pictures = comparison.known(entries, looked_at)
    parts = [
        _HEAD,
        *([results_scoreboard.section(scored, root, origin)] if scored else []),
        comparison.section(pictures),
        claims.section(claims.Evidence(found, pictures, finetuned, looked_at)),
        "## Reached and missed\n\n" + reaches.table(_reaches(found, entries)),
        *(section.text for section in sections),
        *_rest([one for one in rest if one.is_run], origin),
        hours.section(found),
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
    found_flat = list(reaches_minima.lines(final_records(found)))
    return reaches.lines(entries, speeds, stability) + found_flat


def write(page: Path, root: Path = RESULTS) -> list[Path]:
    """The page, and beside it its pictures, where there is something to draw.

    Returns:
      What was written.
    """
    entries, found = campaign_entries(root), read_all(root)
    finetuned = results_finetuning.all_entries(root)
    scored = results_scoreboard.read(root)
    text = _document(root, found, entries, finetuned, scored)
    page.write_text(text, encoding="utf-8", newline="\n")
    written = [page, *results_ablation.write_picture(page, found)]
    written += results_scoreboard.write_picture(page, scored)
    panels = {
        title: entries[name] for name, title in _PICTURE.items() if name in entries
    }
    if panels:
        written.append(page.with_suffix(".png"))
        plots.plot_against_state(panels, written[-1])
    if looked := plots_minima.with_curvature(final_records(found)):
        written.append(page.with_name("MINIMA.png"))
        plots_minima.plot_minima(looked, written[-1])
    return written


def _is_stability(record: Record) -> bool:
    return any("losses_against" in row for row in record.get("rows") or ())


def _rest(rest: Sequence[Found], origin: Provenance) -> Iterator[str]:
    """Runs in folders that no section knows, one table a folder."""
    for folder in dict.fromkeys(one.path.parent for one in rest):
        some = [one for one in rest if one.path.parent == folder]
        rows = [{"file": one.path.name, **one.record} for one in some]
        yield f"## Other runs (`{folder.as_posix()}`)"
        yield generic.tables({"records": rows})
        yield origin.line([run for one in some for run in one.runs])


def _listing(found: Sequence[Found]) -> str:
    lines = "\n".join(f"- `results/{one.path.as_posix()}`" for one in found)
    summary = f"<summary>{len(found)} files</summary>"
    return f"## Records\n\n<details>{summary}\n\n{lines}\n\n</details>"
