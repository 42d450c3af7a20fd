"""Curvature of a loss at given parameters, matrix-free: spectra, traces, sharpness.

Everything takes and gives trees shaped as the parameters and goes through the data one
batch after the other: inside `jax.jit` over stacked batches, or out of an iterator. The
algorithms are those of `matfree`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from dsbp_optax.core import checks
from dsbp_optax.instruments.batches import averaged, loops_for
from dsbp_optax.linalg.types import Array, PyTree, Scalar

#: tree shaped as the parameters -> the same
Product: TypeAlias = Callable[[PyTree], PyTree]

#: Lanczos steps for each eigenvalue that is asked for, and the fewest of all.
_STEPS, _FEWEST = 5, 40


class Eigenvalues(NamedTuple):
    """The largest eigenvalues of a symmetric operator.

    Attributes:
      values: ``(count,)``, descending.
      vectors: shaped as the parameters with a leading axis of length `count`; of unit
        norm.
      residuals: ``(count,)``, ``|H v - lambda v|``: how far each can be off.
    """

    values: Array
    vectors: PyTree
    residuals: Array


class Estimate(NamedTuple):
    """A mean over random samples.

    Attributes:
      mean: ``()``.
      standard_error: ``()``.
    """

    mean: Array
    standard_error: Array


class Density(NamedTuple):
    """Density of a spectrum: point masses, to be smoothed by whoever draws them.

    Attributes:
      nodes: ``(samples, steps)``, eigenvalues of the Lanczos matrices.
      weights: ``(samples, steps)``, their masses; each row sums to 1.
    """

    nodes: Array
    weights: Array

    def smoothed(self, grid: Array, width: Scalar) -> Array:
        """Mean over samples of Gaussians of standard deviation `width`: ``(n,)``."""
        z = (jnp.asarray(grid)[:, None, None] - self.nodes) / width
        bumps = jnp.exp(-0.5 * z * z) / (width * jnp.sqrt(2 * jnp.pi))
        return jnp.sum(bumps * self.weights, axis=(1, 2)) / len(self.nodes)


def hessian_product(
    loss_fn: Callable[[PyTree, Any], Array], params: PyTree, batches: PyTree
) -> Product:
    """``v -> H v`` with the Hessian of the mean loss over all batches.

    Args:
      loss_fn: ``(params, batch) -> scalar``.
      params: where.
      batches: trees of arrays with a leading axis over batches, see `stack_batches`,
        or a stream of them, see `stream_batches`.

    Returns:
      A function of trees shaped as `params`.

    Cost: of a product, twice a gradient over the data; memory of one batch.

    Reference: Pearlmutter (1994).

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> batches = jnp.ones((2, 4, 3))
      >>> product = diagnostics.hessian_product(
      ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(3), batches)
      >>> product(jnp.array([1.0, 0.0, 0.0]))
      Array([2., 2., 2.], dtype=float32)
    """

    def one(vector: PyTree, batch: Any) -> PyTree:
        return jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (vector,))[1]

    return averaged(one, batches)


def gauss_newton_product(
    predict_fn: Callable[[PyTree, Any], PyTree],
    output_loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batches: PyTree,
) -> Product:
    """``v -> J^T H_out J v``: the Hessian without the curvature of the model itself.

    Args:
      predict_fn: ``(params, batch) -> outputs``.
      output_loss_fn: ``(outputs, batch) -> scalar``, convex in the outputs for a
        positive semi-definite product.
      params: where.
      batches: as for `hessian_product`.

    Returns:
      A function of trees shaped as `params`.

    Cost: of a product, two forward passes and one backward pass over the data.

    Reference: Schraudolph (2002).

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> product = diagnostics.gauss_newton_product(
      ...     lambda w, x: x @ w, lambda y, x: jnp.mean(y**2), jnp.ones(3),
      ...     jnp.ones((2, 4, 3)))
      >>> product(jnp.array([1.0, 0.0, 0.0]))
      Array([2., 2., 2.], dtype=float32)
    """

    def one(vector: PyTree, batch: Any) -> PyTree:
        outputs, pull = jax.vjp(lambda p: predict_fn(p, batch), params)
        _, push = jax.jvp(lambda p: predict_fn(p, batch), (params,), (vector,))
        slope = jax.grad(lambda y: output_loss_fn(y, batch))
        (result,) = pull(jax.jvp(slope, (outputs,), (push,))[1])
        return result

    return averaged(one, batches)


def top_eigenvalues(
    product: Product, params: PyTree, count: int = 10, *, steps: int | None = None
) -> Eigenvalues:
    """The largest eigenvalues by Lanczos with full reorthogonalisation.

    Args:
      product: a symmetric operator, such as `hessian_product` gives.
      params: for shapes and dtypes.
      count: how many.
      steps: of the iteration; None for ``5 count``, at least 40, at most the number
        of parameters.

    Returns:
      `Eigenvalues`.

    Raises:
      ValueError: for a count below 1, or fewer steps than that.
      ImportError: without ``matfree``.

    Cost: ``steps + count`` products, and as many trees of parameters in memory.

    Reference: Lanczos (1950), by `matfree.decomp.tridiag_sym`.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> found = diagnostics.top_eigenvalues(
      ...     lambda v: jnp.array([3.0, 2.0, 1.0]) * v, jnp.ones(3), 2)
      >>> print(found.values.round().astype(int))
      [3 2]
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    checks.check_integer("count", count, 1)
    steps = min(size, max(_STEPS * count, _FEWEST)) if steps is None else steps
    if not count <= steps <= size:
        raise ValueError(
            f"top_eigenvalues: got {count} eigenvalues in {steps} steps with {size} "
            "parameters, expected count <= steps <= parameters."
        )
    flat, unravel = ravel_pytree(params)
    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    with loops_for(product):
        krylov, matrix = _lanczos(product, unravel, start, steps)
    values, rotation = jnp.linalg.eigh(matrix)
    order = jnp.argsort(-values)[:count]
    values = values[order]
    vectors = jax.vmap(unravel)(rotation.T[order] @ krylov)

    def gap(pair: tuple[Array, PyTree]) -> Array:
        value, vector = pair
        off = jax.tree.map(lambda h, v: h - value * v, product(vector), vector)
        norm: Array = optax.tree.norm(off)
        return norm

    with loops_for(product):
        gaps = jax.lax.map(gap, (values, vectors))
    return Eigenvalues(values, vectors, gaps)


def trace(product: Product, params: PyTree, key: Array, samples: int = 32) -> Estimate:
    """The trace, by Hutchinson's estimator with random signs.

    Args:
      product: a symmetric operator.
      params: for shapes and dtypes.
      key: of the random numbers.
      samples: how many; the error falls with their square root.

    Returns:
      `Estimate`.

    Raises:
      ImportError: without ``matfree``.

    Cost: `samples` products.

    Reference: Hutchinson (1989), by `matfree.stochtrace`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> found = diagnostics.trace(
      ...     lambda v: jnp.array([3.0, 2.0, 1.0]) * v, jnp.ones(3), jax.random.key(0))
      >>> float(found.mean)
      6.0
    """
    with checks.brought_by("instruments"):
        from matfree import stochtrace

    checks.check_integer("samples", samples, 2)
    integrand = stochtrace.monte_carlo_trace()
    sampler = stochtrace.sampler_signs(params, num=1)

    def one(key: Array) -> Array:
        sample = jax.tree.map(lambda x: x[0], sampler(key))
        value: Array = integrand(product, sample)
        return value

    with loops_for(product):
        values = jax.lax.map(one, jax.random.split(key, samples))
    return Estimate(values.mean(), values.std(ddof=1) / jnp.sqrt(samples))


def spectral_density(
    product: Product,
    params: PyTree,
    key: Array,
    *,
    samples: int = 4,
    steps: int = 40,
) -> Density:
    """The density of all eigenvalues, by stochastic Lanczos quadrature.

    Args:
      product: a symmetric operator.
      params: for shapes and dtypes.
      key: of the random starts.
      samples: number of starts.
      steps: of each iteration; at most the number of parameters.

    Returns:
      `Density`.

    Raises:
      ValueError: for more steps than parameters.
      ImportError: without ``matfree``.

    Cost: ``samples * steps`` products; `steps` trees of parameters in memory.

    Reference: Ghorbani et al., arXiv 1901.10159, by `matfree.decomp.tridiag_sym`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> found = diagnostics.spectral_density(
      ...     lambda v: jnp.array([3.0, 2.0, 1.0]) * v, jnp.ones(3),
      ...     jax.random.key(0), steps=3)
      >>> print(found.nodes[0].round().astype(int))
      [1 2 3]
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    checks.check_integer("steps", steps, 1)
    checks.check_integer("samples", samples, 1)
    if steps > size:
        raise ValueError(
            f"spectral_density: got {steps} steps, expected at most the {size} "
            "parameters."
        )
    flat, unravel = ravel_pytree(params)

    def one(key: Array) -> tuple[Array, Array]:
        start = jax.random.normal(key, flat.shape, flat.dtype)
        _, matrix = _lanczos(product, unravel, start, steps)
        values, vectors = jnp.linalg.eigh(matrix)
        return values, vectors[0] ** 2

    with loops_for(product):
        return Density(*jax.lax.map(one, jax.random.split(key, samples)))


def _lanczos(
    product: Product, unravel: Callable[[Array], PyTree], start: Array, steps: int
) -> tuple[Array, Array]:
    """Krylov vectors ``(steps, n)`` and the tridiagonal matrix ``(steps, steps)``."""
    with checks.brought_by("instruments"):
        from matfree import decomp

    tridiagonalise = decomp.tridiag_sym(steps, custom_vjp=False)
    krylov, matrix, *_ = tridiagonalise(
        lambda v: ravel_pytree(product(unravel(v)))[0], start
    )
    return krylov, matrix


def m_sharpness(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batches: PyTree,
    radius: Scalar = 0.05,
    ascents: int = 1,
) -> Array:
    """How much the loss of a batch rises within `radius`, mean over batches of m.

    The largest rise over the unit ball is approached by `ascents` normalised gradient
    steps, each of which ends on the sphere; the best of them counts, and no rise is 0.

    Args:
      loss_fn: ``(params, batch) -> scalar``.
      params: where.
      batches: as for `hessian_product`; m is their size.
      radius: of the ball.
      ascents: gradient steps, at least 1.

    Returns:
      The mean rise, ``()``.

    Cost: `ascents` gradients and as many losses over the data.

    Reference: Foret et al., arXiv 2010.01412.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> rise = diagnostics.m_sharpness(
      ...     lambda w, x: jnp.sum(x * w), jnp.zeros(4), jnp.ones((2, 4)), 0.5)
      >>> float(rise)
      1.0
    """
    checks.check_integer("ascents", ascents, 1)

    def one(params: PyTree, batch: Any) -> Array:
        base, away, rise = loss_fn(params, batch), params, jnp.zeros([])
        for _ in range(ascents):
            slope = jax.grad(loss_fn)(away, batch)
            moved = optax.tree.add(
                optax.tree.sub(away, params), _to_length(slope, radius)
            )
            away = optax.tree.add(params, _to_length(moved, radius))
            rise = jnp.maximum(rise, loss_fn(away, batch) - base)
        return rise

    mean_rise: Array = averaged(one, batches)(params)
    return mean_rise


def _to_length(tree: PyTree, length: Scalar) -> PyTree:
    norm = optax.tree.norm(tree)
    factor = jnp.where(norm > 0, length / jnp.where(norm > 0, norm, 1), 0)
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)
