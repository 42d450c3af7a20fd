"""What the instruments say of a state: true figures, and warnings that fire."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import with_basis

import dsbp_optax
from dsbp_optax import Activations, diagnostics

D, M, K = 24, 20, 3


def basis_of(x: Any) -> np.ndarray:
    _, vectors = np.linalg.eigh(np.asarray(x.T @ x, np.float64))
    return vectors[:, ::-1][:, :K]


def samples(seed: int, count: int = 200, turn: float = 0.0, noise: float = 0.3) -> Any:
    """Samples with K strong directions, the first of them turned away by an angle."""
    scales = jnp.concatenate([jnp.array([8.0, 6.0, 4.0]), noise * jnp.ones(D - K)])
    x = jax.random.normal(jax.random.key(seed), (count, D)) * scales
    rotation = jnp.eye(D).at[0, 0].set(jnp.cos(turn)).at[K, K].set(jnp.cos(turn))
    rotation = rotation.at[0, K].set(-jnp.sin(turn)).at[K, 0].set(jnp.sin(turn))
    return x @ rotation.T


def train(batches: list[Any], **settings: Any) -> Any:
    """A state that has seen some batches."""
    settings = {"rank": K, "update_every": 1, "power_iterations": 8, **settings}
    tx = dsbp_optax.dsbp_sgd(0.1, **with_basis(**settings))
    params = {"kernel": jnp.ones((D, M)), "bias": jnp.ones(M)}
    state = tx.init(params)
    for x in batches:
        grads = jax.tree.map(lambda p, x=x: p * x.mean(), params)
        _, state = jax.jit(tx.update)(
            grads, state, params, statistics={"kernel": Activations(x)}
        )
    return state


def test_angles_between_states_are_those_of_the_eigenspaces() -> None:
    one, two = samples(0), samples(0, turn=0.4)
    angles = diagnostics.principal_angles(train([one]), train([two]))["kernel"]
    cosines = np.linalg.svd(basis_of(one).T @ basis_of(two), compute_uv=False)
    np.testing.assert_allclose(angles, np.arccos(np.minimum(cosines, 1)), atol=5e-3)
    assert float(angles[-1]) == pytest.approx(0.4, abs=0.02)
    same = diagnostics.principal_angles(train([one]), train([one]))["kernel"]
    assert float(same.max()) < 1e-3


def test_halves_of_a_batch_reproduce_strong_directions_and_not_noise() -> None:
    def largest(x: Any) -> float:
        halves = [train([half]) for half in (x[::2], x[1::2])]
        return float(diagnostics.principal_angles(*halves)["kernel"].max())

    assert largest(samples(3)) < 0.15
    assert largest(jax.random.normal(jax.random.key(1), (200, D))) > 0.5


def test_angles_of_stacked_kernels() -> None:
    axes = {"*": dsbp_optax.Axes(batch=(0,), inputs=(1,), outputs=(2,))}
    tx = dsbp_optax.dsbp_sgd(0.1, rank=2, basis=dsbp_optax.Basis(axes=axes))
    states = []
    for seed in (0, 1):
        kernel = jax.random.normal(jax.random.key(seed), (3, D, M))
        params = {"kernel": kernel}
        state = tx.init(params)
        states.append(jax.jit(tx.update)(params, state, params)[1])
    angles = diagnostics.principal_angles(*states)["kernel"]
    assert angles.shape == (3, 2)
    assert float(angles.min()) > 0.1


def test_bases_that_differ_in_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same"):
        diagnostics.principal_angles(train([]), train([], rank=2))


def test_metrics_count_every_byte_and_the_leading_eigenvalue() -> None:
    x = samples(0)
    state = train([x])
    figures = jax.jit(diagnostics.metrics)(state)
    basis, moments = 2 * D * K, 2 * K * M
    residual = 5 * D * M // 8 + 2 * (D + M)
    assert int(figures["dsbp/state_bytes/kernel"]) == basis + moments + residual
    top = np.linalg.eigvalsh(np.asarray(x.T @ x, np.float64) / len(x))[-1]
    assert float(figures["dsbp/largest/kernel"]) == pytest.approx(top, rel=1e-3)


def test_a_healthy_run_has_no_warnings() -> None:
    assert diagnostics.warnings(train([samples(s) for s in range(12)])) == []
    assert diagnostics.warnings(optax.adam(1e-3).init(jnp.ones(3))) == []


def test_a_stale_basis_is_called_stale() -> None:
    # One iteration on a covariance that has turned: the basis lags behind.
    late = [samples(0, noise=4.0)] * 5 + [samples(1, turn=1.4, noise=4.0)]
    assert diagnostics.warnings(train(late[-3:], power_iterations=1)) == []  # Fresh.
    (words,) = diagnostics.warnings(train(late, power_iterations=1))
    assert words.startswith("kernel: stale basis")
    assert "update_every" in words


def test_a_refused_refresh_is_called_ill_conditioned() -> None:
    broken = [samples(0), samples(0) * jnp.nan, samples(1)[:1]]
    (words,) = diagnostics.warnings(train(broken[::2]))
    assert "ill-conditioned or diverging iteration: 1 refreshes" in words
    assert "rank" in words


def test_a_forgotten_statistic_is_told() -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (D, M))}
    tx = dsbp_optax.dsbp_sgd(0.1, rank=2, update_every=1)
    state = tx.init(params)
    for _ in range(6):
        _, state = jax.jit(tx.update)(params, state, params)
    (words,) = diagnostics.warnings(state)
    assert words.startswith("kernel: a basis of gradients")
    assert "pass statistics= to update" in words


def test_muon_misses_no_statistics_but_those_of_one_layer_among_others() -> None:
    params = {
        name: {"kernel": jax.random.normal(jax.random.key(0), (D, M))}
        for name in ("first", "second")
    }
    tx = dsbp_optax.dsbp_muon(0.1, rank=2, update_every=1)
    some = {"first/kernel": dsbp_optax.Activations(samples(0))}
    for statistics, expected in ((None, []), ({}, []), (some, ["second/kernel: a "])):
        state = tx.init(params)
        update = jax.jit(functools.partial(tx.update, statistics=statistics))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(6):
                _, state = update(params, state, params)
        said = diagnostics.warnings(state)
        assert [words[: len("second/kernel: a ")] for words in said] == expected
    adam = dsbp_optax.dsbp_adamw(0.1, rank=2)
    with pytest.warns(UserWarning, match="got no statistics"):
        adam.update(params, adam.init(params), params)
    with pytest.raises(ValueError, match="of a metric, expected that of a momentum m"):
        tx.update(params, adam.init(params), params)


def test_steps_without_statistics_and_skipped_steps_are_told() -> None:
    tx = dsbp_optax.add_spectral_sharpness(0.1)
    params = {"kernel": jnp.ones((D, M))}
    state = tx.init(params)
    for _ in range(12):
        _, state = jax.jit(tx.update)(
            jax.tree.map(jnp.zeros_like, params), state, params
        )
    assert any("no basis after 12 steps" in w for w in diagnostics.warnings(state))
    broken = jax.tree.map(lambda x: x * jnp.inf, params)
    for name in ("dsbp_sgd", "dsbp_muon", "dsbp_adamw"):
        tx = getattr(dsbp_optax, name)(0.1, rank=2)
        state, update = tx.init(params), jax.jit(tx.update)
        for grads in (broken, params):
            _, state = update(grads, state, params, statistics={})
        said = diagnostics.warnings(state)
        assert any("1 of 2 steps were skipped" in words for words in said), name
