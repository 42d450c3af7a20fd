"""Layers of third-party models: statistics that are right, or one warning."""

import re
import warnings
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from states import basis_of, owners
from test_adapters import assert_same, explicit, optimizer

import dsbp_optax
from dsbp_optax import Axes, project_gradients
from dsbp_optax.capture import Inspection, LinearMap, einsum_map, linen_scope

X = jax.random.normal(jax.random.key(9), (6, 5, 8))
ROWS = X.reshape(30, 8)


class Heads(nn.Module):
    """Attention's way out in nanodo: a kernel of three axes, no bias."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.DenseGeneral((2, 4), use_bias=False, name="query")(x)
        return nn.DenseGeneral(8, (-2, -1), use_bias=False, name="odd")(jnp.tanh(h))


class Decoder(nn.Module):
    """Blocks scanned along the second axis of their kernels; all lengths coincide."""

    axis: int = 1
    length: int = 8

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def block(module: Any, x: Any, _: Any) -> Any:
            return jnp.tanh(nn.Dense(8, use_bias=False, name="wi")(x)), None

        scanned = nn.scan(
            block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.length,
        )
        return scanned(self, x, None)[0]


class Members(nn.Module):
    """Kernels stacked by `nn.vmap` along an axis of the same length as the others."""

    axis: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        members = nn.vmap(
            nn.Dense,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=8,
        )
        return members(8, use_bias=False, name="members")(x)


class Einsum(nn.Module):
    """An einsum of the user's own, the equation before the input, as big_vision's."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation: str, x: Any) -> Any:
        w = self.param("w", nn.initializers.normal(0.3), self.shape)
        return jnp.einsum(equation, x, w)


EQUATIONS = ("BTD,SNDH->SBTNH", "BTNH,NHD->BTD")


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        qkv = Einsum((3, 2, 8, 4), name="qkv_einsum")(EQUATIONS[0], x)
        y = Einsum((2, 4, 8), name="vec")(EQUATIONS[1], jnp.tanh(qkv.sum(0)))
        return nn.Einsum((8, 2, 3), "...d,dhe->...he", name="flax")(y)


GEMMA_RULE = {
    Einsum: lambda m: einsum_map(
        EQUATIONS[0] if m.name == "qkv_einsum" else EQUATIONS[1], "w"
    )
}


class StdConv(nn.Conv):
    """Of ViT hybrids: it standardizes its kernel."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        found = super().param(name, *args, **kwargs)
        if name == "kernel":
            found = found - found.mean((0, 1, 2))
            found = found / (found.std((0, 1, 2)) + 1e-5)
        return found


class Hybrid(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = StdConv(6, (3, 3), name="stem")(x.reshape(6, 5, 8, 1))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Tied(nn.Module):
    """FlaxBERT's head: a Dense applied to the transpose of the table."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        table = nn.Embed(8, 8, name="table")
        h = nn.Dense(8, use_bias=False, name="dense")(x)
        params = {"kernel": table.embedding.T}
        logits = nn.Dense(8, use_bias=False, parent=None).apply({"params": params}, h)
        return logits + table(jnp.arange(5))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.RNN(nn.OptimizedLSTMCell(7), name="rnn")(x)


class Weighted(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8, name="first")(x)
        return nn.WeightNorm(nn.Dense(6, name="second"))(x)


class Transposed(nn.Module):
    """``x @ K^T``, the kernel square: no shape tells."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x @ self.param("kernel", nn.initializers.normal(), (8, 8)).T


class Mixture(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Einsum((6, 8, 4), "ebd,edf->ebf", name="experts")(x)


class NnxHeads(nnx.Module):
    """Qwen3's and Gemma's in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q_proj = nnx.Einsum("BTD,DNH->BTNH", (8, 2, 4), rngs=rngs)
        self.kv = nnx.Einsum("BTNH,SNHK->SBTK", (2, 2, 4, 8), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.kv(jnp.tanh(self.q_proj(x)))


class Case:
    """A model, and the samples ``(*batch, n, d)`` that enter each kernel.

    `fails` are paths without statistics, and a word of the reason for each.
    """

    def __init__(self, model: Any, seen: Any, x: Any = X, **fails: str) -> None:
        self.model, self.seen, self.x, self.rules = model, seen, x, {}
        self.params: Any = None
        self.fails = {path.replace("__", "/"): why for path, why in fails.items()}

    def by(self, rules: Any) -> "Case":
        self.rules = rules
        return self

    def start(self) -> Any:
        """Loss, differentiated argument, parameters by path, plain way, adapter."""
        if isinstance(self.model, type):
            model = self.model(nnx.Rngs(0))
            return (
                lambda m: jnp.mean(jnp.sin(m(self.x))),
                model,
                nnx.value_and_grad,
                dsbp_optax.nnx,
            )
        if self.params is None:
            self.params = jax.jit(self.model.init)(jax.random.key(0), self.x)["params"]
        return (
            lambda p: jnp.mean(jnp.sin(self.model.apply({"params": p}, self.x))),
            self.params,
            jax.value_and_grad,
            dsbp_optax.linen,
        )


def heads(p: Any) -> Any:
    h = jnp.tanh(jnp.einsum("nd,dhe->nhe", ROWS, p["query"]["kernel"]))
    return {"query/kernel": ROWS, "odd/kernel": h.reshape(30, 8)}


def decoder(axis: int, length: int) -> Any:
    def seen(p: Any) -> Any:
        x, every = ROWS, []
        for kernel in jnp.moveaxis(p["wi"]["kernel"], axis, 0):
            every.append(x)
            x = jnp.tanh(x @ kernel)
        return {"wi/kernel": jnp.stack(every)}

    return seen


def gemma(p: Any) -> Any:
    qkv = jnp.einsum("nd,shde->nhe", ROWS, p["qkv_einsum"]["w"])
    h = jnp.tanh(qkv)
    y = jnp.einsum("nhe,hed->nd", h, p["vec"]["w"])
    return {"qkv_einsum/w": ROWS, "vec/w": h.reshape(30, 8), "flax/kernel": y}


def lstm(p: Any) -> Any:
    cell = nn.OptimizedLSTMCell(7)
    params = {"params": p["OptimizedLSTMCell_0"]}
    carry, before = (jnp.zeros((6, 7)), jnp.zeros((6, 7))), []
    for t in range(5):
        before.append(carry[1])
        carry, _ = cell.apply(params, carry, X[:, t])
    found = {f"OptimizedLSTMCell_0/i{g}/kernel": ROWS for g in "ifgo"}
    hidden = jnp.concatenate(before)
    return {**found, **{f"OptimizedLSTMCell_0/h{g}/kernel": hidden for g in "ifgo"}}


def nnx_heads(p: Any) -> Any:
    q = jnp.tanh(jnp.einsum("nd,dhe->nhe", ROWS, p["q_proj"]["kernel"]))
    return {"q_proj/kernel": ROWS, "kv/kernel": q.reshape(30, 8)}


def std_head(p: Any) -> Any:
    stem = StdConv(6, (3, 3)).apply({"params": p["stem"]}, X.reshape(6, 5, 8, 1))
    return {"head/kernel": stem.mean((1, 2))}


CASES = {
    "heads": Case(Heads(), heads),
    "decoder": Case(Decoder(), decoder(1, 8)),
    "decoder 0": Case(Decoder(0, 3), decoder(0, 3)),
    "decoder 2": Case(Decoder(2), decoder(2, 8)),
    "members": Case(
        Members(), lambda p: {"members/kernel": jnp.stack([ROWS] * 8)}, ROWS
    ),
    "members 0": Case(
        Members(0), lambda p: {"members/kernel": jnp.stack([ROWS] * 8)}, ROWS
    ),
    "gemma": Case(Gemma(), gemma).by(GEMMA_RULE),
    "std": Case(Hybrid(), std_head, stem__kernel="does not act"),
    "tied": Case(
        Tied(),
        lambda p: {"dense/kernel": ROWS},
        table__embedding="no rule",
    ),
    "lstm": Case(Recurrent(), lstm),
    "weight norm": Case(
        Weighted(), lambda p: {"first/kernel": ROWS}, second__kernel="rewrites"
    ),
    "transposed": Case(Transposed(), lambda p: {}, kernel="no rule"),
    "transposed, a rule": Case(Transposed(), lambda p: {"kernel": ROWS}).by(
        {Transposed: lambda m: LinearMap(jnp.matmul, axes=Axes((1,), (0,)))}
    ),
    "transposed, a wrong rule": Case(
        Transposed(), lambda p: {}, kernel=r"axes \(0,\) are summed over by its rule"
    ).by({Transposed: lambda m: LinearMap(jnp.matmul, 1)}),
    "mixture": Case(Mixture(), lambda p: {"experts/kernel": X}),
    "nnx einsum": Case(NnxHeads, nnx_heads),
}


def in_kernel_form(sketch: Any, matrices: Any, axes: Axes, basis: Any) -> Any:
    """The sketch by its definition, with the axes in the kernel's order."""
    order = (*axes.batch, *axes.inputs, *axes.outputs, basis.ndim - 1)
    flat = basis.transpose(order).reshape(*matrices.shape[:-2], matrices.shape[-1], -1)
    expected = explicit(matrices, flat[..., None, :])
    got = sketch.product.transpose(order).reshape(flat.shape)
    assert_same(got, expected.product.reshape(flat.shape), rtol=1e-4)
    assert_same(sketch.count.ravel(), expected.count.ravel())
    assert_same(sketch.trace.ravel(), expected.trace.ravel(), rtol=1e-4)


@pytest.mark.parametrize("make", ["value_and_grad", "subspace_value_and_grad"])
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_right_or_one_warning_says_why(name: str, make: str) -> None:
    case = CASES[name]
    loss_fn, params, plain, adapter = case.start()
    pure = nnx.state(params, nnx.Param) if adapter is dsbp_optax.nnx else params
    tree = nnx.to_pure_dict(pure) if adapter is dsbp_optax.nnx else params
    plan = adapter.inspect(loss_fn, params, rules=case.rules)
    assert isinstance(plan, Inspection) and hash(plan) == hash(plan)
    expected = case.seen(tree)
    assert set(plan.covered) == set(expected), str(plan)
    assert set(case.fails) <= set(dict(plan.reasons))
    tx = optimizer(axes=plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = jax.jit(tx.init)(pure)
    compiled = nnx.jit if adapter is dsbp_optax.nnx else jax.jit
    step = compiled(getattr(adapter, make)(loss_fn, rules=case.rules))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss, grads, seen = step(params, opt_state=state)
    value, whole = compiled(plain(loss_fn))(params)
    assert_same(loss, value, rtol=1e-6)
    short = make != "value_and_grad"
    right = project_gradients(whole, state) if short else whole
    if short:
        leaves, treedef = jax.tree.flatten(grads, is_leaf=is_short)
        exact, parts = (treedef.flatten_up_to(tree) for tree in (whole, right))
        for got, one, part in zip(leaves, exact, parts, strict=True):
            assert_same(got, part if is_short(got) else one, rtol=1e-4)
    else:
        assert_same(grads, whole, rtol=1e-6)
        assert jax.tree.structure(grads) == jax.tree.structure(whole)
    assert set(seen) == set(expected)
    for path, matrices in expected.items():
        in_kernel_form(
            seen[path], matrices, dict(plan.axes)[path], basis_of(state, path)
        )
    failing = {p: why for p, why in case.fails.items() if p in owners(state)}
    assert len(caught) == bool(failing), [str(w.message) for w in caught]
    for path, why in failing.items():
        assert f"'{path}': " in str(caught[0].message)
        assert re.search(why, str(caught[0].message))


@pytest.mark.parametrize("name", ["heads", "gemma", "tied", "nnx einsum"])
def test_value_and_gradients_are_those_of_jax_bit_for_bit(name: str) -> None:
    """One operation after the other, as compilers fuse them differently."""
    case = CASES[name]
    loss_fn, params, plain, adapter = case.start()
    pure = nnx.state(params, nnx.Param) if adapter is dsbp_optax.nnx else params
    plan = adapter.inspect(loss_fn, params, rules=case.rules)
    step = adapter.value_and_grad(loss_fn, rules=case.rules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *got, _ = step(params, opt_state=jax.jit(optimizer(axes=plan).init)(pure))
    jax.tree.map(np.testing.assert_array_equal, got, list(plain(loss_fn)(params)))


def test_a_state_of_another_optimizer_is_told() -> None:
    params, tx = {"kernel": jnp.ones((8, 8))}, optimizer()
    chain = optax.chain(optax.clip(1.0), tx).init(params)
    step = dsbp_optax.capture.value_and_grad(lambda params: params["kernel"].sum())
    _, grads, seen = step(params, opt_state=chain[0])
    assert seen is None
    metric = dsbp_optax.dsbp_adamw(0.02, rank=2)
    with pytest.warns(UserWarning, match="pass it all of what tx.init") as caught:
        metric.update(grads, metric.init(params), params, statistics=seen)
    assert caught[0].filename == __file__  # Not a line of ours.


def test_what_accumulates_gradients_gets_the_statistics() -> None:
    """`optax.MultiSteps` takes keywords, and has not the type that says so."""
    model = nn.Dense(4)
    params = model.init(jax.random.key(0), ROWS)["params"]
    tx = optax.MultiSteps(dsbp_optax.dsbp_muon(0.02, rank=2), 1)
    state = dsbp_optax.linen.TrainState.create(
        apply_fn=model.apply, params=params, tx=tx
    )

    def loss_fn(params: Any) -> Any:
        return jnp.mean(model.apply({"params": params}, ROWS) ** 2)

    step = dsbp_optax.linen.value_and_grad(loss_fn)
    _, grads, seen = step(state.params, opt_state=state.opt_state)
    state = state.apply_gradients(grads=grads, statistics=seen)
    layer = dsbp_optax.by_path(state.opt_state)["kernel"]
    assert int(layer.spectrum.activations.max()) == 1


def test_a_sketch_of_half_precision_inputs_makes_no_wide_copy_of_them() -> None:
    layer = nn.Dense(16, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (200, 24)).astype(jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)["params"]
    tx = dsbp_optax.dsbp_muon(0.02, rank=4)
    state = tx.init(params)

    def loss_fn(params: Any) -> Any:
        return layer.apply({"params": params}, x).astype(jnp.float32).mean()

    def step(params: Any, state: Any) -> Any:
        return dsbp_optax.linen.value_and_grad(loss_fn)(params, opt_state=state)

    _, _, seen = step(params, state)
    wide, v = x.astype(jnp.float32), basis_of(state, "kernel").astype(jnp.float32)
    sketch = seen["kernel"]
    product = sketch.product.reshape(24, 4)
    assert sketch.product.dtype == jnp.float32
    assert_same(product, wide.T @ (wide @ v.reshape(24, 4)), rtol=0.02)
    assert float(sketch.trace.max()) == pytest.approx(float((wide**2).sum()), rel=1e-3)
    text = str(jax.make_jaxpr(step)(params, state))
    assert "bf16[200,24]" in text and "f32[200,24]" not in text.replace("bf16", "half")


def is_short(leaf: Any) -> bool:
    return isinstance(leaf, dsbp_optax.Coordinates)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", [Decoder, Members])
def test_a_stack_is_found_where_all_lengths_coincide(kind: Any, axis: int) -> None:
    loss_fn, params, _, adapter = Case(kind(axis), None, ROWS).start()
    plan = adapter.inspect(loss_fn, params)
    ((_, axes),) = plan.axes
    rest = [a for a in range(3) if a != axis]
    assert axes == Axes((rest[0],), (rest[1],), (axis,))


# ---------------------------------------------------------------- compiled inside


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4, name="b")(jnp.tanh(nn.Dense(6, name="a")(x)))


@pytest.mark.parametrize(
    ("where", "before", "make"),  # every pair of two of them
    [
        ("loss", False, "value_and_grad"),
        ("loss", True, "subspace_value_and_grad"),
        ("apply", False, "subspace_value_and_grad"),
        ("apply", True, "value_and_grad"),
    ],
)
def test_a_compiled_loss_is_observed_and_not_poisoned(
    where: str, before: bool, make: str
) -> None:
    net = Net()
    params = jax.jit(net.init)(jax.random.key(0), ROWS)["params"]
    apply = jax.jit(net.apply) if where == "apply" else net.apply

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean(apply({"params": params}, x) ** 2)

    loss_fn = jax.jit(loss_fn) if where == "loss" else loss_fn
    plain = net.apply({"params": params}, ROWS)
    expected = jax.jit(
        jax.value_and_grad(lambda p, x: jnp.mean(net.apply({"params": p}, x) ** 2))
    )(params, ROWS)
    if before:
        loss_fn(params, ROWS)
        jax.grad(loss_fn)(params, ROWS)
    state = jax.jit(optimizer().init)(params)
    step = getattr(dsbp_optax.linen, make)(loss_fn)
    for run in (
        step,
        step,
        jax.jit(lambda p, x, opt_state: step(p, x, opt_state=opt_state)),
    ):
        loss, grads, seen = run(params, ROWS, opt_state=state)
        assert_same(loss, expected[0], rtol=1e-6)
        whole = project_gradients(expected[1], state)
        assert_same(grads, expected[1] if make == "value_and_grad" else whole)
        assert_same(seen["a/kernel"], explicit(ROWS, basis_of(state, "a/kernel")))
        assert float(seen["b/kernel"].count.max()) == 30
        assert_same(apply({"params": params}, ROWS), plain)
        assert_same(loss_fn(params, ROWS), expected[0])
        assert_same(jax.grad(loss_fn)(params, ROWS), expected[1])


def test_a_compiled_nnx_loss_is_observed_and_not_poisoned() -> None:
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    loss_fn = nnx.jit(lambda model, x: jnp.mean(model(x) ** 2))
    state = optimizer().init(nnx.state(model, nnx.Param))
    step = dsbp_optax.nnx.value_and_grad(loss_fn)
    for _ in range(2):
        loss, _, seen = step(model, ROWS, opt_state=state)
        assert_same(seen["kernel"], explicit(ROWS, basis_of(state, "kernel")))
        assert_same(loss_fn(model, ROWS), loss)


# ---------------------------------------------------------------- without a framework


def plain_params() -> Any:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "first": {"w": jax.random.normal(keys[0], (8, 6)), "b": jnp.zeros(6)},
        "second": {"w": jax.random.normal(keys[1], (4, 6))},
    }


def plain_loss(params: Any, x: Any) -> Any:
    first, second = params["first"], params["second"]
    h = jnp.tanh(dsbp_optax.tap(x, "first/w") @ first["w"] + first["b"])
    transposed = LinearMap(jnp.matmul, axes=Axes((1,), (0,)))
    return jnp.mean((dsbp_optax.tap(h, "second/w", transposed) @ second["w"].T) ** 2)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint])
def test_plain_jax_says_tap(around: Any) -> None:
    params, loss_fn = plain_params(), around(plain_loss)
    plan = dsbp_optax.capture.inspect(loss_fn, params, ROWS)
    assert dict(plan.axes)["second/w"] == Axes((1,), (0,))
    tx = optimizer(axes=plan)
    state = jax.jit(tx.init)(params)
    step = dsbp_optax.capture.value_and_grad(loss_fn)
    plain = jax.jit(jax.value_and_grad(plain_loss))(params, ROWS)
    for run in (
        step,
        step,
        jax.jit(lambda p, x, opt_state: step(p, x, opt_state=opt_state)),
    ):
        loss, grads, seen = run(params, ROWS, opt_state=state)
        assert_same((loss, grads), plain, rtol=1e-6)
        hidden = jnp.tanh(ROWS @ params["first"]["w"])
        for path, a in (("first/w", ROWS), ("second/w", hidden)):
            v = basis_of(state, path).reshape(a.shape[1], -1)
            got = seen[path].product.reshape(v.shape)
            assert_same(got, a.T @ (a @ v))
            assert float(seen[path].count.max()) == 30
    assert dsbp_optax.tap(ROWS, "first/w") is ROWS
    jax.jit(tx.update)(grads, state, params, statistics=seen)


def test_plain_layers_that_do_not_tap_are_named() -> None:
    params = plain_params()

    def loss_fn(params: Any, x: Any) -> Any:
        h = dsbp_optax.tap(x, "first/w") @ params["first"]["w"]
        return jnp.mean((h @ params["second"]["w"].T) ** 2)

    state = optimizer().init(params)
    with pytest.warns(UserWarning, match="'second/w': no rule") as caught:
        seen = dsbp_optax.capture.value_and_grad(loss_fn)(
            params, ROWS, opt_state=state
        )[2]
    assert set(seen) == {"first/w"} and len(caught) == 1


# ---------------------------------------------------------------- hidden layers


class Signed(nn.Module):
    """A layer whose kernel's cotangent is rewritten, as Flax's own example does."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def backward(pull: Any, g: Any) -> Any:
            of_params, of_x = pull(g)
            return jax.tree.map(jnp.sign, of_params), of_x

        def plain(module: Any, x: Any) -> Any:
            return module(x)

        def forward(module: Any, x: Any) -> Any:
            return nn.vjp(plain, module, x)

        signed = nn.custom_vjp(plain, forward_fn=forward, backward_fn=backward)
        return nn.Dense(8, name="beside")(signed(nn.Dense(8, name="hidden"), x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(8, name="beside")(nn.Dense(8, name="hidden")(x))


def _own_derivative(apply: Any) -> Any:
    own = jax.custom_vjp(apply)
    own.defvjp(
        lambda params, x: (own(params, x), (params, x)),
        lambda saved, g: jax.vjp(apply, *saved)[1](g),
    )
    return own


def _fixed_point(apply: Any) -> Any:
    def solve(f: Any, z: Any) -> Any:
        return jax.lax.fori_loop(0, 20, lambda _, z: z - f(z), z)

    def found(params: Any, x: Any) -> Any:
        def equation(z: Any) -> Any:
            return z - 0.3 * jnp.tanh(apply(params, z)) - x

        return jax.lax.custom_root(
            equation, x, solve, lambda g, y: y / g(jnp.ones_like(y))
        )

    return found


HIDING = {
    "jax.custom_vjp": (Plain(), _own_derivative, ("beside", "hidden")),
    "jax.lax.custom_root": (Plain(), _fixed_point, ("beside", "hidden")),
    "nn.custom_vjp": (Signed(), lambda apply: apply, ("hidden",)),
}


@pytest.mark.parametrize("name", HIDING)
def test_what_a_derivative_of_its_own_hides_is_named(name: str) -> None:
    model, around, hidden = HIDING[name]
    params = model.init(jax.random.key(0), ROWS)["params"]
    apply = around(lambda params, x: model.apply({"params": params}, x))
    state = jax.jit(optimizer().init)(params)

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean(apply(params, x) ** 2)

    collect = jax.jit(
        lambda p, s, x: dsbp_optax.linen.value_and_grad(loss_fn)(p, x, opt_state=s)
    )
    with pytest.warns(UserWarning, match="a derivative of its own") as caught:
        loss, grads, seen = collect(params, state, ROWS)
    (warning,) = caught
    assert all(f"'{path}/kernel': its layer" in str(warning.message) for path in hidden)
    assert set(seen) == {f"{p}/kernel" for p in ("beside", "hidden") if p not in hidden}
    assert_same((loss, grads), jax.jit(jax.value_and_grad(loss_fn))(params, ROWS))


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda model: {"a": model}, r"nnx\.Dict"),
        (lambda model: [model], r"nnx\.List"),
        (lambda model: nnx.state(model, nnx.Param), r"nnx\.merge"),
    ],
)
def test_what_holds_nnx_modules_and_is_none_is_refused(make: Any, remedy: str) -> None:
    model = make(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    collect = dsbp_optax.nnx.value_and_grad(lambda model: jnp.zeros(()))
    with pytest.raises(TypeError, match=rf"model: got .*Remedy: .*{remedy}"):
        collect(model, opt_state=None)


# ---------------------------------------------------------------- the rest


def test_what_is_private_of_flax_is_as_it_was() -> None:
    """`capture/linen_scope.py` names the versions that it holds for."""
    version = tuple(map(int, flax.__version__.split(".")[:3]))
    assert (0, 11, 2) <= version <= (0, 12, 12), "try it, then widen the docstring"
    assert "0.11.2 to 0.12.12" in (linen_scope.__doc__ or "")
    seen = []

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        scope = context.module.scope
        if scope is not None and not scope.path:
            params = linen_scope.parameters(scope)
            seen.append({**params})
            doubled = jax.tree.map(lambda x: 2 * x, params)
            linen_scope.set_parameters(scope, doubled)
        return call(*args, **kwargs)

    layer = nn.Dense(4, use_bias=False)
    params = jax.jit(layer.init)(jax.random.key(0), ROWS)["params"]
    with nn.intercept_methods(look):
        twice = layer.apply({"params": params}, ROWS)
    assert_same(twice, 2 * layer.apply({"params": params}, ROWS))
    assert_same(seen[0], params)


def test_an_inspection_prints_and_settles_axes_and_groups() -> None:
    model = nn.MultiHeadDotProductAttention(2, use_bias=False)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    plan = dsbp_optax.linen.inspect(loss_fn, jax.eval_shape(lambda: params), X)
    assert plan.shared == (("key/kernel", "query/kernel", "value/kernel"),)
    assert plan("out/kernel", (2, 4, 8)) == Axes((0, 1), (2,))
    assert plan("out/kernel", (8, 8)) is None and plan("other", (8, 8)) is None
    lines = str(plan).splitlines()
    assert len(lines) == 4 and "one input with key/kernel" in lines[-1]
    tx = optax.chain(optimizer(axes=plan, share=plan.shared))
    state = tx.init(params)
    assert owners(state) == {"key/kernel", "out/kernel"}


def test_a_failure_of_ours_does_not_stop_the_training(monkeypatch: Any) -> None:
    """Whatever goes wrong while a layer is tapped: the plain result, one warning."""
    net = Net()
    params = jax.jit(net.init)(jax.random.key(0), ROWS)["params"]

    def loss_fn(params: Any) -> Any:
        return jnp.mean(net.apply({"params": params}, ROWS) ** 2)

    def fail(*args: Any) -> Any:
        raise RuntimeError("ours")

    state = optimizer().init(params)
    monkeypatch.setattr("dsbp_optax.capture.recorder.observe_input", fail)
    with pytest.warns(UserWarning, match="'a/kernel': its layer cannot be.*ours"):
        loss, grads, seen = dsbp_optax.linen.value_and_grad(loss_fn)(
            params, opt_state=state
        )
    jax.tree.map(
        np.testing.assert_array_equal,
        (loss, grads),
        jax.value_and_grad(loss_fn)(params),
    )
    assert seen == {}
    with pytest.raises(RuntimeError, match="ours"):
        dsbp_optax.linen.value_and_grad(loss_fn, strict=True)(params, opt_state=state)
