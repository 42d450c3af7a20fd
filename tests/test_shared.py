"""Kernels with one and the same input keep one basis; a wrong grouping is refused."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from states import basis_of, layer, owners, with_basis

import dsbp_optax
from dsbp_optax import Activations, Axes, by_path, diagnostics

D, M, K, N = 12, 10, 3, 40
QKV = ("query/kernel", "key/kernel", "value/kernel")


def params_of(*names: str, prefix: str = "", dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(0)
    one = {
        name: {"kernel": jnp.asarray(rng.normal(size=(D, M)), dtype)} for name in names
    }
    return {prefix: one} if prefix else one


def projection(inner: Any = None, **keywords: Any) -> Any:
    chosen = {"rank": K, "update_every": 2, "power_iterations": 2, **keywords}
    inner = optax.trace(0.9) if inner is None else inner
    return dsbp_optax.scale_by_spectral_projection(inner, **with_basis(**chosen))


def moment_of(state: Any, path: str) -> Any:
    return optax.tree.get(layer(state, path).inner, "trace")


def refused(error: type, call: Any, *words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


# ---------------------------------------------------------------- what is grouped


def test_patterns_group_paths_whose_stars_are_equal() -> None:
    tree = {f"block_{i}": params_of("query", "key", "value", "out") for i in range(2)}
    share = [("*/query/kernel", "*/key/kernel", "*/value/kernel")]
    state = projection(share=share).init(tree)
    who = {"query": "query", "key": "query", "value": "query", "out": "out"}
    assert {path: one.kernel.owner for path, one in by_path(state).items()} == {
        f"block_{i}/{name}/kernel": f"block_{i}/{owner}/kernel"
        for i in range(2)
        for name, owner in who.items()
    }
    kept = {f"block_{i}/{n}/kernel" for i in range(2) for n in ("query", "out")}
    assert owners(state) == kept
    assert sum(map(len, state.basis.values())) == 4
    assert sum(x.size for x in jax.tree.leaves(state.inner)) == 8 * K * M


def test_two_bases_fewer_a_block() -> None:
    """q, k, v save ``2 d k`` numbers, and what is known of two spectra."""
    tree = params_of("query", "key", "value")
    alone, together = (
        projection(project="always", share=share).init(tree) for share in ((), [QKV])
    )
    bytes_of = diagnostics.state_bytes
    assert bytes_of(alone.basis) - bytes_of(together.basis) == 2 * D * K * 4
    assert bytes_of(alone.spectrum) == 3 * bytes_of(together.spectrum)
    assert bytes_of(alone.inner) == bytes_of(together.inner)


def test_memory_is_weighed_jointly() -> None:
    """Each kernel alone would not save memory: a basis costs more than it spares."""
    tree = {n: {"kernel": jnp.ones((D, 4))} for n in ("query", "key", "value")}
    make = functools.partial(projection, rank=4)
    assert not owners(make().init(tree))
    tx = make(share=[QKV])
    assert owners(tx.init(tree)) == {QKV[0]}
    told = str(diagnostics.explain(tx, tree))
    assert "key/kernel    projected: shares the basis of 'query/kernel'" in told
    (choice,) = diagnostics.explain(tx, tree)[QKV[1]]
    assert choice.kernel.owner == QKV[0]
    tx = projection(rank=11, share=[QKV])
    assert "for all that share the basis" in str(diagnostics.explain(tx, tree))


def test_the_owner_is_the_first_that_can_be_projected() -> None:
    tree = params_of("query", "key", "value")
    rank = {"query/*": None, "*": K}
    state = projection(rank=rank, share=[QKV]).init(tree)
    assert set(by_path(state)) == set(QKV[1:])
    assert layer(state, QKV[2]).kernel.owner == QKV[1]
    mask = {"query": False, "key": True, "value": True}
    state = optax.masked(projection(share=[QKV]), mask).init(tree)
    assert owners(state) == {QKV[1]}
    assert layer(state, QKV[2]).kernel.owner == QKV[1]


@pytest.mark.parametrize(
    ("error", "share", "words"),
    [
        (TypeError, "query", ("share", "'query'", "groups")),
        (TypeError, ["query/kernel"], ("share", "query/kernel", "groups")),
        (TypeError, [(1, 2)], ("share", "(1, 2)")),
        (ValueError, [("query/kernel",)], ("share", "two paths or more")),
        (ValueError, [("*/kernel", "key/kernel")], ("share", "as many '*'")),
    ],
)
def test_bad_groups_at_construction(error: Any, share: Any, words: Any) -> None:
    refused(error, lambda: projection(share=share), *words)


def test_bad_groups_at_init() -> None:
    tree = params_of("query", "key", "value")
    tree["wide"] = {"kernel": jnp.ones((D + 1, M))}
    tree["heads"] = {"kernel": jnp.ones((D, 2, 5)), "bias": jnp.ones((2, 5))}

    def init(share: Any, **keywords: Any) -> Any:
        return lambda: projection(share=share, **keywords).init(tree)

    refused(
        ValueError, init([("query/kernel", "kye/kernel")]), "'kye/kernel'", "'key/ker"
    )
    refused(
        ValueError, init([("query/kernel", "wide/kernel")]), "wide/kernel", "(13, 10)"
    )
    refused(ValueError, init([("query/kernel", "heads/kernel")]), "heads", "Remedy")
    refused(ValueError, init([QKV], side="output"), "input side", "Remedy")
    rank = {"key/*": 2, "*": K}
    refused(ValueError, init([QKV], rank=rank, project="always"), "(12, 1, 2)")
    twice = [QKV, ("wide/kernel", "key/kernel")]
    refused(ValueError, init(twice), "'key/kernel'", "more than one group")


def test_heads_of_different_number_share() -> None:
    """Grouped-query attention: the basis has the input's axes alone."""
    tree = {
        "query": {"kernel": jnp.ones((D, 4, 5))},
        "key": {"kernel": jnp.ones((D, 2, 5))},
    }
    axes = {"*/kernel": Axes((0,), (1, 2))}
    state = projection(share=[QKV[:2]], axes=axes).init(tree)
    assert basis_of(state, QKV[0]).shape == (D, 1, 1, K)
    assert moment_of(state, QKV[1]).shape == (K, 10)


def test_a_fraction_gives_a_group_the_largest_of_its_ranks() -> None:
    """Keys of fewer heads are narrower than queries."""
    tree = params_of("query", "key")
    tree["key"] = {"kernel": jnp.ones((D, 4))}
    rank = dsbp_optax.RankFraction(0.5)
    tx = projection(rank=rank, share=[QKV[:2]], project="always")
    state = tx.init(tree)
    assert basis_of(state, QKV[0]).shape == (D, 1, M // 2)
    assert moment_of(state, QKV[1]).shape == (M // 2, 4)
    grads = jax.tree.map(jnp.ones_like, tree)
    _, after = jax.jit(tx.update)(grads, state, tree)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    other = projection(rank=2, share=[QKV[:2]], project="always").init(tree)
    _, after = jax.jit(tx.update)(grads, other, tree)
    assert basis_of(after, QKV[0]).shape == (D, 1, 2), "the state says what it holds"


# ---------------------------------------------------------------- laws


def gradients(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def activations(seed: int) -> Activations:
    rng = np.random.default_rng(100 + seed)
    return Activations(jnp.asarray(rng.normal(size=(N, D)) * 1.5 ** -np.arange(D)))


def start_alike(state: Any) -> Any:
    """The same initial basis for all: a path has its own."""
    first, each = layer(state, QKV[0]).basis, by_path(state)
    alike = {path: each[path]._replace(basis=first) for path in owners(state)}
    return dsbp_optax.with_layers(state, alike)


def test_shared_equals_unshared_with_equal_statistics() -> None:
    tree = params_of("query", "key", "value")
    every = [
        projection(optax.scale_by_adam(), project="always", share=share)
        for share in ((), [QKV])
    ]
    states = [start_alike(tx.init(tree)) for tx in every]
    wrong = states[0]
    alone, together = (jax.jit(tx.update) for tx in every)
    for i in range(4):
        grads, one = gradients(tree, i), {QKV[0]: activations(i)}
        same = dict.fromkeys(QKV, activations(i))
        expected, states[0] = alone(grads, states[0], statistics=same)
        got, states[1] = together(grads, states[1], statistics=one)
        other = {**same, QKV[2]: activations(i + 50)}
        spoilt, wrong = alone(grads, wrong, statistics=other)
    for left, right in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    gap = jnp.abs(spoilt["value"]["kernel"] - got["value"]["kernel"])
    assert float(gap.max()) > 1e-2, "another basis must show"


def test_without_statistics_the_basis_is_that_of_all_gradients() -> None:
    """The top left singular vectors of the gradients side by side."""
    tree = params_of("query", "key", "value")
    tx = projection(
        optax.identity(), project="always", share=[QKV], update_every=1, rank=K
    )
    rng = np.random.default_rng(3)
    values = np.diag(3.0 ** -np.arange(D))
    vectors = np.linalg.qr(rng.normal(size=(D, D)))[0]
    mixed = vectors @ values @ rng.normal(size=(D, 3 * M))
    parts = np.split(mixed.astype(np.float32), 3, axis=1)
    grads = {
        path.split("/")[0]: {"kernel": jnp.asarray(part)}
        for path, part in zip(QKV, parts, strict=True)
    }
    state = tx.init(tree)
    update = jax.jit(tx.update)
    for _ in range(12):
        _, state = update(grads, state)
    basis = np.asarray(layer(state, QKV[0]).basis)

    def outside(matrix: Any) -> float:
        truth = np.linalg.svd(matrix)[0][:, :K]
        return float(np.linalg.norm(truth - basis @ (basis.T @ truth)))

    assert outside(mixed) < 1e-3
    assert outside(parts[0]) > 1e-2, "one of them alone has another basis"


def test_statistics_under_the_path_of_any_member() -> None:
    tree = params_of("query", "key", "value")
    tx = projection(share=[QKV], project_cold=True)
    grads, state = gradients(tree, 0), tx.init(tree)
    every = dict.fromkeys(QKV, activations(0))
    one, _ = jax.jit(tx.update)(grads, state, statistics=every)
    two, _ = jax.jit(tx.update)(grads, state, statistics={QKV[2]: activations(0)})
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    gap = jnp.abs(one["key"]["kernel"] - grads["key"]["kernel"]).max()
    assert float(gap) > 1e-2
    fewer = Activations(jnp.ones((N - 1, D)))
    refused(
        ValueError,
        lambda: tx.update(
            grads, state, statistics={QKV[0]: activations(0), QKV[1]: fewer}
        ),
        "'key/kernel'",
        "'query/kernel'",
        "Remedy",
    )


# ---------------------------------------------------------------- the adapters


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any, y: Any = None) -> Any:
        return nn.MultiHeadDotProductAttention(2, name="attn")(x, y)


def attn(*names: str) -> tuple[str, ...]:
    return tuple(f"attn/{name}/kernel" for name in names)


X, Y = jnp.ones((4, 6, 8)), jnp.ones((4, 5, 8))


def linen_case(model: nn.Module, *inputs: Any) -> tuple[Any, Any]:
    params = model.init(jax.random.key(0), *inputs)["params"]

    def loss_fn(params: Any, *inputs: Any) -> Any:
        return jnp.mean(model.apply({"params": params}, *inputs) ** 2)

    return params, loss_fn


class AttentionNnx(nnx.Module):
    def __init__(self) -> None:
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, *inputs: Any) -> Any:
        return self.attn(*inputs)


def nnx_loss(model: Any, *inputs: Any) -> Any:
    return jnp.mean(model(*inputs) ** 2)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [((X,), attn("key", "query", "value")), ((X, Y), attn("key", "value"))],
    ids=["self", "cross"],
)
def test_attention_is_understood(inputs: Any, expected: Any) -> None:
    params, loss_fn = linen_case(Attention(), *inputs)
    assert dsbp_optax.linen.find_shared_inputs(loss_fn, params, *inputs) == (expected,)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    groups = dsbp_optax.nnx.find_shared_inputs(nnx_loss, AttentionNnx(), *shapes)
    assert groups == (expected,)


def test_a_wrong_grouping_is_refused_by_both_adapters() -> None:
    tx = projection(rank=2, project="always", share=[attn("query", "key", "value")])
    words = ("'attn/key/kernel'", "'attn/query/kernel'", "another input", "Remedy")
    params, loss_fn = linen_case(Attention(), X, Y)
    state = tx.init(params)

    def trace(*inputs: Any, strict: bool = True) -> Any:
        step = dsbp_optax.linen.value_and_grad(loss_fn, strict=strict)
        return jax.eval_shape(lambda s: step(params, *inputs, opt_state=s), state)[2]

    assert set(trace(X)) == owners(state)
    with pytest.warns(UserWarning, match="'attn/key/kernel'.*another input"):
        assert set(trace(X, Y, strict=False)) == owners(state)
    refused(ValueError, lambda: trace(X, Y), *words)
    model = AttentionNnx()
    state = tx.init(nnx.state(model, nnx.Param))
    step = dsbp_optax.nnx.value_and_grad(nnx_loss, strict=True)
    refused(ValueError, lambda: step(model, X, Y, opt_state=state), *words)


class Mixed(nn.Module):
    """Layers of one input that do not read it alike, and calls that differ."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        a = nn.Conv(6, (3, 3), name="plain")(x)
        b = nn.Conv(6, (3, 3), strides=2, name="strided")(x)
        c = nn.Conv(6, (3, 3), name="alike")(x)
        flat = x.reshape(x.shape[0], -1)
        one, two = nn.Dense(5, name="one"), nn.Dense(5, name="two")
        third, copy = nn.Dense(7, name="third"), nn.Dense(5, name="copy")
        outs = [one(flat), two(flat), two(flat + 1), third(flat), copy(flat + 0)]
        return sum(jnp.mean(y) for y in (a, b, c, *outs))


def test_patches_and_calls_must_coincide() -> None:
    x = jnp.ones((2, 6, 6, 3))
    params, loss_fn = linen_case(Mixed(), x)
    assert dsbp_optax.linen.find_shared_inputs(loss_fn, params, x) == (
        ("alike/kernel", "plain/kernel"),
        ("one/kernel", "third/kernel"),
    )


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        gate, up = nn.Dense(12, name="gate")(x), nn.Dense(12, name="up")(x)
        return x + nn.Dense(8, name="down")(jnp.tanh(gate) * up), None


class Stack(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.remat(Gated, prevent_cse=False) if self.remat else Gated
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scanned(name="blocks")(x, None)[0]


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        members = nn.vmap(
            Gated,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, None),
        )
        return members(name="blocks")(x, None)[0]


@pytest.mark.parametrize(
    "model", [Stack(False), Stack(True), Ensemble()], ids=["scan", "remat", "vmap"]
)
def test_stacked_layers_share(model: Any) -> None:
    x = jax.random.normal(jax.random.key(1), (3, 20, 8))
    params, loss_fn = linen_case(model, x)
    found = dsbp_optax.linen.find_shared_inputs(loss_fn, params, x)
    assert found == (("blocks/gate/kernel", "blocks/up/kernel"),)
    tx = projection(rank=2, share=found)
    state = tx.init(params)
    assert basis_of(state, "blocks/gate/kernel").shape == (3, 8, 1, 2)
    collect = dsbp_optax.linen.value_and_grad(loss_fn)

    def step(params: Any, state: Any) -> Any:
        _, grads, statistics = collect(params, x, opt_state=state)
        assert set(statistics) == owners(state)
        return tx.update(grads, state, statistics=statistics)

    updates, new = jax.eval_shape(step, params, state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)


class GatedNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Linear(8, 12, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.down(jnp.tanh(self.gate(x)) * self.up(x))


class StackNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> GatedNnx:
            return GatedNnx(rngs)

        self.blocks = make(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: GatedNnx, x: Any) -> Any:
            return nnx.remat(lambda layer, x: layer(x))(layer, x)

        return run(self.blocks, x)


def test_stacked_nnx_layers_share() -> None:
    model = StackNnx(nnx.Rngs(0))
    before = jax.tree.structure(nnx.state(model))
    found = dsbp_optax.nnx.find_shared_inputs(nnx_loss, model, jnp.ones((5, 8)))
    assert found == (("blocks/gate/kernel", "blocks/up/kernel"),)
    assert jax.tree.structure(nnx.state(model)) == before
    assert type(model.blocks.gate) is nnx.Linear


def test_nnx_trains_with_a_shared_basis_and_compiles_once() -> None:
    model = AttentionNnx()
    share = dsbp_optax.nnx.find_shared_inputs(nnx_loss, model, X)
    tx = projection(rank=2, project="always", share=share)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    collect, traces = dsbp_optax.nnx.value_and_grad(nnx_loss), []

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        traces.append(1)
        loss, grads, statistics = collect(model, x, opt_state=optimizer)
        optimizer.update(model, grads, statistics=statistics)
        return loss

    for _ in range(3):
        step(model, optimizer, X)
    assert len(traces) == 1
