"""Curvature without matrices against the dense Hessian of small models."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from dsbp_optax import diagnostics

SIZES = (6, 8, 4)


def predict(params: Any, batch: Any) -> Any:
    x, _ = batch
    for number, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        x = jnp.tanh(x) if number + 1 < len(params) else x
    return x


def output_loss(outputs: Any, batch: Any) -> Any:
    _, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def loss(params: Any, batch: Any) -> Any:
    return output_loss(predict(params, batch), batch)


@pytest.fixture(scope="module")
def problem() -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 20))
    params = [
        {"w": jax.random.normal(next(keys), (a, b)), "b": jnp.zeros(b)}
        for a, b in itertools.pairwise(SIZES)
    ]
    batches = diagnostics.stack_batches(
        (
            jax.random.normal(next(keys), (16, SIZES[0])),
            jax.random.randint(next(keys), (16,), 0, SIZES[-1]),
        )
        for _ in range(3)
    )
    return params, batches


def dense(function: Any, params: Any, batches: Any) -> np.ndarray:
    """The mean over batches of a matrix, in float64."""
    flat, unravel = ravel_pytree(params)
    found = jax.jit(
        lambda flat: [
            function(flat, unravel, jax.tree.map(lambda x, i=i: x[i], batches))
            for i in range(3)
        ]
    )(flat)
    return np.mean(np.asarray(found, np.float64), axis=0)


def hessian(flat: Any, unravel: Any, batch: Any) -> Any:
    return jax.hessian(lambda w: loss(unravel(w), batch))(flat)


def gauss_newton(flat: Any, unravel: Any, batch: Any) -> Any:
    def outputs(w: Any) -> Any:
        return predict(unravel(w), batch).ravel()

    y = outputs(flat)
    inner = jax.hessian(lambda y: output_loss(y.reshape(-1, SIZES[-1]), batch))(y)
    jacobian = jax.jacobian(outputs)(flat)
    return jacobian.T @ inner @ jacobian


PRODUCTS = {
    "hessian": (
        lambda p, b: diagnostics.hessian_product(loss, p, b),
        hessian,
    ),
    "gauss-newton": (
        lambda p, b: diagnostics.gauss_newton_product(predict, output_loss, p, b),
        gauss_newton,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_eigenvalues_and_vectors_are_those_of_the_dense_matrix(
    name: str, problem: Any
) -> None:
    params, batches = problem
    make, reference = PRODUCTS[name]
    matrix = dense(reference, params, batches)
    values, vectors = np.linalg.eigh(matrix)
    product = make(params, batches)
    found = jax.jit(lambda p: diagnostics.top_eigenvalues(product, p, 10))(params)
    np.testing.assert_allclose(found.values, values[::-1][:10], rtol=0.01)
    top, _ = ravel_pytree(jax.tree.map(lambda x: x[0], found.vectors))
    assert abs(top @ vectors[:, -1]) > 0.999
    assert float(found.residuals.max()) < 1e-3
    other = PRODUCTS["gauss-newton" if name == "hessian" else "hessian"][1]
    wrong = np.linalg.eigvalsh(dense(other, params, batches))[::-1][:10]
    assert np.abs(found.values / wrong - 1).max() > 0.01


def test_residuals_tell_when_there_were_too_few_steps(problem: Any) -> None:
    params, batches = problem
    product = diagnostics.hessian_product(loss, params, batches)
    short = diagnostics.top_eigenvalues(product, params, 4, steps=5)
    assert float(short.residuals.max()) > 1e-2


def test_trace_covers_the_dense_one_and_its_error_is_honest(problem: Any) -> None:
    params, batches = problem
    exact = np.trace(dense(hessian, params, batches))
    product = diagnostics.hessian_product(loss, params, batches)
    found = jax.jit(lambda key: diagnostics.trace(product, params, key, samples=400))(
        jax.random.key(1)
    )
    assert abs(found.mean - exact) < 4 * found.standard_error
    assert found.standard_error < 0.1 * abs(exact)
    few = diagnostics.trace(product, params, jax.random.key(1), samples=25)
    assert 2 < few.standard_error / found.standard_error < 8


def test_density_has_the_moments_of_the_spectrum(problem: Any) -> None:
    params, batches = problem
    values = np.linalg.eigvalsh(dense(hessian, params, batches))
    product = diagnostics.hessian_product(loss, params, batches)
    found = diagnostics.spectral_density(
        product, params, jax.random.key(2), samples=400, steps=25
    )
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-4)
    for power in (1, 2):
        moment = jnp.mean(jnp.sum(found.weights * found.nodes**power, 1))
        np.testing.assert_allclose(moment, np.mean(values**power), rtol=0.2)
    grid = np.linspace(values[0] - 1, values[-1] + 1, 400)
    area = np.trapezoid(found.smoothed(grid, 0.1), grid)
    assert area == pytest.approx(1, abs=0.02)


def test_sharpness_on_a_quadratic_is_half_the_curvature() -> None:
    curvature = jnp.array([8.0, 1.0])

    def bowl(w: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum(curvature * w * w) + 0 * batch

    def rise(**more: Any) -> float:
        start = jnp.array([0.01, 0.01])
        return float(diagnostics.m_sharpness(bowl, start, jnp.zeros(2), **more))

    exact = 0.5 * 8 * (0.51**2 - 0.01**2)  # Along the first axis, all but exactly.
    assert rise(radius=0.5, ascents=5) == pytest.approx(exact, rel=0.02)
    assert rise(radius=0.5) <= rise(radius=0.5, ascents=5) + 1e-6
    assert rise(radius=1.0) > 3 * rise(radius=0.5)
    flat = diagnostics.m_sharpness(lambda w, b: 0 * b, jnp.ones(2), jnp.zeros(2))
    assert float(flat) == 0


def test_batches_stream_and_weigh_alike(problem: Any) -> None:
    params, batches = problem
    whole = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batches)
    vector = optax.tree.random_like(jax.random.key(5), params)
    one, many = (
        diagnostics.hessian_product(loss, params, b)(vector) for b in (whole, batches)
    )
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_refusals(problem: Any) -> None:
    params, _ = problem
    with pytest.raises(ValueError, match="no batch"):
        diagnostics.stack_batches([])
    with pytest.raises(ValueError, match="incomplete last batch"):
        diagnostics.stack_batches([jnp.ones(3), jnp.ones(2)])
    with pytest.raises(ValueError, match="count <= steps <= parameters"):
        diagnostics.top_eigenvalues(lambda v: v, params, 5, steps=4)
    with pytest.raises(ValueError, match="at most the"):
        diagnostics.spectral_density(
            lambda v: v, jnp.ones(3), jax.random.key(0), steps=4
        )


def streamed(batches: Any, reads: list[int] | None = None) -> Any:
    """The same batches out of an iterator; `reads` notes when it is opened."""

    def read() -> Any:
        if reads is not None:
            reads.append(1)
        count = len(jax.tree.leaves(batches)[0])
        return (jax.tree.map(lambda x, i=i: x[i], batches) for i in range(count))

    return diagnostics.stream_batches(read)


def test_figures_of_an_iterator_are_those_of_stacked_batches(problem: Any) -> None:
    params, batches = problem
    along = jax.tree.map(jnp.ones_like, params)
    key = jax.random.key(0)

    def figures(batches: Any) -> dict[str, Any]:
        product = diagnostics.hessian_product(loss, params, batches)
        top = diagnostics.top_eigenvalues(product, params, 2, steps=24)
        density = diagnostics.spectral_density(product, params, key, samples=1, steps=5)
        return {
            "values": top.values,
            "residuals": top.residuals,
            "trace": diagnostics.trace(product, params, key, samples=2),
            "density": density,
            "rise": diagnostics.m_sharpness(loss, params, batches, 0.1, ascents=2),
            "surface": diagnostics.loss_surface(
                *(loss, params, batches, along, params), points=3
            ).losses,
            "bound": diagnostics.pac_bayes_bound(
                lambda p, b: 1 - jnp.exp(-loss(p, b)),
                *(params, along, batches, key),
                noise=0.1,
                count=48,
                samples=3,
            ).bound,
        }

    reads: list[int] = []
    whole = jax.jit(figures)
    found, expected = figures(streamed(batches, reads)), whole(batches)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4),
        *(found, expected),
    )
    assert len(reads) > 40  # Read afresh for each product, not remembered.
    short = whole(jax.tree.map(lambda x: x[:2], batches))
    assert abs(short["values"][0] / found["values"][0] - 1) > 1e-2


def test_a_batch_of_a_stream_is_compiled_once(problem: Any) -> None:
    params, batches = problem
    traces = []

    def noted(params: Any, batch: Any) -> Any:
        traces.append(1)
        return loss(params, batch)

    product = diagnostics.hessian_product(noted, params, streamed(batches))
    diagnostics.top_eigenvalues(product, params, 2, steps=4)
    first = len(traces)
    diagnostics.top_eigenvalues(product, params, 2, steps=9)
    assert len(traces) == first < 4


def test_streams_refuse_to_be_compiled_and_to_be_empty(problem: Any) -> None:
    params, batches = problem
    product = diagnostics.hessian_product(loss, params, streamed(batches))
    with pytest.raises(ValueError, match="got a computation to compile"):
        jax.jit(product)(params)
    spent = iter([jax.tree.map(lambda x: x[0], batches)])
    once = diagnostics.hessian_product(
        loss, params, diagnostics.stream_batches(lambda: spent)
    )
    once(params)
    with pytest.raises(ValueError, match="got no batch"):
        once(params)
    with pytest.raises(ValueError, match="got list_iterator, expected a function"):
        diagnostics.stream_batches(iter([]))
