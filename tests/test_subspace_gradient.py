"""The gradient that is never formed is that of `project_gradients` on a whole one."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import NETWORKS, ScanNet, batch, init
from states import layer, owners
from test_adapters import assert_same, loss_of, nnx_twin, optimizer
from versions import x64

import dsbp_optax
from dsbp_optax import project_gradients
from dsbp_optax.core import coordinates


def warm(tx: Any, params: Any, loss_fn: Any, x: Any) -> Any:
    """A state whose bases have seen the data."""
    return dsbp_optax.linen.warm_start(
        loss_fn, params, x, opt_state=tx.init(params), power_iterations=3
    )


def both(loss_fn: Any, params: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    """What the short way gives, and what the long way gives."""
    short = dsbp_optax.linen.subspace_value_and_grad(loss_fn, **kwargs)
    long = dsbp_optax.linen.value_and_grad(loss_fn, **kwargs)

    @jax.jit
    def run(params: Any, state: Any) -> Any:
        value, grads, seen = long(params, *args, opt_state=state)
        expected = value, project_gradients(grads, state), seen
        return short(params, *args, opt_state=state), expected

    return run(params, state)


def held(grads: Any) -> set[str]:
    """Paths of the gradients that came as coordinates."""
    return {*coordinates.find(grads)}


def exact_adamw() -> Any:
    """Without a residual, in the dtype of the computation: equal ways stay equal."""
    return dsbp_optax.subspace_adamw(
        0.01,
        rank=2,
        clip=None,
        update_every=4,
        basis=dsbp_optax.Basis(power_iterations=1, dtype=jnp.zeros([]).dtype),
        moment_dtype=None,
    )


def differentiated(loss_fn: Any, short: bool) -> Any:
    """The short way, or the long one."""
    way = dsbp_optax.linen
    return (way.subspace_value_and_grad if short else way.value_and_grad)(loss_fn)


@pytest.mark.parametrize("name", [*NETWORKS, "remat"])
def test_linen_equals_projecting_whole_gradients(name: str) -> None:
    network = NETWORKS["scan" if name == "remat" else name]
    model = ScanNet(remat=True) if name == "remat" else network.linen
    params, x = init(network), batch(network, 3)
    loss_fn = loss_of(model)
    state = warm(optimizer(), params, loss_fn, x)
    got, expected = both(loss_fn, params, state, x)
    assert_same(got, expected)
    assert held(got[1]) == {f"{path}/kernel" for path in network.paths}
    other, _ = both(loss_fn, params, optimizer().init(params), x)
    gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), got[1], other[1])
    assert max(map(float, jax.tree.leaves(gaps))) > 1e-3, "the basis matters"


@pytest.mark.parametrize("name", list(NETWORKS))
def test_nnx_equals_linen(name: str) -> None:
    network = NETWORKS[name]
    params, x = init(network), batch(network, 3)
    tx, model = optimizer(), nnx_twin(network, params)
    state = warm(tx, params, loss_of(network.linen), x)
    value, grads, seen = dsbp_optax.linen.subspace_value_and_grad(
        loss_of(network.linen)
    )(params, x, opt_state=state)
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    pairs = {f"{b}/kernel": f"{a}/kernel" for a, b in network.paths.items()}
    own = tx.init(nnx.state(model, nnx.Param))
    layers = dsbp_optax.by_path(state)
    own = dsbp_optax.with_layers(own, {b: layers[a] for b, a in pairs.items()})
    collect = dsbp_optax.nnx.subspace_value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))

    @nnx.jit
    def step(model: Any, own: Any, opt: Any, x: Any) -> Any:
        found = collect(model, x, opt_state=own)
        _, grads, seen = collect(model, x, opt_state=opt)
        opt.update(model, grads, statistics=seen)
        return found

    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    mine_value, mine, mine_seen = step(model, own, opt, x)
    assert_same(mine_value, value)
    for path, linen_path in pairs.items():
        assert_same(mine_seen[path], seen[linen_path])
    assert sum(map(np.size, jax.tree.leaves(mine))) == sum(
        map(np.size, jax.tree.leaves(grads))
    )
    for ours, theirs in network.paths.items():
        one, two = grads, mine
        for part in ours.split("/"):
            one = one[part]
        for part in theirs.split("/"):
            two = two[part]
        assert_same(two["kernel"], one["kernel"])
        assert_same(two["bias"], one["bias"])
    after = nnx.state(model, nnx.Param)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), before, after)
    kernels = [x for x in jax.tree.leaves_with_path(moved) if "kernel" in str(x[0])]
    assert min(float(x) for _, x in kernels) > 0, "every kernel trains"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_training_is_that_with_projected_whole_gradients(dtype: Any) -> None:
    """Twenty steps over five refreshes, Adam inside; equal to rounding."""
    with x64(dtype == jnp.float64):
        network = NETWORKS["dense"]
        loss_fn, x = loss_of(network.linen), batch(network, 3, dtype)
        params = init(network, dtype)
        tx = exact_adamw()

        def train(short: bool) -> Any:
            collect = differentiated(loss_fn, short)

            @jax.jit
            def step(params: Any, state: Any) -> Any:
                loss, grads, seen = collect(params, x, opt_state=state)
                grads = grads if short else project_gradients(grads, state)
                updates, state = tx.update(grads, state, params, statistics=seen)
                return optax.apply_updates(params, updates), state, loss

            held, state, losses = params, tx.init(params), []
            for _ in range(20):
                held, state, loss = step(held, state)
                losses.append(float(loss))
            return losses

        got, expected = train(True), train(False)
    rtol = 1e-10 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(got, expected, rtol=rtol)
    assert got[-1] < 0.7 * got[0]


def test_kernels_with_one_basis_each_get_their_own_gradient() -> None:
    network = NETWORKS["attention"]
    params, x = init(network), batch(network, 3)
    loss_fn = loss_of(network.linen)
    groups = dsbp_optax.linen.find_shared_inputs(loss_fn, params, x)
    state = warm(optimizer(share=groups), params, loss_fn, x)
    got, expected = both(loss_fn, params, state, x)
    assert_same(got, expected)
    assert set(got[2]) == {"attn/key/kernel", "attn/out/kernel"}
    assert len(held(got[1])) == 4


class Twice(nn.Module):
    """One layer called two times, and a layer without a rule of its own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.Dense(8, name="shared")
        kernel = self.param("free", nn.initializers.lecun_normal(), (8, 8))
        return layer(jnp.tanh(layer(x))) @ kernel


def test_layers_called_twice_add_up_and_others_stay_whole() -> None:
    x = batch(NETWORKS["scan"], 1)
    params = Twice().init(jax.random.key(0), x)["params"]
    loss_fn = loss_of(Twice())
    state = optimizer().init(params)
    with pytest.warns(UserWarning, match="'free': no rule says"):
        got, expected = both(loss_fn, params, state, x)
    assert held(got[1]) == {"shared/kernel"}
    free, basis = got[1].pop("free"), layer(state, "free").basis
    assert_same(basis.T @ free, expected[1].pop("free").values[0].T)
    assert_same(got, expected)


@pytest.mark.filterwarnings("ignore:.*no rule says")
def test_output_sides_stay_whole() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 3)
    tx = optimizer({"first*": "output", "*": "input"})
    loss_fn = loss_of(network.linen)
    grads = dsbp_optax.linen.subspace_value_and_grad(loss_fn)(
        params, x, opt_state=tx.init(params)
    )[1]
    assert held(grads) == {"second/kernel"}
    assert_same(grads["first"], jax.grad(lambda p: loss_fn(p, x))(params)["first"])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8, name="first", dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(4, name="second")(jnp.tanh(x))


def test_mixed_precision_and_batch_statistics() -> None:
    x = batch(NETWORKS["dense"], 1)
    variables = Normed().init(jax.random.key(0), x)
    params, state = variables["params"], optimizer().init(variables["params"])

    def loss_fn(params: Any) -> Any:
        held = {"params": params, "batch_stats": variables["batch_stats"]}
        y, new = Normed().apply(held, x, mutable=["batch_stats"])
        return jnp.mean(y**2), new

    got, expected = both(loss_fn, params, state, has_aux=True)
    assert_same(got[0], expected[0])
    assert_same(got[1], expected[1], rtol=2e-2)  # of bfloat16
    assert_same(got[2], expected[2])


# ---------------------------------------------------------------- what is refused


def penalised(params: Any, x: Any) -> Any:
    plain = loss_of(NETWORKS["dense"].linen)(params, x)
    return plain + 0.1 * jnp.sum(params["first"]["kernel"] ** 2)


def test_a_penalty_on_a_kernel_is_an_error_unless_told_otherwise() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 3)
    state = optimizer().init(params)
    step = dsbp_optax.linen.subspace_value_and_grad(penalised, strict=True)
    with pytest.raises(ValueError, match="'first/kernel'") as raised:
        jax.jit(lambda params: step(params, x, opt_state=state))(params)
    assert "'second/kernel'" not in str(raised.value)
    assert "Remedy: weight_decay=" in str(raised.value)
    loose = dsbp_optax.linen.subspace_value_and_grad(penalised)
    with pytest.warns(UserWarning, match="depends on 'first/kernel'.*whole gradient"):
        _, grads, seen = loose(params, x, opt_state=state)
    assert held(grads) == {"second/kernel"} and set(seen) == owners(state)
    assert_same(grads["first"], jax.grad(penalised)(params, x)["first"])


def test_a_penalty_on_other_parameters_is_none() -> None:
    network = NETWORKS["scan"]
    params, x = init(network), batch(network, 3)

    def loss_fn(params: Any, x: Any) -> Any:
        return loss_of(network.linen)(params, x) + sum(
            jnp.sum(p**2) for p in jax.tree.leaves(params) if p.ndim < 3
        )

    state = warm(optimizer(), params, loss_fn, x)
    assert_same(*both(loss_fn, params, state, x))


def test_nnx_refuses_a_penalty_too() -> None:
    model, x = NETWORKS["dense"].nnx(nnx.Rngs(0)), batch(NETWORKS["dense"], 0)
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    def loss_fn(model: Any, x: Any) -> Any:
        return jnp.mean(model(x) ** 2) + jnp.sum(model.second.kernel[...] ** 2)

    step = dsbp_optax.nnx.subspace_value_and_grad(loss_fn, strict=True)
    with pytest.raises(ValueError, match="depends on 'second/kernel'"):
        step(model, x, opt_state=opt)


def test_states_that_do_not_fit_are_named() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 3)
    step = dsbp_optax.linen.subspace_value_and_grad(loss_of(network.linen))
    with pytest.raises(ValueError, match="no state of scale_by_spectral_projection"):
        step(params, x, opt_state=optax.adam(0.1).init(params))
    state = optimizer().init(params)
    with pytest.raises(ValueError, match=r"a place for 'second/kernel'.*Remedy"):
        step({"first": params["first"]}, x, opt_state=state)
    with_residual = dsbp_optax.subspace_adamw(0.1, rank=2, residual="int5")
    state = with_residual.init({"w": jnp.ones((64, 64))})
    small = project_gradients({"w": jnp.ones((64, 64))}, state)
    with pytest.raises(ValueError, match=r"Remedy: .*residual=None"):
        with_residual.update(small, state, {"w": jnp.ones((64, 64))})


# ---------------------------------------------------------------- what it is for


class Deep(nn.Module):
    width: int
    scanned: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if not self.scanned:
            for _ in range(6):
                x = nn.relu(nn.Dense(self.width)(x))
            return x
        layers = nn.scan(
            Relu, variable_axes={"params": 0}, split_rngs={"params": True}, length=6
        )
        return layers(self.width)(x, None)[0]


class Relu(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
        return nn.relu(nn.Dense(self.width)(x)), None


def compiled(width: int, samples: int, rank: int, scanned: bool) -> dict[str, Any]:
    """What the compiler says of three ways to a gradient; nothing is run."""
    model = Deep(width, scanned)
    x = jax.ShapeDtypeStruct((samples, width), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    tx = dsbp_optax.subspace_adamw(1e-3, rank=rank)
    loss_fn = loss_of(model)
    ways = {
        "plain": lambda p, x, s: jax.value_and_grad(loss_fn)(p, x),
        "whole": lambda p, x, s: dsbp_optax.linen.value_and_grad(loss_fn)(
            p, x, opt_state=s
        ),
        "short": lambda p, x, s: dsbp_optax.linen.subspace_value_and_grad(loss_fn)(
            p, x, opt_state=s
        ),
    }
    state = jax.eval_shape(tx.init, params)
    found = {}
    for name, way in ways.items():
        program = jax.jit(way).lower(params, x, state).compile()
        costs, memory = program.cost_analysis(), program.memory_analysis()
        grads = jax.eval_shape(way, params, x, state)[1]
        found[name] = {
            "flops": (costs[0] if isinstance(costs, list) else costs)["flops"],
            "temporary": memory.temp_size_in_bytes,
            "gradient": sum(g.size * g.dtype.itemsize for g in jax.tree.leaves(grads)),
        }
    return found


def ratios(found: dict[str, Any], way: str) -> tuple[float, ...]:
    return tuple(found[way][key] / found["plain"][key] for key in found["plain"])


def test_a_gradient_takes_two_thirds_of_the_flops_and_a_fiftieth_of_the_bytes() -> None:
    found = compiled(2048, 4096, 16, scanned=False)
    flops, _, gradient = ratios(found, "short")
    assert flops <= 0.67 and gradient <= 0.02
    flops, _, gradient = ratios(found, "whole")
    assert flops > 0.9 and gradient > 0.9, "the bounds can be missed"


def test_scanned_layers_keep_half_as_much() -> None:
    found = compiled(512, 4096, 16, scanned=True)
    assert ratios(found, "short")[1] <= 0.5 < ratios(found, "whole")[1]


@pytest.mark.parametrize("residual", [None, "float32"])
def test_updates_are_merged_into_donated_kernels(residual: Any) -> None:
    """Parameters and state are overwritten; beside them lies one update, no more."""
    params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    tx = dsbp_optax.subspace_adamw(1e-3, rank=8, residual=residual)
    state = jax.eval_shape(tx.init, params)
    short = residual is None
    whole = {"w": params["w"]}
    grads = jax.eval_shape(project_gradients, whole, state) if short else whole

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def compiled(**settings: Any) -> Any:
        return jax.jit(step, **settings).lower(params, state, grads).compile()

    program, copying = compiled(donate_argnums=(0, 1)), compiled()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    assert "input_output_alias" in program.as_text()
    apart = size - program.memory_analysis().alias_size_in_bytes
    assert 0 <= apart < 64, "a counter that no result needs"
    assert copying.memory_analysis().alias_size_in_bytes == 0
    kernel = 4 * 512 * 512
    beside = program.memory_analysis().temp_size_in_bytes
    assert (beside < 1.2 * kernel) == short, "a residual takes more"
