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

_LEAST_ERROR = 0.1


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
        _curve(right, result, lambda run: _errors(run.test_accuracy))
    left.set(yscale="log", xlabel="epoch", ylabel="training loss (epoch mean)")
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    _accuracy_axis(right)
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
        errors = _errors(result.final_accuracies())
        mean = errors.mean()
        color, _, marker = _STYLES[result.name]
        axes.errorbar(
            result.program.state_bytes / 1024,
            mean,
            yerr=[[mean - errors.min()], [errors.max() - mean]],
            color=color,
            marker=marker,
            markersize=9,
            capsize=4,
            linestyle="none",
            label=f"{result.name}: {100 - mean:.1f} %",
        )
    axes.set(
        xscale="log", xlabel="optimizer state, KiB", ylabel="final test accuracy, %"
    )
    _accuracy_axis(axes)
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


def _errors(accuracies: Any) -> np.ndarray:
    """Percent of wrong answers, at least the least that the axis shows."""
    return np.maximum(100 * (1 - np.asarray(accuracies)), _LEAST_ERROR)


def _accuracy_axis(axes: Any) -> None:
    """Logarithmic in the error, labelled in accuracy: 98 and 99 % stay apart."""
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_yticks([80, 50, 20, 10, 5, 2, 1, 0.5])
    axes.yaxis.set_major_formatter(lambda error, _: f"{100 - error:g}")
    axes.yaxis.set_minor_formatter(lambda error, _: "")
    axes.tick_params(axis="y", which="minor", length=0)
