"""Moments of gradients in a few bits a number, as plain Optax transformations.

They know no basis. A kernel is stored as matrices with one scale a row and one a
column, see `dsbp_optax.linalg.quantize`; parameters of fewer than two axes are kept as
floats, since their scales would be as long as themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import checks, plan
from dsbp_optax.core.transform import Rule, Seen, transformation
from dsbp_optax.linalg import quantize
from dsbp_optax.linalg.types import Array, PyTree, Scalar
from dsbp_optax.rules.inner import as_transformation

#: All arrays of two axes or more are matrices here, and none has a basis.
MATRICES = plan.choices(1, 1, None, 1, None, "never")


class FactoredAdam(NamedTuple):
    """Moments of one matrix, see `scale_by_quantized_adam`.

    Attributes:
      mu: first moment, as stored.
      rows: mean square of each row, ``(d, 1)``.
      columns: mean square of each column, ``(1, m)``.
      steps: int32, taken so far, for the correction of the bias.
    """

    mu: PyTree
    rows: Array
    columns: Array
    steps: Array


class Storage(NamedTuple):
    """How a matrix is kept from step to step.

    Attributes:
      init: zeros shaped as the matrix -> what is kept.
      encode: matrix -> what is kept.
      decode: what is kept -> matrix.
    """

    init: Callable[[Array], PyTree]
    encode: Callable[[Array], PyTree]
    decode: Callable[[PyTree], Array]


def storage(bits: int) -> Storage:
    """Of so many bits a number; 32 keeps the floats.

    Raises:
      ValueError: for other numbers of bits.
    """
    known = (*quantize.STEPS, 32)
    try:
        number = None if isinstance(bits, bool | jax.Array) else operator.index(bits)
    except TypeError:
        number = None
    if number not in known:
        raise ValueError(
            f"bits: got {bits}, expected one of {known}, a Python integer: it sets the "
            "shapes of the state."
        )
    if bits == 32:
        return Storage(*(lambda matrix: matrix,) * 3)
    return Storage(
        lambda matrix: quantize.empty(matrix, bits),
        lambda matrix: quantize.quantize(matrix, bits),
        lambda held: quantize.dequantize(held, bits),
    )


def scale_by_quantized_momentum(
    decay: Scalar = 0.95, bits: int = 6, *, nesterov: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Momentum whose matrices are stored in a few bits a number.

        m <- decay m + g in `bits` a number,   update = decay m + g (nesterov), else m

    The update uses the new momentum before it is rounded. In six bits Muon's loss is
    that of whole floats, see the records that the documentation names.

    Args:
      decay: of the momentum; may be traced.
      bits: 1 to 8 bits a number; 32 keeps the floats.
      nesterov: as in `optax.trace`.

    Returns:
      A transformation; kernels' momenta are kept by path.

    Raises:
      ValueError, TypeError: for other numbers of bits, or a decay outside [0, 1).

    Cost: ``bits d m / 8 + 2 (d + m)`` bytes of state a kernel, ``4 n`` for n numbers
    that are no matrix; five passes over a matrix.

    Reference: levels of least error for a normal variable, Max, 1960; momenta of
    Muon in few bits: arXiv 2509.23106, 2605.11396.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = optax.chain(
      ...     dsbp_optax.scale_by_quantized_momentum(0.95, bits=6),
      ...     optax.contrib.muon(0.02, beta=0.0, nesterov=False),
      ... )
    """
    rest = optax.trace(decay, nesterov=nesterov)
    rule = quantized_momentum(decay, bits, nesterov)
    return transformation("moments", rule, as_transformation(rest), MATRICES)


def quantized_momentum(decay: Scalar, bits: int, nesterov: bool) -> Rule:
    """`scale_by_quantized_momentum` of one matrix."""
    store = storage(bits)
    checks.check_number("decay", decay, 0.0, 1.0)

    def update(g: Array, seen: Seen, held: PyTree) -> tuple[Array, PyTree]:
        del seen
        rate = jnp.asarray(decay, g.dtype)
        m = rate * store.decode(held).astype(g.dtype) + g
        return rate * m + g if nesterov else m, store.encode(m)

    return Rule(lambda zeros, rank: store.init(zeros), update, whole=_WHO)


def scale_by_quantized_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    bits: int = 5,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam with a first moment in a few bits and a factored second moment.

        m <- b1 m + (1 - b1) g in `bits` a number,   v = rows columns^T / mean(rows)
        update = m / (sqrt(v) + eps), both moments corrected for their bias

    Args:
      b1: decay of the first moment; may be traced, like all of the numbers.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      bits: 1 to 8 bits a number of the first moment; 32 keeps the floats.
      nesterov: as in `optax.scale_by_adam`.

    Returns:
      A transformation; moments are kept by path. What is no matrix gets plain Adam.

    Raises:
      ValueError, TypeError: for other numbers of bits, or decays outside [0, 1).

    Cost: ``bits d m / 8 + 6 (d + m)`` bytes of state a kernel instead of ``8 d m``.

    Reference: the factors are those of Adafactor, arXiv 1804.04235.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = optax.chain(
      ...     dsbp_optax.scale_by_quantized_adam(bits=5),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
    """
    rest = optax.scale_by_adam(b1, b2, eps, nesterov=nesterov)
    rule = quantized_adam(b1, b2, eps, bits, nesterov)
    return transformation("moments", rule, as_transformation(rest), MATRICES)


def check_adam(b1: Scalar, b2: Scalar, eps: Scalar) -> None:
    """Raise for settings of Adam that are out of range."""
    checks.check_number("b1", b1, 0.0, 1.0)
    checks.check_number("b2", b2, 0.0, 1.0)
    checks.check_number("eps", eps, 0.0)


def quantized_adam(
    b1: Scalar, b2: Scalar, eps: Scalar, bits: int, nesterov: bool
) -> Rule:
    """`scale_by_quantized_adam` of one matrix."""
    store = storage(bits)
    check_adam(b1, b2, eps)

    def init(zeros: Array, rank: int) -> FactoredAdam:
        del rank
        rows, columns = zeros[:, :1], zeros[:1]
        return FactoredAdam(store.init(zeros), rows, columns, jnp.zeros([], jnp.int32))

    def update(g: Array, seen: Seen, held: Any) -> tuple[Array, FactoredAdam]:
        del seen
        first, second = jnp.asarray(b1, g.dtype), jnp.asarray(b2, g.dtype)
        count = optax.safe_increment(held.steps)
        m = average(first, store.decode(held.mu).astype(g.dtype), g)
        rows, columns, v = factored(second, held.rows, held.columns, g * g)
        step = adam_step(m, v, g, first, second, eps, count, nesterov)
        return step, FactoredAdam(store.encode(m), rows, columns, count)

    return Rule(init, update, whole=_WHO)


_WHO = "moments in few bits"


def average(decay: Array, past: Array, fresh: Array) -> Array:
    """``decay past + (1 - decay) fresh``."""
    return decay * past + (1 - decay) * fresh


def factored(
    decay: Array, rows: Array, columns: Array, square: Array
) -> tuple[Array, Array, Array]:
    """Averages of the rows' and columns' mean squares, and the product they stand for.

    Args:
      decay: of the averages.
      rows: ``(a, 1)``.
      columns: ``(1, b)``.
      square: ``(a, b)``.

    Returns:
      Rows, columns, and ``rows columns^T / mean(rows) (a, b)``.
    """
    rows = average(decay, rows, square.mean(-1, keepdims=True))
    columns = average(decay, columns, square.mean(-2, keepdims=True))
    mean = rows.mean(-2, keepdims=True)
    return rows, columns, rows * (columns / jnp.where(mean > 0, mean, 1))


def adam_step(
    first_moment: Array,
    second_moment: Array,
    fresh: Array,
    b1: Array,
    b2: Array,
    eps: Scalar,
    count: Array,
    nesterov: bool,
) -> Array:
    """``m / (sqrt(v) + eps)``, both moments corrected for their bias after `count`."""
    used = first_moment / (1 - b1 ** (count + nesterov))
    if nesterov:
        used = average(b1, used, fresh / (1 - b1**count))
    return used / (jnp.sqrt(second_moment / (1 - b2**count)) + eps)
