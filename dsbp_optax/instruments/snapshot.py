"""What an optimizer state says of each layer at one moment, on the host."""

from typing import NamedTuple

import jax
import numpy as np

from dsbp_optax.core import state
from dsbp_optax.linalg.types import PyTree


class Snapshot(NamedTuple):
    """Figures of one moment; kernels by path, stacked kernels averaged.

    Attributes:
      step: updates seen.
      eigenvalues: path -> ``(k,)``, descending, a sample.
      energy: path -> share of the gradient inside the basis at its last refresh.
      explained: path -> share of the covariance's trace inside the basis.
    """

    step: int
    eigenvalues: dict[str, np.ndarray]
    energy: dict[str, float]
    explained: dict[str, float]


def snapshot(opt_state: PyTree) -> Snapshot:
    """Figures of all layers at this moment, for `dsbp_optax.plotting`.

    Args:
      opt_state: any nest of optax states, not traced.

    Returns:
      `Snapshot`, NumPy arrays and floats.

    Cost: copies ``k`` numbers a kernel to the host.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2)
      >>> state = tx.init({"kernel": jnp.ones((8, 8))})
      >>> dsbp_optax.diagnostics.snapshot(state).eigenvalues["kernel"].shape
      (2,)
    """
    step, values, energy, explained = 0, {}, {}, {}
    for one in state.find_states(opt_state):
        step = max(step, int(one.step))
        for path, layer in state.by_path(one).items():
            if layer.basis is None:
                continue
            spectrum = jax.device_get(layer.spectrum)
            name, rank = path, spectrum.eigenvalues.shape[-1]
            values[name] = spectrum.eigenvalues.reshape(-1, rank).mean(0)
            energy[name] = float(spectrum.energy.mean())
            whole = float(spectrum.trace.mean())
            explained[name] = float(values[name].sum()) / whole if whole > 0 else 0.0
    return Snapshot(step, values, energy, explained)
