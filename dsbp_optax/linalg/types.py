"""Axis glossary and the small protocols that the rest of the package shares.

Every array is described by letters from one glossary:

=========  ==================================================================
``n``      samples: rows of an activation matrix (batch x positions)
``d``      length of the side that carries the basis: rows of a matrix
``m``      length of the other side: columns
``k``      rank: number of basis vectors
=========  ==================================================================

A kernel seen from its *input* side has ``d = fan in`` and ``m = fan out``; seen from
its *output* side the two swap. Numerical code works on one ``d x m`` matrix and knows
nothing of sides, paths or pytrees; `dsbp_optax.core.stacks` runs it on many at once.
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
#: (matrix (d, m), fan in, fan out) -> matrix (d, m)
Direction: TypeAlias = Callable[[Array, int, int], Array]


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
    """What `Sketch`, `Activations` and `Covariance` have in common.

    ``update`` takes these three alone: a form of one's own goes into ``FORMS`` of
    `dsbp_optax.core.statistics`.
    """

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


def is_zero(value: Any) -> bool:
    """Whether Python knows that `value` is zero."""
    return isinstance(value, int | float) and value == 0


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf has no value yet; else Python can decide by it."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
