"""Read-only figures: what an optimizer does with each parameter, and how it fares."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _layout, _plan, _spectral
from dsbp_optax._curvature import (
    Density,
    Eigenvalues,
    Estimate,
    gauss_newton_product,
    hessian_product,
    m_sharpness,
    spectral_density,
    stack_batches,
    top_eigenvalues,
    trace,
)
from dsbp_optax._eigenbasis import Schedule
from dsbp_optax._plan import Decision
from dsbp_optax._types import Array, PyTree, state_bytes

__all__ = [
    "Decision",
    "Density",
    "Eigenvalues",
    "Estimate",
    "explain",
    "gauss_newton_product",
    "hessian_product",
    "m_sharpness",
    "metrics",
    "spectral_density",
    "stack_batches",
    "state_bytes",
    "top_eigenvalues",
    "trace",
]


class Explanation(dict[str, list[Decision]]):
    """Path -> decisions, one for each spectral transformation; prints as a table."""

    def __str__(self) -> str:
        width = max((len(path) for path in self), default=4)
        lines = [f"{'path':{width}}  what is done, and why"]
        for path, decisions in self.items():
            for choice in decisions:
                verb = "projected" if choice.projected else "full space"
                lines.append(f"{path:{width}}  {verb}: {choice.reason}")
        return "\n".join(lines)


def explain(tx: optax.GradientTransformation, params: PyTree) -> Explanation:
    """What `tx` will do with each parameter, and why; allocates nothing.

    Sees through chains, masks, partitions and other wrappers: it listens while
    ``tx.init`` is evaluated on shapes.

    Args:
      tx: any optimizer that contains transformations of this package.
      params: parameters, or a tree of `jax.ShapeDtypeStruct`.

    Returns:
      Path -> list of `Decision`; ``print`` it for a table.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> print(dsbp_optax.diagnostics.explain(dsbp_optax.dsbp_sgd(0.1), params))
      path    what is done, and why
      bias    full space: fewer than two axes
      kernel  projected: input side, rank 8 of 64
    """
    plans: list[dict[str, Decision]] = []
    token = _plan.OBSERVER.set(plans)
    try:
        jax.eval_shape(lambda tree: tx.init(tree), params)  # anew: jax keeps traces
    finally:
        _plan.OBSERVER.reset(token)
    found = Explanation()
    for path in _layout.flatten_with_paths(params)[0]:
        found[path] = [plan[path] for plan in plans if path in plan]
    return found


def metrics(opt_state: PyTree) -> dict[str, Array]:
    """Scalars for a logger: a flat dict ``"dsbp/<figure>/<path>" -> ()``.

    For each projected parameter: ``energy`` (share of the gradient inside the basis
    at the last refresh), ``leading_share`` (``lambda_1 / tr C``), ``explained``
    (``sum lambda / tr C``), ``effective_rank`` (``(sum lambda)^2 / sum lambda^2``),
    ``residual`` (of the eigenpairs), ``failures``, ``iterations`` and ``staleness``
    (steps since the last refresh that was accepted); with an adaptive interval
    ``interval``, ``drift`` and ``jitter``, with an adaptive rank ``active_rank``; of
    the whole: ``step`` and ``skipped``. Stacked kernels are averaged, but for the
    staleness, which is the greatest. Can be jit-compiled.

    Args:
      opt_state: any nest of optax states.

    Returns:
      A flat dict of scalar arrays.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2)
      >>> state = tx.init({"kernel": jnp.ones((8, 8))})
      >>> int(dsbp_optax.diagnostics.metrics(state)["dsbp/step"])
      0
    """
    figures: dict[str, Array] = {}
    for state in _spectral.find_states(opt_state):
        suffix = _spectral.STATES[type(state)]
        for path, spectrum in state.spectrum.items():
            for name, value in _layer_metrics(spectrum).items():
                figures[f"dsbp/{name}/{path}{suffix}"] = jnp.mean(value)
            behind = jnp.max(state.step - 1 - spectrum.refreshed)
            figures[f"dsbp/staleness/{path}{suffix}"] = behind
            for name, value in _decisions(state.schedule.get(path)).items():
                figures[f"dsbp/{name}/{path}{suffix}"] = jnp.max(value)
        figures[f"dsbp/step{suffix}"] = jnp.asarray(state.step)
        figures[f"dsbp/skipped{suffix}"] = jnp.asarray(state.skipped)
    return figures


def _layer_metrics(spectrum: Any) -> Mapping[str, Array]:
    values, whole = spectrum.eigenvalues, spectrum.trace[..., 0]
    total, tiny = jnp.sum(values, -1), jnp.finfo(values.dtype).tiny
    return {
        "energy": spectrum.energy,
        "leading_share": values[..., 0] / jnp.maximum(whole, tiny),
        "explained": total / jnp.maximum(whole, tiny),
        "effective_rank": total**2 / jnp.maximum(jnp.sum(values**2, -1), tiny),
        "residual": spectrum.residual,
        "failures": spectrum.failures,
        "iterations": spectrum.iterations,
    }


def _decisions(schedule: Schedule | None) -> Mapping[str, Array]:
    """What a layer has decided for itself; the same for every matrix of a stack."""
    if schedule is None:
        return {}
    figures = {
        "interval": schedule.interval,
        "drift": schedule.drift,
        "jitter": schedule.jitter,
        "active_rank": schedule.rank,
    }
    return {name: value for name, value in figures.items() if value is not None}
