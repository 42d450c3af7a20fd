"""Eigensolvers on plain arrays: one outline each, exchangeable by passing a function.

V <- orthonormalize(C V)                     (subspace iteration)
V^T C V = Q Theta Q^T,   V <- V Q            (Rayleigh-Ritz)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsbp_optax.linalg.types import Array, Eigenpairs, Operator, Scalar

_HIGHEST = jax.lax.Precision.HIGHEST


def orthonormalize(columns: Array) -> Array:
    """Orthonormal basis ``(d, k)`` of the span of `columns` ``(d, k)``, by QR.

    The span of the leading columns is kept: the first ``j`` columns of the result
    span the first ``j`` columns of the argument. Cost: ``O(d k^2)``.
    """
    return jnp.linalg.qr(columns)[0]


def ritz(basis: Array, product: Array) -> tuple[Array, Array, Array]:
    """Rayleigh-Ritz of ``C`` on span `basis`, given ``product = C basis``.

    Args:
      basis: ``(d, k)`` orthonormal columns ``V``.
      product: ``(d, k)``, ``C V``.

    Returns:
      Ritz values ``(k,)`` descending and not negative, the rotation ``Q (k, k)``
      whose columns give the Ritz vectors ``V Q``, and the relative residual
      ``|C V - V (V^T C V)|_F / theta_1``.
    """
    rayleigh = jnp.matmul(basis.T, product, precision=_HIGHEST)
    values, rotation = jnp.linalg.eigh((rayleigh + rayleigh.T) / 2)
    values, rotation = jnp.maximum(values[::-1], 0), rotation[:, ::-1]
    remainder = product - jnp.matmul(basis, rayleigh, precision=_HIGHEST)
    tiny = jnp.finfo(basis.dtype).tiny
    return values, rotation, jnp.linalg.norm(remainder) / jnp.maximum(values[0], tiny)


def rayleigh_ritz(operator: Operator, basis: Array) -> Eigenpairs:
    """Eigenpairs of `operator` restricted to span `basis` ``(d, k)``."""
    values, rotation, residual = ritz(basis, operator.matmul(basis))
    return Eigenpairs(jnp.matmul(basis, rotation, precision=_HIGHEST), values, residual)


def power_step(operator: Operator, basis: Array) -> Eigenpairs:
    """One step of subspace iteration with a single product ``C V``.

    The eigenvalues and the residual are those of the *given* basis: a sketch
    knows ``C`` nowhere else. The columns are ordered by Ritz value before the QR,
    so that the leading directions stay in front.
    """
    product = operator.matmul(basis)
    values, rotation, residual = ritz(basis, product)
    ordered = jnp.matmul(product, rotation, precision=_HIGHEST)
    return Eigenpairs(orthonormalize(ordered), values, residual)


def power_iteration(operator: Operator, basis: Array, iterations: Scalar) -> Eigenpairs:
    """Block power iteration with QR, warm-started: the default solver.

    ``iterations`` times ``V <- orthonormalize(C V)``, then Rayleigh-Ritz. With an
    operator that is not `exact` (a sketch) exactly one step is taken.

    Args:
      operator: the second moment, see `Operator`.
      basis: ``(d, k)``, the previous basis.
      iterations: number of power steps; may be traced.

    Returns:
      `Eigenpairs`.

    Cost: ``iterations + 1`` products with ``C`` and ``O(d k^2)`` for each QR.

    Reference: Stewart, "Accelerating the orthogonal iteration for the
    eigenvectors of a Hermitian matrix", 1969.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import Covariance, power_iteration
      >>> start = jnp.linalg.qr(jnp.ones((3, 1)))[0]
      >>> operator = Covariance(jnp.diag(jnp.array([4.0, 1.0, 0.5]))).operator(start)
      >>> pairs = power_iteration(operator, start, iterations=20)
      >>> round(float(pairs.eigenvalues[0]), 3)
      4.0
    """
    if not operator.exact:
        return power_step(operator, basis)

    def advance(_: Array, v: Array) -> Array:
        return orthonormalize(operator.matmul(v))

    return rayleigh_ritz(operator, jax.lax.fori_loop(0, iterations, advance, basis))


def eigh(operator: Operator, basis: Array, iterations: Scalar) -> Eigenpairs:
    """Exact eigenpairs by a dense decomposition: forms the ``d x d`` matrix.

    For small layers and for checking the others.

    Args:
      operator: must be `exact`; a sketch is refused.
      basis: ``(d, k)``, used for its shape and dtype.
      iterations: ignored.

    Returns:
      `Eigenpairs`, exact to rounding.

    Raises:
      TypeError: when the operator is a sketch.

    Cost: ``O(d^3)`` time, ``O(d^2)`` memory.
    """
    del iterations
    _require_exact(operator, "eigh")
    size, rank = basis.shape
    dense = operator.matmul(jnp.eye(size, dtype=basis.dtype))
    _, vectors = jnp.linalg.eigh((dense + dense.T) / 2)
    return rayleigh_ritz(operator, vectors[:, ::-1][:, :rank])


def _require_exact(operator: Operator, solver: str) -> None:
    if not operator.exact:
        raise TypeError(
            f"solver `{solver}` needs C v for any v; got a sketch, which knows C v "
            "only for the current basis, as does the gradient of a kernel without a "
            "statistic. Remedy: use `dsbp_optax.power_iteration`, or pass "
            "`Activations` or `Covariance` statistics of every kernel."
        )
