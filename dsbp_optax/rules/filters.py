"""Spectral filters: what each eigendirection's coordinate is multiplied with.

A filter is a function ``(eigenvalues (k,), rest ()) -> (k,)``, where `rest` is the
mean of the eigenvalues outside the basis. It acts on the
coordinates before the inner optimizer: before a linear one (momentum) that is the same
as after it, before Adam the second moment undoes it in part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from dsbp_optax.core import checks
from dsbp_optax.linalg.types import Array, Scalar

#: (eigenvalues (k,) descending, mean of the rest ()) -> factors (k,)
Filter: TypeAlias = Callable[[Array, Array], Array]

#: Least mean of the remaining spectrum, as a share of the mean of the whole.
_FLOOR = 1e-3


def whiten(exponent: Scalar = 0.5, damping: Scalar = 1.0) -> Filter:
    """Truncated one-sided whitening: strong directions shrink towards the rest.

        f = ((1 + damping) rest / (lambda + damping rest))^exponent,  at most 1

    With ``exponent=1`` this is FOOF (one-sided K-FAC) in a basis of rank k, with
    ``0.5`` its square root. No direction is amplified, so an update is nowhere longer
    than without the filter.

    Args:
      exponent: 0 is the identity, 1 divides by the damped eigenvalue.
      damping: in units of the mean of the remaining spectrum.

    Returns:
      A filter for ``scale_by_spectral_projection(spectral_filter=...)``.

    Raises:
      ValueError, TypeError: for negative numbers.

    Cost: nothing beyond the step itself.

    Reference: Benzing, FOOF, arXiv 2201.12250.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = dsbp_optax.scale_by_spectral_projection(
      ...     optax.trace(0.9), spectral_filter=dsbp_optax.whiten(),
      ...     residual=dsbp_optax.residual_momentum(0.9))
    """
    checks.check_number("exponent", exponent, 0.0)
    checks.check_number("damping", damping, 0.0)

    def factors(eigenvalues: Array, rest: Array) -> Array:
        shift = damping * rest
        damped = jnp.maximum(eigenvalues, rest) + shift
        return jnp.where(damped > 0, (rest + shift) / damped, 1) ** exponent

    return factors


def remaining_mean(eigenvalues: Array, trace: Array, size: int) -> Array:
    """Mean of the eigenvalues outside the basis, floored: ``()``.

    Args:
      eigenvalues: ``(k,)``.
      trace: ``()``, of the same samples.
      size: ``d``.
    """
    outside = max(size - eigenvalues.shape[-1], 1)
    rest = (trace - jnp.sum(eigenvalues)) / outside
    return jnp.maximum(rest, _FLOOR * trace / size)
