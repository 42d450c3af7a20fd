"""Sharpness-aware wrappers: laws, their controls, and what must not break."""

from typing import Any

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from states import layer
from versions import x64

import dsbp_optax
from dsbp_optax import Activations

D, M, RHO = 12, 16, 0.1
PATH = "layer/kernel"


def make_params(seed: int = 0) -> Any:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "layer": {
            "kernel": jax.random.normal(keys[0], (D, M)),
            "bias": jax.random.normal(keys[1], (M,)),
        }
    }


def inputs(seed: int) -> Any:
    scales = 2.0 ** -jnp.arange(D)
    return jax.random.normal(jax.random.key(seed), (32, D)) * scales


def loss_fn(params: Any, x: Any) -> Any:
    y = x @ params["layer"]["kernel"] + params["layer"]["bias"]
    return jnp.mean(jnp.sum(jnp.tanh(y) ** 2 + 0.1 * y**4, -1))


def projection(inner: Any = None, rank: int = 4, **more: Any) -> Any:
    return optax.chain(
        dsbp_optax.scale_by_spectral_projection(
            inner,
            rank=rank,
            update_every=4,
            basis=dsbp_optax.Basis(power_iterations=2),
            project="always",
            **more,
        ),
        optax.scale_by_learning_rate(0.05),
    )


def run(tx: Any, steps: int = 9, params: Any = None) -> tuple[Any, Any, list[Any]]:
    """Parameters, state, and the points at which second gradients were taken."""
    params, points = make_params() if params is None else params, []
    state = tx.init(params)
    for step in range(steps):
        x = inputs(step)

        def grad_fn(there: Any, number: int, x: Any = x) -> Any:
            assert number == 0
            points.append(there)
            return jax.grad(loss_fn)(there, x)

        grads = jax.grad(loss_fn)(params, x)
        updates, state = tx.update(
            grads, state, params, grad_fn=grad_fn, statistics={PATH: Activations(x)}
        )
        params = optax.apply_updates(params, updates)
    return params, state, points


def distance(left: Any, right: Any) -> float:
    return float(optax.tree.norm(optax.tree.sub(left, right)))


def plain_sam(rho: float) -> Any:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    tx = optax.contrib.sam(optax.sgd(0.05), ascent, opaque_mode=True)

    def update(
        grads: Any, state: Any, params: Any, *, grad_fn: Any, statistics: Any
    ) -> Any:
        del statistics
        return tx.update(grads, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def test_with_a_whole_basis_it_is_sam() -> None:
    whole = projection(rank=D, project_cold=True)
    expected, _, _ = run(plain_sam(RHO))
    got, _, _ = run(dsbp_optax.subspace_sam(whole, RHO))
    assert distance(got, expected) < 1e-4
    for wrong in (
        dsbp_optax.subspace_sam(whole, 2 * RHO),
        dsbp_optax.subspace_sam(whole, RHO, unprojected=False),
        dsbp_optax.subspace_sam(projection(rank=3, project_cold=True), RHO),
    ):
        assert distance(run(wrong)[0], expected) > 1e-3


@pytest.mark.parametrize("unprojected", [True, False])
def test_the_ascent_has_its_length_and_lies_in_the_basis(unprojected: bool) -> None:
    tx = dsbp_optax.subspace_sam(projection(), RHO, unprojected=unprojected)
    params, state, _ = run(tx, 5)
    seen = []
    tx.update(
        jax.grad(loss_fn)(params, inputs(7)),
        state,
        params,
        grad_fn=lambda there, i: (
            seen.append(there) or jax.grad(loss_fn)(there, inputs(7))
        ),
    )
    ascent = optax.tree.sub(seen[0], params)
    np.testing.assert_allclose(optax.tree.norm(ascent), RHO, rtol=1e-4)
    assert (float(jnp.abs(ascent["layer"]["bias"]).max()) > 1e-3) == unprojected
    basis = layer(state, PATH).basis
    kernel = ascent["layer"]["kernel"]
    outside = kernel - basis @ (basis.T @ kernel)
    assert float(jnp.linalg.norm(outside)) < 1e-5
    assert (
        float(jnp.sum(kernel * jax.grad(loss_fn)(params, inputs(7))["layer"]["kernel"]))
        > 0
    )


def test_asam_scales_by_the_parameters() -> None:
    """In the coordinates of the basis: ``rho T^2 g / |T g|``."""
    tx = dsbp_optax.subspace_sam(projection(), RHO, adaptive=True, unprojected=False)
    params, state, _ = run(tx, 3)
    seen = []
    grads = jax.grad(loss_fn)(params, inputs(5))
    tx.update(grads, state, params, grad_fn=lambda p, i: seen.append(p) or grads)
    basis = np.asarray(layer(state, PATH).basis, np.float64)
    w, g = (
        basis.T @ np.asarray(t["layer"]["kernel"], np.float64) for t in (params, grads)
    )
    expected = basis @ (RHO * w**2 * g / np.linalg.norm(np.abs(w) * g))
    got = seen[0]["layer"]["kernel"] - params["layer"]["kernel"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_lost_second_gradient_costs_one_step() -> None:
    params, x = make_params(), inputs(0)
    tx = dsbp_optax.subspace_sam(dsbp_optax.dsbp_sgd(0.05, rank=3), RHO)
    state = tx.init(params)
    for step in range(8):
        lost = jnp.nan if step == 3 else 1.0
        grads = jax.grad(loss_fn)(params, x)

        def away(params: Any, _: Any, lost: float = lost) -> Any:
            return jax.tree.map(lambda g: lost * g, jax.grad(loss_fn)(params, x))

        updates, state = tx.update(grads, state, params, grad_fn=away)
        params = optax.apply_updates(params, updates)
    assert state.optimizer[0].skipped == 1
    chex.assert_tree_all_finite((params, state))


@pytest.mark.parametrize("adaptive", [True, False])
def test_zero_gradients_stay_finite(adaptive: bool) -> None:
    tx = dsbp_optax.subspace_sam(
        dsbp_optax.dsbp_sgd(0.1, rank=2), RHO, adaptive=adaptive
    )
    params = make_params()
    nothing, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    for _ in range(3):
        updates, state = tx.update(nothing, state, params, grad_fn=lambda p, i: nothing)
        chex.assert_trees_all_equal(updates, nothing)
        chex.assert_tree_all_finite(state)


# --- along the momentum

RECIPES = {
    "dsbp_sgd": dsbp_optax.dsbp_sgd,
    "subspace_adamw": dsbp_optax.subspace_adamw,
    "subspace_muon": dsbp_optax.subspace_muon,
}


def schedule(step: Any) -> Any:
    return RHO * (1 + step % 3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_along_the_momentum_is_taken_and_taken_back(name: str) -> None:
    """Against a loop that keeps the parameters and steps away for each gradient."""
    with x64():  # Adam magnifies what rounding leaves of small gradients.
        follow_the_momentum(name)


def follow_the_momentum(name: str) -> None:
    base = RECIPES[name](
        0.05,
        rank=3,
        update_every=3,
        weight_decay=0.1,
        moment_dtype=None,
        basis=dsbp_optax.Basis(power_iterations=2, dtype=jnp.float64),
    )
    wrapped = dsbp_optax.subspace_msam(base, schedule)
    params = here = make_params()
    state, held = wrapped.init(params), base.init(params)
    away = jax.tree.map(jnp.zeros_like, params)
    for step in range(8):
        x = inputs(step)
        statistics = {PATH: Activations(x)}
        grads = jax.grad(loss_fn)(params, x)
        updates, state = jax.jit(wrapped.update)(
            grads, state, params, statistics=statistics
        )
        params = optax.apply_updates(params, updates)
        grads = jax.grad(loss_fn)(optax.tree.add(here, away), x)
        updates, held = jax.jit(base.update)(grads, held, here, statistics=statistics)
        here = optax.apply_updates(here, updates)
        field = "mu" if name == "subspace_adamw" else "trace"
        u = optax.tree.get(layer(held, PATH).inner[0], field)
        lifted = layer(held, PATH).basis @ u
        lifted = schedule(step) * lifted / jnp.linalg.norm(lifted)
        away = jax.tree.map(jnp.zeros_like, params)
        away["layer"]["kernel"] = lifted
        evaluated = dsbp_optax.evaluation_params(state, params)
        assert distance(evaluated, here) < 1e-6
        np.testing.assert_allclose(
            distance(params, evaluated), schedule(step), rtol=1e-3
        )


def test_evaluation_needs_nothing_but_state_and_parameters() -> None:
    tx = dsbp_optax.subspace_msam(
        dsbp_optax.dsbp_sgd(0.05, rank=3, update_every=3), RHO
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    params = make_params()
    state = tx.init(params)
    for step in range(5):
        grads = jax.grad(loss_fn)(params, inputs(step))
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = dsbp_optax.evaluation_params(state, params)
    assert distance(expected, params) > 0.9 * RHO
    blank = tx.init(make_params(1))
    restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state))
    got = dsbp_optax.evaluation_params(restored, params)
    chex.assert_trees_all_equal(got, expected)
    same = dsbp_optax.evaluation_params(optax.sgd(0.1).init(params), params)
    chex.assert_trees_all_equal(same, params)


def test_a_step_that_is_skipped_moves_nothing() -> None:
    tx = dsbp_optax.subspace_msam(dsbp_optax.dsbp_sgd(0.05, rank=3), RHO)
    params = make_params()
    _, state = jax.jit(tx.update)(
        jax.grad(loss_fn)(params, inputs(0)), tx.init(params), params
    )
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, after = jax.jit(tx.update)(broken, state, params)
    assert float(optax.tree.norm(updates)) < 1e-6
    chex.assert_trees_all_equal(after.optimizer[0].inner, state.optimizer[0].inner)


@pytest.mark.filterwarnings("ignore:the axes of kernels were guessed")
def test_convolutions_and_stacks_are_read_as_by_the_optimizer() -> None:
    """The lift of the wrapper is that of the projection, whatever the kernel."""
    shapes = {"conv": (1, 1, 16, 24), "wide": (3, 3, 8, 16), "scan": (2, 16, 24)}
    params = {
        name: {"kernel": jax.random.normal(jax.random.key(n), shape)}
        for n, (name, shape) in enumerate(shapes.items())
    }
    for side in ("input", "output"):
        tx = dsbp_optax.scale_by_spectral_projection(
            optax.trace(0.9),
            rank=2,
            basis=dsbp_optax.Basis(
                side=side,
                axes={"scan*": dsbp_optax.Axes(batch=(0,), inputs=(1,), outputs=(2,))},
            ),
            project="always",
            project_cold=True,
        )
        wrapped = dsbp_optax.subspace_msam(tx, RHO)
        updates, state = wrapped.update(params, wrapped.init(params))
        plain, _ = tx.update(params, tx.init(params))
        norm = optax.tree.norm(plain)
        # The first momentum is the projected gradient itself.
        expected = jax.tree.map(lambda u, norm=norm: u * (1 + RHO / norm), plain)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)
        assert float(state.radius) == pytest.approx(RHO)


# --- batch statistics are those of the first gradient alone


class Linen(nn.Module):
    """One normalised layer."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(M, name="layer")(x)
        return nn.BatchNorm(use_running_average=False, name="norm")(x)


def test_linen_batch_statistics_move_once_a_step() -> None:
    model, x = Linen(), inputs(0)
    variables = model.init(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]
    tx = dsbp_optax.subspace_sam(dsbp_optax.dsbp_sgd(0.1, rank=2), RHO)

    def loss(params: Any, x: Any) -> Any:
        y, changed = model.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean(y**4), changed["batch_stats"]

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value_and_grad = dsbp_optax.linen.value_and_grad(loss, has_aux=True)
        (_, new), grads, statistics = value_and_grad(params, x, opt_state=state)
        updates, state = tx.update(
            grads,
            state,
            params,
            grad_fn=lambda p, i: jax.grad(loss, has_aux=True)(p, x)[0],
            statistics=statistics,
        )
        return updates, new, state

    updates, new, _ = step(params, tx.init(params))
    mean = jnp.mean(x @ params["layer"]["kernel"], axis=0)
    np.testing.assert_allclose(new["norm"]["mean"], 0.01 * mean, atol=1e-6)
    chex.assert_tree_all_finite(updates)


class Nnx(nnx.Module):
    """The same."""

    def __init__(self) -> None:
        self.layer = nnx.Linear(D, M, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(M, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.norm(self.layer(x))


def test_nnx_batch_statistics_move_once_a_step() -> None:
    x = inputs(0)

    def loss(model: Any, x: Any) -> Any:
        return jnp.mean(model(x) ** 4)

    def train(rho: float | None) -> Any:
        model, tx = Nnx(), dsbp_optax.dsbp_sgd(0.1, rank=2)
        wrapped = tx if rho is None else dsbp_optax.subspace_sam(tx, rho)
        optimizer = nnx.Optimizer(model, wrapped, wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, optimizer: Any) -> None:
            value_and_grad = dsbp_optax.nnx.value_and_grad(loss)
            _, grads, found = value_and_grad(model, x, opt_state=optimizer)
            more = {}
            if rho is not None:
                more["grad_fn"] = dsbp_optax.nnx.make_grad_fn(loss, model, x)
            optimizer.update(model, grads, statistics=found, **more)

        step(model, optimizer)
        return model

    plain, sam, none = train(None), train(RHO), train(0.0)
    np.testing.assert_array_equal(sam.norm.mean[...], plain.norm.mean[...])
    np.testing.assert_array_equal(sam.norm.var[...], plain.norm.var[...])
    kernels = [m.layer.kernel[...] for m in (plain, none, sam)]
    np.testing.assert_allclose(kernels[0], kernels[1], atol=1e-6)
    assert float(jnp.abs(kernels[0] - kernels[2]).max()) > 1e-5


def test_without_projected_kernels_the_wrappers_change_nothing() -> None:
    params = {"bias": jnp.ones(3)}
    base = dsbp_optax.dsbp_sgd(0.1)
    expected, _ = jax.jit(base.update)(params, base.init(params), params)
    tx = dsbp_optax.subspace_msam(base, RHO)
    got, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal(got, expected)


# --- what cannot work is said at once


@pytest.mark.parametrize("name", ["dsbp_muon", "dsbp_adamw"])
def test_the_ascent_lies_in_the_basis_of_a_metric(name: str) -> None:
    base = getattr(dsbp_optax, name)(
        0.01, rank=3, update_every=4, basis=dsbp_optax.Basis(dtype=jnp.float32)
    )
    tx = dsbp_optax.subspace_sam(base, RHO, unprojected=False)
    params, state, _ = run(tx, 3)
    grads, points = jax.grad(loss_fn)(params, inputs(9)), []

    def grad_fn(there: Any, _: int) -> Any:
        points.append(there)
        return grads

    tx.update(grads, state, params, grad_fn=grad_fn, statistics={})
    v = np.asarray(layer(state, PATH).basis, np.float64)
    inside = v.T @ np.asarray(grads["layer"]["kernel"], np.float64)
    expected = RHO * v @ inside / np.linalg.norm(inside)
    got = points[0]["layer"]["kernel"] - params["layer"]["kernel"]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(v @ v.T - np.eye(D)).max() > 0.1, "a part of the space"
    assert distance(points[0]["layer"]["bias"], params["layer"]["bias"]) == 0


def test_refusals() -> None:
    params = make_params()
    wrappers = {
        dsbp_optax.subspace_sam: "without an eigenbasis",
        dsbp_optax.subspace_msam: "without scale_by_spectral_projection",
    }
    for wrap, said in wrappers.items():
        with pytest.raises(ValueError, match=said):
            wrap(optax.adam(1e-3)).init(params)
        with pytest.raises(ValueError, match="radius"):
            wrap(dsbp_optax.dsbp_sgd(0.1), -1.0)
    with pytest.raises(ValueError, match=r"in coordinates.*Remedy.*subspace_muon"):
        dsbp_optax.subspace_msam(dsbp_optax.dsbp_muon(0.1)).init(params)
    with pytest.raises(ValueError, match="keeps no momentum"):
        dsbp_optax.subspace_msam(dsbp_optax.dsbp(0.1)).init(params)
    tx = dsbp_optax.subspace_sam(dsbp_optax.dsbp_sgd(0.1, rank=2))
    with pytest.raises(ValueError, match="got no grad_fn"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="got no parameters"):
        tx.update(params, tx.init(params), grad_fn=lambda p, i: p)
    base = dsbp_optax.dsbp_sgd(0.1, rank=2, residual=None)
    small = dsbp_optax.project_gradients(params, base.init(params))
    tx = dsbp_optax.subspace_msam(base)
    with pytest.raises(ValueError, match="got Coordinates"):
        tx.update(small, tx.init(params))
    updates, _ = jax.jit(tx.update)(small, tx.init(params), params)
    chex.assert_tree_all_finite(updates)


def test_memory_and_work_of_a_second_gradient() -> None:
    """By the compiler: a set of kernels and one gradient; no more FLOPs than SAM."""
    model = nn.Sequential([f for _ in range(6) for f in (nn.Dense(256), nn.relu)])
    x = jnp.ones((128, 256))
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    def figures(tx: Any) -> tuple[int, float]:
        def step(params: Any, state: Any, x: Any) -> Any:
            collect = dsbp_optax.linen.value_and_grad(loss)
            _, grads, statistics = collect(params, x, opt_state=state)
            updates, state = optax.with_extra_args_support(tx).update(
                grads,
                state,
                params,
                grad_fn=lambda there, _: jax.grad(loss)(there, x),
                statistics=statistics,
            )
            return optax.apply_updates(params, updates), state

        held = jax.eval_shape(tx.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, held, x).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return memory, compiled.cost_analysis()["flops"]

    base = dsbp_optax.dsbp_sgd(0.1, rank=4)
    plain, ours = figures(base), figures(dsbp_optax.subspace_sam(base, RHO))
    peer = figures(plain_sam(RHO))
    kernels = 6 * 4 * 256 * 256
    assert ours[0] - plain[0] < 2.1 * kernels
    assert 1.2 * plain[1] < ours[1] < 1.1 * peer[1]
