"""What the runs on record took, against the budget that was set for them."""

from collections.abc import Sequence

from benchmarks import markdown
from benchmarks.found import Found

#: Core hours for all runs of one seed each: campaign, minima, fine-tuning, episodes.
BUDGET = 40

_HEAD = """## Hours

Hours of runs on record, one core each, training and looking; a run that was stopped
has no record, and cells of the ablation keep no time."""


def section(found: Sequence[Found]) -> str:
    """One row a folder, and the sum against the budget."""
    spent: dict[str, list[float]] = {}
    for one in found:
        folder = "/".join(one.path.parts[:2])
        times = (run["seconds"] for run in one.runs if _is_timed(run))
        spent.setdefault(folder, []).extend(times)
    rows = [
        (folder, str(len(times)), f"{sum(times) / 3600:.1f}")
        for folder, times in spent.items()
        if times
    ]
    whole = sum(sum(times) for times in spent.values()) / 3600
    total = ("all", str(sum(map(len, spent.values()))), f"{whole:.1f} of {BUDGET}")
    return f"{_HEAD}\n\n{markdown.table(('records', 'runs', 'hours'), [*rows, total])}"


def _is_timed(run: dict[str, object]) -> bool:
    return "seed" in run and isinstance(run.get("seconds"), int | float)
