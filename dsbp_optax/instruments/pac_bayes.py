"""A PAC-Bayes bound on the test error of a trained network, and its KL term.

Posterior: the trained parameters plus Gaussian noise. Prior: a Gaussian about the
parameters at initialisation, whose scale may be chosen after the fact from a grid; the
union over the grid is paid for. With the eigenbases of an optimizer state the prior has
two scales, one inside of them and one outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import checks, paths
from dsbp_optax.instruments import batches as batches_
from dsbp_optax.linalg.eigensolvers import orthonormalize
from dsbp_optax.linalg.types import Array, PyTree, Scalar
from dsbp_optax.sharpness import subspace

#: The grid of prior variances: ``_LARGEST exp(-j / _FINENESS)``, j = 1, 2, ...
_LARGEST, _FINENESS = 100.0, 100.0
#: Bisections of the inverse of the binary KL divergence: past float32.
_BISECTIONS = 40


class Divergence(NamedTuple):
    """``KL(posterior | prior)`` and what it is made of.

    Attributes:
      kl: ``()``, in nats, without the price of the grid.
      grid: ``()``, in nats: the price of choosing the prior's scales.
      inside: ``()``, the part of `kl` inside the eigenbases; 0 without any.
      distance: ``()``, Euclidean, of the parameters from their start.
      distance_inside: ``()``, the part of it inside the eigenbases.
    """

    kl: Array
    grid: Array
    inside: Array
    distance: Array
    distance_inside: Array


class Bound(NamedTuple):
    """An upper bound on the expected error of the noisy network.

    Attributes:
      bound: by Maurer's inequality, the tightest here.
      mcallester: by McAllester's, which is looser and simpler.
      risk: mean training error over the noise, as sampled.
      risk_bound: upper confidence bound on the training error over the noise.
      divergence: the KL term.
    """

    bound: Array
    mcallester: Array
    risk: Array
    risk_bound: Array
    divergence: Divergence


def kl_divergence(
    params: PyTree,
    start: PyTree,
    noise: Scalar,
    *,
    opt_state: PyTree | None = None,
) -> Divergence:
    """``KL(N(params, noise^2) | N(start, scale^2))`` with the best scale of a grid.

        KL = 1/2 (n s^2 / l - n + |W - W_0|^2 / l + n log(l / s^2)),  l on the grid

    Cheap enough to be logged along training.

    Args:
      params: the parameters.
      start: what they were at initialisation, before any data was seen.
      noise: standard deviation s of the posterior.
      opt_state: where given, the prior has one scale inside the eigenbases of this
        state and one outside. For a bound the bases must not depend on the samples
        that the bound is computed with: take them from other inputs.

    Returns:
      `Divergence`.

    Raises:
      ValueError: for a noise that is not positive.

    Cost: a pass over the parameters; ``2 d k m`` FLOPs a kernel with bases.

    Reference: Dziugaite and Roy, arXiv 1703.11008.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> found = diagnostics.kl_divergence(jnp.ones(4), jnp.zeros(4), 0.5)
      >>> print(round(float(found.kl), 2))
      3.22
    """
    _check_noise(noise)
    moved = jax.tree.map(lambda p, q: (p - q).astype(jnp.float32), params, start)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    whole = optax.tree.norm(moved, squared=True)
    within, dimensions = jnp.zeros([]), 0
    if opt_state is not None:
        for part in _inside(opt_state, moved).values():
            within, dimensions = within + jnp.sum(part * part), dimensions + part.size
    inside, price = _group(within, dimensions, noise)
    outside, other = _group(jnp.maximum(whole - within, 0), size - dimensions, noise)
    return Divergence(
        inside + outside, price + other, inside, jnp.sqrt(whole), jnp.sqrt(within)
    )


def pac_bayes_bound(
    error_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    start: PyTree,
    batches: PyTree,
    key: Array,
    *,
    noise: Scalar,
    count: int,
    samples: int = 100,
    delta: float = 0.025,
    sampling_delta: float = 0.01,
    opt_state: PyTree | None = None,
) -> Bound:
    """A bound on the test error that holds with probability ``1 - delta - sampling``.

        kl(risk | bound) <= (KL + grid + log(2 sqrt(n) / delta)) / n

    Args:
      error_fn: ``(params, batch) -> share of errors``, in [0, 1].
      params: the trained parameters.
      start: the parameters at initialisation.
      batches: the training data, see `stack_batches`, `stream_batches`.
      key: of the noise.
      noise: standard deviation of the posterior. Chosen by looking at the bound, it
        costs a union over the values tried: divide `delta` by their number.
      count: n, number of training samples in `batches`.
      samples: draws from the posterior.
      delta: the bound's own chance to fail.
      sampling_delta: chance that so many draws mislead about the training error.
      opt_state: as for `kl_divergence`.

    Returns:
      `Bound`.

    Raises:
      ValueError: for numbers out of range.

    Cost: `samples` passes over the data.

    Reference: McAllester (1999); Maurer, cs/0411099; sampling as in Langford and
    Caruana (2001).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> found = diagnostics.pac_bayes_bound(
      ...     lambda w, x: jnp.mean(x @ w < 0), jnp.ones(4), jnp.zeros(4),
      ...     jnp.ones((5, 200, 4)), jax.random.key(0), noise=0.1, count=1000)
      >>> 0 < float(found.bound) < float(found.mcallester) < 1
      True
    """
    _check_noise(noise)
    checks.check_integer("count", count, 1)
    checks.check_integer("samples", samples, 1)
    for name, value in (("delta", delta), ("sampling_delta", sampling_delta)):
        if not 0 < value < 1:
            raise ValueError(f"pac_bayes_bound: {name}: got {value}, expected (0, 1).")

    mean_error = batches_.averaged(error_fn, batches)

    def one(key: Array) -> Array:
        away = optax.tree.random_like(key, params)
        noisy = jax.tree.map(lambda p, z: p + noise * z, params, away)
        error: Array = mean_error(noisy)
        return error

    with batches_.loops_for(mean_error):
        risk = jax.lax.map(one, jax.random.split(key, samples)).mean()
    upper = invert_binary_kl(risk, jnp.log(2 / sampling_delta) / samples)
    found = kl_divergence(params, start, noise, opt_state=opt_state)
    nats = found.kl + found.grid + jnp.log(2 * jnp.sqrt(count) / delta)
    bound = invert_binary_kl(upper, nats / count)
    loose = upper + jnp.sqrt(nats / (2 * count))
    return Bound(bound, loose, risk, upper, found)


def invert_binary_kl(share: Array, nats: Array) -> Array:
    """The largest p with ``kl(share | p) <= nats``, by bisection.

    Args:
      share: ``q`` in [0, 1].
      nats: at least 0.
    """
    share = jnp.asarray(share)

    def divergence(p: Array) -> Array:
        return jax.scipy.special.rel_entr(share, p) + jax.scipy.special.rel_entr(
            1 - share, 1 - p
        )

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        fits = divergence(middle) <= nats
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    ends = share, jnp.ones_like(share)
    _, high = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
    largest: Array = high
    return largest


def _inside(opt_state: PyTree, moved: PyTree) -> Mapping[str, Array]:
    leaves, _ = paths.flatten(moved)
    states = subspace.with_bases(opt_state, "kl_divergence")
    spaces = subspace.subspaces(states, leaves)
    # Rounded bases, made orthonormal: the prior's parts inside and outside of them are
    # to be independent.
    exact = {
        path: space._replace(basis=jax.vmap(orthonormalize)(space.basis))
        for path, space in spaces.items()
    }
    return {path: space.project(leaves[path]) for path, space in exact.items()}


def _group(squared: Array, size: int, noise: Scalar) -> tuple[Array, Array]:
    """KL of `size` parameters with one prior scale, and the price of the grid."""
    if size == 0:
        return jnp.zeros([]), jnp.zeros([])
    variance = jnp.square(jnp.asarray(noise, jnp.float32))
    best = variance + squared / size
    place = jnp.maximum(jnp.floor(_FINENESS * jnp.log(_LARGEST / best)), 1)
    prior = _LARGEST * jnp.exp(-place / _FINENESS)
    kl = 0.5 * (
        (size * variance + squared) / prior - size + size * jnp.log(prior / variance)
    )
    return kl, 2 * jnp.log(place) + jnp.log(jnp.pi**2 / 6)


def _check_noise(noise: Scalar) -> None:
    if not isinstance(noise, jax.core.Tracer) and not noise > 0:
        raise ValueError(f"noise: got {noise}, expected a number above 0.")
