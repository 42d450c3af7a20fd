"""How flat are the minima that the optimizers find, after equal training?"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.data import Data
from benchmarks.experiment import Order, Record, carry_out_run
from benchmarks.optimizers import Contender
from benchmarks.train import build
from benchmarks.workloads import Params, Workload
from dsbp_optax import diagnostics

#: Training samples that the curvature is taken over, and eigenvalues.
SAMPLES, COUNT = 512, 10
#: Radius of the m-sharpness; m is the batch size.
RADIUS = 0.05


def measure(workload: Workload, params: Params, data: Data) -> dict[str, Any]:
    """Curvature of the training loss at `params`.

    Returns:
      ``hessian_eigenvalues`` (descending), ``hessian_residuals``, ``hessian_trace``
      with its ``hessian_trace_error``, and ``m_sharpness``.
    """
    size = workload.batch_size
    batches = diagnostics.stack_batches(
        data.train.take(np.arange(start, start + size))
        for start in range(0, max(SAMPLES // size, 1) * size, size)
    )

    @jax.jit
    def figures(params: Params) -> Any:
        product = diagnostics.hessian_product(workload.loss, params, batches)
        top = diagnostics.top_eigenvalues(product, params, COUNT)
        trace = diagnostics.trace(product, params, jax.random.key(0), samples=16)
        rise = diagnostics.m_sharpness(workload.loss, params, batches, RADIUS)
        return top.values, top.residuals, trace, rise

    values, residuals, trace, rise = jax.device_get(figures(params))
    return {
        "hessian_eigenvalues": values.tolist(),
        "hessian_residuals": residuals.tolist(),
        "hessian_trace": float(trace.mean),
        "hessian_trace_error": float(trace.standard_error),
        "m_sharpness": float(rise),
    }


def placed(order: Order, seed: int) -> Order:
    """The same order from another seed."""
    return dataclasses.replace(order, seed=seed)


def compare(
    workload: Workload,
    data: Data,
    contenders: Sequence[tuple[Contender, Order]],
    seeds: Sequence[int],
    after_run: Callable[[], None] = lambda: None,
) -> list[Record]:
    """One record a contender and seed: that of the run, and how flat it ended.

    Args:
      workload: what to train.
      data: of the workload.
      contenders: each with the rate and length of its runs.
      seeds: of parameters and data order.
      after_run: called after each.
    """
    found = []
    for contender, order in contenders:
        program = build(workload, contender)
        for seed in seeds:
            record, run = carry_out_run(program, data, placed(order, seed))
            if not run.diverged:
                record |= measure(workload, run.params, data)
            found.append(record)
            after_run()
    return found
