"""A picture of minima: accuracy against sharpness, and the KL term along training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks import minima
from benchmarks.experiment import Record
from benchmarks.optimizers import CONTENDERS
from benchmarks.plots import COLD, OURS_COLOR, PEER_COLOR, WARM
from benchmarks.workloads import WORKLOADS


def plot_minima(panels: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Two panels a workload; flat and accurate is up and to the left.

    Args:
      panels: workload -> final records of `benchmarks.minima`; bars span a standard
        deviation.
      path: the PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (5.4 * 2, 4.2 * len(panels))
    figure = Figure(figsize=shape, dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False)
    for (name, found), (left, right) in zip(panels.items(), rows, strict=True):
        groups = {key: _sound(runs) for key, runs in minima.grouped(found).items()}
        _sharpness(left, name, groups)
        _divergence(right, groups)
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


def _sharpness(axes: Any, name: str, groups: Mapping[Any, Sequence[Record]]) -> None:
    metric = WORKLOADS[name].metric
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
        axes.annotate(
            *(label, (tops.mean(), values.mean())),
            xytext=(6, 6),
            textcoords="offset points",
            color=color,
            weight="bold" if ours else "normal",
        )
    axes.set(xscale="log", title=name, ylabel=metric.label)
    axes.set_xlabel("largest eigenvalue of the Hessian of the training loss")
    axes.margins(x=0.25, y=0.12)
    _tidy(axes)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")


def _divergence(axes: Any, groups: Mapping[Any, Sequence[Record]]) -> None:
    places = {True: 0, False: 0}
    for (label, _), runs in groups.items():
        curve = minima.mean_curve(runs, "kl")
        if curve is None:
            continue
        ours = CONTENDERS[runs[0]["optimizer"]].ours
        colors = WARM if ours else COLD
        axes.plot(
            [point["step"] for point in runs[0]["curve"]],
            curve / 1e3,
            color=colors[places[ours] % len(colors)],
            linestyle="-" if ours else "--",
            label=label,
        )
        places[ours] += 1
    axes.set(xlabel="step", ylabel="KL from the start, thousands of nats")
    axes.set_ylim(0, None)
    axes.legend(frameon=False)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
