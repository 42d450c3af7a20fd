"""Dynamic Spectral Backpropagation (DSBP) for Optax.

The top eigenbasis of each layer's activations, kept in the optimizer's state, and
optimizers that work in it. Start with `dsbp_muon` or `dsbp_adamw`, and collect the
activations with `dsbp_optax.linen` or `dsbp_optax.nnx`:

    tx = dsbp_optax.dsbp_muon(0.02)
    value_and_grad = dsbp_optax.linen.value_and_grad(loss_fn)
    loss, grads, statistics = value_and_grad(params, batch, opt_state=opt_state)
    updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
"""

import importlib
from types import ModuleType

from dsbp_optax import capture, diagnostics
from dsbp_optax.capture.plain import tap
from dsbp_optax.core.coordinates import project_gradients
from dsbp_optax.core.layout import Axes, Coordinates
from dsbp_optax.core.plan import Basis
from dsbp_optax.core.rank import RankFraction
from dsbp_optax.core.state import (
    Layer,
    SpectralState,
    Spectrum,
    by_path,
    put_statistics,
    with_layers,
)
from dsbp_optax.core.statistics import (
    Activations,
    Covariance,
    Sketch,
    add_statistics,
    sum_statistics,
)
from dsbp_optax.linalg.eigensolvers import eigh, power_iteration
from dsbp_optax.linalg.types import Eigenpairs, Operator, Solver, Statistic
from dsbp_optax.recipes import (
    dsbp,
    dsbp_adamw,
    dsbp_muon,
    dsbp_sgd,
    subspace_adamw,
    subspace_muon,
)
from dsbp_optax.rules.clip import ClipByNormGrowthState, clip_by_norm_growth
from dsbp_optax.rules.directions import orthogonalize
from dsbp_optax.rules.filters import whiten
from dsbp_optax.rules.metric import scale_by_activation_metric
from dsbp_optax.rules.moments import (
    scale_by_quantized_adam,
    scale_by_quantized_momentum,
)
from dsbp_optax.rules.projection import scale_by_spectral_projection
from dsbp_optax.rules.residual import (
    Residual,
    normalize_residual,
    residual_adam,
    residual_momentum,
    scale_residual,
)
from dsbp_optax.rules.sharpness import add_spectral_sharpness
from dsbp_optax.scale.checkpoint import check_checkpoint
from dsbp_optax.scale.sharding import state_shardings
from dsbp_optax.sharpness.msam import (
    SubspaceMsamState,
    evaluation_params,
    subspace_msam,
)
from dsbp_optax.sharpness.sam import SubspaceSamState, subspace_sam

__version__ = "0.3.0"

__all__ = [
    "Activations",
    "Axes",
    "Basis",
    "ClipByNormGrowthState",
    "Coordinates",
    "Covariance",
    "Eigenpairs",
    "Layer",
    "Operator",
    "RankFraction",
    "Residual",
    "Sketch",
    "Solver",
    "SpectralState",
    "Spectrum",
    "Statistic",
    "SubspaceMsamState",
    "SubspaceSamState",
    "add_spectral_sharpness",
    "add_statistics",
    "by_path",
    "capture",
    "check_checkpoint",
    "clip_by_norm_growth",
    "diagnostics",
    "dsbp",
    "dsbp_adamw",
    "dsbp_muon",
    "dsbp_sgd",
    "eigh",
    "evaluation_params",
    "normalize_residual",
    "orthogonalize",
    "power_iteration",
    "project_gradients",
    "put_statistics",
    "residual_adam",
    "residual_momentum",
    "scale_by_activation_metric",
    "scale_by_quantized_adam",
    "scale_by_quantized_momentum",
    "scale_by_spectral_projection",
    "scale_residual",
    "state_shardings",
    "subspace_adamw",
    "subspace_msam",
    "subspace_muon",
    "subspace_sam",
    "sum_statistics",
    "tap",
    "whiten",
    "with_layers",
]


def __getattr__(name: str) -> ModuleType:
    """`linen`, `nnx` and `plotting` on first use: Flax and Matplotlib stay optional."""
    if name in ("linen", "nnx", "plotting"):
        return importlib.import_module(f"dsbp_optax.{name}")
    raise AttributeError(f"module 'dsbp_optax' has no attribute '{name}'")
