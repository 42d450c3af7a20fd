"""The optimizers that users call: each is a rule of matrices, decay and rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import checks, paths, plan
from dsbp_optax.core.paths import PerPath
from dsbp_optax.core.plan import Basis, Choices
from dsbp_optax.core.rank import Rank, RankFraction
from dsbp_optax.core.state import Kind
from dsbp_optax.core.transform import Rule, transformation
from dsbp_optax.linalg import quantize
from dsbp_optax.linalg.types import PyTree, Scalar, is_zero
from dsbp_optax.rules import filters, inner, metric, moments
from dsbp_optax.rules.clip import clip_by_norm_growth
from dsbp_optax.rules.directions import Scale, orthogonalize
from dsbp_optax.rules.projection import scale_by_spectral_projection
from dsbp_optax.rules.residual import (
    Factor,
    Residual,
    normalize_residual,
    residual_adam,
    residual_momentum,
)

Mask: TypeAlias = Any
Fallback: TypeAlias = optax.GradientTransformation | None
#: How moments of kernels are stored: so many bits a number, or floats.
Storage: TypeAlias = Literal[
    "int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "float32"
]
#: That, a share for `normalize_residual`, a rule of one's own, or None to drop it.
ResidualChoice: TypeAlias = Storage | Scalar | Residual | Factor | None

_BITS: Mapping[str, int] = {
    **{f"int{bits}": bits for bits in quantize.STEPS},
    "float32": 32,
}

#: Directions that pay for themselves beside a residual that keeps the rest.
_FEW = RankFraction(1 / 16, most=8)
#: Directions of a projection without a residual.
_QUARTER = RankFraction(1 / 4, most=32)


def dsbp_muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    moment_dtype: Storage = "int5",
    exponent: optax.ScalarOrSchedule = 0.5,
    scale: Scale = "muon",
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    fallback: Fallback = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    rank: PerPath[Rank] = metric.SHARE,
    update_every: Scalar = metric.EVERY,
    basis: Basis | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon, its step shortened along dominant directions, with momentum in five bits.

        m <- momentum m + G in five bits a number,   S = I - V diag(1 - f) V^T
        W <- W - eta (|D| / |S D| S D + weight_decay W),   D = orthogonalize(S m)

    A chain of `scale_by_quantized_momentum` and `scale_by_activation_metric` around
    `orthogonalize`. Parameters that are no kernels get Adam.

    Args:
      learning_rate: eta, a number or a schedule; Muon's own up to twice that (or, with
        ``scale="adam"``, AdamW's).
      momentum: decay of the momentum.
      nesterov: whether to use Nesterov momentum.
      moment_dtype: how the momentum of kernels is stored: "int1" to "int8", so many
        bits a number, or "float32".
      rank: k, an integer, a `RankFraction`, a mapping from glob pattern, or a
        callable. By default an eighth of the narrower side, at most 32.
      exponent: of the metric, a number or a schedule; 0 turns it off.
      scale: size of the orthogonalised update, see `orthogonalize`.
      fallback_learning_rate: of the parameters that are no kernels, a number or a
        schedule; None for `learning_rate`.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      update_every: p, steps between refreshes.
      fallback: transformation for parameters that are no kernels, in place of Adam,
        ``optax.scale_by_adam(nesterov=nesterov)``.
      basis: how bases are kept, see `Basis`.

    Returns:
      An optimizer; call ``update(grads, state, params)``, as Muon's. V are the leading
      directions of the momentum, or with ``statistics=`` those of the activations; no
      difference between the two was resolved in any test.

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
    checks.check_number("momentum", momentum, 0.0, 1.0)
    rule = metric.metric_rule(
        orthogonalize(scale=scale),
        exponent,
        before=moments.quantized_momentum(momentum, _bits(moment_dtype), nesterov),
    )
    asked = metric.metric_choices(rank, update_every, basis)
    adam = optax.scale_by_adam(nesterov=nesterov)
    tx = _of_kernels(rule, fallback, adam, asked)
    rates = _rates(learning_rate, fallback_learning_rate, asked)
    return _finished(tx, weight_decay, mask, rates)


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
    exponent: optax.ScalarOrSchedule = 0.5,
    fallback: Fallback = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    rank: PerPath[Rank] = metric.LARGE_SHARE,
    update_every: Scalar = metric.EVERY,
    basis: Basis | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW, scaled by each layer's activations, with a ninth of AdamW's state.

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
      rank: k, an integer, a `RankFraction`, a mapping from glob pattern, or a
        callable. By default three sixteenths of the narrower side, at most 32.
      exponent: of the metric, a number or a schedule; 0 turns it off.
      fallback_learning_rate: of the parameters that are no kernels, a number or a
        schedule; None for `learning_rate`.
      update_every: p, steps between refreshes.
      fallback: transformation for parameters that are no kernels, in place of Adam,
        ``optax.scale_by_adam(nesterov=nesterov)``.
      basis: how bases are kept, see `Basis`.

    Returns:
      An optimizer; call ``update(grads, state, params, statistics=...)``. With
      ``statistics={}`` the metric is that of the gradient's own directions, which gave
      0.103 of the 0.122 nats gained on the small GPT.

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
    rule = metric.metric_rule(
        exponent=exponent,
        between=moments.quantized_adam(b1, b2, eps, _bits(moment_dtype), nesterov),
    )
    asked = metric.metric_choices(rank, update_every, basis)
    adam = optax.scale_by_adam(b1, b2, eps, nesterov=nesterov)
    tx = _of_kernels(rule, fallback, adam, asked)
    rates = _rates(learning_rate, fallback_learning_rate, asked)
    return _finished(tx, weight_decay, mask, rates)


def dsbp_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.9,
    *,
    nesterov: bool = False,
    whitening: Scalar = 1.0,
    clip: Scalar | None = 2.0,
    residual: ResidualChoice = "int5",
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    fallback: Fallback = None,
    moment_dtype: Any = "bfloat16",
    rank: PerPath[Rank] = _FEW,
    update_every: Scalar = 100,
    basis: Basis | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD whose momentum is whitened by each layer's activations, in few bits.

        u = momentum(f V^T G),   r = momentum(G - V V^T G) in a few bits a number
        W <- W - eta (V u + r + weight_decay W)

    Args:
      learning_rate: eta, a number or a schedule; SGD's own is a fair start.
      momentum: decay of the momentum.
      nesterov: whether to use Nesterov momentum.
      rank: k, an integer, a `RankFraction`, a mapping from glob pattern, or a
        callable. By default a sixteenth of the narrower side, at most 8.
      whitening: exponent of the spectral filter, see `whiten`; 0 turns it off.
      clip: largest ratio of the gradient's norm to its running mean, see
        `clip_by_norm_growth`; None for any. Whitening keeps units alive that plain
        SGD kills when its rate is too high, and without a bound the loss then grows
        without end.
      residual: "int5" keeps the residual's momentum in five bits a number, see
        `residual_momentum`; likewise "int1" to "int8", "float32"; a number is
        the share of `normalize_residual`; a rule; None drops the residual.
      update_every: p, steps between refreshes.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: transformation for parameters that are no kernels; None: the same.
      moment_dtype: dtype that moments in the subspace are stored in; bfloat16 is
        rounded stochastically; None keeps that of the computation.
      basis: how bases are kept, see `Basis`.

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
    checks.check_number("momentum", momentum, 0.0, 1.0)
    tx = scale_by_spectral_projection(
        optax.trace(momentum, nesterov),
        rank=rank,
        update_every=update_every,
        spectral_filter=_whitening(whitening),
        residual=_residual_rule(
            residual, lambda bits: residual_momentum(momentum, bits, nesterov=nesterov)
        ),
        fallback=fallback,
        moment_dtype=moment_dtype,
        basis=_in_half(basis),
    )
    rates = optax.scale_by_learning_rate(learning_rate)
    return _finished(tx, weight_decay, mask, rates, clip)


def subspace_muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    whitening: Scalar = 0.0,
    residual: ResidualChoice = None,
    scale: Scale = "muon",
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    fallback: Fallback = None,
    moment_dtype: Any = "bfloat16",
    rank: PerPath[Rank] = _QUARTER,
    update_every: Scalar = 100,
    basis: Basis | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon that needs only coordinates of gradients in each layer's eigenbasis.

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
      rank: k, an integer, a `RankFraction`, a mapping from glob pattern, or a
        callable. By default a quarter of the narrower side, at most 32.
      whitening: exponent of the spectral filter, see `whiten`; 0 turns it off.
      residual: None drops what is outside, as gradients in coordinates ask for. With
        whole gradients "int6" keeps its momentum in six bits a number, see
        `residual_momentum`; likewise "int1" to "int8", "float32"; a number is the
        share of `normalize_residual`; or a rule.
      scale: size of the orthogonalised update, see `orthogonalize`.
      weight_decay: decoupled weight decay, in full space.
      mask: which parameters decay, as in `optax.adamw`.
      update_every: p, steps between refreshes.
      fallback: transformation for parameters that are no kernels, in place of Adam,
        ``optax.scale_by_adam(nesterov=nesterov)``.
      moment_dtype: dtype that moments in the subspace are stored in; bfloat16 is
        rounded stochastically; None keeps that of the computation.
      basis: how bases are kept, see `Basis`.

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
    checks.check_number("momentum", momentum, 0.0, 1.0)
    tx = scale_by_spectral_projection(
        optax.trace(momentum, nesterov),
        rank=rank,
        update_every=update_every,
        spectral_filter=_whitening(whitening),
        residual=_residual_rule(
            residual, lambda bits: residual_momentum(momentum, bits, nesterov=nesterov)
        ),
        direction=orthogonalize(scale=scale),
        fallback=fallback or optax.scale_by_adam(nesterov=nesterov),
        moment_dtype=moment_dtype,
        basis=_in_half(basis),
    )
    rates = optax.scale_by_learning_rate(learning_rate)
    return _finished(tx, weight_decay, mask, rates)


def subspace_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    clip: Scalar | None = 2.0,
    residual: ResidualChoice = None,
    fallback: Fallback = None,
    moment_dtype: Any = "bfloat16",
    rank: PerPath[Rank] = _QUARTER,
    update_every: Scalar = 100,
    basis: Basis | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW that needs only coordinates of gradients in each layer's eigenbasis.

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
      rank: k, an integer, a `RankFraction`, a mapping from glob pattern, or a
        callable. By default a quarter of the narrower side, at most 32.
      clip: largest ratio of the gradient's norm to its running mean, see
        `clip_by_norm_growth`, which keeps high rates stable; None for any.
      residual: None drops what is outside, as gradients in coordinates ask for. With
        whole gradients "int5" keeps its first moment in five bits a number and factors
        the second, see `residual_adam`; likewise "int1" to "int8", "float32"; a number
        is the share of `normalize_residual`; or a rule.
      update_every: p, steps between refreshes.
      moment_dtype: dtype that moments in the subspace are stored in; bfloat16 is
        rounded stochastically; None keeps that of the computation.
      basis: how bases are kept, see `Basis`.

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
    moments.check_adam(b1, b2, eps)
    tx = scale_by_spectral_projection(
        optax.scale_by_adam(b1, b2, eps, nesterov=nesterov),
        rank=rank,
        update_every=update_every,
        residual=_residual_rule(
            residual, lambda bits: residual_adam(b1, b2, eps, bits, nesterov=nesterov)
        ),
        fallback=fallback,
        moment_dtype=moment_dtype,
        basis=_in_half(basis),
    )
    rates = optax.scale_by_learning_rate(learning_rate)
    return _finished(tx, weight_decay, mask, rates, clip)


def dsbp(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    rank: PerPath[int] = 10,
    update_every: Scalar = 100,
    power_iterations: Scalar = 5,
    sharpness: optax.ScalarOrSchedule = 0.1,
    *,
    basis: Basis | None = None,
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
      basis: how bases are kept, see `Basis`; the paper's has ``side="output"``.

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
    basis = plan.check_basis(basis)
    if basis.side is None:
        basis = dataclasses.replace(basis, side="output")
    elif isinstance(basis.side, Mapping):  # what no pattern names is the paper's
        side = {**basis.side, "*": basis.side.get("*", "output")}
        basis = dataclasses.replace(basis, side=side)
    if basis.power_iterations is None:
        basis = dataclasses.replace(basis, power_iterations=power_iterations)
    tx = scale_by_spectral_projection(
        rank=rank,
        update_every=update_every,
        sharpness=sharpness,
        project="always",
        project_cold=True,
        basis=basis,
    )
    return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))


def _of_kernels(
    rule: Rule, fallback: Fallback, adam: optax.GradientTransformation, asked: Choices
) -> optax.GradientTransformationExtraArgs:
    """`rule`, with a metric in it, for kernels; `fallback` or `adam` for the rest."""
    rest = inner.as_transformation(fallback or adam, "fallback")

    def check(others: Mapping[str, Any]) -> None:
        if fallback is not None:
            inner.check_fallback(rest, others)

    # The directions of a momentum serve as well: no statistics are missed there.
    kind: Kind = "metric" if rule.incoming is None else "momentum_metric"
    return transformation(kind, rule, rest, asked, check)


def _rates(
    learning_rate: optax.ScalarOrSchedule,
    others: optax.ScalarOrSchedule | None,
    asked: Choices,
) -> optax.GradientTransformation:
    """The learning rate, another for what is no kernel if that is asked for."""
    rates = optax.scale_by_learning_rate(learning_rate)
    if others is None:
        return rates

    def label(tree: PyTree) -> PyTree:
        leaves, treedef = paths.flatten(tree)
        return treedef.unflatten(
            "kernel" if plan.is_kernel(path, x, asked) else "other"
            for path, x in leaves.items()
        )

    each = {"kernel": rates, "other": optax.scale_by_learning_rate(others)}
    return optax.partition(each, label)


def _finished(
    spectral: optax.GradientTransformationExtraArgs,
    weight_decay: Scalar,
    mask: Mask,
    rates: optax.GradientTransformation,
    clip: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clipping, `spectral`, decay, learning rates; the state of `spectral` first.

    A step that `spectral` skips does not decay the weights either, nor is its norm
    remembered.
    """
    without = is_zero(weight_decay)
    tx = optax.chain(
        spectral,
        # Decay in full space; without it the parameters need not be passed.
        optax.identity() if without else optax.add_decayed_weights(weight_decay, mask),
        rates,
    )
    limit = None
    if clip is not None:
        limit = clip_by_norm_growth(checks.check_number("clip", clip, 1.0))

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
        taken = new[0].skipped == state[0].skipped
        updates = jax.tree.map(
            lambda u: jnp.where(taken, u, 0).astype(u.dtype), updates
        )
        if limit is None:
            return updates, new
        held = jax.tree.map(lambda x, y: jnp.where(taken, x, y), held, state[-1])
        return updates, (*new, held)

    return optax.GradientTransformationExtraArgs(init, update)


def _in_half(basis: Basis | None) -> Basis:
    """Bases in bfloat16, unless told otherwise."""
    basis = plan.check_basis(basis)
    if basis.dtype is not None:
        return basis
    return dataclasses.replace(basis, dtype="bfloat16")


def _residual_rule(
    choice: ResidualChoice, kept: Callable[[int], Residual]
) -> Residual | Factor | None:
    """The rule that a choice stands for, moments of so many bits among them."""
    if choice is None or is_zero(choice):
        return None
    if isinstance(choice, str):
        if choice not in _BITS:
            raise ValueError(
                f"residual: got {choice!r}, expected one of {sorted(_BITS)}, a number "
                "of at least 0, a rule such as dsbp_optax.residual_momentum(), or None "
                "to drop it."
            )
        return kept(_BITS[choice])
    if isinstance(choice, Residual) or callable(choice):
        return choice
    checks.check_number("residual", choice, 0.0)
    return normalize_residual(choice)


def _bits(storage: Storage) -> int:
    """How many bits a number a name stands for."""
    if storage not in _BITS:
        raise ValueError(
            f"moment_dtype: got {storage!r}, expected one of {sorted(_BITS)}."
        )
    return _BITS[storage]


def _whitening(exponent: Scalar) -> filters.Filter | None:
    checks.check_number("whitening", exponent, 0.0)
    return None if is_zero(exponent) else filters.whiten(exponent)
