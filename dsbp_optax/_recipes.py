"""The optimizers that users call."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _eigenbasis, _plan, _residual
from dsbp_optax._layout import AxesRule, PerPath
from dsbp_optax._project import scale_by_spectral_projection
from dsbp_optax._types import PyTree, Scalar, Side, Solver

Mask: TypeAlias = Any


def dsbp(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    rank: PerPath[int] = 10,
    update_every: Scalar = 100,
    power_iterations: Scalar = 5,
    sharpness: optax.ScalarOrSchedule = 0.1,
    *,
    side: PerPath[Side] = "output",
    solver: Solver | None = None,
    centered: bool = False,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Dynamic Spectral Backpropagation: the paper's rule, literally, with its defaults.

        W <- W - eta (P G + beta lambda_1 / tr(C) e_1 e_1^T W),   P = V V^T

    Kept for fidelity and comparison: on measured workloads it trains worse than plain
    SGD. `dsbp_sgd` and `dsbp_adamw` are the recommended rules. Two departures:

    * the paper adds ``beta lambda_1 e_1 e_1^T``, which does not conform to ``W``; see
      `add_spectral_sharpness` for the reading used here;
    * with sketches, the iterations of a refresh spread over as many steps, one
      mini-batch each. With `Activations` or `Covariance` statistics all of them
      happen on one batch, before the projection, as published; the adapters'
      ``warm_start`` does that for the first batch.

    Args:
      learning_rate: eta, a number or a schedule.
      rank: k; a rank of d or more is the identity. Per path if wished.
      update_every: p, steps between refreshes.
      power_iterations: q, power iterations a refresh.
      sharpness: beta, a number or a schedule; acts where activations were observed.
      side: "output" is the paper's; "input" is the useful one.
      solver: eigensolver, None for block power iteration.
      centered: use the covariance about the mean.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``.

    Raises:
      ValueError, TypeError: on bad arguments, naming them.

    Cost: ``d k`` numbers of state a kernel.

    Reference: arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp(0.1)
      >>> params = {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
    """
    return optax.chain(
        scale_by_spectral_projection(
            rank=rank,
            side=side,
            update_every=update_every,
            power_iterations=power_iterations,
            solver=solver,
            sharpness=sharpness,
            centered=centered,
            decay=decay,
            axes=axes,
            project="always",
            project_cold=True,
            statistics_in_state=statistics_in_state,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def dsbp_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.9,
    *,
    nesterov: bool = False,
    rank: PerPath[int] = 16,
    residual: Scalar = 0.5,
    side: PerPath[Side] = "input",
    update_every: Scalar = 100,
    power_iterations: Scalar = 5,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    solver: Solver | None = None,
    centered: bool = False,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Momentum in the activation eigenbasis, with a normalised residual.

        u = momentum(V^T G)
        W <- W - eta (V u + s (G - V V^T G) + weight_decay W),  |s res| = c |u|

    Args:
      learning_rate: eta, a number or a schedule; SGD's own is a fair start.
      momentum: decay of the momentum.
      nesterov: whether to use Nesterov momentum.
      rank: k, an integer, a mapping from glob pattern, or a callable.
      residual: c, RMS of the residual's part as a share of the subspace's; 0 drops it.
      side: side of the kernel that carries the basis.
      update_every: p, steps between refreshes.
      power_iterations: q, power iterations a refresh.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      solver: eigensolver, None for block power iteration.
      centered: use the covariance about the mean.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``.

    Raises:
      ValueError, TypeError: on bad arguments, naming them.

    Cost: ``k (d + m)`` numbers of state a projected kernel instead of ``d m``.

    Reference: the eigenbasis is that of arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=4)
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
    """
    return _recipe(
        optax.trace(momentum, nesterov),
        learning_rate,
        weight_decay,
        mask,
        rank=rank,
        residual=_residual_rule(residual),
        side=side,
        update_every=update_every,
        power_iterations=power_iterations,
        solver=solver,
        centered=centered,
        decay=decay,
        axes=axes,
        statistics_in_state=statistics_in_state,
    )


def dsbp_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    mu_dtype: Any = None,
    nesterov: bool = False,
    rank: PerPath[int] = 16,
    residual: Scalar = 0.5,
    side: PerPath[Side] = "input",
    update_every: Scalar = 100,
    power_iterations: Scalar = 5,
    solver: Solver | None = None,
    centered: bool = False,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW in the activation eigenbasis, with a normalised residual.

        u = adam(V^T G)
        W <- W - eta (V u + s (G - V V^T G) + weight_decay W),  |s res| = c |u|

    Args:
      learning_rate: eta, a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      mu_dtype: dtype of the first moment, None for the coordinates' own.
      nesterov: whether to use Nesterov momentum.
      rank: k, an integer, a mapping from glob pattern, or a callable.
      residual: c, RMS of the residual's part as a share of the subspace's; 0 drops it.
      side: side of the kernel that carries the basis.
      update_every: p, steps between refreshes.
      power_iterations: q, power iterations a refresh.
      solver: eigensolver, None for block power iteration.
      centered: use the covariance about the mean.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``.

    Raises:
      ValueError, TypeError: on bad arguments, naming them.

    Cost: ``k (d + 2 m)`` numbers of state a projected kernel instead of ``2 d m``.

    Reference: the eigenbasis is that of arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_adamw(1e-3, rank=4)
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
    """
    return _recipe(
        optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=nesterov),
        learning_rate,
        weight_decay,
        mask,
        rank=rank,
        residual=_residual_rule(residual),
        side=side,
        update_every=update_every,
        power_iterations=power_iterations,
        solver=solver,
        centered=centered,
        decay=decay,
        axes=axes,
        statistics_in_state=statistics_in_state,
    )


def _recipe(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    mask: Mask,
    **projection: Any,
) -> optax.GradientTransformationExtraArgs:
    without = _eigenbasis.is_zero(weight_decay)
    tx = optax.chain(
        scale_by_spectral_projection(inner, **projection),
        # Decay in full space; without it the parameters need not be passed.
        optax.identity() if without else optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        updates, new = tx.update(updates, state, params, **extra)
        # A step that was skipped does not decay the weights either.
        taken = new[0].skipped == state[0].skipped
        updates = jax.tree.map(
            lambda u: jnp.where(taken, u, 0).astype(u.dtype), updates
        )
        return updates, new

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _residual_rule(share: Scalar) -> _residual.Factor | None:
    _plan.check_number("residual", share, 0.0)
    if _eigenbasis.is_zero(share):
        return None
    return _residual.normalize_residual(share)
