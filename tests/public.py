"""The modules whose names are public."""

import dsbp_optax
import dsbp_optax.capture
import dsbp_optax.linen
import dsbp_optax.nnx
import dsbp_optax.plotting

MODULES = (
    dsbp_optax,
    dsbp_optax.capture,
    dsbp_optax.diagnostics,
    dsbp_optax.linen,
    dsbp_optax.nnx,
    dsbp_optax.plotting,
)
