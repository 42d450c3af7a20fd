"""Pictures of a comparison, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.compare import Entry
from benchmarks.optimizers import CONTENDERS

#: Warm and solid: this package. Cold and dashed: the others.
WARM = (
    *("#f0a04b", "#d1495b", "#7d1128", "#c71f8f"),
    *("#8c564b", "#e377c2", "#b8860b", "#ff6f3c"),
)
COLD = ("#30638e", "#003d5b", "#00a6a6", "#6a994e", "#7a7a7a", "#6a5acd", "#5fb0e5")
_MARKERS = "oD^vPsX"
_LEAST_ERROR = 1e-3
OURS_COLOR, PEER_COLOR = "#b3202f", "#30638e"
#: Of a name beside a point, in parts of the axes.
_NAME_WIDTH, _NAME_HEIGHT = 0.22, 0.055

Style = dict[str, Any]


def plot_comparison(found: Sequence[Entry], title: str, path: Path) -> None:
    """The metric by step and by time, and the final one by bytes of state.

    Args:
      found: one a contender; bands and bars span the seeds.
      title: above the panels.
      path: the PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(17, 5.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for entry in found:
        steps, values = entry.curves()
        style = _style(entry)
        _curve(panels[0], steps, entry, values, style)
        _curve(panels[1], steps * entry.step_seconds, entry, values, style)
        _point(panels[2], entry, style)
    panels[0].set(xlabel="step", ylabel=found[0].metric.label)
    panels[1].set(xlabel="training time, s")
    panels[2].set(xlabel="optimizer state, KiB", xscale="log")
    panels[2].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[2].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[2].xaxis.set_minor_formatter(lambda value, _: "")
    for axes, everything in zip(panels, (True, True, False), strict=True):
        _value_axis(axes, found, everything)
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_against_state(panels: Mapping[str, Sequence[Entry]], path: Path) -> None:
    """The final metric by bytes of state; better is up and to the left.

    Args:
      panels: title -> entries, one a contender; bars span a standard deviation.
      path: the PNG. Its bytes follow from the records and Matplotlib's version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    width = 6.2 * len(panels)
    figure = Figure(figsize=(width, 4.4), dpi=120, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, found) in zip(row, panels.items(), strict=True):
        shown = [entry for entry in found if np.isfinite(entry.mean)]
        for entry in shown:
            _state_point(axes, entry)
        metric = found[0].metric
        label = metric.label + " (lower is up)" * (not metric.higher)
        axes.set(xscale="log", title=title, ylabel=label)
        axes.set_xlabel("optimizer state, KiB")
        axes.margins(x=2 * _NAME_WIDTH, y=0.12)
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # Names need final ones.
        if not metric.higher:
            axes.invert_yaxis()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _name_points(axes, shown)
    figure.suptitle("Up and to the left is better; red and bold: this package")
    figure.savefig(path, metadata={"Software": None})


def _state_place(entry: Entry) -> tuple[float, float]:
    kilobytes = (entry.median("state_bytes") or np.nan) / 1024
    return kilobytes, entry.metric.factor * entry.mean


def _state_point(axes: Any, entry: Entry) -> None:
    finals = list(entry.finals.values())
    spread = np.std(finals, ddof=1) if len(finals) > 1 else 0.0
    axes.errorbar(
        *_state_place(entry),
        yerr=entry.metric.factor * spread,
        marker="o" if entry.ours else "s",
        markersize=10 if entry.ours else 7,
        color=OURS_COLOR if entry.ours else PEER_COLOR,
        capsize=3,
        zorder=3 if entry.ours else 2,
    )


def _name_points(axes: Any, found: Sequence[Entry]) -> None:
    """Names beside the points: to the left of those that have a neighbour."""
    places = axes.transAxes.inverted().transform(
        axes.transData.transform([_state_place(entry) for entry in found])
    )
    taken: list[tuple[float, float, bool]] = []
    for number in np.argsort(places[:, 1]):
        (x, y), entry = places[number], found[number]
        gaps = places - places[number]
        close = (gaps[:, 0] > 0.01) & (gaps[:, 0] < _NAME_WIDTH)
        left = bool((close & (abs(gaps[:, 1]) < 2 * _NAME_HEIGHT)).any())
        near = [
            h
            for other, h, side in taken
            if abs(other - x) < _NAME_WIDTH and side == left
        ]
        height = max([y, *(h + _NAME_HEIGHT for h in near)])
        taken.append((x, height, left))
        axes.annotate(
            *(entry.name, (x, y)),
            xytext=(x - 0.025 if left else x + 0.025, height),
            xycoords="axes fraction",
            ha="right" if left else "left",
            va="center",
            color=OURS_COLOR if entry.ours else PEER_COLOR,
            weight="bold" if entry.ours else "normal",
        )


def _style(entry: Entry) -> Style:
    """The same in every picture: by the place among `CONTENDERS`."""
    alike = [name for name, c in CONTENDERS.items() if c.ours == entry.ours]
    number, colors = alike.index(entry.name), WARM if entry.ours else COLD
    return {
        "color": colors[number % len(colors)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": "-" if entry.ours else "--",
    }


def _curve(
    axes: Any, x: np.ndarray, entry: Entry, values: np.ndarray, style: Style
) -> None:
    shown = _shown(entry, values)
    axes.plot(x, shown.mean(0), lw=2, markersize=5, label=entry.name, **style)
    axes.fill_between(
        x, shown.min(0), shown.max(0), color=style["color"], alpha=0.12, lw=0
    )


def _point(axes: Any, entry: Entry, style: Style) -> None:
    shown = _shown(entry, np.asarray(list(entry.finals.values())))
    mean = shown.mean()
    axes.errorbar(
        (entry.median("state_bytes") or np.nan) / 1024,
        mean,
        yerr=[[mean - shown.min()], [shown.max() - mean]],
        markersize=9,
        capsize=4,
        **{**style, "linestyle": "none"},
    )


def _shown(entry: Entry, values: np.ndarray) -> np.ndarray:
    """Accuracies as errors, so that the axis can be logarithmic."""
    return np.maximum(1 - values, _LEAST_ERROR) if entry.metric.higher else values


def _value_axis(axes: Any, found: Sequence[Entry], everything: bool) -> None:
    """From the best value to the worst one early on (curves) or at the end."""
    metric = found[0].metric
    finals = np.concatenate([_shown(e, e.curves()[1])[:, -1] for e in found])
    early = np.asarray([_shown(e, e.curves()[1]).mean(0)[0] for e in found])
    values = np.concatenate([finals, early]) if everything else finals
    values = values[np.isfinite(values)]
    if not values.size:
        return
    low, high = values.min(), values.max()
    if metric.higher:
        _accuracy_axis(axes, low / 1.15, min(1.0, high * 1.15))
    else:
        high = np.quantile(values, 0.9) if everything else high
        margin = 0.05 * max(high - low, 0.1)
        axes.set_ylim(low - margin, high + margin)


def _accuracy_axis(axes: Any, low: float, high: float) -> None:
    """Logarithmic in the error, labelled in accuracy: 98 and 99 % stay apart."""
    axes.set_yscale("log")
    axes.set_ylim(high, low)
    nice = np.outer([1e-3, 1e-2, 1e-1, 1], [1, 1.5, 2, 3, 4, 5, 6, 8]).ravel()
    axes.set_yticks([error for error in nice if low <= error <= high])
    axes.yaxis.set_major_formatter(lambda error, _: f"{100 * (1 - error):.4g}")
    axes.yaxis.set_minor_formatter(lambda error, _: "")
    axes.tick_params(axis="y", which="minor", length=0)
