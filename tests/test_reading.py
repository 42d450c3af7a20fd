"""The axes of kernels: inferred where something tells, else said, and compared."""

import re
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from states import basis_of
from test_adapters import assert_same, explicit, optimizer

import dsbp_optax
from dsbp_optax import Axes, project_gradients
from dsbp_optax.core import infer
from dsbp_optax.diagnostics import explain

D, N, K, H, L, F, E = 32, 4, 2, 8, 3, 48, 5

#: What a model holds, the path of a kernel in it, and that kernel's axes.
ATTENTION = {"q_proj": (D, N, H), "k_proj": (D, K, H), "o_proj": (N, H, D)}
LLAMA = {"q_proj": (L, D, F), "k_proj": (L, D, F), "o_proj": (L, F, D)}
MAXTEXT = {"query": (D, L, N, H), "key": (D, L, K, H), "out": (N, L, H, D)}
SCANNED = {"query": (L, D, N, H), "key": (L, D, K, H), "out": (L, N, H, D)}
GATED = {"gate_proj": (D, L, F), "up_proj": (D, L, F), "down_proj": (F, L, D)}
CASES: list[tuple[dict[str, Any], str, Axes]] = [
    (ATTENTION, "q_proj", Axes((0,), (1, 2))),
    (ATTENTION, "k_proj", Axes((0,), (1, 2))),
    (ATTENTION, "o_proj", Axes((0, 1), (2,))),
    (LLAMA, "q_proj", Axes((1,), (2,), (0,))),
    (LLAMA, "o_proj", Axes((1,), (2,), (0,))),
    (MAXTEXT, "query", Axes((0,), (2, 3), (1,))),
    (MAXTEXT, "out", Axes((0, 2), (3,), (1,))),
    (SCANNED, "query", Axes((1,), (2, 3), (0,))),
    (SCANNED, "out", Axes((1, 2), (3,), (0,))),
    (GATED, "gate_proj", Axes((0,), (2,), (1,))),
    (GATED, "down_proj", Axes((0,), (2,), (1,))),
    ({"wi": (D, L, F), "wi/bias": (F, L)}, "wi", Axes((0,), (2,), (1,))),
    ({"wi": (L, D, F), "wi/bias": (L, F)}, "wi", Axes((1,), (2,), (0,))),
    ({"qkv_einsum": (3, N, D, H)}, "qkv_einsum", Axes((2,), (0, 1, 3))),
    ({"kv_einsum": (2, K, D, H)}, "kv_einsum", Axes((2,), (0, 1, 3))),
    ({"q_einsum": (N, D, H)}, "q_einsum", Axes((1,), (0, 2))),
    ({"attn_vec_einsum": (N, H, D)}, "attn_vec_einsum", Axes((0, 1), (2,))),
    (
        {"gating_einsum": (E, 2, F, D), "linear": (E, F, D)},
        "gating_einsum",
        Axes((3,), (1, 2), (0,)),
    ),
    (
        {"gating_einsum": (2, D, F), "linear": (F, D)},
        "gating_einsum",
        Axes((1,), (0, 2)),
    ),
    ({"c_attn": (3 * D, D), "c_attn/bias": (3 * D,)}, "c_attn", Axes((1,), (0,))),
    ({"c_attn": (D, 3 * D), "c_attn/bias": (3 * D,)}, "c_attn", Axes((0,), (1,))),
    # The bias wins over the name: blocks of plain attention, scanned.
    ({"out": (12, D, D), "out/bias": (12, D)}, "out", Axes((1,), (2,), (0,))),
    ({"query": (12, D, D), "query/bias": (12, D)}, "query", Axes((1,), (2,), (0,))),
    ({"query": (D, N, H), "query/bias": (N, H)}, "query", Axes((0,), (1, 2))),
    # Both ways fit the bias, and the name tells.
    ({"query": (H, H, N), "query/bias": (H, N)}, "query", Axes((0,), (1, 2))),
    ({"stem": (3, 3, N, F), "stem/bias": (F,)}, "stem", Axes((0, 1, 2), (3,))),
    ({"shortcut": (1, 1, N, F)}, "shortcut", Axes((0, 1, 2), (3,))),
    ({"Conv_0": (3, 3, N, F)}, "Conv_0", Axes((0, 1, 2), (3,))),
]


def tree_of(layers: dict[str, Any]) -> Any:
    keys = jax.random.split(jax.random.key(0), len(layers))
    tree: dict[str, Any] = {}
    for key, (name, shape) in zip(keys, layers.items(), strict=True):
        owner, _, leaf = name.partition("/")
        drawn = jax.random.normal(key, shape)
        tree.setdefault(owner, {})[leaf or "kernel"] = drawn
    return {"block": tree}


def view_of(tx: Any, params: Any, path: str) -> Any:
    return explain(tx, params)[path][0].kernel.view


@pytest.mark.parametrize(("layers", "name", "axes"), CASES)
def test_what_is_told_is_read_in_silence(layers: Any, name: str, axes: Axes) -> None:
    """The update has the size that it has with the right ``axes=``."""
    params, path = tree_of(layers), f"block/{name}/kernel"

    def size(tx: Any) -> Any:
        update = jax.jit(tx.update)(params, tx.init(params), params)[0]
        return jnp.sqrt(jnp.mean(update["block"][name]["kernel"] ** 2))

    told = dsbp_optax.dsbp_muon(1.0, basis=dsbp_optax.Basis(axes={path: axes}))
    views = [view_of(tx, params, path) for tx in (dsbp_optax.dsbp_muon(1.0), told)]
    assert views[0] == views[1]
    np.testing.assert_allclose(size(dsbp_optax.dsbp_muon(1.0)), size(told), rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "shape", "bias"),
    [
        ("split/kernel", (D, N, H), None),
        ("stem/kernel", (2, 3, N, F), None),
        ("split/kernel", (H, H, H), (H, H)),
        ("mlp/gating_einsum", (2, F, D), None),
    ],
)
def test_what_is_not_told_is_a_guess(path: str, shape: Any, bias: Any) -> None:
    assert not infer.infer_axes(path, shape, bias).sure


@pytest.mark.parametrize(
    ("shape", "batch", "sure"),
    [
        ((5, 3, 3, 8, 16), (0,), False),  # As `nn.scan` stacks them.
        ((3, 3, 3, 8, 16), (), True),
        ((5, 1, 1, 8, 16), (), True),
        ((3, 3, 8, 16), (), True),
    ],
)
def test_a_square_window_behind_an_axis_is_a_stack(
    shape: Any, batch: Any, sure: bool
) -> None:
    axes, known = infer.infer_axes("Conv_0/kernel", shape, None)
    assert (axes.batch, known) == (batch, sure)
    assert axes.outputs == (len(shape) - 1,)


def test_neighbours_without_a_stack_make_one_a_guess() -> None:
    name, shape = "block/query/kernel", (L, D, N, H)
    for beside, sure in [
        ({}, True),
        ({"out": (L, N, H, D)}, True),
        ({"out": (L, N, H, D), "stem": (7, 7, N, F)}, False),
    ]:
        found = infer.infer_axes(name, shape, None, beside)
        assert found == (Axes((1,), (2, 3), (0,)), sure)


def guessing() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"split": (D, N, H), "stem": (2, 3, N, F), "q_proj": (D, N, H)}
    return {
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def test_a_guess_is_said_once_with_every_kernel_and_the_remedy() -> None:
    params = guessing()
    with pytest.warns(UserWarning, match="were guessed") as caught:
        dsbp_optax.dsbp_muon(0.1).init(params)
    (warning,) = caught
    text = str(warning.message)
    assert f"'split/kernel' ({D}, {N}, {H}) as {D} stacked {N} x {H} matrices" in text
    assert "'stem/kernel'" in text and "q_proj" not in text
    assert "Remedy" in text and text.count("dsbp_optax.Axes(inputs=") == 2
    told = eval(re.search(r"axes=(\{.*\})", text)[1])  # what the warning says to write
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dsbp_optax.dsbp_muon(0.1, basis=dsbp_optax.Basis(axes=told)).init(params)
        shown = str(explain(dsbp_optax.dsbp_muon(0.1), params))
    assert shown.count("axes guessed") == 2
    assert f"axes guessed, {D} stacked {N} x {H} matrices" in shown
    assert "guessed" not in str(
        explain(dsbp_optax.dsbp_muon(0.1, basis=dsbp_optax.Basis(axes=told)), params)
    )


# ---------------------------------------------------------------- what layers say


class Heads(nn.Module):
    """A kernel of three axes without a bias, under a name that tells nothing."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.DenseGeneral((N, H), use_bias=False, name="split")(x)
        return nn.DenseGeneral(D, (-2, -1), use_bias=False, name="merge")(jnp.tanh(x))


class Tall(nn.Module):
    """Three layers scanned along the second axis of their kernels, without a bias."""

    heads: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def block(module: Any, x: Any, _: Any) -> Any:
            if module.heads:
                return Heads(name="heads")(x), None
            return jnp.tanh(nn.Dense(D, use_bias=False, name="wi")(x)), None

        scanned = nn.scan(
            block, variable_axes={"params": 1}, split_rngs={"params": True}, length=L
        )
        return scanned(self, x, None)[0]


class HeadsNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.split = nnx.LinearGeneral(D, (N, H), use_bias=False, rngs=rngs)
        self.merge = nnx.LinearGeneral(
            (N, H), D, axis=(-2, -1), use_bias=False, rngs=rngs
        )

    def __call__(self, x: Any) -> Any:
        return self.merge(jnp.tanh(self.split(x)))


class TallNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=L)
        @nnx.vmap(in_axes=0, out_axes=1)
        def make(rngs: nnx.Rngs) -> Any:
            return nnx.Linear(D, D, use_bias=False, rngs=rngs)

        self.wi = make(rngs)

    def __call__(self, x: Any) -> Any:
        axes = nnx.StateAxes({(nnx.Param, dsbp_optax.nnx.Probe): 1, ...: None})

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: nnx.Linear, x: Any) -> Any:
            return jnp.tanh(layer(x))

        return run(self.wi, x)


HEADS = {
    "split/kernel": Axes((0,), (1, 2)),
    "merge/kernel": Axes((0, 1), (2,)),
}
STACK = {"wi/kernel": Axes((0,), (2,), (1,))}
MODELS: dict[str, tuple[Any, dict[str, Axes]]] = {
    "heads": (Heads(), HEADS),
    "tall": (Tall(), STACK),
    "tall heads": (
        Tall(heads=True),
        {
            "heads/split/kernel": Axes((0,), (2, 3), (1,)),
            "heads/merge/kernel": Axes((0, 2), (3,), (1,)),
        },
    ),
    "nnx heads": (HeadsNnx, HEADS),
    "nnx tall": (TallNnx, STACK),
}


def loss_of(name: str) -> Any:
    """The loss, the parameters or the model, its plain gradient, and the adapter."""
    made, _ = MODELS[name]
    x = jax.random.normal(jax.random.key(1), (20, D))
    if name.startswith("nnx"):
        model = made(nnx.Rngs(0))
        return (
            lambda model: jnp.mean(model(x) ** 2),
            model,
            nnx.value_and_grad,
            dsbp_optax.nnx,
        )
    params = jax.jit(made.init)(jax.random.key(0), x)["params"]
    return (
        lambda params: jnp.mean(made.apply({"params": params}, x) ** 2),
        params,
        jax.value_and_grad,
        dsbp_optax.linen,
    )


def pure(params: Any) -> Any:
    return nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params


def init(tx: Any, params: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of guesses
        return tx.init(pure(params))


@pytest.mark.parametrize("make", ["value_and_grad", "subspace_value_and_grad"])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_layer_says_is_compared(name: str, make: str) -> None:
    """Misread: no statistic, the plain gradient, one warning, whose remedy mends it."""
    loss_fn, params, plain, adapter = loss_of(name)
    step, expected = getattr(adapter, make)(loss_fn), plain(loss_fn)(params)
    state = init(optimizer(), params)
    with pytest.warns(UserWarning) as caught:
        loss, grads, seen = step(params, opt_state=state)
    (warning,) = caught
    text = str(warning.message)
    assert seen == {}
    assert_same((loss, grads), expected, rtol=1e-6)
    told = eval(re.search(r"axes=(\{.*\})\), or", text)[1])
    assert told == MODELS[name][1]
    state = optimizer(axes=told).init(pure(params))
    loss, grads, seen = step(params, opt_state=state)
    assert set(seen) == set(told)
    assert {float(s.count.max()) for s in seen.values()} == {20.0}
    short = make != "value_and_grad"
    right = project_gradients(expected[1], state) if short else expected[1]
    assert_same((loss, grads), (expected[0], right), rtol=1e-4)


@pytest.mark.parametrize("name", ["heads", "nnx heads"])
def test_one_that_is_misread_leaves_the_others(name: str) -> None:
    loss_fn, params, _, adapter = loss_of(name)
    axes = {"merge/kernel": HEADS["merge/kernel"]}
    state = init(optimizer(axes=axes), params)
    with pytest.warns(UserWarning, match=r"'split/kernel'.* is read as 32 stacked 4 x"):
        seen = adapter.value_and_grad(loss_fn)(params, opt_state=state)[2]
    assert set(seen) == {"merge/kernel"}


def test_the_statistic_of_a_second_axis_is_that_of_its_layers() -> None:
    loss_fn, params, *_ = loss_of("tall")
    state = optimizer(axes=STACK).init(params)
    seen = dsbp_optax.linen.value_and_grad(loss_fn)(params, opt_state=state)[2]
    x = jax.random.normal(jax.random.key(1), (20, D))
    basis = basis_of(state, "wi/kernel")
    for layer in range(L):
        expected = explicit(x, basis[:, layer])
        assert_same(seen["wi/kernel"].product[:, layer], expected.product)
        x = jnp.tanh(x @ params["wi"]["kernel"][:, layer])


def test_a_loss_that_fails_for_reasons_of_its_own_says_so() -> None:
    loss_fn, params, _, adapter = loss_of("tall")
    state = optimizer(axes=STACK).init(params)

    def broken(params: Any) -> Any:
        return loss_fn(params) + jnp.ones(3) @ jnp.ones(4)

    with pytest.raises(TypeError, match="dot_general"):
        adapter.value_and_grad(broken)(params, opt_state=state)
