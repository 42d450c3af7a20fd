"""Pictures: bytes follow from the records and the versions of the libraries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from adjustText import adjust_text
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.core.records import Record
from benchmarks.core.statistics import Interval, mean_interval, spread
from benchmarks.optimizers import CONTENDERS
from benchmarks.peers import CONTENDERS as PEERS
from benchmarks.report import tables
from benchmarks.report.entries import Entry
from benchmarks.tasks.base import Workload

#: Warm and solid: this package. Cold and dashed: the others.
WARM = (
    *("#f0a04b", "#d1495b", "#7d1128", "#c71f8f"),
    *("#8c564b", "#e377c2", "#b8860b", "#ff6f3c"),
)
COLD = ("#30638e", "#003d5b", "#00a6a6", "#6a994e", "#7a7a7a", "#6a5acd", "#5fb0e5")
OURS, CONTROL, PEER = "#b3202f", "#8a6d3b", "#30638e"
_LEAST_ERROR = 1e-3


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def style(name: str) -> dict[str, Any]:
    """The same in every picture: by the place among `CONTENDERS`."""
    ours = CONTENDERS[name].ours
    alike = [other for other, c in CONTENDERS.items() if c.ours == ours]
    number, colors = alike.index(name), WARM if ours else COLD
    return {
        "color": colors[number % len(colors)],
        "linestyle": "-" if ours else "--",
        "marker": "oD^vPsX"[number % 7],
    }


def _tidy(axes: Any, logarithmic: bool = False) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")


def _named(axes: Any, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Names beside points ``(name, x, y, color)``, where they cover no other."""
    axes.margins(x=0.25, y=0.15)
    texts = [
        axes.text(
            1.03 * x, y, name, color=color, weight="bold" if color == OURS else "normal"
        )
        for name, x, y, color in points
    ]
    arrows = {"arrowstyle": "-", "lw": 0.5, "color": "#999999"}
    adjust_text(texts, ax=axes, arrowprops=arrows, expand=(1.1, 1.3))


def comparison(found: Sequence[Entry], title: str, path: Path) -> None:
    """The metric by step and by time, and the final one by bytes of state.

    Bands and bars are the range over the seeds; accuracies are shown as errors.
    """
    figure = Figure(figsize=(17, 5.6), dpi=120, layout="constrained")
    panels, higher = figure.subplots(1, 3), found[0].metric.higher

    def shown(values: Any) -> np.ndarray:
        array = np.asarray(values, float)
        return np.maximum(1 - array, _LEAST_ERROR) if higher else array

    for entry in found:
        (steps, values), look = entry.curves(), style(entry.name)
        curve = shown(values)
        for axes, x in zip(panels, (steps, steps * entry.step_seconds), strict=False):
            axes.plot(x, curve.mean(0), lw=2, markersize=5, label=entry.name, **look)
            low, high = curve.min(0), curve.max(0)
            axes.fill_between(x, low, high, color=look["color"], alpha=0.12, lw=0)
        ends = shown(list(entry.finals.values()))
        panels[2].errorbar(
            (entry.median("state_bytes") or np.nan) / 1024,
            ends.mean(),
            yerr=[[ends.mean() - ends.min()], [ends.max() - ends.mean()]],
            markersize=9,
            capsize=4,
            **{**look, "linestyle": "none"},
        )
    words = "step", "training time, s", "optimizer state, KiB"
    for number, (axes, word) in enumerate(zip(panels, words, strict=True)):
        _tidy(axes, logarithmic=number == 2)
        axes.set_xlabel(word)
        if higher:
            axes.set_yscale("log")
            axes.invert_yaxis()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * (1 - y):.4g}")
            axes.yaxis.set_minor_formatter(lambda y, _: "")
    panels[0].set_ylabel(found[0].metric.label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(f"{title}; bands and bars: range over seeds")
    save(figure, path)


def against_state(panels: Mapping[str, Sequence[Entry]], path: Path) -> None:
    """The final metric by bytes of state; better is up and to the left."""
    figure = Figure(figsize=(6.2 * len(panels), 4.4), dpi=120, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, found) in zip(row, panels.items(), strict=True):
        metric, points = found[0].metric, []
        for entry in found:
            x = (entry.median("state_bytes") or np.nan) / 1024
            y = metric.factor * entry.mean
            wide = metric.factor * (spread(list(entry.finals.values())) or 0.0)
            color = OURS if entry.ours else PEER
            marker = "o" if entry.ours else "s"
            axes.errorbar(x, y, yerr=wide, marker=marker, color=color, capsize=3)
            points.append((entry.name, x, y, color))
        label = metric.label + " (lower is up)" * (not metric.higher)
        axes.set(title=title, ylabel=label, xlabel="optimizer state, KiB")
        _tidy(axes, logarithmic=True)
        if not metric.higher:
            axes.invert_yaxis()
        _named(axes, points)
    figure.suptitle("Up and to the left is better; red and bold: this package")
    save(figure, path)


def scoreboard(rows: Sequence[Record], key: str, path: Path) -> None:
    """Test loss by the state of the kernels, a panel a plain optimizer."""
    finals = tables.finals_of(rows)
    kinds = dict.fromkeys(PEERS[name].plain for name in finals)
    figure = Figure(figsize=(6.6 * len(kinds), 5.2), dpi=120, layout="constrained")
    row = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, plain in zip(row, kinds, strict=True):
        points = []
        for name, runs in finals.items():
            share = tables.share_of(runs, finals.get(plain))
            values = [run[key] for run in runs.values()]
            if PEERS[name].plain != plain or share is None or None in values:
                continue
            color = CONTROL if PEERS[name].rule else OURS
            color = color if PEERS[name].ours else PEER
            share *= 1.04 ** sum(abs(100 * share / x - 1) < 0.15 for _, x, *_ in points)
            interval = mean_interval(values) or Interval(
                values[0], values[0], values[0]
            )
            axes.errorbar(
                *(100 * share, interval.value, interval.value - interval.low),
                marker="s" if color == PEER else "o",
                markerfacecolor="white" if color == CONTROL else color,
                color=color,
                capsize=3,
            )
            points.append((name, 100 * share, interval.value, color))
        _tidy(axes, logarithmic=True)
        title = {"muon": "Muon", "adamw": "AdamW"}.get(plain, plain)
        axes.set(title=f"in the place of {title}", ylabel="test loss, nats")
        axes.set_xlabel(f"state of the kernels, % of {title}'s")
        _named(axes, points)
    figure.suptitle(
        "Small GPT, Tiny Shakespeare: down and to the left is better. Red and bold: "
        "this package;\nhollow: its controls, which take a part away; blue: others. "
        "Bars: 95 % interval of the mean"
    )
    save(figure, path)


def minima(panels: Sequence[tuple[Workload, Sequence[Record]]], path: Path) -> None:
    """Accuracy against sharpness, and the KL term along training; a row a workload."""
    figure = Figure(figsize=(12, 4.2 * len(panels)), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False)
    for (workload, found), (left, right) in zip(panels, rows, strict=True):
        metric, points = workload.metric, []
        sound = [run for run in found if not run["diverged"]]
        for (name, _), runs in tables.grouped(sound).items():
            optimizer = runs[0]["optimizer"]
            color = OURS if CONTENDERS[optimizer].ours else PEER
            key = "hessian_eigenvalues"
            tops = [run[key][0] for run in runs if key in run]
            values = [metric.factor * run[metric.test] for run in runs]
            if tops:
                x, y = float(np.mean(tops)), float(np.mean(values))
                bars = {"xerr": spread(tops), "yerr": spread(values), "capsize": 3}
                left.errorbar(x, y, marker="o", color=color, **bars)
                points.append((name, x, y, color))
            curve = tables.mean_curve(runs, "kl")
            if curve is not None:
                steps = [point["step"] for point in runs[0]["curve"]]
                look = {**style(optimizer), "marker": None}
                right.plot(steps, curve / 1e3, label=name, **look)
        left.set(title=workload.name, ylabel=metric.label)
        left.set_xlabel("largest eigenvalue of the Hessian of the training loss")
        right.set(xlabel="step", ylabel="KL from the start, thousands of nats")
        right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        _tidy(left, logarithmic=True)
        _tidy(right)
        _named(left, points)
    save(figure, path)


def effects(
    found: Mapping[str, Mapping[str, Mapping[str, Interval]]], path: Path
) -> None:
    """Effects and their intervals: figure -> workload -> effect, in decades.

    All main effects, and the eight largest interactions whose interval has no 0.
    """
    first = next(iter(found.values()))
    clear = {
        name: max(abs(some[name].value) for some in first.values())
        for some in first.values()
        for name, one in some.items()
        if " x " in name and one.low * one.high > 0
    }
    names = [name for name in next(iter(first.values())) if " x " not in name]
    names += sorted(clear, key=lambda name: -clear[name])[:8]
    size = 12.5, 2 + 0.34 * len(names)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (title, workloads) in zip(panels, found.items(), strict=True):
        for place, (workload, some) in enumerate(workloads.items()):
            rows = np.arange(len(names)) + 0.26 * (place - (len(workloads) - 1) / 2)
            chosen = np.asarray([some[name] for name in names])
            ends = np.abs(chosen[:, 1:] - chosen[:, :1]).T
            look = {"fmt": "os^"[place % 3], "color": (OURS, PEER, CONTROL)[place % 3]}
            axes.errorbar(
                chosen[:, 0], rows, xerr=ends, label=workload, capsize=3, **look
            )
        axes.axvline(0, color="black", lw=1)
        _tidy(axes)
        axes.xaxis.set_major_formatter(lambda x, _: f"{10**x:.2g}")
        axes.set(xlabel=f"{title}, times (left is better)")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[-1].legend(frameon=False)
    save(figure, path)
