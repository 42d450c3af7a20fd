"""Axis glossary and the small protocols that the rest of the package shares.

Every array is described by letters from one glossary:

=========  ==================================================================
``n``      samples: rows of an activation matrix (batch x positions)
``d``      length of the side that carries the basis (rows of the matrix view)
``m``      length of the other side (columns of the matrix view)
``k``      rank: number of basis vectors
``*batch`` leading axes of stacked kernels (scanned layers, experts); absent
           for an ordinary kernel
=========  ==================================================================

A kernel seen from its *input* side has ``d = fan in`` and ``m = fan out``; seen
from its *output* side the two swap. All numerical code below works on
``(*batch, d, m)`` matrices and knows nothing of sides, paths or pytrees.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Side: TypeAlias = Literal["input", "output"]
#: A number, or something traced that stands for one (``inject_hyperparams``).
Scalar: TypeAlias = float | int | Array


def compute_dtype(dtype: Any) -> Any:
    """The dtype of all linear algebra on parameters of `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Operator:
    """The per-sample second moment ``C = A^T A / n`` of activations, matrix-free.

    Attributes:
      matmul: ``(d, k) -> (d, k)``, the product ``C v``.
      trace: ``()``, the trace of ``C``.
      count: ``()``, the number of samples; 0 says that nothing was observed.
      exact: whether `matmul` holds for every ``v``. A sketch knows ``C v`` only
        for the basis it was taken with, and allows one power step.
    """

    matmul: Callable[[Array], Array]
    trace: Array
    count: Array
    exact: bool


class Eigenpairs(NamedTuple):
    """What a `Solver` returns.

    Attributes:
      basis: ``(d, k)`` orthonormal columns, leading direction first.
      eigenvalues: ``(k,)`` descending, per sample.
      residual: ``()``, ``|C V - V Lambda|_F / lambda_1``, 0 when converged.
    """

    basis: Array
    eigenvalues: Array
    residual: Array


class Solver(Protocol):
    """An eigensolver: any function of this signature can be passed in."""

    def __call__(
        self, operator: Operator, basis: Array, iterations: Scalar
    ) -> Eigenpairs:
        """Improve `basis` ``(d, k)`` towards the top eigenspace of `operator`.

        Args:
          operator: the second moment to diagonalise.
          basis: ``(d, k)`` orthonormal starting point, the previous basis.
          iterations: how many passes to take; may be traced.

        Returns:
          `Eigenpairs` of the same rank and dtype as `basis`.
        """
        ...


class Statistic(Protocol):
    """What a layer's activations leave behind; see `Activations`, `Sketch`."""

    def operator(self, basis: Array) -> Operator:
        """The per-sample second moment, in the dtype of `basis` ``(d, k)``."""
        ...


def state_bytes(opt_state: PyTree) -> int:
    """Bytes of all arrays in an optimizer state (or in its shapes).

    Args:
      opt_state: any tree of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The sum of their sizes.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_optax
      >>> dsbp_optax.diagnostics.state_bytes(optax.adam(1e-3).init(jnp.ones((4, 4))))
      132
    """
    leaves = jax.tree.leaves(opt_state)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
