"""The learners of few-shot episodes, with the rates that are tried."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

import dsbp_optax
from benchmarks.controls import keep_basis
from benchmarks.fitting import Fit
from benchmarks.maml import keep_bases
from benchmarks.meta_learner import Maml
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.pretrained import Pixels, Pretrained, linear_probe, nearest_mean

#: Inner rates that are tried; the first while the outer one is tuned.
INNER_RATES = (0.4, 0.1, 1.0)
#: Directions a kernel in which spectral inner steps move, and the age they reach.
RANK, PERIOD = 8, 20

_PLAIN: dict[str, Any] = {"weight_decay": 0.0}


@dataclass(frozen=True)
class Learner:
    """One way to learn from few drawings.

    Attributes:
      name: as typed on the command line.
      summary: one line for people.
      make: shots -> the learner, ready to be trained.
      grid: outer rates tried first; none where nothing is tuned.
      inner_rates: that are tried, in this order.
      takes: the learner whose tuned rates it takes; None for its own.
    """

    name: str
    summary: str
    make: Callable[[int], Fit]
    grid: tuple[float, ...] = ()
    inner_rates: tuple[float, ...] = INNER_RATES
    takes: str | None = None


def _spectral_adam(
    learning_rate: optax.ScalarOrSchedule, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    settings = {"rank": RANK, "update_every": PERIOD, **settings}
    return keep_bases(optax.adam(learning_rate), **settings)


_ADAM = dataclasses.replace(CONTENDERS["adamw"], name="adam", factory=optax.adam)
_SPECTRAL = dataclasses.replace(_ADAM, name="spectral", factory=_spectral_adam)


def _undecayed(name: str) -> Contender:
    return dataclasses.replace(CONTENDERS[name], settings=_PLAIN)


def _maml(
    name: str, summary: str, contender: Contender, takes: str | None = None, **how: bool
) -> Learner:
    def make(shots: int) -> Fit:
        return Maml(contender, shots, **how)

    return Learner(name, summary, make, contender.grid, takes=takes)


def _spectral(name: str, summary: str, **settings: Any) -> Learner:
    """The spectral inner step with other settings, at its rates."""
    changed = dataclasses.replace(_SPECTRAL, settings=settings)
    return _maml(name, summary, changed, takes="maml_spectral", spectral=True)


LEARNERS = {
    learner.name: learner
    for learner in (
        _maml("maml", "MAML of second order, Adam outside", _ADAM),
        _maml("fomaml", "MAML of first order, Adam outside", _ADAM, first_order=True),
        _maml(
            *("maml_projected_adamw", "MAML, projected_adamw outside"),
            _undecayed("projected_adamw"),
        ),
        _maml("maml_muon", "MAML, Muon outside", CONTENDERS["muon"]),
        _maml(
            "maml_projected_muon",
            "MAML, projected_muon outside",
            CONTENDERS["projected_muon"],
        ),
        _maml(
            "maml_spectral",
            f"MAML, Adam outside, inner steps in {RANK} eigendirections a kernel",
            _SPECTRAL,
            spectral=True,
        ),
        _spectral(
            "spectral_random",
            "the same in 8 random directions",
            basis=dsbp_optax.Basis(solver=keep_basis),
        ),
        Learner(
            "nearest_mean",
            "classifier pretrained with Adam, nearest class mean of its features",
            lambda shots: Pretrained(_ADAM, nearest_mean),
            _ADAM.grid,
            (0.0,),
        ),
        Learner(
            "linear_probe",
            "classifier pretrained with Adam, linear probe of its features by SGD",
            lambda shots: Pretrained(_ADAM, linear_probe),
            _ADAM.grid,
        ),
        Learner(
            "pixels",
            "nothing trained, nearest class mean of the pixels",
            lambda shots: Pixels(),
            inner_rates=(0.0,),
        ),
    )
}
