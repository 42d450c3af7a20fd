"""The bound against closed forms, and against what it must hold for."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import layer

import dsbp_optax
from dsbp_optax import Activations, diagnostics
from dsbp_optax.instruments import pac_bayes

N = 400


def gaussian_kl(size: int, squared: float, noise: float, prior: float) -> float:
    """Between isotropic Gaussians, in float64."""
    ratio = noise**2 / prior
    return 0.5 * (size * ratio - size + squared / prior - size * math.log(ratio))


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("distance", [0.0, 3.0, 100.0])
def test_kl_is_the_closed_form_at_the_best_scale(noise: float, distance: float) -> None:
    moved = jnp.zeros(N).at[3].set(distance)
    found = diagnostics.kl_divergence(moved + 5, jnp.full(N, 5.0), noise)
    best = noise**2 + distance**2 / N
    least = gaussian_kl(N, distance**2, noise, best)
    assert least == pytest.approx(0.5 * N * math.log(best / noise**2), abs=1e-6)
    # The grid is one per cent fine, and the minimum is flat.
    assert least - 1e-2 <= float(found.kl) <= least + 0.02 * (1 + least)
    wrong = gaussian_kl(N, distance**2, noise, 2 * best)
    assert wrong > float(found.kl) + 1
    assert 0 < float(found.grid) < 20
    assert float(found.distance) == pytest.approx(distance, rel=1e-5)


def test_the_binary_kl_is_inverted() -> None:
    for share, nats in [(0.0, 0.1), (0.1, 0.02), (0.5, 0.3), (0.9, 0.001), (0.3, 0.0)]:
        p = float(pac_bayes.invert_binary_kl(share, nats))
        kl = sum(
            a * math.log(a / b) for a, b in ((share, p), (1 - share, 1 - p)) if a > 0
        )
        assert p >= share - 1e-6
        assert kl == pytest.approx(nats, abs=1e-4)


def test_the_bound_is_maurers_and_tighter_than_mcallesters() -> None:
    """Without errors on any draw: ``1 - exp(-(KL + ...) / n)`` by hand."""
    start, params = jnp.zeros(10), jnp.full(10, 0.3)
    found = diagnostics.pac_bayes_bound(
        lambda w, x: jnp.zeros([]),
        params,
        start,
        jnp.zeros((2, 5)),
        jax.random.key(0),
        noise=0.1,
        count=5000,
        samples=10**5,
    )
    divergence = found.divergence
    nats = float(divergence.kl + divergence.grid) + math.log(
        2 * math.sqrt(5000) / 0.025
    )
    expected = 1 - math.exp(-nats / 5000)
    assert float(found.bound) == pytest.approx(expected, rel=0.1)
    assert float(found.bound) > expected, "sampling has its price"
    loose = float(found.risk_bound) + math.sqrt(nats / 10_000)
    assert float(found.mcallester) == pytest.approx(loose, rel=1e-3)
    assert float(found.mcallester) > float(found.bound)


def classifier(seed: int, samples: int) -> tuple[Any, Any]:
    """Noisy linear data."""
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (samples, 20))
    labels = jnp.sign(x[:, 0] + 0.5 * jax.random.normal(keys[1], (samples,)))
    return x, labels


def error(w: Any, batch: Any) -> Any:
    x, labels = batch
    return jnp.mean(jnp.sign(x @ w) != labels)


def test_the_bound_holds_and_more_data_and_less_motion_tighten_it() -> None:
    test = classifier(99, 20_000)

    def bounded(count: int, length: float) -> Any:
        w = jnp.zeros(20).at[0].set(length)
        batches = jax.tree.map(lambda a: a[None], classifier(1, count))
        return w, diagnostics.pac_bayes_bound(
            error,
            w,
            jnp.zeros(20),
            batches,
            jax.random.key(2),
            noise=0.3,
            count=count,
            samples=500,
        )

    w, found = bounded(2000, 1.0)
    draws = w + 0.3 * jax.random.normal(jax.random.key(5), (200, 20))
    true = float(jnp.mean(jax.vmap(lambda v: error(v, test))(draws)))
    assert true < float(found.bound) < 0.5
    assert float(bounded(200, 1.0)[1].bound) > float(found.bound)
    far = bounded(2000, 30.0)[1].divergence
    assert float(far.kl) > float(found.divergence.kl)
    pure = diagnostics.pac_bayes_bound(
        error,
        jnp.zeros(20),
        jnp.zeros(20),
        jax.tree.map(lambda a: a[None], (classifier(1, 200)[0], jnp.ones(200))),
        jax.random.key(2),
        noise=1.0,
        count=200,
    )
    assert float(pure.bound) > 0.5, "guessing has no better bound"


def test_motion_inside_the_eigenbases_costs_less_with_a_scale_of_its_own() -> None:
    x = jax.random.normal(jax.random.key(0), (64, 32)) * (2.0 ** -jnp.arange(32))
    tx = dsbp_optax.dsbp_sgd(0.1, rank=2, update_every=1)
    start = {"kernel": jnp.zeros((32, 24))}
    grads = {"kernel": jnp.ones((32, 24))}
    statistics = {"kernel": Activations(x)}
    _, state = jax.jit(tx.update)(grads, tx.init(start), start, statistics=statistics)
    basis = layer(state, "kernel").basis
    inside = {"kernel": basis @ jnp.ones((2, 24))}
    outside = {"kernel": jnp.zeros((32, 24)).at[31].set(2**0.5)}

    def kl(params: Any, **more: Any) -> Any:
        return jax.jit(lambda p: diagnostics.kl_divergence(p, start, 0.02, **more))(
            params
        )

    one, two = kl(inside), kl(inside, opt_state=state)
    assert float(two.kl + two.grid) < 0.5 * float(one.kl + one.grid)
    assert float(two.distance_inside) == pytest.approx(float(two.distance), rel=1e-4)
    np.testing.assert_allclose(two.inside, two.kl, rtol=0.05)
    assert float(two.distance_inside) <= float(two.distance) * (1 + 1e-6)
    away = kl(outside, opt_state=state)
    assert float(away.distance_inside) < 0.05 * float(away.distance)


@pytest.mark.parametrize(
    ("word", "more"),
    [
        ("noise", {"noise": 0.0}),
        ("delta", {"delta": 0.0}),
        ("sampling_delta", {"sampling_delta": 1.5}),
        ("count", {"count": 0}),
    ],
)
def test_refusals(word: str, more: Any) -> None:
    settings = {"noise": 0.1, "count": 5, **more}
    with pytest.raises(ValueError, match=word):
        diagnostics.pac_bayes_bound(
            error,
            jnp.ones(20),
            jnp.ones(20),
            jax.tree.map(lambda a: a[None], classifier(0, 5)),
            jax.random.key(0),
            **settings,
        )
