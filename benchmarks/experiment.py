"""One run and its record."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import kernels, records, timing
from benchmarks.data import Data, DataError
from benchmarks.train import Observe, Program, Run, train

Record = dict[str, Any]


@dataclass(frozen=True)
class Order:
    """One run as it is asked for.

    Attributes:
      phase: "tune" or "final": judged on validation or on test samples.
      rate: the learning rate.
      seed: of parameters and data order.
      steps: length.
      quick: whether lengths are those of ``--quick``.
      round: of the tuning, from 1; 0 for final runs.
      source: where the learning rate comes from.
    """

    phase: str
    rate: float
    seed: int
    steps: int
    quick: bool = False
    round: int = 0
    source: str = "tuned"


def carry_out(
    program: Program,
    data: Data,
    order: Order,
    after_step: Callable[[], None] = lambda: None,
) -> Record:
    """Train once and describe it; `carry_out_run` returns the run as well.

    Args:
      program: workload and contender, compiled.
      data: of the workload.
      order: what to do.
      after_step: called after each step.

    Raises:
      DataError: when there are fewer training samples than one batch.
    """
    return carry_out_run(program, data, order, after_step)[0]


def carry_out_run(
    program: Program,
    data: Data,
    order: Order,
    after_step: Callable[[], None] = lambda: None,
    observe: Observe = lambda params, opt_state: {},
) -> tuple[Record, Run]:
    """The record of a run, and the run; `observe` as for `train`."""
    workload = program.workload
    if len(data.train) < workload.batch_size:
        raise DataError(
            f"training set: got {len(data.train)} samples, expected at least one batch "
            f"of {workload.batch_size}. Remedy: more data, or a larger --limit."
        )
    final = order.phase == "final"
    start = time.perf_counter()
    run = train(
        program,
        data,
        data.test if final else data.validation,
        rate=order.rate,
        steps=order.steps,
        seed=order.seed,
        after_step=after_step,
        observe=observe,
    )
    record = _describe(program, order, run)
    if final:
        value = workload.measure(run.params, data.validation, None)
        record["validation_value"] = value
    seconds = time.perf_counter() - start
    record |= {"seconds": seconds, "train_samples": len(data.train)}
    return record, run


def _describe(program: Program, order: Order, run: Run) -> Record:
    workload, contender = program.workload, program.contender
    final, value = order.phase == "final", run.curve[-1]["value"]
    metric = workload.metric.final_key if final else workload.metric.tuning_key
    return {
        "workload": workload.name,
        "optimizer": contender.name,
        "phase": order.phase,
        "round": order.round,
        "learning_rate": order.rate,
        "learning_rate_source": order.source,
        "seed": order.seed,
        "steps": order.steps,
        "quick": order.quick,
        "batch_size": workload.batch_size,
        "schedule": workload.schedule.__doc__,
        "clip": workload.clip,
        "hyperparameters": contender.hyperparameters(),
        "judged_on": "test" if final else "validation",
        "metric": metric,
        metric: None if run.diverged else value,
        "train_loss": run.curve[-1]["train_loss"],
        "diverged": run.diverged,
        "curve": run.curve,
        **_times(run),
        **program.figures,
        "projected_state_counts": kernels.COUNTED,
        **records.environment(),
    }


def _times(run: Run) -> dict[str, float | None]:
    """Medians in milliseconds; the mean step weighs refresh steps by their share."""
    seconds, refreshing = np.asarray(run.step_seconds), np.asarray(run.refreshing)
    return {
        "step_ms": _median(seconds[~refreshing]),
        "refresh_step_ms": _median(seconds[refreshing]),
        "mean_step_ms": 1e3 * timing.stratified_median(seconds, refreshing),
    }


def _median(seconds: np.ndarray) -> float | None:
    return float(1e3 * np.median(seconds)) if seconds.size else None
