"""The contenders: their settings, and the learning rates that are tried.

A new contender is one `Contender` in `CONTENDERS`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

import dsbp_optax
from benchmarks.core.kernels import map_kernels

#: Rank of GaLore, twice that of a projection; period of every low-rank contender; of
#: ours, those that project take so many iterations to refresh.
_RANK, _PERIOD, _ITERATIONS = 16, 100, 5

#: Of the rules of version 0.2, which live on under other names.
_FEW = dsbp_optax.RankFraction(1 / 16, most=8)
projected_muon = functools.partial(dsbp_optax.subspace_muon, residual="int6", rank=_FEW)
projected_adamw = functools.partial(
    dsbp_optax.subspace_adamw, residual="int5", rank=_FEW
)

#: Learning rates that are tried: as many for every contender.
_COARSE = (0.01, 0.03, 0.1, 0.3, 1.0)
_FINE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_MUON = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Contender:
    """One optimizer of the comparison."""

    name: str  # as typed on the command line
    summary: str  # one line for people
    # ``(learning_rate, **settings) -> optimizer``
    factory: Callable[..., optax.GradientTransformation]
    # learning rates tried first; tuning extends it where the best is at an edge
    grid: tuple[float, ...]
    default_rate: float  # used where no tuning record exists
    # keywords for the factory; the rest keeps the factory's defaults, weight decay
    # included
    settings: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = False  # whether it is of this package; the others are its peers
    # of ours, the optimizer whose place and learning rate it takes
    plain: str | None = None
    period: int = 0  # steps between refreshes of a basis, 0 for optimizers without one
    window: int = 0  # steps at the start of each period that refresh
    # whether all iterations of the first refresh happen on the first batch, as the
    # paper has it
    warm_start: bool = False
    # whether gradients of projected kernels are taken in coordinates
    coordinates: bool = False

    def build(
        self, learning_rate: optax.ScalarOrSchedule
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer; it ignores extra arguments that are not for it."""
        tx = self.factory(learning_rate, **self.settings)
        return optax.with_extra_args_support(tx)

    def refreshes(self, step: int) -> bool:
        """Whether this step (from 0) refreshes a basis."""
        return self.period > 0 and step % self.period < self.window

    def hyperparameters(self) -> dict[str, Any]:
        """Settings and defaults of the factory, as far as they are plain values."""
        signature = inspect.signature(self.factory).parameters.values()
        defaults = {p.name: p.default for p in signature if p.name != "learning_rate"}
        merged = {**defaults, **self.settings}
        plain = int | float | str | bool | None
        return {k: v for k, v in merged.items() if isinstance(v, plain)}


def _sam(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, rho: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """SAM over SGD: the gradient of the true step is taken ``rho`` uphill."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    descent = optax.sgd(learning_rate, momentum)
    tx = optax.contrib.sam(descent, ascent, sync_period=2, opaque_mode=True)

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_fn: Any, **others: Any
    ) -> Any:
        del others  # SAM tolerates none.
        return tx.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _subspace_sam(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, rho: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    return dsbp_optax.subspace_sam(dsbp_optax.dsbp_sgd(learning_rate, momentum), rho)


def _subspace_msam(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, rho: float = 0.1
) -> optax.GradientTransformationExtraArgs:
    return dsbp_optax.subspace_msam(dsbp_optax.dsbp_sgd(learning_rate, momentum), rho)


def _galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = _RANK,
    update_proj_gap: int = _PERIOD,
) -> optax.GradientTransformation:
    """GaLore over Adam, on the kernels where it saves memory; Adam on the rest."""

    def axes(kernel: Any) -> optax.contrib.GaLoreDimensionNumbers | None:
        outputs = kernel.shape[-1]
        inputs = kernel.size // outputs
        low = rank * (max(inputs, outputs) + 2 * min(inputs, outputs))
        if low >= 2 * kernel.size:
            return None
        return optax.contrib.GaLoreDimensionNumbers(
            tuple(range(kernel.ndim - 1)), kernel.ndim - 1
        )

    return optax.contrib.galore(
        learning_rate,
        rank=rank,
        update_proj_gap=update_proj_gap,
        weight_dimension_numbers=lambda params: map_kernels(axes, params),
    )


def _muon(
    learning_rate: optax.ScalarOrSchedule, beta: float = 0.95
) -> optax.GradientTransformation:
    """Muon on the kernels, Adam at the same learning rate on the rest."""

    def axes(kernel: Any) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(kernel.ndim - 1)), kernel.ndim - 1
        )

    return optax.contrib.muon(
        learning_rate,
        beta=beta,
        muon_weight_dimension_numbers=lambda params: map_kernels(axes, params),
    )


#: What those of ours have in common that project, and those with a metric.
OURS: Any = {"ours": True, "period": _PERIOD, "window": _ITERATIONS}
METRIC: Any = {"ours": True, "period": 20, "window": 2}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "dsbp",
            "the paper's rule with the paper's settings",
            dsbp_optax.dsbp,
            _COARSE,
            0.01,
            warm_start=True,
            plain="sgd",
            **OURS,
        ),
        Contender(
            "dsbp_sgd",
            "momentum whitened in the eigenbasis, the rest in 5 bits",
            dsbp_optax.dsbp_sgd,
            _COARSE,
            0.1,
            {"momentum": 0.9},
            plain="sgd",
            **OURS,
        ),
        Contender(
            "dsbp_adamw",
            "AdamW in the metric of the activations, in 5 bits and factored",
            dsbp_optax.dsbp_adamw,
            _FINE,
            1e-2,
            plain="adamw",
            **METRIC,
        ),
        Contender(
            "dsbp_muon",
            "Muon in the metric of the activations, its momentum in 5 bits",
            dsbp_optax.dsbp_muon,
            _MUON,
            3e-2,
            plain="muon",
            **METRIC,
        ),
        Contender(
            "projected_adamw",
            "AdamW, exact in the eigenbasis, the rest in 5 bits and factored",
            projected_adamw,
            _FINE,
            3e-3,
            plain="adamw",
            **OURS,
        ),
        Contender(
            "projected_muon",
            "orthogonalised momentum, finer in the eigenbasis, the rest in 6 bits",
            projected_muon,
            _MUON,
            1e-2,
            plain="muon",
            **OURS,
        ),
        Contender(
            "dsbp_sgd_sam",
            "dsbp_sgd with a second gradient, uphill inside the eigenbases",
            _subspace_sam,
            _COARSE,
            0.1,
            {"momentum": 0.9, "rho": 0.05},
            plain="sam",
            **OURS,
        ),
        Contender(
            "dsbp_sgd_msam",
            "dsbp_sgd, its parameters kept uphill along the momentum",
            _subspace_msam,
            _COARSE,
            0.3,
            {"momentum": 0.9, "rho": 0.1},
            plain="sgd",
            **OURS,
        ),
        Contender(
            "sgd", "optax.sgd with momentum", optax.sgd, _COARSE, 0.1, {"momentum": 0.9}
        ),
        Contender("adamw", "optax.adamw", optax.adamw, _FINE, 1e-2),
        Contender(
            "sam",
            "optax.contrib.sam over SGD with momentum, two gradients a step",
            _sam,
            _COARSE,
            0.1,
            {"momentum": 0.9, "rho": 0.05},
        ),
        Contender(
            "galore",
            "optax.contrib.galore over Adam, rank 16",
            _galore,
            _FINE,
            1e-2,
            {"rank": _RANK, "update_proj_gap": _PERIOD},
            period=_PERIOD,
            window=1,
        ),
        Contender(
            "muon",
            "optax.contrib.muon on kernels, Adam on the rest",
            _muon,
            _MUON,
            1e-2,
            {"beta": 0.95},
        ),
    )
}


def plain_of(contender: Contender) -> Contender:
    """The optimizer whose place a contender takes; itself where it takes none."""
    return CONTENDERS[contender.plain] if contender.plain else contender
