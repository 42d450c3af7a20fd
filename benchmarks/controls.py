"""Controls: a rule with one of its parts taken away, at the rule's own learning rate.

What a part is worth is the difference to the rule without it, seed by seed. A new
control is one `_control` in `CONTROLS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import optax

import dsbp_optax
from benchmarks.optimizers import CONTENDERS, Contender


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
    """One rule with something taken away."""

    name: str
    of: str  # the contender that it is a control of
    contender: Contender  # what is trained


def _control(of: str, name: str, summary: str, **changes: Any) -> Control:
    base = CONTENDERS[of]
    factory = changes.pop("factory", base.factory)
    training = changes.pop("training", {})
    settings = changes.pop("settings", {**base.settings, **changes})
    told = {"summary": summary, "factory": factory, "settings": settings, **training}
    return Control(name, of, replace(base, name=f"{of}, {name}", **told))


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
        "projected_muon",
        "gradients in coordinates",
        "32 x m numbers, whole ones never",
        rank=32,
        residual=None,
        training={"coordinates": True, "warm_start": True},
    ),
    *_of_any("dsbp_sgd"),
    _control("dsbp_sgd", "no whitening", "momentum as it is", whitening=0.0),
    _control("dsbp_sgd", "no residual", "what is outside dropped", residual=None),
)
