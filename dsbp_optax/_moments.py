"""Residual rules that keep moments of ``E = G - V V^T G`` in a few bits a number."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from dsbp_optax import _checks, _momentum
from dsbp_optax._residual import Contribution, Outside, Residual
from dsbp_optax._types import Array, PyTree, Scalar


class FactoredAdam(NamedTuple):
    """State of `residual_adam` for one kernel.

    Attributes:
      momentum: as stored.
      rows: mean square of each row, ``(*batch, a, 1)``.
      columns: mean square of each column, ``(*batch, 1, b)``.
      taken: number of steps so far, for the correction of the bias.
    """

    momentum: PyTree
    rows: Array
    columns: Array
    taken: Array


def residual_momentum(
    decay: Scalar = 0.9, bits: int = 4, *, nesterov: bool = False
) -> Residual:
    """Momentum of the residual, kept in a few bits a number.

        r <- decay r + (G - V V^T G)

    Beside ``inner=optax.trace(decay, nesterov)`` the sum is the momentum of the whole
    gradient: exact where the gradient's energy is, coarse where little is left.

    Args:
      decay: of the momentum, that of the inner optimizer; may be traced.
      bits: 1 to 8 bits a number; 32 keeps the floats.
      nesterov: as in `optax.trace`.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Raises:
      ValueError: for other numbers of bits.

    Cost: ``bits d m / 8 + 2 (d + m)`` bytes of state for each kernel; one
    more lift, ``2 d k m`` FLOPs.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.trace(0.9), residual=dsbp_optax.residual_momentum(0.9))
    """
    store = _momentum.storage(bits)
    _checks.check_number("decay", decay, 0.0, 1.0)

    def update(seen: Outside, held: Any) -> tuple[Contribution, Any]:
        fresh = seen.residual()
        rate = jnp.asarray(decay, fresh.dtype)
        momentum = rate * store.decode(held) + fresh
        used = rate * momentum + fresh if nesterov else momentum
        return Contribution(addition=used), store.encode(momentum)

    return Residual(store.init, update)


def residual_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    bits: int = 4,
    *,
    nesterov: bool = False,
) -> Residual:
    """Adam of the residual ``E``: coarse first moment, factored second moment.

        m <- b1 m + (1 - b1) E,   v = rows columns^T / mean(rows) of averaged E^2
        addition = m / (sqrt(v) + eps),  both moments corrected for their bias

    Beside ``inner=optax.scale_by_adam(b1, b2, eps)`` every part of the update has the
    size that Adam gives it: exact moments where the gradient's energy is, coarse ones
    where little is left.

    Args:
      b1: decay of the first moment; may be traced, like all of the numbers.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      bits: 1 to 8 bits a number of the first moment; 32 keeps the floats.
      nesterov: as in `optax.scale_by_adam`.

    Returns:
      A rule for ``scale_by_spectral_projection(residual=...)``.

    Raises:
      ValueError: for other numbers of bits.

    Cost: ``bits d m / 8 + 6 (d + m)`` bytes of state for each kernel; one
    more lift, ``2 d k m`` FLOPs, and two reductions over the residual.

    Reference: the factors are those of Adafactor, arXiv 1804.04235.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.scale_by_adam(), residual=dsbp_optax.residual_adam())
    """
    store = _momentum.storage(bits)
    _checks.check_number("b1", b1, 0.0, 1.0)
    _checks.check_number("b2", b2, 0.0, 1.0)
    _checks.check_number("eps", eps, 0.0)

    def init(matrix: Array) -> FactoredAdam:
        rows, columns = matrix[..., :, :1], matrix[..., :1, :]
        return FactoredAdam(store.init(matrix), rows, columns, jnp.zeros([], jnp.int32))

    def update(seen: Outside, held: FactoredAdam) -> tuple[Contribution, FactoredAdam]:
        fresh = seen.residual()
        dtype, count = fresh.dtype, optax.safe_increment(held.taken)
        first, second = jnp.asarray(b1, dtype), jnp.asarray(b2, dtype)
        momentum = _momentum.average(first, store.decode(held.momentum), fresh)
        rows, columns, variance = _momentum.factored(
            second, held.rows, held.columns, fresh * fresh
        )
        addition = _momentum.adam_step(
            momentum, variance, fresh, first, second, eps, count, nesterov
        )
        state = FactoredAdam(store.encode(momentum), rows, columns, count)
        return Contribution(addition=addition), state

    return Residual(init, update)
