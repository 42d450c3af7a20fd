"""Laws of clipping by growth, each with an answer that must be rejected."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsbp_optax


def norms_after(norms: list[float], **settings: float) -> list[float]:
    """Norms that come out where gradients of these norms go in."""
    tx = dsbp_optax.clip_by_norm_growth(**settings)
    direction = {"a": jnp.asarray([0.6, 0.0]), "b": {"c": jnp.asarray([[0.8]])}}
    state, found = tx.init(direction), []
    for norm in norms:
        gradient = jax.tree.map(lambda x, n=norm: n * x, direction)
        clipped, state = jax.jit(tx.update)(gradient, state)
        found.append(float(optax.tree.norm(clipped)))
        chex.assert_trees_all_close(
            clipped, jax.tree.map(lambda x, n=found[-1]: n * x, direction), rtol=1e-5
        )
    return found


def by_hand(norms: list[float], factor: float, decay: float) -> list[float]:
    """The rule in float64, one number at a time."""
    kept: list[float] = []
    for norm in norms:
        weights = decay ** np.arange(len(kept))[::-1]
        bound = factor * np.average(kept, weights=weights) if kept else np.inf
        kept.append(min(norm, bound))
    return kept


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    st.floats(1.0, 4.0),
    st.floats(0.1, 0.99),
)
def test_norms_are_those_by_hand(norms, factor, decay) -> None:
    found = norms_after(norms, factor=factor, decay=decay)
    np.testing.assert_allclose(found, by_hand(norms, factor, decay), rtol=1e-4)


def test_the_answer_by_hand_is_particular() -> None:
    norms = [1.0, 5.0, 0.5, 9.0]
    found = norms_after(norms, factor=2.0, decay=0.5)
    for wrong in (by_hand(norms, 3.0, 0.5), by_hand(norms, 2.0, 0.9), norms):
        assert not np.allclose(found, wrong, rtol=1e-3)


def test_growth_of_a_runaway_is_bounded() -> None:
    found = norms_after([3.0**n for n in range(30)], factor=2.0, decay=0.99)
    assert found[-1] < 2 * 30


def test_zeros_set_no_scale() -> None:
    """What is frozen at first must be free to start."""
    found = norms_after([0.0, 0.0, 3.0, 4.0, 0.0, 5.0])
    np.testing.assert_allclose(found, [0.0, 0.0, 3.0, 4.0, 0.0, 5.0], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_numbers_that_are_not_finite_pass_and_are_forgotten(bad) -> None:
    tx = dsbp_optax.clip_by_norm_growth()
    _, before = jax.jit(tx.update)(jnp.ones(3), tx.init(jnp.ones(3)))
    passed, after = jax.jit(tx.update)(jnp.asarray([1.0, bad, 1.0]), before)
    chex.assert_trees_all_equal(before, after)
    np.testing.assert_array_equal(passed, [1.0, bad, 1.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept_and_squares_do_not_overflow(dtype) -> None:
    tx = dsbp_optax.clip_by_norm_growth()
    small, large = jnp.full(4, 1.0, dtype), jnp.full(4, 1000.0, dtype)
    _, state = jax.jit(tx.update)(small, tx.init(small))
    clipped, state = jax.jit(tx.update)(large, state)
    assert clipped.dtype == dtype and state.total.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(clipped, np.float32), 2.0, rtol=1e-2)


@pytest.mark.parametrize("largest", [1e38, 1e20, 1e-6, 1e-25, 1e-42, 0.0])
def test_gradients_whose_squares_are_not_finite_are_clipped(largest) -> None:
    gradient = jnp.full((4, 4), 0.25).at[1, 2].set(largest)
    tx = dsbp_optax.clip_by_norm_growth()
    _, state = jax.jit(tx.update)(jnp.full((4, 4), 0.25), tx.init(gradient))
    clipped, state = jax.jit(tx.update)(gradient, state)
    expected = min(np.linalg.norm(np.asarray(gradient, np.float64)), 2.0)
    np.testing.assert_allclose(np.linalg.norm(clipped), expected, rtol=1e-5)
    np.testing.assert_allclose(state.total / state.weight, 1, atol=0.6)
    alone = jnp.full((4, 4), min(largest, 1e30))
    passed, _ = jax.jit(tx.update)(alone, tx.init(alone))
    np.testing.assert_allclose(passed, alone, atol=1e-38)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"factor": 0.5}, "factor: got 0.5"), ({"decay": 1.0}, "decay: got 1.0")],
)
def test_bad_settings_say_what_was_expected(settings, match) -> None:
    with pytest.raises(ValueError, match=match):
        dsbp_optax.clip_by_norm_growth(**settings)


def test_a_rate_too_high_for_sgd_stays_finite_with_it_and_not_without() -> None:
    """A quartic bowl: beyond its stable rate each step throws the next one further."""
    gradient = jax.grad(lambda p: jnp.sum(p["kernel"] ** 4) / 16)

    def ends_at(clip: float | None) -> float:
        tx = dsbp_optax.dsbp_sgd(8.0, clip=clip, rank=2)
        params = {"kernel": jnp.linspace(0.5, 1.5, 256).reshape(16, 16)}
        state = tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(40):
            updates, state = update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
        return float(jnp.abs(params["kernel"]).max())

    assert ends_at(2.0) < 1e4 < ends_at(None)
