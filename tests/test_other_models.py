"""Models that a loss captures (a teacher, a target network) are none of ours."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import NETWORKS, batch, init
from states import basis_of
from test_adapters import assert_same, explicit, optimizer, statistics_of

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


# ---------------------------------------------------------------- tied heads


def exactly(loss_fn: Any, params: Any) -> Any:
    """What both ways find; losses and whole gradients are the plain ones, bit by bit.

    Returns:
      Statistics of the long way and of the short one, gradients of the short one.
    """
    state = optimizer().init(params)
    way = dsbp_optax.linen

    @jax.jit
    def run(params: Any) -> Any:
        plain = jax.value_and_grad(loss_fn)(params)
        long = way.value_and_grad(loss_fn)(params, opt_state=state)
        return plain, long, project_gradients(plain[1], state)

    @jax.jit
    def run_short(params: Any) -> Any:
        return way.subspace_value_and_grad(loss_fn)(params, opt_state=state)

    plain, (loss, grads, seen), projected = run(params)
    short_loss, short, also = run_short(params)
    np.testing.assert_array_equal(loss, plain[0])
    np.testing.assert_array_equal(short_loss, plain[0])
    jax.tree.map(np.testing.assert_array_equal, grads, plain[1])
    leaves, _ = jax.tree.flatten(short, is_leaf=is_short)
    wholes, treedef = jax.tree.flatten(plain[1])
    parts = treedef.flatten_up_to(projected)
    for got, whole, part in zip(leaves, wholes, parts, strict=True):
        assert_same(got, part if is_short(got) else whole, rtol=1e-5)
    return seen, also, short


def is_short(leaf: Any) -> bool:
    return isinstance(leaf, dsbp_optax.Coordinates)


class Tied(nn.Module):
    """A language model whose head is its table, by an apply inside of an apply."""

    own_bias: bool = False

    def setup(self) -> None:
        self.table = nn.Embed(12, 8)
        self.dense = nn.Dense(8)
        self.wide = nn.Dense(12)
        self.head = nn.Dense(12, parent=None, use_bias=self.own_bias)

    def __call__(self, tokens: Any) -> Any:
        h = jnp.tanh(self.dense(self.table(tokens)))
        wide = self.wide(h)
        params = {"kernel": self.table.variables["params"]["embedding"].T}
        if self.own_bias:
            params["bias"] = self.wide.variables["params"]["bias"]
        return self.head.apply({"params": params}, h) + 0.1 * wide


@pytest.mark.parametrize("own_bias", [False, True])
def test_a_head_tied_to_a_table_is_no_other_kernel(own_bias: bool) -> None:
    """The table's transpose has the shape and the name of the wide layer's kernel."""
    model, tokens = Tied(own_bias), jnp.arange(16) % 12
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)

    def loss_fn(params: Any) -> Any:
        logits = model.apply({"params": params}, tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), tokens])

    seen, also, short = exactly(loss_fn, params)
    dense = params["dense"]
    x = params["table"]["embedding"][tokens]
    h = jnp.tanh(x @ dense["kernel"] + dense["bias"])
    state = optimizer().init(params)
    for found in (seen, also):
        assert_same(found["wide/kernel"], explicit(h, basis_of(state, "wide/kernel")))
        assert_same(found["dense/kernel"], explicit(x, basis_of(state, "dense/kernel")))
    assert is_short(short["wide"]["kernel"]) and is_short(short["dense"]["kernel"])


def test_a_kernel_is_not_its_own_transpose() -> None:
    layer = nn.Dense(8, use_bias=False)
    x = jax.random.normal(jax.random.key(1), (20, 8))
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]

    def loss_fn(params: Any) -> Any:
        code = layer.apply({"params": params}, x)
        back = layer.apply({"params": {"kernel": params["kernel"].T}}, code)
        return jnp.mean((back - x) ** 2)

    state = optimizer().init(params)
    seen = dsbp_optax.linen.value_and_grad(loss_fn)(params, opt_state=state)[2]
    assert_same(seen["kernel"], explicit(x, basis_of(state, "kernel")))
    short = dsbp_optax.linen.subspace_value_and_grad
    with pytest.raises(ValueError, match="a tied head"):
        short(loss_fn, strict=True)(params, opt_state=state)
    with pytest.warns(UserWarning, match="a tied head.*whole gradients"):
        _, grads, also = short(loss_fn)(params, opt_state=state)
    assert_same(grads, jax.grad(loss_fn)(params), rtol=1e-5)
    assert_same(also, seen)


# ---------------------------------------------------------------- who is who


@pytest.mark.parametrize("through", [jax.checkpoint, jax.jit])
@pytest.mark.parametrize("student", [True, False])
def test_a_teacher_through_a_transformation_is_not_observed(
    through: Any, student: bool
) -> None:
    """It is an argument of the loss that becomes an argument of a function inside."""
    params, x = init(NETWORK), batch(NETWORK, 2)
    teacher = jax.tree.map(lambda p: p * 2, params)

    def says(params: Any, x: Any) -> Any:
        return NETWORK.linen.apply({"params": params}, x)

    def loss_fn(params: Any, x: Any, teacher: Any) -> Any:
        target = through(lambda p: says(p, 2 * x))(teacher)
        told = through(lambda p: says(p, x))(params) if student else says(params, x)
        return jnp.mean((told - target) ** 2)

    state = optimizer().init(params)
    expected = project_gradients(jax.grad(loss_fn)(params, x, teacher), state)
    alone = statistics_of(NETWORK.linen, params, x)

    @jax.jit
    def step(params: Any, teacher: Any) -> Any:
        way = dsbp_optax.linen
        long = way.value_and_grad(loss_fn)(params, x, teacher, opt_state=state)
        short = way.subspace_value_and_grad(loss_fn)
        return long[2], *short(params, x, teacher, opt_state=state)[1:]

    seen, grads, also = step(params, teacher)
    assert_same(seen, alone)
    assert_same(also, alone)
    assert_same(grads, expected)


def test_one_function_for_two_players_observes_neither() -> None:
    """It is traced once, for both: the statistic cannot be told apart, and none is."""
    params, x = init(NETWORK), batch(NETWORK, 2)
    teacher = jax.tree.map(lambda p: p * 2, params)

    @jax.checkpoint
    def says(params: Any, x: Any) -> Any:
        return NETWORK.linen.apply({"params": params}, x)

    def loss_fn(params: Any) -> Any:
        return jnp.mean((says(params, x) - says(teacher, 2 * x)) ** 2)

    state = optimizer().init(params)
    way = dsbp_optax.linen
    for make in (way.value_and_grad, way.subspace_value_and_grad):
        with pytest.warns(UserWarning, match="cannot be told to be this parameter"):
            _, grads, seen = make(loss_fn)(params, opt_state=state)
        assert seen == {}
        assert_same(grads, jax.grad(loss_fn)(params), rtol=1e-5)


class TiedNnx(nnx.Module):
    """Its head is a copy of the wide layer that holds the transpose of the table."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(12, 8, rngs=rngs)
        self.wide = nnx.Linear(8, 12, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        h = self.table(tokens)
        head = nnx.clone(self.wide)
        head.kernel = nnx.Param(self.table.embedding[...].T)
        return head(jnp.tanh(h)) + 0.1 * self.wide(h)


@pytest.mark.parametrize("make", ["value_and_grad", "subspace_value_and_grad"])
def test_an_nnx_layer_with_another_kernel_is_not_observed(make: str) -> None:
    model, tokens = TiedNnx(nnx.Rngs(0)), jnp.arange(16) % 12
    state = optimizer().init(nnx.state(model, nnx.Param))

    def loss_fn(model: Any) -> Any:
        return jnp.mean(model(tokens) ** 2)

    loss, plain = nnx.value_and_grad(loss_fn)(model)
    way = getattr(dsbp_optax.nnx, make)
    got, grads, seen = way(loss_fn)(model, opt_state=state)
    np.testing.assert_array_equal(got, loss)
    short = make == "subspace_value_and_grad"
    expected = project_gradients(plain, state) if short else plain
    assert_same(grads, expected, rtol=1e-5 if short else 0)
    h = model.table(tokens)
    assert_same(seen["wide/kernel"], explicit(h, basis_of(state, "wide/kernel")))


@pytest.mark.parametrize("name", ["scale", "step", "mask"])
def test_rewritten_parameters_are_observed_and_have_whole_gradients(name: str) -> None:
    """The coordinates of the layer's kernel are not those of the parameter."""
    params, x = init(NETWORK), batch(NETWORK, 2)

    def inner(params: Any) -> Any:
        return jnp.mean(NETWORK.linen.apply({"params": params}, x) ** 2)

    rewrite = {
        "scale": lambda p: jax.tree.map(lambda w: 0.5 * w, p),
        "step": lambda p: jax.tree.map(lambda w, g: w - g, p, jax.grad(inner)(p)),
        "mask": lambda p: jax.tree.map(lambda w: jnp.where(w > 0, w, 0), p),
    }[name]

    def loss_fn(params: Any) -> Any:
        return jnp.mean(NETWORK.linen.apply({"params": rewrite(params)}, x + 1) ** 2)

    state = optimizer().init(params)
    way = dsbp_optax.linen
    expected = jax.grad(loss_fn)(params)
    _, grads, seen = way.value_and_grad(loss_fn)(params, opt_state=state)
    assert_same(grads, expected, rtol=1e-5)
    if name == "step":  # The inner calls count too, and have gradients of their own.
        return
    assert {float(s.count.max()) for s in seen.values()} == {float(len(x))}
    _, grads, also = way.subspace_value_and_grad(loss_fn)(params, opt_state=state)
    assert_same(grads, expected, rtol=1e-5)
    assert_same(also, seen)
