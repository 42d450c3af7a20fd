"""How flat are the minima that the optimizers find, after equal training?"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.data import Data
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
    count = max(min(SAMPLES, len(data.train)) // size, 1)

    def read() -> Iterator[Any]:
        for start in range(0, count * size, size):
            yield data.train.take(np.arange(start, start + size))

    batches = diagnostics.stream_batches(read)
    product = diagnostics.hessian_product(workload.loss, params, batches)
    top = diagnostics.top_eigenvalues(product, params, COUNT)
    trace = diagnostics.trace(product, params, jax.random.key(0), samples=16)
    rise = diagnostics.m_sharpness(workload.loss, params, batches, RADIUS)
    values, residuals = jax.device_get((top.values, top.residuals))
    return {
        "hessian_eigenvalues": values.tolist(),
        "hessian_residuals": residuals.tolist(),
        "hessian_trace": float(trace.mean),
        "hessian_trace_error": float(trace.standard_error),
        "m_sharpness": float(rise),
    }
