"""Contenders of the scoreboard: textbook forms of peers, and rules of this package.

Each is one `Contender` in `CONTENDERS`. All have the same auxiliary Adam, with a rate
of its own, for what is no kernel, and decoupled weight decay on kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

import dsbp_optax
from benchmarks.kernels import is_kernel, map_kernels, path_of

#: Decays of every Adam: the auxiliary one, AdamW and those in few bits.
_B1, _B2 = 0.9, 0.95
_MOMENTUM = 0.95

#: Rates tried first, each twice the one before; and weight decays.
_MUON, _FINE = (0.01, 0.02, 0.04, 0.08), (0.0015, 0.003, 0.006, 0.012)
_AUX = (0.003, 0.006, 0.012, 0.024)
_MUON_DECAYS, _FINE_DECAYS = (0.0, 0.03, 0.1, 0.3), (0.0, 0.1, 0.3, 1.0)

Build = Callable[[Any, Any, Any], optax.GradientTransformation]


@dataclass(frozen=True)
class Contender:
    """One optimizer of the scoreboard.

    Attributes:
      name: as typed on the command line.
      summary: one line for people.
      build: rate of kernels, rate of the rest, weight decay -> optimizer.
      statistics: what its update takes beside gradients: "none"; "package", the
        statistics of `dsbp_optax.linen`; "inputs", ``second_moments=``, the mean of
        ``a a^T`` over each dense layer's inputs.
      rates: of kernels, tried first.
      aux_rates: of the rest, tried first.
      decays: weight decays, 0 first.
    """

    name: str
    summary: str
    build: Build
    statistics: str = "none"
    rates: tuple[float, ...] = _MUON
    aux_rates: tuple[float, ...] = _AUX
    decays: tuple[float, ...] = _MUON_DECAYS


def assemble(
    kernels: optax.GradientTransformation, rate: Any, aux_rate: Any, decay: Any
) -> optax.GradientTransformationExtraArgs:
    """`kernels` gives the ascent direction of kernels; Adam moves the rest."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, x: "kernels" if is_kernel(path_of(keys), x) else "rest", params
        )

    return optax.partition(
        {
            "kernels": optax.chain(
                kernels,
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(rate),
            ),
            "rest": optax.chain(
                optax.scale_by_adam(_B1, _B2), optax.scale_by_learning_rate(aux_rate)
            ),
        },
        labels,
    )


def kernel_rule(make: Callable[[], optax.GradientTransformation]) -> Build:
    """The contender whose kernels follow a rule of their own."""
    return lambda rate, aux_rate, decay: assemble(make(), rate, aux_rate, decay)


def _muon() -> optax.GradientTransformation:
    def axes(kernel: Any) -> optax.contrib.MuonDimensionNumbers:
        inputs = tuple(range(kernel.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, kernel.ndim - 1)

    return optax.contrib.muon(
        -1.0,
        beta=_MOMENTUM,
        muon_weight_dimension_numbers=lambda params: map_kernels(axes, params),
    )


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("muon", "optax.contrib.muon on kernels", kernel_rule(_muon)),
        Contender(
            "adamw",
            "optax.adamw",
            kernel_rule(lambda: optax.scale_by_adam(_B1, _B2)),
            rates=_FINE,
            decays=_FINE_DECAYS,
        ),
        Contender(
            "dsbp_muon",
            "orthogonalised momentum, finer in the eigenbasis, the rest in 6 bits",
            kernel_rule(lambda: dsbp_optax.dsbp_muon(-1.0)),
            statistics="package",
        ),
    )
}
