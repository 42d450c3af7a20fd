"""The recommended optimizers inside what people wrap around them."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from versions import x64

import dsbp_optax
from dsbp_optax import Basis, diagnostics
from dsbp_optax.core.state import find_states

SMALL = {"rank": 2, "update_every": 4, "basis": Basis(power_iterations=2)}
RECIPES = {
    "dsbp_sgd": functools.partial(dsbp_optax.dsbp_sgd, 0.05, **SMALL),
    "dsbp_adamw": functools.partial(dsbp_optax.dsbp_adamw, 0.02, **SMALL),
    "dsbp_muon": functools.partial(dsbp_optax.dsbp_muon, 0.02, **SMALL),
}
#: Rules that take gradients in coordinates.
IN_COORDINATES = {
    "dsbp_sgd": functools.partial(RECIPES["dsbp_sgd"], residual=None),
    "subspace_adamw": functools.partial(dsbp_optax.subspace_adamw, 0.02, **SMALL),
    "subspace_muon": functools.partial(dsbp_optax.subspace_muon, 0.02, **SMALL),
}
every_recipe = pytest.mark.parametrize("name", RECIPES)

MODEL = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(16)])
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
TARGETS = jnp.sin(INPUTS[:, :16])
PARAMS = MODEL.init(jax.random.key(0), INPUTS)["params"]


def loss_fn(params: Any, scale: Any = 1.0) -> Any:
    return scale * jnp.mean((MODEL.apply({"params": params}, INPUTS) - TARGETS) ** 2)


def fit(tx: Any, steps: int = 60, params: Any = PARAMS) -> Any:
    """Parameters and state after some steps."""
    value_and_grad = dsbp_optax.linen.value_and_grad(loss_fn)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads, seen = value_and_grad(params, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=seen, value=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


WRAPPED = {
    "ema": lambda tx: optax.chain(tx, optax.ema(0.5)),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.05, b1=0.9),
    "clip": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@every_recipe
def test_training_goes_on_inside(name, wrapper) -> None:
    params, state = fit(WRAPPED[wrapper](RECIPES[name]()))
    before, after = float(loss_fn(PARAMS)), float(loss_fn(params))
    assert after < 0.7 * before
    assert int(diagnostics.metrics(state)["dsbp/skipped"]) == 0


@every_recipe
def test_statistics_do_not_see_the_scale_of_the_loss(name) -> None:
    """Dynamic loss scaling: gradients scale, what is known of activations does not."""
    state = RECIPES[name]().init(PARAMS)
    step = jax.jit(dsbp_optax.linen.value_and_grad(loss_fn))
    _, grads, plain = step(PARAMS, 1.0, opt_state=state)
    _, scaled_grads, scaled = step(PARAMS, 1024.0, opt_state=state)
    jax.tree.map(np.testing.assert_array_equal, plain, scaled)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, scaled_grads, jax.tree.map(lambda g: 1024 * g, grads))


@every_recipe
def test_an_overflow_of_the_scaled_loss_costs_one_step(name) -> None:
    """What `flax.training.dynamic_scale` does with a step, written out."""
    tx = RECIPES[name]()
    value_and_grad = dsbp_optax.linen.value_and_grad(loss_fn)

    @jax.jit
    def step(params: Any, state: Any, scale: Any) -> Any:
        _, grads, seen = value_and_grad(params, scale, opt_state=state)
        grads = jax.tree.map(lambda g: g / scale, grads)
        updates, state = tx.update(grads, state, params, statistics=seen)
        return optax.apply_updates(params, updates), state

    params, state = step(PARAMS, tx.init(PARAMS), 2.0**10)
    stuck, skipped = step(params, state, jnp.inf)
    jax.tree.map(np.testing.assert_array_equal, stuck, params)
    assert int(diagnostics.metrics(skipped)["dsbp/skipped"]) == 1
    moved, _ = step(stuck, skipped, 2.0**9)
    assert (
        float(jnp.abs(moved["layers_0"]["kernel"] - params["layers_0"]["kernel"]).max())
        > 0
    )


@every_recipe
def test_a_gradient_too_large_to_square_does_no_lasting_harm(name) -> None:
    """One column in two steps: clipped or skipped, and all goes on."""
    tx, params = RECIPES[name](), PARAMS["layers_0"]
    update, state = jax.jit(tx.update), tx.init(params)
    wild = [
        jax.tree.map(lambda x, n=large: x.at[..., 0].set(n), params)
        for large in (1e18, 1e20, 1e30)
    ]
    for grads in (params, *wild, params, params):
        updates, state = update(grads, state, params)
        chex.assert_tree_all_finite((updates, state))
    assert float(jnp.abs(updates["kernel"]).max()) > 0
    skipped = int(diagnostics.metrics(state)["dsbp/skipped"])
    # A bound on the growth of the norm lets them in, shortened.
    assert skipped == (0 if name == "dsbp_sgd" else len(wild))


@every_recipe
def test_frozen_kernels_thaw(name) -> None:
    """Frozen in a partition at first, trained with all the others later."""

    def labels(*frozen: str) -> Any:
        return {k: "frozen" if k in frozen else "trained" for k in PARAMS}

    def optimizer(*frozen: str) -> Any:
        parts = {"trained": RECIPES[name](), "frozen": optax.set_to_zero()}
        return optax.partition(parts, labels(*frozen))

    params, _ = fit(optimizer("layers_0"), 12)
    np.testing.assert_array_equal(
        params["layers_0"]["kernel"], PARAMS["layers_0"]["kernel"]
    )
    thawed, _ = fit(optimizer(), 60, params)
    moved = thawed["layers_0"]["kernel"] - params["layers_0"]["kernel"]
    assert float(jnp.abs(moved).max()) > 1e-3
    assert float(loss_fn(thawed)) < float(loss_fn(params))


@every_recipe
def test_a_layer_without_gradient_wakes_up(name) -> None:
    """A gate keeps one layer's gradient at zero, then opens."""
    tx = RECIPES[name](weight_decay=0.0)
    value_and_grad = dsbp_optax.linen.value_and_grad(loss_fn)

    @jax.jit
    def step(params: Any, state: Any, gate: Any) -> Any:
        _, grads, seen = value_and_grad(params, opt_state=state)
        grads = {
            **grads,
            "layers_0": jax.tree.map(lambda g: gate * g, grads["layers_0"]),
        }
        updates, state = tx.update(grads, state, params, statistics=seen)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(9):
        params, state = step(params, state, 0.0)
    np.testing.assert_array_equal(
        params["layers_0"]["kernel"], PARAMS["layers_0"]["kernel"]
    )
    awake, _ = step(params, state, 1.0)
    moved = jnp.abs(awake["layers_0"]["kernel"] - params["layers_0"]["kernel"])
    assert 0 < float(moved.max()) < 1.0


def test_state_of_the_recommended_recipes_is_what_they_say() -> None:
    """Within 2 % of the formula for kernels of 128 and more; numbers a matrix apart."""
    d, m = 256, 512
    params = {"kernel": jnp.zeros((d, m))}

    def held(tx: Any) -> int:
        state = jax.eval_shape(tx.init, params)
        (spectral,) = find_states(state)
        figures = diagnostics.metrics(_zeros(state))
        large = [x for x in jax.tree.leaves(state) if x.size > 64]
        whole = diagnostics.state_bytes(large)
        # An instrument says the same.
        assert abs(int(figures["dsbp/state_bytes/kernel"]) - whole) <= 0.01 * whole
        layer = dsbp_optax.by_path(state)["kernel"]
        assert layer.basis.dtype in (jnp.bfloat16, jnp.float32)
        assert spectral.basis["kernel"].shape == (1, *layer.basis.shape)
        return whole

    def basis(k: int) -> int:
        return 2 * d * k

    def moment(k: int) -> int:
        return 2 * k * m

    bit, scale = d * m // 8, 2 * (d + m)
    eight = {"rank": 8}
    expected = {
        dsbp_optax.dsbp_sgd(0.1): basis(8) + moment(8) + 5 * bit + scale,
        dsbp_optax.dsbp_sgd(0.1, residual=0.5): basis(8) + moment(8),
        dsbp_optax.dsbp_muon(0.1): basis(32) + 5 * bit + scale,
        dsbp_optax.dsbp_muon(0.1, moment_dtype="int6"): basis(32) + 6 * bit + scale,
        dsbp_optax.dsbp_adamw(0.1): basis(32) + 5 * bit + 3 * scale,
        dsbp_optax.dsbp_adamw(0.1, **eight): basis(8) + 5 * bit + 3 * scale,
        dsbp_optax.subspace_muon(0.1): basis(32) + moment(32),
        dsbp_optax.subspace_adamw(0.1): basis(32) + 2 * moment(32),
        dsbp_optax.subspace_muon(0.1, residual="int6", **eight): (
            basis(8) + moment(8) + 6 * bit + scale
        ),
        dsbp_optax.subspace_adamw(0.1, residual="int5", **eight): (
            basis(8) + 2 * moment(8) + 5 * bit + 3 * scale
        ),
    }
    for tx, size in expected.items():
        assert abs(held(tx) - size) <= 0.02 * size
    whole = {"moment_dtype": None, "basis": Basis(dtype="float32")}
    exact = held(dsbp_optax.dsbp_sgd(0.1, residual=0.5, **whole))
    assert exact == 2 * basis(8) + 2 * moment(8)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@every_recipe
def test_injected_hyperparameters_are_traced_where_they_may_be(name) -> None:
    factory = optax.inject_hyperparams(getattr(dsbp_optax, name), static_args=("rank",))
    tx = factory(learning_rate=0.02, rank=2)
    params, state = fit(tx, 20)
    assert float(loss_fn(params)) < float(loss_fn(PARAMS))
    assert "learning_rate" in state.hyperparams


@pytest.mark.parametrize("stored", ["int1", "int4", "int6", "int8", "float32"])
def test_storage_of_moments_by_name(stored) -> None:
    """Of a residual beside the basis, or of the whole momentum."""
    made = [make(residual=stored) for make in IN_COORDINATES.values()]
    made += [RECIPES[name](moment_dtype=stored) for name in ("dsbp_adamw", "dsbp_muon")]
    for tx in made:
        params, _ = fit(tx, 40)
        assert float(loss_fn(params)) < 0.8 * float(loss_fn(PARAMS))


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("value_and_grad", name) for name in RECIPES),
        *(("subspace_value_and_grad", name) for name in IN_COORDINATES),
    ],
)
def test_parameters_in_float64(way: str, name: str) -> None:
    """Statistics of the adapters are theirs, whatever the bases are kept in."""
    with x64():
        model = nn.Dense(16, param_dtype=jnp.float64)
        x = jax.random.normal(jax.random.key(0), (32, 16), jnp.float64)
        params = model.init(jax.random.key(1), x)["params"]

        def loss_fn(params: Any, x: Any) -> Any:
            return jnp.mean((model.apply({"params": params}, x) - x) ** 2)

        value_and_grad = getattr(dsbp_optax.linen, way)(loss_fn)
        tx = (RECIPES if way == "value_and_grad" else IN_COORDINATES)[name]()
        state, losses = tx.init(params), []

        @jax.jit
        def step(params: Any, state: Any, x: Any) -> Any:
            loss, grads, sketches = value_and_grad(params, x, opt_state=state)
            updates, state = tx.update(grads, state, params, statistics=sketches)
            return optax.apply_updates(params, updates), state, loss

        for _ in range(8):
            params, state, loss = step(params, state, x)
            losses.append(float(loss))
    assert params["kernel"].dtype == jnp.float64
    assert dsbp_optax.by_path(state)["kernel"].basis.dtype == jnp.bfloat16
    assert losses[-1] < losses[0]
