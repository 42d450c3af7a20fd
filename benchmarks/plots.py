"""Pictures of an experiment, as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.experiment import Result
from benchmarks.train import Run

#: Warm and solid: this package. Cold and dashed: the others.
_STYLES = {
    "dsbp": ("#f0a04b", "-", "s"),
    "dsbp_sgd": ("#d1495b", "-", "o"),
    "dsbp_adamw": ("#7d1128", "-", "D"),
    "sgd": ("#30638e", "--", "o"),
    "adam": ("#003d5b", "--", "D"),
    "sam": ("#00a6a6", "--", "^"),
    "galore": ("#6a994e", "--", "v"),
    "muon": ("#7a7a7a", "--", "P"),
}


def plot_curves(results: Sequence[Result], title: str, path: Path) -> None:
    """Training loss and test accuracy by epoch; the band spans the seeds.

    Args:
      results: one a contender.
      title: above both panels.
      path: the PNG.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result in results:
        _curve(left, result, lambda run: run.train_loss)
        _curve(right, result, lambda run: 100 * np.asarray(run.test_accuracy))
    left.set(yscale="log", xlabel="epoch", ylabel="training loss (epoch mean)")
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    right.set_ylim(*_accuracy_limits(results))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def plot_memory(results: Sequence[Result], title: str, path: Path) -> None:
    """Final test accuracy against the bytes of optimizer state.

    Args:
      results: one a contender.
      title: above the picture.
      path: the PNG.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        final = 100 * result.final_accuracies()
        color, _, marker = _STYLES[result.name]
        axes.errorbar(
            result.program.state_bytes / 1024,
            final.mean(),
            yerr=final.std(ddof=1) if len(final) > 1 else None,
            color=color,
            marker=marker,
            markersize=9,
            capsize=4,
            linestyle="none",
            label=f"{result.name}: {final.mean():.1f} %",
        )
    axes.set(
        xscale="log", xlabel="optimizer state, KiB", ylabel="final test accuracy, %"
    )
    axes.set_ylim(*_accuracy_limits(results, final=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _curve(axes: Any, result: Result, read: Callable[[Run], Any]) -> None:
    color, line, _ = _STYLES[result.name]
    values = np.asarray([read(run) for run in result.runs])
    epochs = np.arange(1, values.shape[1] + 1)
    axes.plot(
        epochs, values.mean(0), color=color, linestyle=line, lw=2, label=result.name
    )
    axes.fill_between(
        epochs, values.min(0), values.max(0), color=color, alpha=0.15, lw=0
    )


def _accuracy_limits(
    results: Sequence[Result], final: bool = False
) -> tuple[float, float]:
    """From a little under the worst final accuracy to a little over the best."""
    accuracies = 100 * np.concatenate([r.final_accuracies() for r in results])
    low, high = float(accuracies.min()), float(accuracies.max())
    margin = max(0.5, 0.08 * (high - low))
    if not final:
        low = min(low, high - 10)
    return max(0.0, low - margin), min(100.5, high + margin)
