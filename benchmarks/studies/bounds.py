"""The PAC-Bayes bound of a trained network, and its KL term along training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks.base import Params, Samples, Workload
from dsbp_optax import diagnostics

#: Standard deviation of the posterior, fixed beforehand.
NOISE = 0.01
#: Draws from the posterior, and samples a batch.
DRAWS, BATCH = 40, 1_000


def divergence(params: Params, start: Params, opt_state: Any) -> dict[str, float]:
    """KL terms at one moment of training.

    ``kl`` has one scale of the prior. Where the state holds eigenbases ``kl_bases`` has
    one scale inside and one outside, ``kl_inside`` is the part inside, and
    ``moved_inside`` the share of the squared distance from the start there.
    """
    found = {"kl": _kl(params, start, None).kl}
    if diagnostics.snapshot(opt_state).energy:
        held = _kl(params, start, opt_state)
        whole = jnp.maximum(held.distance, jnp.finfo(jnp.float32).tiny)
        found |= {
            "kl_bases": held.kl,
            "kl_inside": held.inside,
            "moved_inside": jnp.square(held.distance_inside / whole),
        }
    return {key: float(value) for key, value in found.items()}


@jax.jit
def _kl(params: Params, start: Params, opt_state: Any) -> diagnostics.Divergence:
    return diagnostics.kl_divergence(params, start, NOISE, opt_state=opt_state)


def bound(
    workload: Workload, params: Params, start: Params, train: Samples
) -> dict[str, float]:
    """The bound on the error of the noisy network, over whole batches of `train`."""
    size = min(BATCH, len(train))
    count = size * (len(train) // size)

    def error(params: Params, batch: Any) -> jax.Array:
        inputs, targets = batch
        logits = workload.model.apply({"params": params}, inputs)
        return jnp.mean(jnp.argmax(logits, -1) != targets)

    batches = diagnostics.stream_batches(
        lambda: (
            train.take(np.arange(first, first + size))
            for first in range(0, count, size)
        )
    )
    found = diagnostics.pac_bayes_bound(
        *(error, params, start, batches, jax.random.key(0)),
        noise=NOISE,
        count=count,
        samples=DRAWS,
    )
    return {
        "bound": float(found.bound),
        "bound_risk": float(found.risk),
        "bound_risk_upper": float(found.risk_bound),
        "bound_kl": float(found.divergence.kl),
        "bound_samples": count,
        "bound_noise": NOISE,
    }
