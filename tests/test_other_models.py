"""Models that a loss captures (a teacher, a target network) are none of ours."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from networks import NETWORKS, batch, init
from test_adapters import assert_same, optimizer, statistics_of

import dsbp_optax
from dsbp_optax import project_gradients

NETWORK = NETWORKS["dense"]


def in_a_loop(step: Any) -> Any:
    """One step of a compiled loop around which the teacher lies."""

    def run(teacher: Any) -> Any:
        return jax.lax.scan(lambda c, _: (c, step(teacher)), 0, None, length=1)[1]

    return lambda teacher: jax.tree.map(lambda x: x[0], jax.jit(run)(teacher))


def half(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)


def distill(params: Any, x: Any, teacher: Any, cast: bool = False) -> Any:
    """The student learns what the teacher says; the loss may cast both."""
    one, two = (half(params), half(teacher)) if cast else (params, teacher)
    target = NETWORK.linen.apply({"params": two}, 2 * x)
    gap = jax.checkpoint(NETWORK.linen.apply)({"params": one}, x) - target
    return jnp.mean(gap.astype(jnp.float32) ** 2)


@pytest.mark.parametrize(("around", "cast"), [(jax.jit, False), (in_a_loop, True)])
def test_a_captured_teacher_is_not_observed(around: Any, cast: bool) -> None:
    params, x = init(NETWORK), batch(NETWORK, 2)
    teacher = jax.tree.map(lambda p: p * 2, params)
    state = optimizer().init(params)

    def step(teacher: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            return distill(params, x, teacher, cast)

        whole = dsbp_optax.linen.value_and_grad(loss_fn)
        short = dsbp_optax.linen.subspace_value_and_grad(loss_fn)
        expected = project_gradients(jax.grad(loss_fn)(params), state)
        _, _, seen = whole(params, opt_state=state)
        _, grads, also = short(params, opt_state=state)
        return grads, expected, seen, also

    grads, expected, seen, also = around(step)(teacher)
    assert_same(grads, expected, rtol=2e-2 if cast else 2e-4)
    alone = statistics_of(NETWORK.linen, half(params) if cast else params, x)
    for path in alone:
        for got in (seen[path], also[path]):
            assert float(got.count.max()) == float(alone[path].count.max())
            assert_same(got.trace, alone[path].trace, rtol=2e-2 if cast else 2e-4)


def test_an_eager_teacher_is_not_observed() -> None:
    params, x = init(NETWORK), batch(NETWORK, 2)
    state = optimizer().init(params)
    step = dsbp_optax.linen.value_and_grad(lambda p: distill(p, x, params, True))
    seen = step(params, opt_state=state)[2]
    assert {float(s.count.max()) for s in seen.values()} == {float(len(x))}


class Stack(nn.Module):
    """Layers of the same names in both players, of other widths."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in self.widths:
            x = nn.Dense(width)(jnp.tanh(x))
        return x


@pytest.mark.parametrize("make", ["value_and_grad", "subspace_value_and_grad"])
def test_players_of_other_shapes_do_not_meet(make: str) -> None:
    judge, player = Stack((16, 1)), Stack((16, 12))
    z, real = jnp.ones((10, 6)), jax.random.normal(jax.random.key(0), (10, 12))
    forge = jax.jit(player.init)(jax.random.key(1), z)["params"]
    params = jax.jit(judge.init)(jax.random.key(2), real)["params"]
    state = optimizer().init(params)

    @jax.jit
    def step(params: Any, forge: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            fake = player.apply({"params": half(forge)}, z)
            said = judge.apply({"params": params}, jnp.concatenate([real, fake]))
            return jnp.mean(nn.softplus(said))

        way = getattr(dsbp_optax.linen, make)
        return way(loss_fn)(params, opt_state=state)[2]

    seen = step(params, forge)
    assert {float(s.count.max()) for s in seen.values()} == {20.0}


def test_a_captured_nnx_teacher_is_not_observed() -> None:
    student, teacher = (NETWORK.nnx(nnx.Rngs(seed)) for seed in (0, 1))
    x = batch(NETWORK, 2)
    state = optimizer().init(nnx.state(student, nnx.Param))

    @nnx.jit
    def step(student: Any, teacher: Any) -> Any:
        def loss_fn(model: Any) -> Any:
            return jnp.mean((model(x) - teacher(2 * x)) ** 2)

        way = dsbp_optax.nnx
        grads = nnx.grad(loss_fn)(student)
        _, short, also = way.subspace_value_and_grad(loss_fn)(student, opt_state=state)
        _, _, seen = way.value_and_grad(loss_fn)(student, opt_state=state)
        return short, project_gradients(grads, state), seen, also

    short, expected, seen, also = step(student, teacher)
    assert_same(short, expected)
    for got in (seen, also):
        assert {float(s.count.max()) for s in got.values()} == {float(len(x))}
