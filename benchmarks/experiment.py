"""Several contenders, several seeds, one workload: results and their record."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks import records
from benchmarks.data import DataError, Split, batches
from benchmarks.optimizers import Contender, learning_rate_for
from benchmarks.train import Program, Run, build, train
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Settings:
    """What one experiment is told.

    Attributes:
      epochs: length of a run.
      batch_size: samples a step.
      seeds: one run each.
      learning_rate: for every contender; None for each its own.
      limit: train on the first so many samples; None for all.
    """

    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    learning_rate: float | None = None
    limit: int | None = None


@dataclass
class Result:
    """All runs of one contender."""

    program: Program
    source: str
    runs: list[Run] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The contender's name."""
        return self.program.contender.name

    def final_accuracies(self) -> np.ndarray:
        """Test accuracy at the end, by seed."""
        return np.asarray([run.test_accuracy[-1] for run in self.runs])

    def step_median(self, refreshing: bool) -> float | None:
        """Median seconds of the steps that refresh, or of those that do not."""
        seconds = np.concatenate([run.step_seconds for run in self.runs])
        flags = np.concatenate([run.refreshing for run in self.runs])
        chosen = seconds[flags == refreshing]
        return float(np.median(chosen)) if chosen.size else None


def run_experiment(
    workload: Workload,
    contenders: Sequence[Contender],
    split: Split,
    settings: Settings,
    progress: Progress,
) -> list[Result]:
    """Train every contender from every seed, the contenders taking turns.

    Args:
      workload: what to train.
      contenders: the optimizers.
      split: the data.
      settings: how.
      progress: bars to advance.

    Raises:
      DataError: when there are fewer training samples than one batch.
    """
    split = split.limited(settings.limit)
    steps = len(split.train_labels) // settings.batch_size
    if steps == 0:
        raise DataError(
            f"training set: got {len(split.train_labels)} samples, expected at least "
            f"one batch of {settings.batch_size}. Remedy: a smaller --batch-size or a "
            "larger --limit."
        )
    example = next(batches(split, settings.batch_size, np.random.default_rng(0)))
    total = len(contenders) * (1 + len(settings.seeds) * settings.epochs)
    task = progress.add_task("", total=total)
    results = []
    for contender in contenders:
        progress.update(task, description=f"compile {contender.name}")
        default, source = learning_rate_for(contender, workload.name)
        rate = settings.learning_rate
        rate, source = (default, source) if rate is None else (rate, "given")
        program = build(workload, contender, rate, steps * settings.epochs, example)
        results.append(Result(program, source))
        progress.advance(task)
    for seed in settings.seeds:
        for result in results:
            progress.update(task, description=f"{result.name}, seed {seed}")
            run = train(
                workload,
                result.program,
                split,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                seed=seed,
                after_epoch=lambda run: progress.advance(task),
            )
            result.runs.append(run)
    return results


def to_record(
    workload: Workload, settings: Settings, split: Split, results: Sequence[Result]
) -> dict[str, Any]:
    """Everything about an experiment, ready for JSON."""
    limited = split.limited(settings.limit)
    return {
        **records.environment(),
        "workload": workload.name,
        "schedule": workload.schedule_name,
        "train_samples": len(limited.train_labels),
        "test_samples": len(limited.test_labels),
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "seeds": settings.seeds,
        "optimizers": {result.name: _result_record(result) for result in results},
    }


def _result_record(result: Result) -> dict[str, Any]:
    program, final = result.program, result.final_accuracies()
    return {
        "learning_rate": program.learning_rate,
        "learning_rate_source": result.source,
        "learning_rate_grid": program.contender.grid,
        "hyperparameters": program.contender.hyperparameters(),
        "test_accuracy_mean": float(final.mean()),
        "test_accuracy_std": float(final.std(ddof=1)) if len(final) > 1 else None,
        "step_seconds_median": result.step_median(False),
        "refresh_step_seconds_median": result.step_median(True),
        "compile_seconds": program.compile_seconds,
        "state_bytes": program.state_bytes,
        "runs": [
            {
                "seed": run.seed,
                "diverged": run.diverged,
                "train_loss": run.train_loss,
                "test_accuracy": run.test_accuracy,
                "steps": len(run.step_seconds),
                "refresh_steps": sum(run.refreshing),
                "step_seconds_total": sum(run.step_seconds),
            }
            for run in result.runs
        ],
    }
