"""What a layer's activations leave behind, in three forms behind one protocol.

Every form yields the per-sample second moment ``C = A^T A / n`` as an `Operator`. It
says which shapes its fields have in the ``statistics`` mapping (`shapes`), how they are
those of a kernel's matrices (`matrices`), and whether one observation allows all
iterations of a refresh at once (`instant`). `FORMS` lists them.

The fields of a sketch and of a second moment are sums over samples, so they add up over
micro-batches, devices and calls of a shared layer; only ratios by `count` are used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from dsbp_optax.core.layout import MatrixView, from_kernel_form
from dsbp_optax.linalg.types import Array, Operator, Scalar

#: Name of a field -> the shapes that it may have; None for any length.
Shapes: TypeAlias = Mapping[str, Sequence[tuple[int | None, ...]]]

_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    """The sketch ``Y = A^T (A V)``: ``O(d k)`` memory, what the adapters collect.

    Attributes:
      product: ``(d, k)``, ``Y``, taken with the basis ``V`` of the optimizer state.
      count: ``()``, number of samples; 0 where nothing was collected.
      trace: ``()``, ``|A|_F^2``.

    Inside the ``statistics`` mapping each field has the *kernel form* of the basis
    (see `dsbp_optax.core.layout`).
    """

    product: Array
    count: Array
    trace: Array

    instant: ClassVar[bool] = False

    @staticmethod
    def shapes(view: MatrixView, rank: int) -> Shapes:
        """Of the fields, in kernel form."""
        number = [view.form(False, 1)]
        return {"product": [view.form(True, rank)], "count": number, "trace": number}

    def matrices(self, view: MatrixView, dtype: Any) -> Sketch:
        """Fields ``(n, ...)``, one entry a matrix of the kernel."""
        product, count, trace = (
            from_kernel_form(x, view)
            for x in _as(dtype, self.product, self.count, self.trace)
        )
        return Sketch(product, count[..., 0, 0], trace[..., 0, 0])

    def operator(self, basis: Array) -> Operator:
        """The second moment, right on span `basis` ``(d, k)`` only."""
        product, count, trace = _as(basis.dtype, self.product, self.count, self.trace)
        n = jnp.maximum(count, 1)

        def matmul(v: Array) -> Array:
            inside = jnp.matmul(basis.T, v, precision=_HIGHEST)
            return jnp.matmul(product, inside, precision=_HIGHEST) / n

        return Operator(matmul, trace / n, count, exact=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """An activation matrix ``A``.

    Attributes:
      values: ``(*batch, n, d)``, one sample a row. For a convolution, ``d`` runs
        over the patch in the kernel's own order (height, width, channel).

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> statistics = {"dense/kernel": dsbp_optax.Activations(jnp.ones((32, 8)))}
    """

    values: Array

    instant: ClassVar[bool] = True

    @staticmethod
    def shapes(view: MatrixView, rank: int) -> Shapes:
        """Of the fields, the axes of the projected side flattened."""
        return {"values": [(*view.batch_shape, None, view.size)]}

    def matrices(self, view: MatrixView, dtype: Any) -> Activations:
        """Values ``(n, samples, d)``, one entry a matrix of the kernel."""
        return Activations(jnp.reshape(self.values, (view.matrices, -1, view.size)))

    def operator(self, basis: Array) -> Operator:
        """The second moment ``A^T A / n``; costs two products with ``A`` a use."""
        (a,) = _as(basis.dtype, self.values)
        n = jnp.asarray(a.shape[0], basis.dtype)

        def matmul(v: Array) -> Array:
            inside = jnp.matmul(a, v, precision=_HIGHEST)
            return jnp.matmul(a.T, inside, precision=_HIGHEST) / n

        return Operator(matmul, jnp.sum(a * a) / n, n, exact=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Covariance:
    """A second-moment matrix: the only form in which ``d x d`` numbers exist.

    Attributes:
      matrix: ``(*batch, d, d)``, ``A^T A`` summed over ``count`` samples.
      count: ``(*batch,)`` or a number; the default 1 takes `matrix` as a mean.
    """

    matrix: Array
    count: Scalar = 1.0

    instant: ClassVar[bool] = True

    @staticmethod
    def shapes(view: MatrixView, rank: int) -> Shapes:
        """Of the fields, the axes of the projected side flattened."""
        batch = view.batch_shape
        return {"matrix": [(*batch, view.size, view.size)], "count": [(), batch]}

    def matrices(self, view: MatrixView, dtype: Any) -> Covariance:
        """Matrices ``(n, d, d)``, one entry a matrix of the kernel."""
        count = jnp.broadcast_to(jnp.asarray(self.count), view.batch_shape)
        matrix = jnp.reshape(self.matrix, (-1, view.size, view.size))
        return Covariance(matrix, count.reshape(-1))

    def operator(self, basis: Array) -> Operator:
        """The second moment ``matrix / count``."""
        matrix, count = _as(basis.dtype, self.matrix, self.count)
        n = jnp.maximum(count, jnp.finfo(basis.dtype).tiny)

        def matmul(v: Array) -> Array:
            return jnp.matmul(matrix, v, precision=_HIGHEST) / n

        return Operator(matmul, jnp.trace(matrix) / n, count, exact=True)


#: What ``statistics=`` may hold.
FORMS = (Sketch, Activations, Covariance)


def gradient_sketch(gradient: Array, basis: Array) -> Sketch:
    """The sketch of the gradient's own second moment, its columns taken for samples.

    Where nothing better is known of a layer: ``G (G^T V)``, with m samples.

    Args:
      gradient: ``(d, m)``.
      basis: ``(d, k)``.
    """
    inside = jnp.matmul(gradient.T, basis, precision=_HIGHEST)
    count = jnp.asarray(gradient.shape[-1], basis.dtype)
    trace = jnp.sum(gradient * gradient)
    product = jnp.matmul(gradient, inside, precision=_HIGHEST)
    return Sketch(product, count, trace)


def blend(
    operator: Operator,
    basis: Array,
    eigenvalues: Array,
    trace: Array,
    weight: Scalar,
) -> Operator:
    """Exponential decay on the rank-k model of the past.

        C <- w V Lambda V^T + (1 - w) C

    Args:
      operator: the new observation.
      basis: ``(d, k)``, the basis of the past.
      eigenvalues: ``(k,)``, its eigenvalues.
      trace: ``()``, the trace of the past.
      weight: ``w`` in [0, 1), the share of the past; 0 on the first observation,
        so the first step is exact.
    """

    def matmul(v: Array) -> Array:
        inside = jnp.matmul(basis.T, v, precision=_HIGHEST)
        past = jnp.matmul(basis, eigenvalues[:, None] * inside, precision=_HIGHEST)
        return weight * past + (1 - weight) * operator.matmul(v)

    mixed = weight * trace + (1 - weight) * operator.trace
    return dataclasses.replace(operator, matmul=matmul, trace=mixed)


def add_statistics(left: Any, right: Any) -> Any:
    """Sum of the statistics of two micro-batches.

    Args:
      left: a mapping path -> statistic, as an adapter returns it.
      right: another, of the same structure.

    Returns:
      Those of all samples: sums, and `Activations` one below the other. Sketches must
      have been taken with the same optimizer state.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import Covariance, add_statistics
      >>> one = {"kernel": Covariance(jnp.eye(2), jnp.array(3.0))}
      >>> float(add_statistics(one, one)["kernel"].count)
      6.0
    """

    def add(left: Any, right: Any) -> Any:
        join = jnp.add if isinstance(left, _SUMS) else _append
        return jax.tree.map(join, left, right)

    return jax.tree.map(add, left, right, is_leaf=_is_sum)


def sum_statistics(stacked: Any) -> Any:
    """Sum of statistics stacked along a leading axis, as by `jax.lax.scan`.

    Args:
      stacked: a mapping path -> statistic with one more leading axis.

    Returns:
      Those of all samples: sums over that axis, and `Activations` one below the other.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import Covariance, sum_statistics
      >>> stacked = {"kernel": Covariance(jnp.ones((4, 2, 2)), jnp.ones(4))}
      >>> float(sum_statistics(stacked)["kernel"].count)
      4.0
    """

    def add(one: Any) -> Any:
        join = _total if isinstance(one, _SUMS) else _unstack
        return jax.tree.map(join, one)

    return jax.tree.map(add, stacked, is_leaf=_is_sum)


#: Statistics whose fields add up; others are samples, bare arrays too.
_SUMS = (Sketch, Covariance)


def _is_sum(node: Any) -> bool:
    return isinstance(node, _SUMS)


def _append(left: Array, right: Array) -> Array:
    """Samples ``(*batch, n, d)`` of both."""
    return jnp.concatenate([left, right], axis=-2)


def _total(stacked: Array) -> Array:
    return jnp.sum(stacked, axis=0)


def _unstack(stacked: Array) -> Array:
    """``(s, *batch, n, d)`` -> ``(*batch, s n, d)``."""
    values = jnp.moveaxis(stacked, 0, -3)
    return values.reshape(*values.shape[:-3], -1, values.shape[-1])


def _as(dtype: Any, *arrays: Any) -> tuple[Array, ...]:
    return tuple(jnp.asarray(x).astype(dtype) for x in arrays)
