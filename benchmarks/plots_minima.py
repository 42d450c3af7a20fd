"""A picture of minima: accuracy against sharpness, and the KL term along training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

from benchmarks import minima
from benchmarks.experiment import Record
from benchmarks.optimizers import CONTENDERS
from benchmarks.plots import COLD, OURS_COLOR, PEER_COLOR, WARM
from benchmarks.workloads import WORKLOADS


class _Point(NamedTuple):
    """A name, a place in data, and a color."""

    name: str
    place: tuple[float, float]
    color: str


def plot_minima(panels: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Two panels a workload; flat and accurate is up and to the left.

    Args:
      panels: workload -> final records of `benchmarks.minima`; bars span a standard
        deviation.
      path: the PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (6.0 * 2, 4.2 * len(panels))
    figure = Figure(figsize=shape, dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False)
    for (name, found), (left, right) in zip(panels.items(), rows, strict=True):
        groups = {key: _sound(runs) for key, runs in minima.grouped(found).items()}
        named = _sharpness(left, name, groups)
        _divergence(right, groups)
        figure.draw_without_rendering()  # Places are known from here on.
        _name(left, named)
    figure.savefig(path, metadata={"Software": None})


def with_curvature(
    found: Mapping[str, Sequence[Record]],
) -> dict[str, Sequence[Record]]:
    """The workloads of which some record tells of curvature."""
    return {
        name: runs
        for name, runs in found.items()
        if any("hessian_eigenvalues" in run for run in runs)
    }


def _sound(runs: Sequence[Record]) -> list[Record]:
    return [run for run in runs if not run["diverged"]]


def _sharpness(
    axes: Any, name: str, groups: Mapping[Any, Sequence[Record]]
) -> list[_Point]:
    """Points with bars, still without their names."""
    metric, points = WORKLOADS[name].metric, []
    for (label, _), runs in groups.items():
        seen = [run for run in runs if "hessian_eigenvalues" in run]
        if not seen:
            continue
        tops = np.asarray([run["hessian_eigenvalues"][0] for run in seen])
        values = metric.factor * np.asarray([run[metric.final_key] for run in runs])
        ours = CONTENDERS[runs[0]["optimizer"]].ours
        color = OURS_COLOR if ours else PEER_COLOR
        axes.errorbar(
            *(tops.mean(), values.mean()),
            xerr=tops.std(ddof=1) if len(tops) > 1 else None,
            yerr=values.std(ddof=1) if len(values) > 1 else None,
            marker="o" if ours else "s",
            color=color,
            capsize=3,
        )
        points.append(_Point(label, (tops.mean(), values.mean()), color))
    axes.set(xscale="log", title=name, ylabel=metric.label)
    axes.set_xlabel("largest eigenvalue of the Hessian of the training loss")
    axes.margins(x=0.32, y=0.12)
    _tidy(axes)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    return points


#: Where a name may stand beside its point, the best place first.
_CORNERS = tuple(
    {
        "xytext": (x, y),
        "ha": "left" if x > 0 else "right",
        "va": "bottom" if y > 0 else "top",
    }
    for x in (6, -6)
    for y in (6, -6)
)


def _name(axes: Any, points: Sequence[_Point]) -> None:
    """Names beside points, where they cover no other name and no point."""
    places = (axes.transData.transform(point.place) for point in points)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    for number, point in enumerate(points):
        others = taken[:number] + taken[number + 1 :]
        for corner in _CORNERS:
            text = axes.annotate(
                *(point.name, point.place),
                textcoords="offset points",
                color=point.color,
                weight="bold" if point.color == OURS_COLOR else "normal",
                **corner,
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in others):
                break
            text.remove()
        else:
            text = axes.annotate(point.name, point.place, color=point.color)
            box = text.get_window_extent()
        taken.append(box)


def _divergence(axes: Any, groups: Mapping[Any, Sequence[Record]]) -> None:
    places = {True: 0, False: 0}
    curves = {key: minima.mean_curve(runs, "kl") for key, runs in groups.items()}
    known = {key: curve for key, curve in curves.items() if curve is not None}
    for key, curve in sorted(known.items(), key=lambda item: -item[1][-1]):
        label, runs = key[0], groups[key]
        ours = CONTENDERS[runs[0]["optimizer"]].ours
        colors = WARM if ours else COLD
        axes.plot(
            [point["step"] for point in runs[0]["curve"]],
            curve / 1e3,
            color=colors[places[ours] % len(colors)],
            linestyle=("-" if places[ours] < len(colors) else "-.") if ours else "--",
            label=label,
        )
        places[ours] += 1
    axes.set(xlabel="step", ylabel="KL from the start, thousands of nats")
    axes.set_ylim(0, None)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
