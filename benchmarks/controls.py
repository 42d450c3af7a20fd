"""Controls: a rule with one of its parts taken away, at the rule's own learning rate.

What a part is worth is the difference to the rule without it, seed by seed. Each run
leaves one record; what has a record is not run again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

import dsbp_optax
from benchmarks import records
from benchmarks.data import Data
from benchmarks.experiment import Order, Record, carry_out
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.train import Program, build
from benchmarks.workloads import Workload

#: Below the folder of a workload's records.
FOLDER = "controls"


def keep_basis(
    operator: dsbp_optax.Operator, basis: Any, iterations: Any
) -> dsbp_optax.Eigenpairs:
    """A solver that finds nothing: the first basis, which is random, for good.

    Eigenvalues are the Rayleigh quotients of its columns.
    """
    del iterations
    basis, _ = jnp.linalg.qr(basis)  # As stored it is orthonormal to half precision.
    product = operator.matmul(basis)
    values = jnp.sum(basis * product, axis=0)
    order = jnp.argsort(-values)
    basis, values = basis[:, order], values[order]
    rest = jnp.linalg.norm(product[:, order] - basis * values) / jnp.max(values)
    return dsbp_optax.Eigenpairs(basis, values, rest)


def without_statistics(
    factory: Callable[..., optax.GradientTransformationExtraArgs],
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The same optimizer, never shown an activation: bases are those of gradients."""

    def make(
        learning_rate: optax.ScalarOrSchedule, **settings: Any
    ) -> optax.GradientTransformationExtraArgs:
        tx = factory(learning_rate, **settings)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            extra.pop("statistics", None)
            return tx.update(updates, state, params, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


def orthogonal_coordinates(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.95, rank: int = 16
) -> optax.GradientTransformationExtraArgs:
    """Newton-Schulz on the ``k x m`` coordinates alone, the residual dropped."""
    inner = optax.chain(
        optax.trace(momentum, nesterov=True), dsbp_optax.scale_by_orthogonalization()
    )
    return optax.chain(
        dsbp_optax.scale_by_spectral_projection(
            inner, rank=rank, fallback=optax.scale_by_adam(nesterov=True)
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


@dataclass(frozen=True)
class Control:
    """One rule with something taken away.

    Attributes:
      name: as recorded.
      of: the contender that it is a control of.
      contender: what is trained.
    """

    name: str
    of: str
    contender: Contender


def _control(of: str, name: str, summary: str, **changes: Any) -> Control:
    base = CONTENDERS[of]
    factory = changes.pop("factory", base.factory)
    training = changes.pop("training", {})
    settings = changes.pop("settings", {**base.settings, **changes})
    full = f"{of}, {name}"
    contender = replace(
        base, name=full, summary=summary, factory=factory, settings=settings, **training
    )
    return Control(name, of, contender)


def _of_any(of: str) -> tuple[Control, ...]:
    blind = without_statistics(CONTENDERS[of].factory)
    kept = dsbp_optax.Basis(solver=keep_basis)
    return (
        _control(of, "random basis", "the first basis for good", basis=kept),
        _control(of, "gradient basis", "bases of gradients", factory=blind),
    )


CONTROLS: tuple[Control, ...] = (
    *_of_any("projected_muon"),
    _control("projected_muon", "rank 1", "one direction a kernel", rank=1),
    _control(
        *("projected_muon", "no momentum", "the gradient itself, orthogonalised"),
        momentum=0.0,
        residual=dsbp_optax.scale_residual(1.0),
    ),
    _control(
        *("projected_muon", "coordinates alone", "16 x m numbers, no residual"),
        factory=orthogonal_coordinates,
        settings={},
    ),
    _control(
        *(
            "projected_muon",
            "gradients in coordinates",
            "32 x m numbers, whole ones never",
        ),
        rank=32,
        residual=None,
        training={"coordinates": True, "warm_start": True},
    ),
    *_of_any("dsbp_sgd"),
    _control("dsbp_sgd", "no whitening", "momentum as it is", whitening=0.0),
    _control("dsbp_sgd", "no residual", "what is outside dropped", residual=None),
)


def orders(
    workload: Workload, control: Control, rate: float, seeds: int, quick: bool
) -> list[Order]:
    """All runs of one control, given the rate of its rule."""
    steps = workload.quick_steps if quick else workload.steps
    source = f"that of {control.of}"
    return [
        Order("final", rate, seed, steps, quick, source=source) for seed in range(seeds)
    ]


def path_of(out: Path, workload: Workload, control: Control, order: Order) -> Path:
    """``<out>/<workload>/controls/<rule>-<control>-<rate>-<seed>.json``."""
    words = control.name.replace(" ", "_")
    name = f"{control.of}-{words}-{order.rate:g}-{order.seed}.json"
    return out / workload.name / FOLDER / name


def carry_out_missing(
    out: Path,
    workload: Workload,
    data: Data,
    control: Control,
    wanted: Sequence[Order],
    deadline: float,
    after_run: Callable[[], None] = lambda: None,
) -> bool:
    """Make the runs that have no record yet.

    Returns:
      Whether all are made; False when the time (of `time.monotonic`) is up.
    """
    program: Program | None = None
    for order in wanted:
        path = path_of(out, workload, control, order)
        if not path.exists():
            if time.monotonic() > deadline:
                return False
            program = program or build(workload, control.contender)
            records.write(path, carry_out(program, data, order))
        after_run()
    return True


def made(
    out: Path, workload: Workload, control: Control, wanted: Sequence[Order]
) -> list[Record]:
    """Records of the runs that were made."""
    paths = [path_of(out, workload, control, order) for order in wanted]
    return [records.read(path) for path in paths if path.exists()]
