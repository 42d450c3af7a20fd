"""The picture of the scoreboard: test loss against the state of the kernels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from benchmarks.metrics import mean_interval
from benchmarks.plots import OURS_COLOR, PEER_COLOR

_CONTROL_COLOR = "#8a6d3b"


class Point(NamedTuple):
    """One contender.

    Attributes:
      name: as in the tables.
      share: of the plain optimizer's state for kernels.
      values: test losses of its seeds.
      kind: "ours", "control" of ours, or "peer".
    """

    name: str
    share: float
    values: Sequence[float]
    kind: str

    @property
    def mean(self) -> float:
        """Of the losses."""
        return float(np.mean(self.values))


#: Plain optimizer -> points.
Panels: TypeAlias = dict[str, list[Point]]

_LOOKS: dict[str, dict[str, Any]] = {
    "ours": {"color": OURS_COLOR, "marker": "o", "markersize": 9},
    "control": {"color": _CONTROL_COLOR, "marker": "o", "markerfacecolor": "white"},
    "peer": {"color": PEER_COLOR, "marker": "s", "markersize": 7},
}
#: Least distance of two names, that of a name from its points, and that of points side
#: by side, in parts of the axes.
_LINE, _AWAY, _ASIDE = 0.055, 0.035, 0.02
#: Shares of which one is less than so many times the other stand side by side.
_ALIKE = 1.15
_NAMES = {"muon": "Muon", "adamw": "AdamW"}


def plot(panels: Panels, path: Path) -> None:
    """One panel a plain optimizer; better is down and to the left.

    Args:
      panels: what to draw; bars are the 95 % t interval of the mean.
      path: the PNG. Its bytes follow from the records and Matplotlib's version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6.6 * len(panels), 5.2), dpi=120, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (plain, points) in zip(row, panels.items(), strict=True):
        title = _NAMES.get(plain, plain)
        axes.set(xscale="log", title=f"in the place of {title}")
        axes.set_xlabel(f"state of the kernels, % of {title}'s")
        axes.set_ylabel("test loss, nats")
        span = _span(axes, points)
        for column in columns(points):
            _mark(axes, column, span)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Small GPT, Tiny Shakespeare: down and to the left is better. Red and bold: "
        "this package;\nhollow: its controls, which take a part away; blue: others. "
        "Bars: 95 % interval of the mean; alike states side by side"
    )
    figure.draw_without_rendering()  # Places are known from here on.
    for axes, points in zip(row, panels.values(), strict=True):
        axes.set_ylim(axes.get_ylim())
        for column in columns(points):
            _name(axes, column)
    figure.savefig(path, metadata={"Software": None})


def columns(points: Sequence[Point]) -> list[list[Point]]:
    """Points whose states are about alike, each column from the least loss upwards."""
    found: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.share):
        if found and point.share < _ALIKE * found[-1][0].share:
            found[-1].append(point)
        else:
            found.append([point])
    return [sorted(column, key=lambda point: point.mean) for column in found]


def _span(axes: Any, points: Sequence[Point]) -> float:
    """Room for names to the right; ticks at round shares; width in factors of e."""
    shares = 100 * np.asarray([point.share for point in points])
    low, high = shares.min() / 1.5, shares.max() * 1.5
    end = high * (high / low) ** 0.4
    axes.set_xlim(low, end)
    ticks = np.outer(10.0 ** np.arange(-1, 5), [1, 2, 5]).ravel()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(axis="x", which="minor", length=0)
    return float(np.log(end / low))


def _mark(axes: Any, column: Sequence[Point], span: float) -> None:
    """Points and bars about the middle of a column."""
    places = _middle(column) * np.exp(span * _aside(column))
    for point, x in zip(column, places, strict=True):
        interval = mean_interval(point.values)
        axes.errorbar(
            *(x, point.mean),
            yerr=0.0 if interval is None else point.mean - interval[1],
            capsize=3,
            zorder=3 if point.kind == "ours" else 2,
            **_LOOKS[point.kind],
        )


def _middle(column: Sequence[Point]) -> float:
    """Its share, in percent."""
    return 100 * float(np.exp(np.mean([np.log(point.share) for point in column])))


def _aside(column: Sequence[Point]) -> np.ndarray:
    """What keeps its points apart, in parts of the axes."""
    return _ASIDE * (np.arange(len(column)) - (len(column) - 1) / 2)


def _name(axes: Any, column: Sequence[Point]) -> None:
    """Names to the right of a column, with lines to its points."""
    data = [(_middle(column), point.mean) for point in column]
    data = axes.transData.transform(data)
    places = axes.transAxes.inverted().transform(data)
    aside = _aside(column)
    heights = apart(places[:, 1], _LINE)
    for point, (x, y), offset, height in zip(
        column, places, aside, heights, strict=True
    ):
        axes.annotate(
            *(point.name, (x + offset, y)),
            xytext=(x + aside[-1] + _AWAY, height),
            textcoords="axes fraction",
            xycoords="axes fraction",
            va="center",
            color=_LOOKS[point.kind]["color"],
            weight="bold" if point.kind == "ours" else "normal",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "#999999"},
        )


def apart(heights: Sequence[float], least: float) -> np.ndarray:
    """Sorted heights moved as little as keeps them `least` apart.

    Neighbours that are too close become one block about their mean.
    """
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([float(height)])
        while len(blocks) > 1 and _end(blocks[-2], least, 1) + least > _end(
            blocks[-1], least, -1
        ):
            last = blocks.pop()
            blocks[-1] += last
    return np.concatenate(
        [
            np.mean(block) + least * (np.arange(len(block)) - (len(block) - 1) / 2)
            for block in blocks
        ]
    )


def _end(block: Sequence[float], least: float, side: int) -> float:
    return float(np.mean(block)) + side * least * (len(block) - 1) / 2
