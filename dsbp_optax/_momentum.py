"""Moments of gradients in a few bits a number, as plain Optax transformations.

They know no basis. A kernel is stored as matrices with one scale a row and one a
column, see `dsbp_optax._quantization`; parameters of fewer than two axes are kept as
floats, since their scales would be as long as themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _checks, _coordinates, _infer, _layout, _quantization
from dsbp_optax._gate import gated
from dsbp_optax._layout import Coordinates, MatrixView
from dsbp_optax._types import Array, PyTree, Scalar, compute_dtype


class QuantizedMomentumState(NamedTuple):
    """State of `scale_by_quantized_momentum`.

    Attributes:
      momentum: parameter path -> `Quantized`, or an array for what is no matrix.
    """

    momentum: Any


class QuantizedAdamState(NamedTuple):
    """State of `scale_by_quantized_adam`.

    Attributes:
      taken: int32, steps taken.
      mu: parameter path -> `Quantized` first moment, or an array.
      rows: parameter path -> mean square of each row, ``(*batch, a, 1)``; the second
        moment itself for what is no matrix.
      columns: parameter path -> mean square of each column, ``(*batch, 1, b)``.
    """

    taken: Array
    mu: Any
    rows: Any
    columns: Any


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
    known = (*_quantization.STEPS, 32)
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
        lambda matrix: _quantization.empty(matrix, bits),
        lambda matrix: _quantization.quantize(matrix, bits),
        lambda held: _quantization.dequantize(held, bits),
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
    return gated(quantized_momentum(decay, bits, nesterov))


def quantized_momentum(
    decay: Scalar, bits: int, nesterov: bool
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_quantized_momentum` for gradients that are known to be finite."""
    store = storage(bits)
    _checks.check_number("decay", decay, 0.0, 1.0)

    def init(params: PyTree) -> QuantizedMomentumState:
        return QuantizedMomentumState(_kept(params, store) or jnp.zeros([]))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, QuantizedMomentumState]:
        del params, extra
        leaves, treedef = _layout.flatten_with_paths(updates)
        if not leaves:
            return updates, state
        _check_state("scale_by_quantized_momentum", leaves, state.momentum, store)
        used, kept = {}, {}
        for path, leaf in leaves.items():
            g, view = _as_matrices(path, leaf)
            held, rate = state.momentum[path], jnp.asarray(decay, g.dtype)
            old = held if view is None else store.decode(held).astype(g.dtype)
            m = rate * old + g
            used[path] = _as_leaf(rate * m + g if nesterov else m, leaf, view)
            kept[path] = m if view is None else store.encode(m)
        return treedef.unflatten(used.values()), QuantizedMomentumState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


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
    return gated(quantized_adam(b1, b2, eps, bits, nesterov))


def quantized_adam(
    b1: Scalar, b2: Scalar, eps: Scalar, bits: int, nesterov: bool
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_quantized_adam` for gradients that are known to be finite."""
    store = storage(bits)
    _checks.check_number("b1", b1, 0.0, 1.0)
    _checks.check_number("b2", b2, 0.0, 1.0)
    _checks.check_number("eps", eps, 0.0)

    def init(params: PyTree) -> QuantizedAdamState:
        leaves, _ = _layout.flatten_with_paths(params)
        count = jnp.zeros([], jnp.int32)
        if not leaves:  # A leaf each: what `optax.tree.map_params` asks for.
            return QuantizedAdamState(count, *(jnp.zeros([]) for _ in range(3)))
        rows, columns = {}, {}
        for path, leaf in leaves.items():
            zeros, view = _zeros(path, leaf)
            rows[path] = zeros if view is None else zeros[..., :, :1]
            if view is not None:
                columns[path] = zeros[..., :1, :]
        return QuantizedAdamState(count, _kept(params, store), rows, columns)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, QuantizedAdamState]:
        del params, extra
        leaves, treedef = _layout.flatten_with_paths(updates)
        if not leaves:
            return updates, state
        _check_state("scale_by_quantized_adam", leaves, state.mu, store)
        count = optax.safe_increment(state.taken)
        used, mu, rows, columns = {}, {}, {}, {}
        for path, leaf in leaves.items():
            g, view = _as_matrices(path, leaf)
            first, second = jnp.asarray(b1, g.dtype), jnp.asarray(b2, g.dtype)
            held, square = state.mu[path], g * g
            old = held if view is None else store.decode(held).astype(g.dtype)
            m = average(first, old, g)
            if view is None:
                rows[path] = v = average(second, state.rows[path], square)
                mu[path] = m
            else:
                mu[path] = store.encode(m)
                rows[path], columns[path], v = factored(
                    second, state.rows[path], state.columns[path], square
                )
            step = adam_step(m, v, g, first, second, eps, count, nesterov)
            used[path] = _as_leaf(step, leaf, view)
        state = QuantizedAdamState(count, mu, rows, columns)
        return treedef.unflatten(used.values()), state

    return optax.GradientTransformationExtraArgs(init, update)


def _kept(params: PyTree, store: Storage) -> dict[str, Any]:
    """Zeros by path, matrices as they are stored."""
    leaves, _ = _layout.flatten_with_paths(params)
    kept = {}
    for path, leaf in leaves.items():
        zeros, view = _zeros(path, leaf)
        kept[path] = zeros if view is None else store.init(zeros)
    return kept


def _check_state(who: str, leaves: dict[str, Any], held: Any, store: Storage) -> None:
    """Raise, by path, for moments of other parameters, or of other bits."""
    _coordinates.refuse(
        (path for path, x in leaves.items() if isinstance(x, Coordinates)), who
    )
    strange = [path for path in held if path not in leaves]
    missing = [path for path in leaves if path not in held]
    if strange or missing:
        raise ValueError(
            f"the state of {who} holds a moment of {_checks.some(strange) or 'nothing'}"
            f" that is not among the updates, and none of "
            f"{_checks.some(missing) or 'nothing'} that is. Remedy: call update with "
            "the tree that init saw, or init again."
        )
    expected = jax.eval_shape(lambda tree: _kept(tree, store), leaves)
    for path, like in expected.items():
        shapes = [[x.shape for x in jax.tree.leaves(y)] for y in (held[path], like)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the state's moment of '{path}': got shapes {shapes[0]}, expected "
                f"{shapes[1]} ({who}). Remedy: restore a state of the same parameters "
                "and bits, or init again."
            )


def _as_matrices(path: str, leaf: Array) -> tuple[Array, MatrixView | None]:
    """A leaf as ``(*batch, a, b)`` in its compute dtype; None for what is no matrix."""
    x, view = jnp.asarray(leaf), _view(path, leaf)
    x = x.astype(compute_dtype(x.dtype))
    return (x if view is None else _layout.to_matrices(x, view)), view


def _zeros(path: str, leaf: Array) -> tuple[Array, MatrixView | None]:
    """Zeros shaped as `_as_matrices` has them; matrices lie on no explicit mesh."""
    dtype, view = compute_dtype(jnp.result_type(leaf)), _view(path, leaf)
    if view is None:
        return jnp.zeros_like(leaf, dtype), None
    return jnp.zeros((*view.batch_shape, *view.matrix_shape), dtype), view


def _view(path: str, leaf: Array) -> MatrixView | None:
    """How its axes are read matters little: it says which numbers share a scale."""
    shape = jnp.shape(leaf)
    if len(shape) < 2 or 0 in shape:
        return None
    return _infer.plain_view(path, shape)


def _as_leaf(matrix: Array, leaf: Array, view: MatrixView | None) -> Array:
    whole = matrix if view is None else _layout.from_matrices(matrix, view)
    return whole.astype(jnp.result_type(leaf))


def average(decay: Array, past: Array, fresh: Array) -> Array:
    """``decay past + (1 - decay) fresh``."""
    return decay * past + (1 - decay) * fresh


def factored(
    decay: Array, rows: Array, columns: Array, square: Array
) -> tuple[Array, Array, Array]:
    """Averages of the rows' and columns' mean squares, and the product they stand for.

    Args:
      decay: of the averages.
      rows: ``(*batch, a, 1)``.
      columns: ``(*batch, 1, b)``.
      square: ``(*batch, a, b)``.

    Returns:
      Rows, columns, and ``rows columns^T / mean(rows) (*batch, a, b)``.
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
