"""A picture of effects and their intervals, as PNG."""

from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.effects import Effect

#: Interactions that are shown, the largest first: those with an interval without 0.
_MOST_PAIRS = 8
_COLORS = ("#b3202f", "#30638e", "#6a994e")
_ROW_HEIGHT = 0.34
#: Marked on the axes.
_TIMES = (0.001, 0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100, 1000)

Found = Mapping[str, tuple[Sequence[Effect], Sequence[Effect]]]


def plot_effects(found: Found, title: str, path: Path) -> None:
    """Effects on test error and on training loss, one row an effect.

    Args:
      found: workload -> effects on both in decades, in the same order for all.
      title: above the panels.
      path: the PNG. Its bytes follow from the effects and Matplotlib's version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = shown(found)
    height = 2.0 + _ROW_HEIGHT * len(names)
    figure = Figure(figsize=(12.5, height), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, axes in enumerate(panels):
        for place, (workload, pair) in enumerate(found.items()):
            _points(axes, names, pair[number], place, len(found), workload)
        _furnish(axes, names)
    panels[0].set(xlabel="test error, times (left is better)")
    panels[1].set(xlabel="training loss, times (left is better)")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(found))
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, metadata={"Software": None})


def shown(found: Found) -> list[str]:
    """Names of all main effects, and of the largest interactions that are clear."""
    pairs: dict[str, float] = {}
    mains: dict[str, None] = {}
    for on_error, _ in found.values():
        mains |= dict.fromkeys(effect.name for effect in on_error if not effect.is_pair)
        for effect in on_error:
            if effect.is_pair and effect.is_clear:
                size = max(abs(effect.value), pairs.get(effect.name, 0.0))
                pairs[effect.name] = size
    largest = sorted(pairs, key=lambda name: (-pairs[name], name))
    return [*mains, *largest[:_MOST_PAIRS]]


def _points(
    axes: Any,
    names: Sequence[str],
    effects: Sequence[Effect],
    place: int,
    count: int,
    label: str,
) -> None:
    """Those of one workload, a little above or below the middle of each row."""
    known = {effect.name: effect for effect in effects}
    rows = [known[name] for name in names]
    values = [effect.value for effect in rows]
    axes.errorbar(
        values,
        [row + 0.26 * (place - (count - 1) / 2) for row in range(len(rows))],
        xerr=[
            [effect.value - effect.low for effect in rows],
            [effect.high - effect.value for effect in rows],
        ],
        fmt="os^"[place % 3],
        color=_COLORS[place % len(_COLORS)],
        label=label,
        markersize=6,
        capsize=3,
    )


def _furnish(axes: Any, names: Sequence[str]) -> None:
    """A line at no effect, bands for every other row, a rule before interactions."""
    axes.axvline(0, color="black", lw=1)
    for row in range(0, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f0f0f0", zorder=0)
    mains = sum(" x " not in name for name in names)
    axes.axhline(mains - 0.5, color="black", lw=0.8)
    axes.set_ylim(-0.5, len(names) - 0.5)
    low, high = axes.get_xlim()
    marks = [(log10(times), times) for times in _TIMES]
    known = [(place, times) for place, times in marks if low <= place <= high]
    axes.set_xticks([place for place, _ in known], [f"{x:g}" for _, x in known])
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
