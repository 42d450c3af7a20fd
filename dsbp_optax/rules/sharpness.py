"""The paper's spectral sharpness term as a transformation of its own.

    update <- update + beta lambda_1 / tr(C) e_1 e_1^T W

the gradient of ``beta/2 lambda_1 / tr(C) |e_1^T W|^2``.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax

from dsbp_optax.core import checks, plan
from dsbp_optax.core.paths import PerPath
from dsbp_optax.core.plan import Basis
from dsbp_optax.core.rank import Rank
from dsbp_optax.core.transform import Rule, Seen, transformation, value_at
from dsbp_optax.linalg.types import Array, PyTree, Scalar


def add_spectral_sharpness(
    sharpness: optax.ScalarOrSchedule = 0.1,
    *,
    rank: PerPath[Rank] = 4,
    update_every: Scalar = 100,
    basis: Basis | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Add the gradient of ``sharpness/2 lambda_1 / tr(C) |e_1^T W|^2``.

    Keeps a small eigenbasis of its own, so it chains with any optimizer. The paper
    writes the update ``-beta lambda_1 e_1 e_1^T``: it does not conform to ``W``
    (``d x d`` against ``d x m``), is no gradient of anything, and grows with the
    batch. This is the conformable reading: applied to ``W``, divided by the trace so
    that it lies in [0, beta], and scaled by the learning rate that follows.

    Args:
      sharpness: beta, a number or a schedule.
      rank: basis vectors used to find ``e_1``; only the first enters the term.
      update_every: p, steps between refreshes, as in `scale_by_spectral_projection`.
      basis: how bases are kept, see `Basis`; by default 5 power iterations and the
        dtype of the computation.

    Returns:
      A transformation whose ``update`` needs ``params`` and takes ``statistics=``.
      Kernels without statistics get no term: it speaks of activations.

    Raises:
      ValueError, TypeError: as `scale_by_spectral_projection`.

    Cost: ``d rank`` numbers a kernel; ``4 d m`` FLOPs a step.

    Reference: Dynamic Spectral Backpropagation, arXiv 2505.23369.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = optax.chain(
      ...     dsbp_optax.add_spectral_sharpness(0.1), optax.sgd(0.1, momentum=0.9)
      ... )
    """
    checks.check_number("sharpness", sharpness, 0.0, schedule=True)

    def update(g: Array, seen: Seen, held: PyTree) -> tuple[Array, PyTree]:
        return (g if seen.basis is None else g + sharpness_term(sharpness, seen)), held

    rule = Rule(
        lambda zeros, rank: (), update, whole="add_spectral_sharpness", kernel=True
    )
    asked = plan.choices(rank, update_every, basis, 5, None, "always")
    nothing = optax.with_extra_args_support(optax.identity())
    return transformation("sharpness", rule, nothing, asked)


def sharpness_term(sharpness: optax.ScalarOrSchedule, seen: Seen) -> Array:
    """``beta lambda_1 / tr(C) e_1 e_1^T W (d, m)``, 0 without activations."""
    leading = seen.basis[:, :1]
    trace = jnp.where(seen.trace > 0, seen.trace, 1)
    share = jnp.where(seen.activations > 0, seen.eigenvalues[0] / trace, 0)
    weight = jnp.asarray(value_at(sharpness, seen.step), share.dtype) * share
    along = jnp.sum(leading * seen.kernel, axis=0, keepdims=True)
    term: Array = weight * leading * along
    return term
