"""The grid of learning rates, judged on data held out of the training set."""

from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.data import Split
from benchmarks.experiment import Settings, run_experiment
from benchmarks.optimizers import Contender
from benchmarks.workloads import Workload

#: Share of the training set that judges; the test set is never looked at.
HELD_OUT = 0.2


def run_grid(
    workload: Workload,
    contender: Contender,
    split: Split,
    settings: Settings,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train at every learning rate of the contender's grid.

    Args:
      workload: what to train.
      contender: the optimizer.
      split: the data, test set included.
      settings: how; its learning rate is replaced.
      progress: bars to advance.

    Returns:
      One row a learning rate: ``learning_rate``, ``accuracies`` by seed,
      ``accuracy_mean``, ``final_loss``, ``diverged``.
    """
    kept = split.limited(settings.limit).held_out(HELD_OUT)
    rows = []
    for rate in contender.grid:
        tried = Settings(settings.epochs, settings.batch_size, settings.seeds, rate)
        (result,) = run_experiment(workload, [contender], kept, tried, progress)
        accuracies = result.final_accuracies()
        rows.append(
            {
                "learning_rate": rate,
                "accuracies": accuracies.tolist(),
                "accuracy_mean": float(accuracies.mean()),
                "final_loss": float(np.mean([r.train_loss[-1] for r in result.runs])),
                "diverged": any(run.diverged for run in result.runs),
            }
        )
    return rows
