"""Linen, NNX and explicit activations agree; values and gradients stay untouched."""

import functools
import threading
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from networks import NETWORKS, Network, ScanNet, batch, init
from states import basis_of, layer, owners

import dsbp_optax
from dsbp_optax import Activations, Axes, Sketch
from dsbp_optax.capture import state as capture_state
from dsbp_optax.capture.tap import Rider
from dsbp_optax.core import layout


def optimizer(side: Any = "input", **kwargs: Any) -> Any:
    """A projection; keywords are those of its `Basis`."""
    return dsbp_optax.scale_by_spectral_projection(
        optax.trace(0.9),
        rank=2,
        basis=dsbp_optax.Basis(side=side, **kwargs),
        project="always",
    )


def loss_of(model: nn.Module) -> Any:
    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    return loss_fn


@jax.jit
def explicit(samples: Any, basis: Any) -> Sketch:
    """The sketch by its definition, out of sample matrices ``(*batch, n, d)``."""
    flat = jnp.reshape(basis, (*samples.shape[:-2], samples.shape[-1], -1))
    inside = jnp.einsum("...nd,...dk->...nk", samples, flat)
    product = jnp.einsum("...nd,...nk->...dk", samples, inside)
    small = (*basis.shape[: samples.ndim - 2], *(1,) * (basis.ndim - samples.ndim + 2))
    return Sketch(
        product=product.reshape(basis.shape),
        count=jnp.full(small, float(samples.shape[-2])),
        trace=jnp.sum(samples**2, axis=(-2, -1)).reshape(small),
    )


def assert_same(left: Any, right: Any, rtol: float = 2e-4) -> None:
    a, b = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.shape == two.shape
        scale = max(float(np.abs(two).max()), 1e-3)  # exact zeros are rounded
        np.testing.assert_allclose(one, two, rtol=rtol, atol=rtol * scale)


def collected(network: Network, side: str, params: Any, x: Any) -> Any:
    state = jax.jit(optimizer(side).init)(params)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(network.linen)))
    return (*collect(params, x, opt_state=state), state)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_linen_equals_explicit_activations(name: str, side: str) -> None:
    network = NETWORKS[name]
    params, x = init(network), batch(network, 3)
    loss, grads, statistics, state = collected(network, side, params, x)
    plain, plain_grads = jax.jit(jax.value_and_grad(loss_of(network.linen)))(params, x)
    y, seen = jax.jit(network.by_hand)(params, x)
    assert_same(loss, plain)
    assert_same(jnp.mean(y**2), plain)
    assert_same(grads, plain_grads)
    assert set(statistics) == set(seen)
    for path, (inputs, outputs) in seen.items():
        samples = inputs if side == "input" else outputs
        expected = explicit(samples, basis_of(state, path))
        assert_same(statistics[path], expected)
        wrong = (
            explicit(outputs if side == "input" else inputs, expected.product)
            if (inputs.shape == outputs.shape)
            else explicit(samples[..., ::-1, :] * 1.01, basis_of(state, path))
        )
        assert float(jnp.abs(wrong.trace - expected.trace).max()) > 1e-3


def nnx_twin(network: Network, params: Any) -> nnx.Module:
    """The NNX form with the Linen parameters."""
    model = network.nnx(nnx.Rngs(0))
    for linen_path, nnx_path in network.paths.items():
        source, target = params, model
        for part in linen_path.split("/"):
            source = source[part]
        for part in nnx_path.split("/"):
            target = getattr(target, part)
        for name in ("kernel", "bias"):
            leaf = getattr(target, name)
            setattr(target, name, type(leaf)(source[name]))
    return model


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_nnx_equals_linen(name: str, side: str) -> None:
    """Equal statistics for equal bases, hence equal updates; and an untouched model."""
    network = NETWORKS[name]
    params, x = init(network), batch(network, 3)
    _, _, statistics, state = collected(network, side, params, x)
    model = nnx_twin(network, params)
    tx = optimizer(side)
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    pairs = {f"{b}/kernel": f"{a}/kernel" for a, b in network.paths.items()}
    own = jax.jit(tx.init)(nnx.state(model, nnx.Param))
    layers = dsbp_optax.by_path(state)
    own = dsbp_optax.with_layers(own, {b: layers[a] for b, a in pairs.items()})

    def loss_fn(model: Any, x: Any) -> Any:
        return jnp.mean(model(x) ** 2)

    collect = dsbp_optax.nnx.value_and_grad(loss_fn)

    @nnx.jit
    def step(model: Any, own: Any, x: Any) -> Any:
        return collect(model, x, opt_state=own)

    before = jax.tree.structure(nnx.state(model))
    loss, grads, mine = step(model, own, x)
    plain, plain_grads = nnx.jit(nnx.value_and_grad(loss_fn))(model, x)
    assert_same(loss, plain)
    assert_same(grads, plain_grads)
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)
    assert jax.tree.structure(nnx.state(model)) == before
    assert all(
        type(m).__module__.startswith(("flax", "networks")) for m in modules(model)
    )
    for b, a in pairs.items():
        assert_same(mine[b], statistics[a])
    if side == "input":
        update = nnx.jit(lambda opt, *told, **more: opt.update(*told, **more))
        update(opt, model, grads, statistics=mine)


def modules(model: Any) -> list[Any]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]


def statistics_of(model: nn.Module, params: Any, x: Any, **kwargs: Any) -> Any:
    state = jax.jit(optimizer(**kwargs).init)(params)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(model)))
    return collect(params, x, opt_state=state)[2]


def test_remat_and_frozen_dicts_change_nothing() -> None:
    network = NETWORKS["scan"]
    params, x = init(network), batch(network, 1)
    plain = statistics_of(network.linen, params, x)
    remat = statistics_of(ScanNet(remat=True), params, x)
    assert_same(plain, remat)
    assert_same(plain, statistics_of(network.linen, freeze(params), x))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.Dense(12, name="shared")
        return layer(jnp.tanh(layer(x)))


def test_layers_called_twice_add_up() -> None:
    x = jax.random.normal(jax.random.key(0), (20, 12))
    params = Twice().init(jax.random.key(1), x)["params"]
    tx = optimizer()
    state = jax.jit(tx.init)(params)
    got = statistics_of(Twice(), params, x)["shared/kernel"]
    p = params["shared"]
    hidden = jnp.tanh(x @ p["kernel"] + p["bias"])
    basis = basis_of(state, "shared/kernel")
    assert_same(got, explicit(jnp.concatenate([x, hidden]), basis))
    assert float(got.count.ravel()[0]) == 40


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        members = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return members(6, name="members")(x)


def test_vmapped_kernels_have_statistics_of_their_own() -> None:
    x = (
        jax.random.normal(jax.random.key(0), (3, 20, 12))
        * jnp.arange(1, 4)[:, None, None]
    )
    params = Ensemble().init(jax.random.key(1), x)["params"]
    state = jax.jit(optimizer().init)(params)
    got = statistics_of(Ensemble(), params, x)["members/kernel"]
    assert_same(got, explicit(x, basis_of(state, "members/kernel")))


@pytest.mark.parametrize("adapter", ["linen", "nnx", "coordinates"])
def test_a_loss_that_maps_its_samples_counts_them_all(adapter: str) -> None:
    x = jax.random.normal(jax.random.key(0), (20, 12))
    if adapter == "nnx":
        model = nnx.Linear(12, 8, rngs=nnx.Rngs(0))
        params, make = model, dsbp_optax.nnx.value_and_grad
        state = jax.jit(optimizer().init)(nnx.state(model, nnx.Param))
    else:
        params = nn.Dense(8).init(jax.random.key(1), x)["params"]
        make, state = dsbp_optax.linen.value_and_grad, optimizer().init(params)
    if adapter == "coordinates":
        make = dsbp_optax.linen.subspace_value_and_grad

    def each(params: Any, x: Any) -> Any:
        def one(row: Any) -> Any:
            found = params(row) if adapter == "nnx" else apply(params, row)
            return jnp.mean(found**2)

        return jnp.mean(jax.vmap(one)(x))

    def apply(params: Any, row: Any) -> Any:
        return nn.Dense(8).apply({"params": params}, row)

    got = make(each)(params, x, opt_state=state)[2]["kernel"]
    assert_same(got, explicit(x, basis_of(state, "kernel")))


def test_scan_along_another_axis_by_an_axes_rule() -> None:
    class Tall(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def block(mdl: Any, x: Any, _: Any) -> Any:
                return jnp.tanh(nn.Dense(8, name="dense")(x)), None

            scanned = nn.scan(
                block,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=3,
            )
            return scanned(self, x, None)[0]

    x = jax.random.normal(jax.random.key(0), (20, 8))
    params = Tall().init(jax.random.key(1), x)["params"]
    rule = {"*kernel": dsbp_optax.Axes(inputs=(0,), outputs=(2,), batch=(1,))}
    got = statistics_of(Tall(), params, x, axes=rule)["dense/kernel"]
    assert got.product.shape == (8, 3, 1, 2)
    state = optimizer(axes=rule).init(params)
    first = explicit(x, basis_of(state, "dense/kernel")[:, 0])
    assert_same(got.product[:, 0], first.product)


def test_micro_batches_sum_to_the_whole_batch() -> None:
    network = NETWORKS["conv"]
    params, x = init(network), batch(network, 2)
    state = jax.jit(optimizer().init)(params)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(network.linen)))
    whole = collect(params, x, opt_state=state)[2]

    def body(_: Any, part: Any) -> Any:
        return None, collect(params, part, opt_state=state)[2]

    _, stacked = jax.lax.scan(body, None, x.reshape(3, 2, *x.shape[1:]))
    assert_same(dsbp_optax.sum_statistics(stacked), whole)
    halves = [collect(params, h, opt_state=state)[2] for h in (x[:3], x[3:])]
    assert_same(dsbp_optax.add_statistics(*halves), whole)
    assert float(jnp.abs(halves[0]["first/kernel"].trace).max()) < float(
        whole["first/kernel"].trace.max()
    )


@pytest.mark.parametrize(("name", "bare"), [("dense", True), ("scan", False)])
def test_samples_of_micro_batches_are_those_of_the_whole_batch(
    name: str, bare: bool
) -> None:
    """Of stacked kernels too; activations do not add up number by number."""
    network = NETWORKS[name]
    params, x = init(network), batch(network, 2)
    form = (lambda a: a) if bare else Activations

    def seen(x: Any) -> Any:
        found = jax.jit(network.by_hand)(params, x)[1]
        return {p: form(a) for p, (a, _) in found.items()}

    @jax.jit
    def spectrum(statistics: Any) -> Any:
        state = optimizer(power_iterations=2).init(params)
        update = optimizer(power_iterations=2).update
        return update(params, state, params, statistics=statistics)[1].spectrum

    parts = [seen(part) for part in jnp.split(x, 2)]
    whole = spectrum(seen(x))
    assert_same(spectrum(dsbp_optax.add_statistics(*parts)), whole, rtol=2e-3)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    assert_same(spectrum(dsbp_optax.sum_statistics(stacked)), whole, rtol=2e-3)


def test_statistics_of_two_kinds_do_not_add_up() -> None:
    a = jnp.ones((4, 3))
    one, two = {"w": Activations(a)}, {"w": dsbp_optax.Covariance(a.T @ a, 4)}
    for left, right in ((one, two), (two, one)):
        with pytest.raises(ValueError, match="Activations"):
            dsbp_optax.add_statistics(left, right)


def test_statistics_do_not_see_the_loss_scale() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)
    state = jax.jit(optimizer().init)(params)
    loss_fn = loss_of(network.linen)
    one = jax.jit(dsbp_optax.linen.value_and_grad(loss_fn))(params, x, opt_state=state)
    scaled = jax.jit(dsbp_optax.linen.value_and_grad(lambda p, x: 1e3 * loss_fn(p, x)))
    assert_same(scaled(params, x, opt_state=state)[2], one[2])


def test_nothing_is_collected_between_refreshes() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)
    state = jax.jit(optimizer().init)(params)
    idle = state._replace(collect=jnp.zeros_like(state.collect))
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(network.linen)))
    assert all(
        not x.any() for x in jax.tree.leaves(collect(params, x, opt_state=idle)[2])
    )
    busy = collect(params, x, opt_state=state)[2]
    assert all(s.product.any() and s.count.any() for s in busy.values())


class Trainer(nn.Module):
    """BatchNorm, dropout, mixed precision: what a training script has."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Dense(12, dtype=self.dtype, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(8, dtype=self.dtype, name="second")(x).astype(jnp.float32)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_aux_rngs_batch_norm_and_mixed_precision(dtype: Any) -> None:
    model = Trainer(dtype)
    x = jax.random.normal(jax.random.key(0), (30, 12))
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(1), x
    )
    params, stats = variables["params"], variables["batch_stats"]

    def loss_fn(params: Any, x: Any, key: Any) -> Any:
        y, new = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jnp.mean(y**2), new["batch_stats"]

    key = jax.random.key(7)
    state = jax.jit(optimizer().init)(params)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_fn, has_aux=True))
    (loss, new), grads, statistics = collect(params, x, key, opt_state=state)
    plain = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (expected, new_expected), expected_grads = plain(params, x, key)
    assert_same((loss, new, grads), (expected, new_expected, expected_grads))
    exact = explicit(x, basis_of(state, "first/kernel"))
    assert_same(statistics["first/kernel"], exact, rtol=1e-5)
    assert statistics["first/kernel"].product.dtype == jnp.float32


def test_train_state_with_a_transformation_that_takes_no_statistics() -> None:
    params = {"kernel": jnp.ones((4, 3))}
    state = dsbp_optax.linen.TrainState.create(
        apply_fn=None, params=params, tx=optax.scale(-0.5)
    )
    state = state.apply_gradients(grads=params, statistics={})
    np.testing.assert_array_equal(state.params["kernel"], 0.5)


def test_train_state_passes_statistics() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)
    tx = optax.chain(optimizer(), optax.scale_by_learning_rate(0.1))
    state = dsbp_optax.linen.TrainState.create(
        apply_fn=network.linen.apply, params=params, tx=tx
    )
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(network.linen)))
    loss, grads, statistics = collect(state.params, x, opt_state=state.opt_state)
    apply = jax.jit(lambda state, **told: state.apply_gradients(**told))
    new = apply(state, grads=grads, statistics=statistics, value=loss)
    updates, expected = jax.jit(tx.update)(
        grads, state.opt_state, params, statistics=statistics
    )
    assert_same(new.params, optax.apply_updates(params, updates))
    assert_same(new.opt_state, expected)
    assert int(new.step) == 1
    spectrum = layer(new.opt_state, "first/kernel").spectrum
    assert bool(spectrum.activations.all())


def test_penalties_on_the_parameters_do_not_see_the_bases() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)

    def loss_fn(params: Any, x: Any) -> Any:
        return loss_of(network.linen)(params, x) + optax.tree.norm(params, squared=True)

    state = jax.jit(optimizer().init)(params)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_fn))
    loss, grads, statistics = collect(params, x, opt_state=state)
    assert_same((loss, grads), jax.jit(jax.value_and_grad(loss_fn))(params, x))
    assert_same(statistics, statistics_of(network.linen, params, x))


def test_a_teacher_of_the_same_architecture_is_not_observed() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)
    teacher = jax.tree.map(lambda p: p * 2, params)

    def distill(params: Any, x: Any, teacher: Any) -> Any:
        target = network.linen.apply({"params": teacher}, x)
        return jnp.mean((network.linen.apply({"params": params}, x) - target) ** 2)

    state = jax.jit(optimizer().init)(params)
    collect = dsbp_optax.linen.value_and_grad(distill)
    step = jax.jit(lambda p, x, t: collect(p, x, t, opt_state=state)[2])
    assert_same(step(params, x, teacher), statistics_of(network.linen, params, x))


def test_cast_parameters_and_whole_variables_are_recognised() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)

    def loss_fn(variables: Any, x: Any) -> Any:
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)
        return jnp.mean(network.linen.apply(half, x).astype(jnp.float32) ** 2)

    variables = {"params": params}
    state = jax.jit(optimizer().init)(variables)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_fn))
    got = collect(variables, x, opt_state=state)[2]
    assert set(got) == {"params/first/kernel", "params/second/kernel"}
    exact = explicit(x, basis_of(state, "params/first/kernel"))
    assert_same(got["params/first/kernel"], exact)


def test_two_models_in_one_tree() -> None:
    network = NETWORKS["dense"]
    one, x = init(network), batch(network, 2)
    two = jax.tree.map(lambda p: p * 3, one)
    both = {"one": one, "two": two}

    def loss_fn(params: Any, x: Any) -> Any:
        return sum(loss_of(network.linen)(params[k], x) for k in ("one", "two"))

    state = jax.jit(optimizer().init)(both)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_fn))
    got = collect(both, x, opt_state=state)[2]
    for name, params in both.items():
        _, seen = jax.jit(network.by_hand)(params, x)
        for path, (inputs, _) in seen.items():
            key = f"{name}/{path}"
            assert_same(got[key], explicit(inputs, basis_of(state, key)))


def test_partitioned_parameters() -> None:
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
            return nn.Dense(8, kernel_init=kernel, name="dense")(x)

    x = jax.random.normal(jax.random.key(0), (20, 12))
    params = Boxed().init(jax.random.key(1), x)["params"]
    tx = optimizer()
    state = jax.jit(tx.init)(params)
    assert owners(state) == {"dense/kernel"}
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(Boxed())))
    _, grads, statistics = collect(params, x, opt_state=state)
    exact = explicit(x, basis_of(state, "dense/kernel"))
    assert_same(statistics["dense/kernel"], exact)
    updates, _ = jax.jit(tx.update)(grads, state, params, statistics=statistics)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


class Bilinear(nn.Module):
    """A layer of the user's own: an einsum with its own parameter name."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        w = self.param("weight", nn.initializers.lecun_normal(), (12, 2, 5))
        return jnp.einsum("nd,dhe->nhe", x, w)


def test_a_rule_for_a_layer_of_ones_own() -> None:
    x = jax.random.normal(jax.random.key(0), (20, 12))
    params = Bilinear().init(jax.random.key(1), x)["params"]
    axes = {"weight": dsbp_optax.Axes(inputs=(0,), outputs=(1, 2))}
    state = optimizer(axes=axes).init(params)

    def rule(module: Any) -> dsbp_optax.linen.LinearMap:
        del module
        return dsbp_optax.linen.LinearMap(lambda x, v: x @ v, 1, parameter="weight")

    loss_fn = loss_of(Bilinear())
    collect = dsbp_optax.linen.value_and_grad(loss_fn, rules={Bilinear: rule})
    got = collect(params, x, opt_state=state)[2]
    assert_same(got["weight"], explicit(x, basis_of(state, "weight")))
    with pytest.warns(UserWarning, match="no rule says"):
        plain = dsbp_optax.linen.value_and_grad(loss_fn)(params, x, opt_state=state)
    assert plain[2] == {}


def test_projection_and_sharpness_collect_side_by_side() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)
    tx = optax.chain(
        dsbp_optax.add_spectral_sharpness(
            0.1, rank=3, basis=dsbp_optax.Basis(side="output")
        ),
        optimizer(),
    )
    state = jax.jit(tx.init)(params)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(network.linen)))
    _, grads, statistics = collect(params, x, opt_state=state)
    assert set(statistics) == {
        "first/kernel",
        "second/kernel",
        "first/kernel#sharpness",
        "second/kernel#sharpness",
    }
    _, new = jax.jit(tx.update)(grads, state, params, statistics=statistics)
    for path in statistics:
        assert bool(layer(new, path).spectrum.activations.all())
    _, seen = jax.jit(network.by_hand)(params, x)
    wide = Activations(seen["first/kernel"][1])
    assert wide.values.shape == (40, 9)


def test_warm_start_makes_all_iterations_on_the_first_batch() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)
    tx = dsbp_optax.dsbp(0.1, rank=2, basis=dsbp_optax.Basis(side="input"))
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(network.linen)))
    cold = tx.init(params)
    warm = dsbp_optax.linen.warm_start(
        loss_of(network.linen), params, x, opt_state=cold
    )
    _, grads, sketches = collect(params, x, opt_state=warm)
    _, after = jax.jit(tx.update)(grads, warm, params, statistics=sketches)
    _, seen = jax.jit(network.by_hand)(params, x)
    matrices = {path: Activations(inputs) for path, (inputs, _) in seen.items()}
    _, exact = jax.jit(tx.update)(grads, cold, params, statistics=matrices)
    for path in seen:
        left, right = layer(after, path).basis, layer(exact, path).basis
        np.testing.assert_allclose(left @ left.T, right @ right.T, atol=1e-4)
        start = layer(cold, path).basis
        assert float(jnp.abs(start @ start.T - right @ right.T).max()) > 1e-2


class Partly(nn.Module):
    """A layer with a shipped rule, and one of the user's own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(7, name="dense")(x)[:, :, None] + Bilinear(name="own")(x)[:, :1]


class BilinearNnx(nnx.Module):
    def __init__(self, weight: Any) -> None:
        self.weight = nnx.Param(weight)

    def __call__(self, x: Any) -> Any:
        return jnp.einsum("nd,dhe->nhe", x, self.weight[...])


class PartlyNnx(nnx.Module):
    def __init__(self, params: Any) -> None:
        for name in ("dense", "spare"):
            layer = nnx.Linear(12, 7, rngs=nnx.Rngs(0))
            layer.kernel = nnx.Param(params[name]["kernel"])
            setattr(self, name, layer)
        self.own = BilinearNnx(params["own"]["weight"])

    def __call__(self, x: Any) -> Any:
        return self.dense(x)[:, :, None] + self.own(x)[:, :1]


def off_center() -> Any:
    """Samples of three clear directions, far from the origin."""
    x = np.random.default_rng(0).normal(size=(40, 12)) * 0.1
    x[:, :3] *= np.array([40.0, 20.0, 2.0])
    return jnp.asarray(x + 5.0, jnp.float32)


@pytest.mark.parametrize("adapter", ["linen", "nnx"])
def test_warm_start_is_told_what_the_optimizer_and_the_step_are(adapter: str) -> None:
    """A rule of one's own, a layer that is never called."""
    x, own = off_center(), dsbp_optax.Axes(inputs=(0,), outputs=(1, 2))
    params = jax.jit(Partly().init)(jax.random.key(1), x)["params"]
    params = {**params, "spare": params["dense"]}
    cold = optimizer(axes={"own/weight": own}).init(params)
    rule = dsbp_optax.linen.LinearMap(lambda x, v: x @ v, 1, parameter="weight")
    linen = adapter == "linen"
    warm_start = (dsbp_optax.linen if linen else dsbp_optax.nnx).warm_start
    loss_fn = loss_of(Partly()) if linen else (lambda model, x: jnp.mean(model(x) ** 2))
    start = functools.partial(
        warm_start,
        loss_fn,
        params if linen else PartlyNnx(params),
        x,
        opt_state=cold,
        power_iterations=9,
        rules={Bilinear if linen else BilinearNnx: lambda layer: rule},
    )
    with pytest.raises(ValueError, match=r"'spare/kernel'.*strict=False"):
        start(strict=True)
    with pytest.warns(UserWarning, match="'spare/kernel': its layer was not called"):
        warm = start()
    exact = np.linalg.eigvalsh(x.T @ x / len(x))[:-3:-1]
    for path in ("dense/kernel", "own/weight"):
        found = layer(warm, path).spectrum
        assert int(found.iterations.max()) == 8
        np.testing.assert_allclose(found.eigenvalues.ravel(), exact, rtol=1e-3)
    assert int(layer(warm, "spare/kernel").spectrum.iterations.max()) == 0


def test_a_head_of_one_output_is_trained_by_the_papers_rule() -> None:
    """Its side has length 1: the projection is the identity, the term beta W."""
    head = nn.Dense(1)
    x = batch(NETWORKS["dense"], 2)
    params = head.init(jax.random.key(0), x)["params"]

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean((head.apply({"params": params}, x) - 1) ** 2)

    tx = dsbp_optax.subspace_sam(dsbp_optax.dsbp(0.1, 2, sharpness=0.5), 0.0)
    state = dsbp_optax.linen.warm_start(loss, params, x, opt_state=tx.init(params))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        _, grads, seen = dsbp_optax.linen.value_and_grad(loss)(
            params, x, opt_state=state
        )
        again = {"statistics": seen, "grad_fn": lambda p, _: jax.grad(loss)(p, x)}
        return grads, tx.update(grads, state, params, **again)[0]

    grads, updates = step(params, state)
    expected = -0.1 * (grads["kernel"] + 0.5 * params["kernel"])
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 1), Axes((0,), (1,))),
        ((1, 5), Axes((0,), (1,))),
        ((3, 3, 4, 1), Axes((0, 1, 2), (3,))),
        ((2, 5, 1), Axes((1,), (2,), (0,))),
        ((1, 1), Axes((0,), (1,))),
    ],
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_side_of_length_one_is_read_off_a_state(shape, axes, side) -> None:
    view = layout.matrix_view(shape, axes, side)
    basis, count = (jnp.zeros(view.form(rows, 1)) for rows in (True, False))
    found = capture_state.view(Rider(basis, count, count), shape)
    assert (found.size, found.other) == (view.size, view.other)
    assert found.coordinate_form(1) == view.coordinate_form(1)


def test_nnx_warm_start_and_state_changes() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(12, 9, rngs=rngs)
            self.norm = nnx.BatchNorm(9, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.drop(self.norm(self.first(x)))

    x = jax.random.normal(jax.random.key(0), (20, 12))
    model = Net(nnx.Rngs(0))
    twin = nnx.clone(model)
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    numbers = nnx.Not(nnx.RngKey)

    def loss_fn(model: Any, x: Any) -> Any:
        return jnp.mean(model(x) ** 2), 1.0

    dsbp_optax.nnx.warm_start(loss_fn, model, x, opt_state=opt, has_aux=True)
    assert_same(nnx.state(model, numbers), nnx.state(twin, numbers))
    done = dsbp_optax.diagnostics.metrics(opt.opt_state)
    assert int(done["dsbp/iterations/first/kernel"]) == 4
    collect = nnx.jit(dsbp_optax.nnx.value_and_grad(loss_fn, has_aux=True))
    (loss, _), grads, _ = collect(model, x, opt_state=opt)
    plain = nnx.jit(nnx.value_and_grad(loss_fn, has_aux=True))
    (expected, _), expected_grads = plain(twin, x)
    assert_same((loss, grads), (expected, expected_grads))
    assert_same(nnx.state(model, numbers), nnx.state(twin, numbers))
    assert int(model.drop.rngs.count[...]) == int(twin.drop.rngs.count[...])


def test_two_threads_and_two_models_do_not_meet() -> None:
    network = NETWORKS["dense"]
    results: dict[int, Any] = {}

    def work(seed: int) -> None:
        params = jax.tree.map(lambda p: p * (seed + 1), init(network))
        model = nnx_twin(network, params)
        x = batch(network, seed)
        state = jax.jit(optimizer().init)(nnx.state(model, nnx.Param))
        collect = dsbp_optax.nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))
        collect = nnx.jit(collect)
        linen = statistics_of(network.linen, params, x)
        results[seed] = (collect(model, x, opt_state=state)[2], linen)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        mine, linen = results[seed]
        assert_same(mine, linen)
    assert float(results[0][0]["second/kernel"].trace.ravel()[0]) != float(
        results[1][0]["second/kernel"].trace.ravel()[0]
    )


def test_second_derivatives_go_through_the_tap() -> None:
    """SAM and Hessian-vector products differentiate the gradient."""
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 2)
    state = jax.jit(optimizer().init)(params)
    collect = jax.jit(dsbp_optax.linen.value_and_grad(loss_of(network.linen)))
    ones = jax.tree.map(jnp.ones_like, params)

    def gradient(params: Any) -> Any:
        return collect(params, x, opt_state=state)[1]

    def product(gradient: Any) -> Any:
        return jax.jit(lambda p: jax.jvp(gradient, (p,), (ones,))[1])(params)

    tapped = product(gradient)
    plain = product(lambda p: jax.grad(loss_of(network.linen))(p, x))
    assert_same(tapped, plain)
