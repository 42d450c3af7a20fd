"""The contenders, their settings, and the learning rates that were tried."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

import dsbp_optax

#: Rank and period of every low-rank contender but the paper's own rule.
_RANK, _PERIOD, _ITERATIONS = 16, 100, 5

_COARSE = (0.01, 0.03, 0.1, 0.3, 1.0)
_FINE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_MUON = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Contender:
    """One optimizer of the comparison.

    Attributes:
      name: as typed on the command line.
      summary: one line for people.
      factory: ``(learning_rate, **settings) -> optimizer``.
      grid: learning rates tried; as many for every contender.
      learning_rate: workload -> the best of the grid; see FINDINGS.md.
      fixed_rate: used in its place where the rule prescribes one.
      settings: keywords for the factory.
      period: steps between refreshes of a basis, 0 for optimizers without one.
      window: steps at the start of each period that refresh.
      warm_start: whether all iterations of the first refresh happen on the first
        batch, as the paper has it.
    """

    name: str
    summary: str
    factory: Callable[..., optax.GradientTransformation]
    grid: tuple[float, ...]
    learning_rate: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    fixed_rate: float | None = None
    period: int = 0
    window: int = 0
    warm_start: bool = False

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
    return optax.contrib.sam(descent, ascent, sync_period=2, opaque_mode=True)


def _galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = _RANK,
    update_proj_gap: int = _PERIOD,
) -> optax.GradientTransformation:
    """GaLore over Adam, on dense and convolution kernels where it saves memory."""

    def axes(kernel: Any) -> optax.contrib.GaLoreDimensionNumbers | None:
        if kernel.ndim < 2:
            return None
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
        weight_dimension_numbers=lambda params: jax.tree.map(axes, params),
    )


def _muon(
    learning_rate: optax.ScalarOrSchedule, beta: float = 0.95
) -> optax.GradientTransformation:
    """Muon on every dense and convolution kernel, Adam on the rest."""

    def axes(kernel: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if kernel.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(kernel.ndim - 1)), kernel.ndim - 1
        )

    return optax.contrib.muon(
        learning_rate,
        beta=beta,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(axes, params),
    )


_REFRESH = {
    "rank": _RANK,
    "update_every": _PERIOD,
    "power_iterations": _ITERATIONS,
}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "dsbp",
            "the paper's rule with the paper's defaults, learning rate included",
            dsbp_optax.dsbp,
            _COARSE,
            {"digits_cnn": 0.1},
            fixed_rate=0.01,
            period=100,
            window=5,
            warm_start=True,
        ),
        Contender(
            "dsbp_sgd",
            "momentum in the activation eigenbasis, normalised residual",
            dsbp_optax.dsbp_sgd,
            _COARSE,
            {"digits_cnn": 0.1},
            {"momentum": 0.9, **_REFRESH},
            period=_PERIOD,
            window=_ITERATIONS,
        ),
        Contender(
            "dsbp_adamw",
            "AdamW in the activation eigenbasis, normalised residual",
            dsbp_optax.dsbp_adamw,
            _FINE,
            {"digits_cnn": 3e-3},
            _REFRESH,
            period=_PERIOD,
            window=_ITERATIONS,
        ),
        Contender(
            "sgd",
            "optax.sgd with momentum",
            optax.sgd,
            _COARSE,
            {"digits_cnn": 0.1},
            {"momentum": 0.9},
        ),
        Contender("adam", "optax.adam", optax.adam, _FINE, {"digits_cnn": 1e-2}),
        Contender(
            "sam",
            "optax.contrib.sam over SGD with momentum, two gradients a step",
            _sam,
            _COARSE,
            {"digits_cnn": 0.1},
            {"momentum": 0.9, "rho": 0.05},
        ),
        Contender(
            "galore",
            "optax.contrib.galore over Adam, rank and period as dsbp_adamw",
            _galore,
            _FINE,
            {"digits_cnn": 1e-2},
            {"rank": _RANK, "update_proj_gap": _PERIOD},
            period=_PERIOD,
            window=1,
        ),
        Contender(
            "muon",
            "optax.contrib.muon on kernels, Adam on the rest",
            _muon,
            _MUON,
            {"digits_cnn": 1e-2},
            {"beta": 0.95},
        ),
    )
}


def learning_rate_for(contender: Contender, workload: str) -> tuple[float, str]:
    """The learning rate to use when none is given, and where it comes from.

    Args:
      contender: the optimizer.
      workload: name of the workload.

    Returns:
      The one that the rule prescribes, else the tuned one of this workload, else
      that of the digits; and words that say so.
    """
    known = contender.learning_rate
    tuned_on = workload if workload in known else "digits_cnn"
    tuned = known[tuned_on]
    words = f"tuned on {tuned_on}"
    if tuned_on != workload:
        words += f", not on {workload}"
    if contender.fixed_rate is not None:
        return contender.fixed_rate, f"prescribed; {tuned:g} is the one {words}"
    return tuned, words
