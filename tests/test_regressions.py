"""Faults that were found by reading, each of which its test here showed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dsbp_optax
import dsbp_optax.linen
import dsbp_optax.nnx
from dsbp_optax import Activations, Basis, Sketch

PARAMS = {"kernel": jnp.ones((32, 24))}


def draw(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layer(opt_state: Any) -> Any:
    return dsbp_optax.by_path(opt_state)["kernel"]


def test_a_dtype_of_the_inner_optimizer_is_not_rounded_before_ours() -> None:
    """To nearest, a slow moment in bfloat16 stood still at a quarter of its size."""
    gradient = {"kernel": draw(32, 24)}
    tx = dsbp_optax.scale_by_spectral_projection(
        optax.scale_by_adam(b1=0.999), rank=4, moment_dtype="bfloat16"
    )
    state = tx.init(PARAMS)
    update = jax.jit(lambda s: tx.update(gradient, s, statistics={})[1])
    state = jax.lax.fori_loop(0, 3000, lambda _, s: update(s), state)
    mu = layer(state).inner[0].mu
    inside = layer(state).basis.T.astype(jnp.float32) @ gradient["kernel"]
    share = float(jnp.linalg.norm(mu.astype(jnp.float32)) / jnp.linalg.norm(inside))
    assert abs(share - (1 - 0.999**3000)) < 0.03
    with pytest.raises(ValueError, match="mu_dtype"):
        dsbp_optax.scale_by_spectral_projection(
            optax.scale_by_adam(mu_dtype=jnp.bfloat16), moment_dtype="bfloat16"
        ).init(PARAMS)


def test_refreshes_that_are_refused_leave_moments_alone() -> None:
    """They were multiplied by V^T V of a rounded basis, each time."""
    tx = dsbp_optax.dsbp_sgd(1.0, momentum=0.0, whitening=0.0, rank=4, update_every=1)
    gradient = {"kernel": draw(32, 24)}
    state = tx.init(PARAMS)
    good = {"kernel": Activations(draw(64, 32, seed=1))}
    _, state = tx.update(gradient, state, PARAMS, statistics=good)
    before = layer(state)
    nothing = {"kernel": Activations(jnp.zeros((64, 32)))}
    frozen = jax.tree.map(jnp.zeros_like, gradient)

    @jax.jit
    def refuse(state: Any) -> Any:
        kept = state[0].inner
        _, after = tx.update(frozen, state, PARAMS, statistics=nothing)
        return after, kept

    for _ in range(3):
        state, _ = refuse(state)
    after = layer(state)
    assert int(after.spectrum.failures) == 3
    np.testing.assert_array_equal(after.basis, before.basis)


def test_an_eager_update_does_not_compile_anew_at_each_call() -> None:
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend" in event else None
    )
    tx = optax.inject_hyperparams(dsbp_optax.dsbp_muon)(learning_rate=0.02)
    gradient, state = {"kernel": draw(32, 24)}, None
    state = tx.init(PARAMS)
    for number in range(30):
        if number == 25:  # Refreshes begin again every 20 steps.
            compiled.clear()
        _, state = tx.update(gradient, state, PARAMS, statistics={})
    assert compiled == []


def test_a_place_for_statistics_that_stays_empty_is_filled_by_the_gradient() -> None:
    tx = dsbp_optax.dsbp_adamw(
        1e-3, rank=4, update_every=1, basis=Basis(statistics_in_state=True)
    )
    state = tx.init(PARAMS)
    before = layer(state).basis
    _, state = tx.update({"kernel": draw(32, 24)}, state, PARAMS)
    after = layer(state)
    assert int(after.spectrum.iterations) == 1 and not int(after.spectrum.activations)
    assert float(jnp.max(jnp.abs(after.basis - before))) > 1e-2


def test_decay_is_that_of_a_window_in_every_form() -> None:
    """Sketches of a window of q steps forgot q times what a whole matrix forgets."""
    windows = [draw(256, 32, seed=s) * scale for s, scale in ((1, 1.0), (2, 3.0))]
    traces = {}
    for form in (Activations, Sketch):
        tx = dsbp_optax.scale_by_spectral_projection(
            rank=4, update_every=4, basis=Basis(power_iterations=3, decay=0.8)
        )
        state = tx.init(PARAMS)
        for number in range(8):
            a = windows[number // 4]
            given = Activations(a)
            if form is Sketch:
                v = layer(state).basis
                total = jnp.sum(a * a).reshape(1, 1)
                given = Sketch(
                    (a.T @ (a @ v))[:, None], jnp.full((1, 1, 1), 256.0), total[None]
                )
            _, state = tx.update(
                {"kernel": draw(32, 24)}, state, statistics={"kernel": given}
            )
        traces[form] = float(layer(state).spectrum.trace)
    np.testing.assert_allclose(traces[Sketch], traces[Activations], rtol=1e-5)


def test_a_key_with_a_slash_and_a_nest_are_two_parameters_or_an_error() -> None:
    params = {"a/b": jnp.ones((8, 8)), "a": {"b": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="a/b"):
        dsbp_optax.dsbp_muon(0.02).init(params)


def test_a_skipped_step_decays_nothing_whatever_the_fallback_is() -> None:
    tx = dsbp_optax.dsbp_muon(
        0.1, weight_decay=0.1, fallback=dsbp_optax.scale_by_quantized_adam()
    )
    params = {"a": PARAMS, "embed": jnp.ones((32, 16))}
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, _ = tx.update(broken, tx.init(params), params, statistics={})
    assert not any(u.any() for u in jax.tree.leaves(updates))


def test_layers_that_were_carried_over_are_refreshed_again() -> None:
    tx = dsbp_optax.dsbp_muon(0.1, rank=4, update_every=2)
    gradient, old = {"kernel": draw(32, 24)}, tx.init(PARAMS)
    seen = {"kernel": Activations(draw(64, 32, seed=1))}
    for _ in range(9):
        _, old = tx.update(gradient, old, PARAMS, statistics=seen)
    new = dsbp_optax.with_layers(tx.init(PARAMS), dsbp_optax.by_path(old))
    np.testing.assert_array_equal(layer(new).basis, layer(old).basis)
    for _ in range(3):
        _, new = tx.update(gradient, new, PARAMS, statistics={})
    assert int(layer(new).spectrum.refreshed) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: dsbp_optax.dsbp_muon(0.1, rank=4, basis=Basis(side="output")),
        lambda: dsbp_optax.dsbp_muon(0.1, rank=3),
        lambda: dsbp_optax.dsbp_muon(0.1, rank=4, moment_dtype="float32"),
    ],
)
def test_layers_of_another_optimizer_are_refused(make: Any) -> None:
    params = {"kernel": jnp.ones((32, 32))}
    layers = dsbp_optax.by_path(dsbp_optax.dsbp_muon(0.1, rank=4).init(params))
    with pytest.raises(ValueError, match=r"with_layers: 'kernel': got .*Remedy"):
        dsbp_optax.with_layers(make().init(params), layers)


def test_a_metric_refuses_an_inner_optimizer_that_descends() -> None:
    with pytest.raises(ValueError, match="inner: its update points downhill"):
        dsbp_optax.scale_by_activation_metric(inner=optax.sgd(0.1))


def test_a_state_of_numpy_arrays_is_one() -> None:
    params = {"a": draw(64, 32), "b": draw(64, 64)}
    tx = dsbp_optax.dsbp_muon(0.1, rank=4)
    state = tx.init(params)
    (one, _), (two, _) = (
        tx.update(params, s, params, statistics={})
        for s in (state, jax.device_get(state))
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_spectral_fallback_sees_its_statistics() -> None:
    params = {"a": jnp.ones((32, 32)), "b": jnp.ones((32, 32))}
    tx = dsbp_optax.dsbp_adamw(
        1e-3, rank={"a": 4}, fallback=dsbp_optax.scale_by_activation_metric(rank=4)
    )
    state, seen = tx.init(params), dict.fromkeys(params, Activations(draw(128, 32)))
    for count in range(2):
        grads = {path: draw(32, 32, seed=count) for path in params}
        _, state = tx.update(grads, state, params, statistics=seen)
    layers = dsbp_optax.by_path(state)
    assert {path: int(x.spectrum.activations) for path, x in layers.items()} == {
        "a": 1,
        "b": 1,
    }


@dataclasses.dataclass
class Attention:
    query: Any
    value: Any


jax.tree_util.register_dataclass(Attention)


def test_an_attribute_called_value_keeps_its_name() -> None:
    params = {"attn": Attention(jnp.ones((32, 24)), jnp.ones((32, 24)))}
    tx = dsbp_optax.dsbp_muon(0.02, rank={"attn/value": 4, "*": None})
    assert list(dsbp_optax.by_path(tx.init(params))) == ["attn/value"]
    seen = {"attn/value": Activations(draw(64, 32))}
    _, state = tx.update(params, tx.init(params), params, statistics=seen)
    assert int(dsbp_optax.by_path(state)["attn/value"].spectrum.activations) == 1


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("dsbp_muon", "momentum"),
        *(
            (x, y)
            for x in ("dsbp_adamw", "subspace_adamw")
            for y in ("b1", "b2", "eps")
        ),
    ],
)
def test_a_schedule_for_a_number_is_refused_by_name(recipe: str, name: str) -> None:
    make = getattr(dsbp_optax, recipe)
    with pytest.raises(TypeError, match=f"{name}: got .*expected a number"):
        make(1e-3, **{name: optax.linear_schedule(0.9, 0.95, 10)})
    with pytest.raises(ValueError, match=f"{name}: got -2"):
        make(1e-3, **{name: -2.0})


def test_a_skipped_step_is_not_remembered_by_the_clip() -> None:
    tx = dsbp_optax.dsbp_sgd(0.1)
    state = tx.init(PARAMS)
    huge = {"kernel": 1e18 * draw(32, 24)}
    _, after = tx.update(huge, state, PARAMS, statistics={})
    assert int(after[0].skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, after[-1], state[-1])


def test_the_clip_can_be_differentiated() -> None:
    clip = dsbp_optax.clip_by_norm_growth()

    def total(scale: Any) -> Any:
        updates, _ = clip.update({"w": scale * jnp.ones(3)}, clip.init(None))
        return jnp.sum(updates["w"])

    np.testing.assert_allclose(jax.grad(total)(2.0), 3.0, rtol=1e-6)


def test_a_solver_of_whole_matrices_says_who_gives_none() -> None:
    basis = Basis(solver=dsbp_optax.eigh)
    tx = dsbp_optax.dsbp_adamw(1e-3, rank=4, basis=basis)
    params = {"a": draw(32, 24), "b": draw(32, 24)}
    with pytest.raises(TypeError, match="kernel without a statistic"):
        seen = {"a": Activations(draw(64, 32))}
        tx.update(params, tx.init(params), params, statistics=seen)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(x, True) for x in ("posterior", "upscale", "cls_head", "normal_proj")],
        *[(x, False) for x in ("pos_table", "cls", "ln_scale", "layernorm", "biases")],
    ],
)
def test_words_of_a_name_tell_tables_from_kernels(name: str, expected: bool) -> None:
    state = dsbp_optax.dsbp_adamw(1e-3).init({name: jnp.ones((64, 32))})
    assert bool(dsbp_optax.by_path(state)) == expected


def test_ranks_are_promoted_by_nobody() -> None:
    tx = dsbp_optax.dsbp_adamw(1e-3)
    with jax.numpy_rank_promotion("raise"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, statistics={})


def test_a_state_of_another_kind_is_refused() -> None:
    given = {"kernel": Activations(draw(64, 32))}
    one = dsbp_optax.scale_by_spectral_projection(rank=4, project="always")
    two = dsbp_optax.scale_by_activation_metric(rank=4)
    with pytest.raises(ValueError, match=r"that of a projection, .* a metric.*Remedy"):
        two.update(PARAMS, one.init(PARAMS), PARAMS, statistics=given)


def test_the_papers_side_is_kept_for_what_no_pattern_names() -> None:
    params = {"first": PARAMS, "second": PARAMS, "third": PARAMS}
    for side, expected in (
        ({"first/*": "input"}, ["input", "output", "output"]),
        ({"*d/*": "output", "*": "input"}, ["input", "output", "output"]),
    ):
        tx = dsbp_optax.dsbp(0.1, rank=4, basis=Basis(side=side))
        found = dsbp_optax.diagnostics.explain(tx, params)
        assert [one.kernel.side for (one,) in found.values()] == expected


WALKED = "whole tree of the model's variables"
X = draw(32, 32, seed=5)


class Two(nnx.Module):
    """Two layers, in a dict whose keys are also a number and a method of dicts."""

    def __init__(self, tied: bool = False) -> None:
        rngs = nnx.Rngs(0)
        layers = [nnx.Linear(32, 32, rngs=rngs) for _ in range(2)]
        if tied:
            layers[1].kernel = layers[0].kernel
        held = nnx.data if hasattr(nnx, "data") else nnx.Dict
        self.layers = held({"0": layers[0], "values": layers[1]})

    def __call__(self, x: Any) -> Any:
        first, second = self.layers["0"], self.layers["values"]
        return second(10 * jnp.sin(first(x)))


def assert_alike(one: Any, other: Any) -> None:
    leaves = map(jax.tree.leaves, (one, other))
    chex.assert_trees_all_close(*leaves, rtol=1e-5, atol=1e-7)


def squares(some: Any) -> Any:
    leaves = (x[...] if isinstance(x, nnx.Variable) else x for x in some)
    return sum(jnp.sum(x**2) for x in leaves)


def parameters(model: Any) -> Any:
    leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return [x for x in leaves if isinstance(x, nnx.Param)]


PENALTIES: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "parameters": (lambda m: squares(jax.tree.leaves(nnx.state(m, nnx.Param))), None),
    "all state": (lambda m: squares(jax.tree.leaves(nnx.state(m))), WALKED),
}
if isinstance(jax.tree.leaves(Two())[0], jax.Array):  # Modules are trees since 0.12.
    PENALTIES |= {
        "tree": (lambda m: squares(jax.tree.leaves(m)), WALKED),
        "variables of a tree": (lambda m: squares(parameters(m)), None),
        "cast": (lambda m: m(X.astype(jnp.bfloat16)).sum(), None),
        "cast tree": (
            lambda m: jax.tree.map(lambda w: w.astype("bfloat16"), m)(X).sum(),
            WALKED,
        ),
    }


@pytest.mark.parametrize("name", PENALTIES)
def test_nnx_losses_of_the_whole_model_see_no_probes(name: str) -> None:
    """They added the bases and a second copy of each kernel, in silence."""
    penalty, reason = PENALTIES[name]

    def loss_fn(model: Any) -> Any:
        return jnp.mean(model(X) ** 2) + 0.01 * penalty(model)

    model = Two()
    tx = nnx.Optimizer(model, dsbp_optax.dsbp_adamw(1e-3, rank=4), wrt=nnx.Param)
    step = dsbp_optax.nnx.value_and_grad(loss_fn)
    if reason is None:
        value, grads, seen = step(model, opt_state=tx)
        assert len(seen) == 2
    else:
        with pytest.warns(UserWarning, match=reason):
            value, grads, seen = step(model, opt_state=tx)
        assert seen == {}
    plain = nnx.value_and_grad(loss_fn)(Two())
    np.testing.assert_allclose(value, plain[0], rtol=1e-6)
    assert_alike(grads, plain[1])


def test_layers_that_share_a_kernel_are_both_observed() -> None:
    model = Two(tied=True)
    tx = nnx.Optimizer(model, dsbp_optax.dsbp_adamw(1e-3, rank=4), wrt=nnx.Param)
    step = dsbp_optax.nnx.value_and_grad(lambda m: jnp.mean(m(X) ** 2))
    (sketch,) = step(model, opt_state=tx)[-1].values()
    inputs = [X, 10 * jnp.sin(model.layers["0"](X))]
    assert sketch.count == 64
    np.testing.assert_allclose(sketch.trace, squares(inputs), rtol=1e-4)


def test_arguments_that_an_nnx_loss_changes_cost_no_statistics() -> None:
    model = Two()
    tx = nnx.Optimizer(model, dsbp_optax.dsbp_adamw(1e-3, rank=4), wrt=nnx.Param)
    metric, rngs = nnx.metrics.Average(), nnx.Rngs(dropout=1)

    def loss_fn(model: Any, rngs: Any, metric: Any) -> Any:
        loss = jnp.mean(nnx.Dropout(0.5)(model(X), rngs=rngs) ** 2)
        metric.update(values=loss)
        return loss

    step = dsbp_optax.nnx.value_and_grad(loss_fn)
    loss, _, seen = step(model, rngs, metric, opt_state=tx)
    assert len(seen) == 2
    assert rngs.dropout.count[...] == 1
    np.testing.assert_allclose(metric.compute(), loss)


class Penalized(nn.Module):
    """Its output, and the norm of its own parameters."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.Dense(32)(jnp.tanh(nn.Dense(32)(x)))
        return y, squares(jax.tree.leaves(self.variables["params"]))


class Mapped(nn.Module):
    """One layer whose parameters are rewritten, one that has its own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        squash = nn.map_variables(
            nn.Dense, "params", lambda p: jax.tree.map(jnp.tanh, p), init=True
        )
        return nn.Dense(32)(squash(32)(x)), 0.0


@pytest.mark.parametrize(
    ("model", "mutable", "reason", "seen"),
    [
        (Penalized(), False, WALKED, set()),
        (Mapped(), False, WALKED, {"Dense_0/kernel"}),
        (Mapped(), True, "mutable=", set()),
    ],
)
def test_linen_modules_that_read_their_tree_see_no_riders(
    model: Any, mutable: bool, reason: str, seen: set[str]
) -> None:
    params = model.init(jax.random.key(0), X)["params"]
    state = dsbp_optax.dsbp_adamw(1e-3, rank=4).init(params)

    def loss_fn(params: Any) -> Any:
        found = model.apply({"params": params}, X, mutable=mutable)
        (y, penalty), changed = found if mutable else (found, {})
        return jnp.mean(y**2) + penalty, changed

    step = dsbp_optax.linen.value_and_grad(loss_fn, has_aux=True)
    with pytest.warns(UserWarning, match=reason):
        (value, aux), grads, found = step(params, opt_state=state)
    assert found.keys() == seen
    (loss, expected), plain = jax.value_and_grad(loss_fn, has_aux=True)(params)
    assert jax.tree.structure(aux) == jax.tree.structure(expected)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert_alike(grads, plain)


def test_scales_of_small_floats_are_replaced_as_in_flax() -> None:
    scales = "_overwrite_with_gradient"
    variables = {"params": PARAMS, scales: {"scale": jnp.ones(1)}}
    state = dsbp_optax.linen.TrainState.create(
        apply_fn=None, params=variables, tx=dsbp_optax.dsbp_sgd(0.1, rank=4)
    )
    grads = {"params": {"kernel": draw(32, 24)}, scales: {"scale": jnp.full(1, 3.0)}}
    after = state.apply_gradients(grads=grads, statistics={}).params
    assert after[scales]["scale"] == 3.0
    assert after.keys() == variables.keys()
    assert bool(jnp.any(after["params"]["kernel"] != PARAMS["kernel"]))
