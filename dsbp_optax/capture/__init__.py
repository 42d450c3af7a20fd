"""Getting activation statistics out of a loss; the adapters for Flax are built on it.

`value_and_grad` and `tap` serve plain JAX, Equinox and Haiku.
"""

from dsbp_optax.capture.einsum import einsum_map
from dsbp_optax.capture.inspection import Inspection
from dsbp_optax.capture.plain import inspect, tap, value_and_grad
from dsbp_optax.capture.tap import LinearMap

__all__ = [
    "Inspection",
    "LinearMap",
    "einsum_map",
    "inspect",
    "tap",
    "value_and_grad",
]
