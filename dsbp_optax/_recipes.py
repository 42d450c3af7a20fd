"""The optimizers that users call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import (
    _basis,
    _checks,
    _coordinates,
    _eigenbasis,
    _filter,
    _layout,
    _metric,
    _momentum,
    _orthogonal,
    _plan,
    _probe,
    _quantization,
    _residual,
    _share,
    _spectral,
)
from dsbp_optax._clip import clip_by_norm_growth
from dsbp_optax._gate import gated
from dsbp_optax._inner import Pair
from dsbp_optax._layout import AxesRule, PerPath
from dsbp_optax._moments import residual_adam, residual_momentum
from dsbp_optax._plan import Choices
from dsbp_optax._project import scale_by_spectral_projection
from dsbp_optax._residual import Factor, Residual
from dsbp_optax._schedule import Every, Rank, RankFraction
from dsbp_optax._types import PyTree, Scalar, Side, Solver

Mask: TypeAlias = Any
Fallback: TypeAlias = optax.GradientTransformation | None
#: How the first moment of the residual is stored, see `residual_momentum`.
Storage: TypeAlias = Literal[
    "int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "float32"
]
#: That, a share for `normalize_residual`, a rule of one's own, or None to drop it.
ResidualChoice: TypeAlias = Storage | Scalar | Residual | Factor | None

_BITS: Mapping[str, int] = {
    **{f"int{bits}": bits for bits in _quantization.STEPS},
    "float32": 32,
}

#: Directions that pay for themselves beside a residual that keeps the rest.
_FEW = RankFraction(1 / 16, most=8)
#: Directions of a projection without a residual.
_QUARTER = RankFraction(1 / 4, most=32)


def dsbp(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    rank: PerPath[int] = 10,
    update_every: Scalar = 100,
    power_iterations: Scalar = 5,
    sharpness: optax.ScalarOrSchedule = 0.1,
    *,
    side: PerPath[Side] = "output",
    solver: Solver | None = None,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Dynamic Spectral Backpropagation: the paper's rule, literally, with its defaults.

        W <- W - eta (P G + beta lambda_1 / tr(C) e_1 e_1^T W),   P = V V^T

    Kept for fidelity and comparison: on measured workloads it trains worse than plain
    SGD. `dsbp_muon`, `dsbp_adamw` and `dsbp_sgd` are recommended. Two departures:

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
      side: "output" is the paper's; the other rules take "input".
      solver: eigensolver, None for block power iteration.
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
    rank: PerPath[Rank] = _FEW,
    whitening: Scalar = 1.0,
    clip: Scalar | None = 2.0,
    residual: ResidualChoice = "int5",
    side: PerPath[Side] = "input",
    update_every: Every = 100,
    power_iterations: Scalar = 5,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    fallback: Fallback = None,
    solver: Solver | None = None,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    share: Sequence[Sequence[str]] = (),
    moment_dtype: Any = "bfloat16",
    basis_dtype: Any = "bfloat16",
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, whitened in the activation eigenbasis and coarse outside.

        u = momentum(f V^T G),   r = momentum(G - V V^T G) in a few bits a number
        W <- W - eta (V u + r + weight_decay W)

    Args:
      learning_rate: eta, a number or a schedule; SGD's own is a fair start.
      momentum: decay of the momentum.
      nesterov: whether to use Nesterov momentum.
      rank: k, an integer, a `RankFraction`, "auto", a mapping from glob pattern, or a
        callable. By default a sixteenth of the narrower side, at most 8.
      whitening: exponent of the spectral filter, see `whiten`; 0 turns it off.
      clip: largest ratio of the gradient's norm to its running mean, see
        `clip_by_norm_growth`; None for any. Whitening keeps units alive that plain
        SGD kills when its rate is too high, and without a bound the loss then grows
        without end.
      residual: "int5" keeps the residual's momentum in five bits a number, see
        `residual_momentum`; likewise "int1" to "int8", "float32"; a number is
        the share of `normalize_residual`; a rule; None drops the residual.
      side: side of the kernel that carries the basis.
      update_every: p, steps between refreshes; "auto" lets each layer find its own.
      power_iterations: q, power iterations a refresh.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: transformation for parameters that are no kernels; None: the same.
      solver: eigensolver, None for block power iteration.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      share: groups of kernels with one input, which keep one basis, see an
        adapter's ``find_shared_inputs``.
      moment_dtype: dtype that moments in the subspace are stored in; bfloat16 is
        rounded stochastically; None keeps that of the computation.
      basis_dtype: dtype that bases are stored in; None as above.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``.

    Raises:
      ValueError, TypeError: on bad arguments, naming them.

    Cost: ``2 (k + 1) (d + m) + 5 d m / 8`` bytes of state a projected kernel instead of
    ``4 d m``.

    Reference: the eigenbasis is that of arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=4)
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
    """
    _checks.check_number("momentum", momentum, 0.0, 1.0)
    return _recipe(
        optax.trace(momentum, nesterov),
        learning_rate,
        weight_decay,
        mask,
        clip,
        rank=rank,
        spectral_filter=_whitening(whitening),
        residual=_residual_rule(
            residual, lambda bits: residual_momentum(momentum, bits, nesterov=nesterov)
        ),
        side=side,
        update_every=update_every,
        power_iterations=power_iterations,
        solver=solver,
        decay=decay,
        axes=axes,
        share=share,
        fallback=fallback,
        moment_dtype=moment_dtype,
        basis_dtype=basis_dtype,
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
    nesterov: bool = False,
    moment_dtype: Storage = "int5",
    rank: PerPath[Rank] = _metric.LARGE_SHARE,
    exponent: optax.ScalarOrSchedule = 0.5,
    damping: Scalar = 0.2,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    side: PerPath[Side] = "input",
    update_every: Every = 20,
    power_iterations: Scalar = 2,
    fallback: Fallback = None,
    solver: Solver | None = None,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    share: Sequence[Sequence[str]] = (),
    basis_dtype: Any = "bfloat16",
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW in the metric of each layer's activations, in a ninth of its moments.

        m <- b1 m + (1 - b1) S G in five bits,   v = rows columns^T / mean(rows)
        W <- W - eta (|D| / |S D| S D + weight_decay W),   D = m / (sqrt(v) + eps)

    `scale_by_activation_metric` round `scale_by_quantized_adam`: Adam of ``S^-1 W``
    with S = I - V diag(1 - f) V^T. Parameters that are no kernels get Adam.

    Args:
      learning_rate: eta, a number or a schedule; AdamW's own up to four times that.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      nesterov: whether to use Nesterov momentum.
      moment_dtype: how the first moment of kernels is stored: "int1" to "int8", so many
        bits a number, or "float32".
      rank: k, an integer, a `RankFraction`, "auto", a mapping from glob pattern, or a
        callable. By default three sixteenths of the narrower side, at most 32.
      exponent: of the metric, a number or a schedule; 0 turns it off.
      damping: of the metric, in units of the mean eigenvalue.
      fallback_learning_rate: of the parameters that are no kernels, a number or a
        schedule; None for `learning_rate`.
      side: side of the kernel that carries the basis.
      update_every: p, steps between refreshes; "auto" lets each layer find its own.
      power_iterations: q, power iterations a refresh.
      fallback: transformation for parameters that are no kernels, in place of Adam.
      solver: eigensolver, None for block power iteration.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      share: groups of kernels with one input, which keep one basis, see an
        adapter's ``find_shared_inputs``.
      basis_dtype: dtype that bases are stored in; None for that of the computation.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``. Without
      statistics the metric is that of the gradient's own directions.

    Raises:
      ValueError, TypeError: on bad arguments, naming them.

    Cost: ``5 d m / 8 + 2 k d + 6 (d + m)`` bytes of state a kernel instead of
    ``8 d m``, about a ninth; ``8 d k m`` FLOPs a step more than AdamW.

    Reference: the eigenbasis is that of arXiv 2505.23369, the factored second moment
    that of Adafactor, arXiv 1804.04235.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_adamw(3e-3, rank=4)
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
    """
    refresh = _eigenbasis.Refresh(
        *(update_every, power_iterations, solver or _basis.power_iteration),
        decay,
    )
    return _metric_recipe(
        Choices(rank, side, axes, "always", _share.check_share(share)),
        refresh,
        _momentum.quantized_adam(b1, b2, eps, _bits(moment_dtype), nesterov),
        fallback or optax.scale_by_adam(b1, b2, eps, nesterov=nesterov),
        None,
        (exponent, damping, basis_dtype, statistics_in_state),
        (learning_rate, fallback_learning_rate, weight_decay, mask),
        inside=True,
    )


def subspace_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    rank: PerPath[Rank] = _QUARTER,
    clip: Scalar | None = 2.0,
    residual: ResidualChoice = None,
    side: PerPath[Side] = "input",
    update_every: Every = 100,
    power_iterations: Scalar = 5,
    fallback: Fallback = None,
    solver: Solver | None = None,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    share: Sequence[Sequence[str]] = (),
    moment_dtype: Any = "bfloat16",
    basis_dtype: Any = "bfloat16",
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on coordinates in the activation eigenbasis, for gradients never formed.

        u = adam(V^T G)
        W <- W - eta (V u + weight_decay W)

    For an adapter's ``subspace_value_and_grad``: less memory, less communication and
    two thirds of the FLOPs of a gradient, at a higher loss; where whole gradients fit,
    `dsbp_adamw` is better.

    Args:
      learning_rate: eta, a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: transformation for parameters that are no kernels; None: the same.
      nesterov: whether to use Nesterov momentum.
      rank: k, an integer, a `RankFraction`, "auto", a mapping from glob pattern, or a
        callable. By default a quarter of the narrower side, at most 32.
      clip: largest ratio of the gradient's norm to its running mean, see
        `clip_by_norm_growth`, which keeps high rates stable; None for any.
      residual: None drops what is outside, as gradients in coordinates ask for. With
        whole gradients "int5" keeps its first moment in five bits a number and factors
        the second, see `residual_adam`; likewise "int1" to "int8", "float32"; a number
        is the share of `normalize_residual`; or a rule.
      side: side of the kernel that carries the basis.
      update_every: p, steps between refreshes; "auto" lets each layer find its own.
      power_iterations: q, power iterations a refresh.
      solver: eigensolver, None for block power iteration.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      share: groups of kernels with one input, which keep one basis, see an
        adapter's ``find_shared_inputs``.
      moment_dtype: dtype that moments in the subspace are stored in; bfloat16 is
        rounded stochastically; None keeps that of the computation.
      basis_dtype: dtype that bases are stored in; None as above.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``.

    Raises:
      ValueError, TypeError: on bad arguments, naming them.

    Cost: ``2 k (d + 2 m)`` bytes of state a projected kernel instead of ``8 d m``.

    Reference: the eigenbasis is that of arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.subspace_adamw(1e-3, rank=4)
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
    """
    return _recipe(
        optax.scale_by_adam(b1, b2, eps, nesterov=nesterov),
        learning_rate,
        weight_decay,
        mask,
        clip,
        rank=rank,
        residual=_residual_rule(
            residual, lambda bits: residual_adam(b1, b2, eps, bits, nesterov=nesterov)
        ),
        side=side,
        update_every=update_every,
        power_iterations=power_iterations,
        solver=solver,
        decay=decay,
        axes=axes,
        share=share,
        fallback=fallback,
        moment_dtype=moment_dtype,
        basis_dtype=basis_dtype,
        statistics_in_state=statistics_in_state,
    )


def dsbp_muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    moment_dtype: Storage = "int5",
    rank: PerPath[Rank] = _metric.SHARE,
    exponent: optax.ScalarOrSchedule = 0.5,
    damping: Scalar = 0.2,
    scale: _orthogonal.Scale = "muon",
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    side: PerPath[Side] = "input",
    update_every: Every = 20,
    power_iterations: Scalar = 2,
    fallback: Fallback = None,
    solver: Solver | None = None,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    share: Sequence[Sequence[str]] = (),
    basis_dtype: Any = "bfloat16",
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Muon in the metric of each layer's activations, its momentum in five bits.

        m <- momentum m + G in five bits a number,   S = I - V diag(1 - f) V^T
        W <- W - eta (unit(S orthogonalize(S m)) + weight_decay W)

    A chain of `scale_by_quantized_momentum` and `scale_by_activation_metric` around
    `orthogonalize`. Parameters that are no kernels get Adam.

    Args:
      learning_rate: eta, a number or a schedule; Muon's own up to twice that (or, with
        ``scale="adam"``, AdamW's).
      momentum: decay of the momentum.
      nesterov: whether to use Nesterov momentum.
      moment_dtype: how the momentum of kernels is stored: "int1" to "int8", so many
        bits a number, or "float32".
      rank: k, an integer, a `RankFraction`, "auto", a mapping from glob pattern, or a
        callable. By default an eighth of the narrower side, at most 32.
      exponent: of the metric, a number or a schedule; 0 turns it off.
      damping: of the metric, in units of the mean eigenvalue.
      scale: size of the orthogonalised update, see `orthogonalize`.
      fallback_learning_rate: of the parameters that are no kernels, a number or a
        schedule; None for `learning_rate`.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      side: side of the kernel that carries the basis.
      update_every: p, steps between refreshes; "auto" lets each layer find its own.
      power_iterations: q, power iterations a refresh.
      fallback: transformation for parameters that are no kernels, in place of Adam,
        ``optax.scale_by_adam(nesterov=nesterov)``.
      solver: eigensolver, None for block power iteration.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      share: groups of kernels with one input, which keep one basis, see an
        adapter's ``find_shared_inputs``.
      basis_dtype: dtype that bases are stored in; None for that of the computation.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``. Without
      statistics the metric is that of the momentum's own directions, which is worth
      less.

    Raises:
      ValueError, TypeError: on bad arguments, naming them.

    Cost: ``5 d m / 8 + 2 k d + 2 (d + m)`` bytes of state a kernel instead of
    ``4 d m``, about a fifth; ``8 d k m`` FLOPs a step more than Muon.

    Reference: Jordan et al., Muon (2024); the eigenbasis is that of arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_muon(0.02, rank=4)
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
    """
    _checks.check_number("momentum", momentum, 0.0, 1.0)
    refresh = _eigenbasis.Refresh(
        *(update_every, power_iterations, solver or _basis.power_iteration),
        decay,
    )
    return _metric_recipe(
        Choices(rank, side, axes, "always", _share.check_share(share)),
        refresh,
        _momentum.quantized_momentum(momentum, _bits(moment_dtype), nesterov),
        fallback or optax.scale_by_adam(nesterov=nesterov),
        _orthogonal.orthogonalize(scale=scale),
        (exponent, damping, basis_dtype, statistics_in_state),
        (learning_rate, fallback_learning_rate, weight_decay, mask),
        inside=False,
    )


def subspace_muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    rank: PerPath[Rank] = _QUARTER,
    whitening: Scalar = 0.0,
    residual: ResidualChoice = None,
    scale: _orthogonal.Scale = "muon",
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    side: PerPath[Side] = "input",
    update_every: Every = 100,
    power_iterations: Scalar = 5,
    fallback: Fallback = None,
    solver: Solver | None = None,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    share: Sequence[Sequence[str]] = (),
    moment_dtype: Any = "bfloat16",
    basis_dtype: Any = "bfloat16",
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Muon on coordinates in the activation eigenbasis, for gradients never formed.

        u = momentum(f V^T G)
        W <- W - eta (V orthogonalize(u) + weight_decay W)

    For an adapter's ``subspace_value_and_grad``: less memory, less communication and
    two thirds of the FLOPs of a gradient, at a higher loss; where whole gradients fit,
    `dsbp_muon` is better. Parameters that are no kernels get Adam with the same
    learning rate.

    Args:
      learning_rate: eta, a number or a schedule; Muon's own (or, with
        ``scale="adam"``, AdamW's).
      momentum: decay of the momentum.
      nesterov: whether to use Nesterov momentum.
      rank: k, an integer, a `RankFraction`, "auto", a mapping from glob pattern, or a
        callable. By default a quarter of the narrower side, at most 32.
      whitening: exponent of the spectral filter, see `whiten`; 0 turns it off.
      residual: None drops what is outside, as gradients in coordinates ask for. With
        whole gradients "int6" keeps its momentum in six bits a number, see
        `residual_momentum`; likewise "int1" to "int8", "float32"; a number is the
        share of `normalize_residual`; or a rule.
      scale: size of the orthogonalised update, see `orthogonalize`.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      side: side of the kernel that carries the basis.
      update_every: p, steps between refreshes; "auto" lets each layer find its own.
      power_iterations: q, power iterations a refresh.
      fallback: transformation for parameters that are no kernels, in place of Adam,
        ``optax.scale_by_adam(nesterov=nesterov)``.
      solver: eigensolver, None for block power iteration.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      share: groups of kernels with one input, which keep one basis, see an
        adapter's ``find_shared_inputs``.
      moment_dtype: dtype that moments in the subspace are stored in; bfloat16 is
        rounded stochastically; None keeps that of the computation.
      basis_dtype: dtype that bases are stored in; None as above.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``.

    Raises:
      ValueError, TypeError: on bad arguments, naming them.

    Cost: ``2 k (d + m)`` bytes of state a projected kernel instead of ``4 d m``; the
    orthogonalisation of a ``k x m`` matrix.

    Reference: Jordan et al., Muon (2024), in the eigenbasis of arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.subspace_muon(0.02, rank=4)
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
    """
    _checks.check_number("momentum", momentum, 0.0, 1.0)
    return _recipe(
        optax.trace(momentum, nesterov),
        learning_rate,
        weight_decay,
        mask,
        None,
        rank=rank,
        spectral_filter=_whitening(whitening),
        residual=_residual_rule(
            residual, lambda bits: residual_momentum(momentum, bits, nesterov=nesterov)
        ),
        direction=_orthogonal.orthogonalize(scale=scale),
        side=side,
        update_every=update_every,
        power_iterations=power_iterations,
        solver=solver,
        decay=decay,
        axes=axes,
        share=share,
        fallback=fallback or optax.scale_by_adam(nesterov=nesterov),
        moment_dtype=moment_dtype,
        basis_dtype=basis_dtype,
        statistics_in_state=statistics_in_state,
    )


def _recipe(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    mask: Mask,
    clip: Scalar | None,
    **projection: Any,
) -> optax.GradientTransformationExtraArgs:
    """Clipping, projection, decay, learning rate; the state of the projection first."""
    rates = optax.scale_by_learning_rate(learning_rate)
    tx = scale_by_spectral_projection(inner, **projection)
    return _finished(tx, weight_decay, mask, rates, clip)


def _metric_recipe(
    choices: Choices,
    refresh: _eigenbasis.Refresh,
    moments: optax.GradientTransformationExtraArgs,
    fallback: optax.GradientTransformation,
    direction: _orthogonal.Direction | None,
    metric: tuple[optax.ScalarOrSchedule, Scalar, Any, bool],
    finish: tuple[optax.ScalarOrSchedule, optax.ScalarOrSchedule | None, Scalar, Mask],
    inside: bool,
) -> optax.GradientTransformationExtraArgs:
    """Moments of kernels and of the rest, the metric round kernels, decay, rates.

    Args:
      choices: what has a basis.
      refresh: of the bases.
      moments: of kernels.
      fallback: for parameters that are no kernels.
      direction: of kernels, between the two factors of the metric.
      metric: exponent, damping, dtype of bases, whether statistics lie in the state.
      finish: learning rate, that of parameters that are no kernels (None: the same),
        weight decay times the rate of each parameter, and its mask.
      inside: whether moments are taken between the two factors, or before both.
    """
    divided = _divided(moments, fallback, choices)
    exponent, damping, basis_dtype, statistics_in_state = metric
    rule = _metric.make_rule(
        *(divided if inside else None, direction, exponent, damping, "both"),
        *(choices, refresh, basis_dtype, statistics_in_state),
    )
    update = _metric.activation_metric(rule)
    update = update if inside else optax.chain(divided, update)
    learning_rate, other_learning_rate, weight_decay, mask = finish
    rates = optax.scale_by_learning_rate(learning_rate)
    if other_learning_rate is not None:
        other_rates = optax.scale_by_learning_rate(other_learning_rate)

        def label(tree: PyTree) -> PyTree:
            leaves, treedef = _layout.flatten_with_paths(tree)
            kernels = _kernels(leaves, choices)
            return treedef.unflatten(
                "kernel" if path in kernels else "other" for path in leaves
            )

        rates = optax.partition({"kernel": rates, "other": other_rates}, label)
    return _finished(gated(update), weight_decay, mask, rates, None)


def _divided(
    moments: optax.GradientTransformationExtraArgs,
    fallback: optax.GradientTransformation,
    choices: Choices,
) -> optax.GradientTransformationExtraArgs:
    """`moments` of kernels, `fallback` of the rest: a `Pair` of flat dicts by path."""
    others = _probe.as_transformation("fallback", fallback)

    def divide(tree: PyTree) -> Pair:
        leaves, _ = _layout.flatten_with_paths(tree)
        own = _kernels(leaves, choices)
        return Pair(own, {path: x for path, x in leaves.items() if path not in own})

    def init(params: PyTree) -> Pair:
        if not jax.tree.leaves(params):
            return Pair(jnp.zeros([]), jnp.zeros([]))
        given = divide(params)
        _probe.check_fallback(others, given.others)
        return Pair(moments.init(given.kernels), others.init(given.others))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Pair]:
        _coordinates.refuse(_coordinates.find(updates), "this optimizer")
        leaves, treedef = _layout.flatten_with_paths(updates)
        given = divide(updates)
        changes, kernels = moments.update(given.kernels, state.kernels, **extra)
        rest, held = given.others, state.others
        if rest:
            there = None if params is None else divide(params).others
            rest, held = others.update(rest, held, there, **extra)
        changes = {**changes, **rest}
        ordered = treedef.unflatten(changes[path] for path in leaves)
        return ordered, Pair(kernels, held)

    return optax.GradientTransformationExtraArgs(init, update)


def _kernels(leaves: Mapping[str, Any], choices: Choices) -> dict[str, Any]:
    """The kernels among `leaves`, by path."""
    return {p: x for p, x in leaves.items() if _plan.is_kernel(p, x, choices)}


def _finished(
    spectral: optax.GradientTransformationExtraArgs,
    weight_decay: Scalar,
    mask: Mask,
    rates: optax.GradientTransformation,
    clip: Scalar | None,
) -> optax.GradientTransformationExtraArgs:
    """Clipping, `spectral`, decay, learning rates; the state of `spectral` first.

    A step that `spectral` skips does not decay the weights either.
    """
    without = _eigenbasis.is_zero(weight_decay)
    tx = optax.chain(
        spectral,
        # Decay in full space; without it the parameters need not be passed.
        optax.identity() if without else optax.add_decayed_weights(weight_decay, mask),
        rates,
    )
    limit = None
    if clip is not None:
        limit = clip_by_norm_growth(_checks.check_number("clip", clip, 1.0))

    def init(params: PyTree) -> tuple[Any, ...]:
        held = () if limit is None else (limit.init(params),)
        return (*tx.init(params), *held)

    def update(
        updates: PyTree,
        state: tuple[Any, ...],
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, tuple[Any, ...]]:
        if not jax.tree.leaves(updates):
            return updates, state
        *chained, held = (*state, None) if limit is None else state
        if limit is not None:
            updates, held = limit.update(updates, held)
        updates, new = tx.update(updates, tuple(chained), params, **extra)
        before, after = (_spectral.find_states(s[0])[0] for s in (state, new))
        taken = after.skipped == before.skipped
        updates = jax.tree.map(
            lambda u: jnp.where(taken, u, 0).astype(u.dtype), updates
        )
        return updates, new if limit is None else (*new, held)

    return optax.GradientTransformationExtraArgs(init, update)


def _residual_rule(
    choice: ResidualChoice, moments: Callable[[int], Residual]
) -> Residual | Factor | None:
    """The rule that a choice stands for, `moments` of so many bits among them."""
    if choice is None or _eigenbasis.is_zero(choice):
        return None
    if isinstance(choice, str):
        if choice not in _BITS:
            raise ValueError(
                f"residual: got {choice!r}, expected one of {sorted(_BITS)}, a number "
                "of at least 0, a rule such as dsbp_optax.scale_residual(1.0), or None "
                "to drop it."
            )
        return moments(_BITS[choice])
    if isinstance(choice, Residual) or callable(choice):
        return choice
    _checks.check_number("residual", choice, 0.0)
    return _residual.normalize_residual(choice)


def _bits(storage: Storage) -> int:
    """How many bits a number a name stands for."""
    if storage not in _BITS:
        raise ValueError(
            f"moment_dtype: got {storage!r}, expected one of {sorted(_BITS)}."
        )
    return _BITS[storage]


def _whitening(exponent: Scalar) -> _filter.Filter | None:
    _checks.check_number("whitening", exponent, 0.0)
    return None if _eigenbasis.is_zero(exponent) else _filter.whiten(exponent)
