"""Read-only figures: what an optimizer does with each parameter, and how it fares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import paths, plan, state
from dsbp_optax.core.plan import Decision
from dsbp_optax.core.state import Layer, Spectrum
from dsbp_optax.instruments.batches import Stream, stack_batches, stream_batches
from dsbp_optax.instruments.curvature import (
    Density,
    Eigenvalues,
    Estimate,
    gauss_newton_product,
    hessian_product,
    m_sharpness,
    spectral_density,
    top_eigenvalues,
    trace,
)
from dsbp_optax.instruments.pac_bayes import (
    Bound,
    Divergence,
    kl_divergence,
    pac_bayes_bound,
)
from dsbp_optax.instruments.snapshot import Snapshot, snapshot
from dsbp_optax.instruments.surface import Surface, loss_surface
from dsbp_optax.linalg import subspace
from dsbp_optax.linalg.types import Array, PyTree, state_bytes

__all__ = [
    "Bound",
    "Decision",
    "Density",
    "Divergence",
    "Eigenvalues",
    "Estimate",
    "Snapshot",
    "Stream",
    "Surface",
    "explain",
    "gauss_newton_product",
    "hessian_product",
    "kl_divergence",
    "loss_surface",
    "m_sharpness",
    "metrics",
    "pac_bayes_bound",
    "principal_angles",
    "snapshot",
    "spectral_density",
    "stack_batches",
    "state_bytes",
    "stream_batches",
    "top_eigenvalues",
    "trace",
    "warnings",
]


#: Residual of the eigenpairs above which a basis is called stale.
_STALE = 0.25
#: Power iterations before which a basis still comes from its random start.
_SETTLED = 5
#: Steps without a basis that are nothing to speak of.
_PATIENCE = 10


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
      kernel  projected: input side, rank 4 of 64
    """
    plans: list[dict[str, Decision]] = []
    token = plan.OBSERVER.set(plans)
    try:
        jax.eval_shape(lambda tree: tx.init(tree), params)  # anew: jax keeps traces
    finally:
        plan.OBSERVER.reset(token)
    found = Explanation()
    for path in paths.flatten(params)[0]:
        found[path] = [one[path] for one in plans if path in one]
    return found


def metrics(opt_state: PyTree) -> dict[str, Array]:
    """Scalars for a logger: a flat dict ``"dsbp/<figure>/<path>" -> ()``.

    For each projected parameter: ``energy`` (share of the gradient inside the basis
    at the last refresh), ``leading_share`` (``lambda_1 / tr C``), ``explained``
    (``sum lambda / tr C``), ``effective_rank`` (``(sum lambda)^2 / sum lambda^2``),
    ``largest`` (``lambda_1`` a sample), ``residual`` (of the eigenpairs), ``failures``,
    ``iterations`` and ``staleness`` (steps since the last refresh that was accepted);
    ``state_bytes`` (basis, moments and residual of this kernel, and moments in few bits
    beside its basis); of the whole: ``step`` and ``skipped``. Stacked kernels are
    averaged, but for the staleness, which is the greatest. Can be jit-compiled.

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
    beside = _moments(opt_state)
    for one in state.find_states(opt_state):
        if not one.basis:
            continue
        for path, layer in state.by_path(one).items():
            if layer.basis is None:
                continue
            spectrum = layer.spectrum
            for name, value in _layer_metrics(spectrum).items():
                figures[f"dsbp/{name}/{path}"] = jnp.mean(value)
            behind = jnp.max(one.step - 1 - spectrum.refreshed)
            figures[f"dsbp/staleness/{path}"] = behind
            size = _kernel_bytes(layer, beside.get(path, ()))
            figures[f"dsbp/state_bytes/{path}"] = jnp.asarray(size)
        # Of several projections, in a partition, the one that counted most.
        for name, count in (("step", one.step), ("skipped", one.skipped)):
            known = figures.get(f"dsbp/{name}{one.suffix}", 0)
            figures[f"dsbp/{name}{one.suffix}"] = jnp.maximum(known, count)
    return figures


def principal_angles(first: PyTree, second: PyTree) -> dict[str, Array]:
    """Angles between the eigenbases of two states, by path of the kernel.

    Two states of one run tell how far its bases have turned in between. Two states
    whose bases were made from two halves of a batch (`warm_start` on each, from the
    same ``tx.init``) tell how far a basis can be reproduced.

    Args:
      first: any nest of optax states.
      second: another of the same optimizer.

    Returns:
      Path -> ``(*stacked, k)`` radians, ascending.

    Raises:
      ValueError: when the states hold different kernels or ranks.

    Cost: two singular value decompositions of ``k`` columns a kernel.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2)
      >>> state = tx.init({"kernel": jnp.ones((8, 8))})
      >>> dsbp_optax.diagnostics.principal_angles(state, state)["kernel"].shape
      (2,)
    """
    one, two = (
        {path: jnp.linalg.qr(basis)[0] for path, basis in _bases(state).items()}
        for state in (first, second)
    )
    shapes = [{path: v.shape for path, v in bases.items()} for bases in (one, two)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"principal_angles: got bases {shapes[0]} and {shapes[1]}, expected the "
            "same. Remedy: two states of one optimizer."
        )
    return {path: subspace.principal_angles(one[path], two[path]) for path in one}


def warnings(opt_state: PyTree) -> list[str]:
    """What is wrong with the bases, each with its remedy; empty if nothing is.

    The two ways in which the method fails by its authors' account are a *stale basis*,
    one that the activations have left behind, and an *ill-conditioned or diverging
    iteration*.

    Args:
      opt_state: any nest of optax states, not traced.

    Returns:
      One sentence a kernel and defect.

    Cost: reads a few scalars a kernel off the device.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2)
      >>> dsbp_optax.diagnostics.warnings(tx.init({"kernel": jnp.ones((8, 8))}))
      []
    """
    found = []
    for one in state.find_states(opt_state):
        if not one.basis:
            continue
        skipped = int(one.skipped)
        step = int(one.step) + skipped
        if skipped:
            found.append(
                f"{skipped} of {step} steps were skipped, their gradients or the "
                "squares of these were not finite. Remedy: a smaller learning rate, "
                "clipping, or loss scaling."
            )
        layers = {p: x for p, x in state.by_path(one).items() if x.basis is not None}
        for path, layer in layers.items():
            found += _defects(path, layer.spectrum, step)
        # A momentum's own directions serve its metric, unless activations were meant.
        seen = {p: int(x.spectrum.activations.max()) for p, x in layers.items()}
        if one.kind != "momentum_metric" or any(seen.values()):
            found += [
                f"{path}: a basis of gradients: its last refresh saw no statistics. "
                "Remedy: pass statistics= to update; none if its layer cannot be "
                "observed."
                for path, layer in layers.items()
                if not seen[path] and int(layer.spectrum.refreshed.min()) >= 0
            ]
    return found


def _defects(path: str, spectrum: Spectrum, step: int) -> list[str]:
    residual, failures = float(spectrum.residual.max()), int(spectrum.failures.max())
    last = int(spectrum.refreshed.min())
    found = []
    if last < 0 and step > _PATIENCE:
        found.append(
            f"{path}: no basis after {step} steps. Remedy: pass statistics= to update, "
            "and batches of as many samples as the rank, or a smaller rank."
        )
    elif residual > _STALE and int(spectrum.iterations.min()) > _SETTLED:
        found.append(
            f"{path}: stale basis: at its last refresh, in step {last}, it missed its "
            f"layer's covariance in that batch by {residual:.0%} of the leading "
            "eigenvalue. Remedy: a smaller update_every, more power_iterations; for "
            "small batches, whose covariances differ, decay."
        )
    if failures:
        found.append(
            f"{path}: ill-conditioned or diverging iteration: {failures} refreshes "
            "were refused, the basis before them was kept. Remedy: batches of as many "
            "samples as the rank, or a smaller rank; a smaller learning rate if "
            "activations grow."
        )
    return found


def _bases(opt_state: PyTree) -> dict[str, Array]:
    """Path -> ``(*stacked, d, k)``."""
    return {
        path: layer.basis.astype(layer.spectrum.trace.dtype)
        for path, layer in state.by_path(opt_state).items()
        if layer.basis is not None and layer.kernel.owner == layer.kernel.path
    }


def _moments(opt_state: PyTree) -> dict[str, PyTree]:
    """Path -> moments in few bits that lie outside of a state with bases."""
    return {
        path.removesuffix("#moments"): layer.inner
        for path, layer in state.by_path(opt_state).items()
        if path.endswith("#moments")
    }


def _kernel_bytes(layer: Layer, beside: PyTree) -> int:
    """Bytes of basis, moments and residual state of one kernel."""
    own = layer.kernel.owner == layer.kernel.path
    return state_bytes([layer.basis if own else (), layer.inner, beside])


def _layer_metrics(spectrum: Any) -> Mapping[str, Array]:
    values, whole = spectrum.eigenvalues, spectrum.trace
    total, tiny = jnp.sum(values, -1), jnp.finfo(values.dtype).tiny
    return {
        "energy": spectrum.energy,
        "largest": values[..., 0],
        "leading_share": values[..., 0] / jnp.maximum(whole, tiny),
        "explained": total / jnp.maximum(whole, tiny),
        "effective_rank": total**2 / jnp.maximum(jnp.sum(values**2, -1), tiny),
        "residual": spectrum.residual,
        "failures": spectrum.failures,
        "iterations": spectrum.iterations,
    }
