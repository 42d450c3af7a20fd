"""Bad input is named early; numbers that go wrong on the device change nothing."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _models import (
    CASES,
    KERNELS,
    activations,
    forward,
    loss_fn,
    make_batch,
    make_params,
    make_step,
    only,
    sketches,
    train,
)
from flax import nnx
from states import with_basis

import dsbp_optax
from dsbp_optax import Activations, Axes, Basis, Covariance, put_statistics
from dsbp_optax.capture.state import riders as make_riders
from dsbp_optax.core.paths import known_paths
from dsbp_optax.core.state import map_states

FIRST = KERNELS[0]
FACTORIES: dict[str, Callable[..., Any]] = {
    "dsbp": functools.partial(dsbp_optax.dsbp, 0.1),
    "dsbp_sgd": functools.partial(dsbp_optax.dsbp_sgd, 0.1),
    "dsbp_adamw": functools.partial(dsbp_optax.dsbp_adamw, 0.1),
    "dsbp_muon": functools.partial(dsbp_optax.dsbp_muon, 0.1),
    "subspace_adamw": functools.partial(dsbp_optax.subspace_adamw, 0.1),
    "subspace_muon": functools.partial(dsbp_optax.subspace_muon, 0.1),
    "metric": dsbp_optax.scale_by_activation_metric,
    "projection": dsbp_optax.scale_by_spectral_projection,
    "sharpness": dsbp_optax.add_spectral_sharpness,
}
#: Those that keep moments in coordinates.
IN_COORDINATES = ("dsbp_sgd", "projection", "subspace_muon")
every_case = pytest.mark.parametrize("name", list(CASES))
some_cases = pytest.mark.parametrize("name", ["dsbp_adamw", "sharpness"])


def refused(call: Callable[[], Any], *words: str) -> str:
    """`call` raises our own error, from our own code, and it holds `words`."""
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    message = str(raised.value)
    assert "dsbp_optax" in str(raised.traceback[-1].path), raised.traceback[-1]
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message


# ---------------------------------------------------------------- construction

CONSTRUCTION = [
    ({"rank": 0}, ("rank", "got 0", "at least 1")),
    ({"rank": -2}, ("rank", "got -2", "at least 1")),
    ({"rank": 1.5}, ("rank", "1.5", "float", "integer")),
    ({"rank": 0.25}, ("rank", "0.25", "Remedy", "RankFraction(0.25)")),
    ({"rank": "3"}, ("rank", "'3'", "str", "integer")),
    ({"rank": True}, ("rank", "True", "bool", "integer")),
    ({"rank": [4]}, ("rank", "[4]", "list", "integer")),
    ({"update_every": 0}, ("update_every", "got 0", "at least 1")),
    ({"update_every": -1}, ("update_every", "got -1", "at least 1")),
    ({"update_every": 2.5}, ("update_every", "2.5", "integer")),
    ({"update_every": "9"}, ("update_every", "'9'", "integer")),
    ({"basis": 3}, ("basis: got 3", "expected a dsbp_optax.Basis")),
    ({"basis": {}}, ("basis: got {}", "expected a dsbp_optax.Basis")),
    ({"basis": Basis}, ("basis: got <class", "expected a dsbp_optax.Basis")),
]
OF_A_BASIS = [
    ({"power_iterations": 0}, ("power_iterations", "got 0", "at least 1")),
    ({"power_iterations": 1.5}, ("power_iterations", "1.5", "integer")),
    ({"decay": 1.0}, ("decay", "1.0", "below 1.0")),
    ({"decay": -0.1}, ("decay", "-0.1", "at least 0")),
    ({"decay": float("nan")}, ("decay", "nan", "at least 0")),
    ({"decay": "much"}, ("decay", "'much'", "number")),
    ({"side": "left"}, ("side", "'left'", "'input'", "'output'")),
    ({"side": 3}, ("side", "3", "'input'", "'output'")),
    ({"solver": "eigh"}, ("solver", "'eigh'", "function")),
    ({"share": "*/kernel"}, ("share", "'*/kernel'", "groups")),
    ({"share": ["*/kernel"]}, ("share", "the group '*/kernel'", "groups")),
    ({"share": [("a/kernel",)]}, ("share", "('a/kernel',)", "two paths or more")),
    ({"share": [("*/a", "b")]}, ("share", "('*/a', 'b')", "as many '*'")),
]
OF_SOME = [
    ("dsbp", {"power_iterations": 0}, ("power_iterations", "got 0", "at least 1")),
    ("dsbp", {"power_iterations": 1.5}, ("power_iterations", "1.5", "integer")),
    ("dsbp", {"sharpness": -0.1}, ("sharpness", "-0.1", "at least 0")),
    ("dsbp", {"sharpness": float("nan")}, ("sharpness", "nan", "at least 0")),
    ("dsbp", {"sharpness": "0.1"}, ("sharpness", "'0.1'", "number")),
    ("sharpness", {"sharpness": -1}, ("sharpness", "-1", "at least 0")),
    ("sharpness", {"sharpness": float("nan")}, ("sharpness", "nan")),
    ("projection", {"sharpness": -1.0}, ("sharpness", "-1.0", "at least 0")),
    ("projection", {"project": "never"}, ("project", "'never'", "'auto'", "'always'")),
    ("dsbp_sgd", {"residual": -0.5}, ("residual", "-0.5", "at least 0")),
    ("subspace_adamw", {"residual": "all"}, ("residual", "'all'", "number", "'int4'")),
    ("dsbp_sgd", {"whitening": -1.0}, ("whitening", "-1.0", "at least 0")),
    ("dsbp_sgd", {"clip": 0.5}, ("clip: got 0.5", "at least 1")),
    ("subspace_adamw", {"clip": "2"}, ("clip: got '2'", "number")),
    ("dsbp_sgd", {"momentum": 8}, ("momentum", "got 8", "below 1.0")),
    ("dsbp_muon", {"momentum": 8}, ("momentum", "got 8", "below 1.0")),
    ("dsbp_muon", {"scale": "lion"}, ("scale", "'lion'", "'muon'", "'adam'")),
    ("subspace_muon", {"residual": object()}, ("residual", "object", "number")),
    ("dsbp_muon", {"moment_dtype": "bfloat16"}, ("moment_dtype", "'int5'", "float32")),
    ("dsbp_adamw", {"moment_dtype": None}, ("moment_dtype", "None", "'int5'")),
    ("dsbp_adamw", {"b1": 1.0}, ("b1: got 1.0", "below 1.0")),
    ("dsbp_adamw", {"eps": -1.0}, ("eps: got -1.0", "at least 0")),
    ("projection", {"fallback": 3}, ("fallback: got 3", "GradientTransformation")),
]


@pytest.mark.parametrize(("keywords", "words"), CONSTRUCTION)
@pytest.mark.parametrize("name", list(FACTORIES))
def test_construction(name, keywords, words):
    refused(lambda: FACTORIES[name](**keywords), *words)


@pytest.mark.parametrize(("keywords", "words"), OF_A_BASIS)
def test_construction_of_a_basis(keywords, words):
    refused(lambda: Basis(**keywords), *words)


@pytest.mark.parametrize("dtype", ["int8", jnp.float16, "half", jnp.float8_e5m2, "x"])
@pytest.mark.parametrize(
    ("make", "keyword"),
    [
        *((FACTORIES[x], "moment_dtype") for x in IN_COORDINATES),
        (Basis, "dtype"),
    ],
    ids=[*IN_COORDINATES, "basis"],
)
def test_dtypes_that_lose_small_numbers(make, keyword, dtype):
    remedy = f"{keyword}=jnp.bfloat16"
    words = f"{keyword}: got {dtype!r}", "floating", "Remedy", remedy
    refused(lambda: make(**{keyword: dtype}), *words)


@pytest.mark.parametrize(("name", "keywords", "words"), OF_SOME)
def test_construction_of_some(name, keywords, words):
    refused(lambda: FACTORIES[name](**keywords), *words)


def test_good_arguments_pass():
    FACTORIES["dsbp"](
        rank=np.int64(3), update_every=np.int32(2), basis=Basis(decay=0.99)
    )
    FACTORIES["projection"](sharpness=lambda step: 0.1, rank=lambda path, shape: None)
    wide = Basis(dtype=np.dtype("float64"))
    FACTORIES["dsbp_muon"](moment_dtype="float32", basis=wide)


AT_INIT = [
    ({"rank": {"first/kernel": 0}}, ("rank", FIRST, "got 0", "at least 1")),
    ({"rank": {"first/*": "3"}}, ("rank", FIRST, "'3'", "integer")),
    ({"rank": lambda path, shape: 1.5}, ("rank", FIRST, "1.5", "integer")),
    ({"rank": {"frist/kernel": 2}}, ("rank", "frist/kernel", f"mean '{FIRST}'")),
    ({"side": {"*/kernel": "left"}}, ("side", FIRST, "'left'", "'input'")),
    ({"side": {"nowhere/*": "input"}}, ("side", "nowhere/*", "no parameter")),
    ({"side": lambda path, shape: "up"}, ("side", FIRST, "'up'", "'output'")),
    ({"axes": {FIRST: Axes((0,), ())}}, ("axes", FIRST, "(16, 12)", "Remedy")),
    ({"axes": {FIRST: Axes((0, 1), (1,))}}, ("axes", FIRST, "exactly once")),
    ({"axes": {FIRST: Axes((0,), (2,))}}, ("axes", FIRST, "(16, 12)", "exactly once")),
    ({"axes": {FIRST: 3}}, ("axes", FIRST, "3", "Axes")),
    ({"axes": {FIRST: Axes(0, 1)}}, ("axes", FIRST, "Axes")),
    ({"axes": {"frist/*": Axes((0,), (1,))}}, ("axes", "frist/*", "no parameter")),
]


@pytest.mark.parametrize(("keywords", "words"), AT_INIT)
@pytest.mark.parametrize("name", ["dsbp_adamw", "sharpness"])
def test_at_init(name, keywords, words):
    tx = FACTORIES[name](**with_basis(**keywords))
    refused(lambda: tx.init(make_params()), *words)


# ---------------------------------------------------------------- inner optimizers


class Odd(NamedTuple):
    """The state of an inner optimizer that the table does not know."""

    momentum: Any


def _odd() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: Odd(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (updates, state),
    )


INNERS = {
    "adam": (optax.adam(1e-3), ("inner", "learning rate", "Remedy")),
    "sgd": (optax.sgd(1e-3), ("inner", "learning rate", "Remedy")),
    "adamw": (optax.adamw(1e-3), ("inner", "params", "Remedy")),
    "decay": (optax.add_decayed_weights(1e-4), ("inner", "params", "Remedy")),
    "trust": (optax.scale_by_trust_ratio(), ("inner", "params", "Remedy")),
    "unknown": (_odd(), ("inner", "Odd.momentum", "Remedy", "transport", "'reset'")),
    "number": (3, ("inner", "int", "optax.GradientTransformation")),
    "factory": (optax.scale_by_adam, ("inner", "optax.GradientTransformation")),
    "string": ("adam", ("inner", "str", "optax.GradientTransformation")),
}


@pytest.mark.parametrize("inner", list(INNERS))
def test_inner(inner):
    given, words = INNERS[inner]
    refused(
        lambda: dsbp_optax.scale_by_spectral_projection(given, rank=2).init(
            make_params()
        ),
        *words,
    )


@pytest.mark.parametrize("fallback", [optax.adam(1e-3), optax.adamw(1e-3)])
@pytest.mark.parametrize("name", ["dsbp_muon", "dsbp_adamw", "projection"])
def test_a_fallback_that_descends(name, fallback):
    tx, words = FACTORIES[name](fallback=fallback), ("learning rate", "Remedy")
    refused(lambda: tx.init(make_params()), "fallback: got", "expected", *words)
    refused(lambda: jax.jit(tx.init)(make_params()), "fallback: got", *words)


def test_a_fallback_of_another_kind():
    make = FACTORIES["dsbp_muon"]
    refused(lambda: make(fallback=3), "fallback: got 3", "GradientTransformation")


def test_a_fallback_with_a_rate_of_its_own_masks_and_arguments():
    """What is said for a learning rate of its own, and what it may use."""
    paths = [path for path in known_paths(make_params()).all if path not in KERNELS]
    rate = optax.chain(optax.scale_by_adam(), optax.scale(0.1))
    decay = optax.add_decayed_weights(0.1, dict.fromkeys(paths, True))
    plateau = optax.contrib.reduce_on_plateau()

    for more in (optax.identity(), decay, plateau):
        fallback = optax.chain(rate, more)
        for name in ("subspace_muon", "dsbp_muon", "dsbp_adamw"):
            state = FACTORIES[name](fallback=fallback).init(make_params())
            assert set(only(state).fallback[0][0].mu) == set(paths)


def test_unknown_moments_may_be_told():
    for kind in ("first", "second", "reset"):
        tx = dsbp_optax.scale_by_spectral_projection(
            _odd(), rank=2, transport={("Odd", "momentum"): kind}
        )
        assert only(tx.init(make_params())).basis


def test_transport_of_an_unknown_kind():
    def make() -> Any:
        table = {("Odd", "momentum"): "third"}
        return dsbp_optax.scale_by_spectral_projection(_odd(), rank=2, transport=table)

    refused(make, "transport", "'third'", "'first'")


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("adapter", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["value_and_grad", "subspace_value_and_grad"])
def test_the_state_is_asked_for(adapter, name):
    make = getattr(getattr(dsbp_optax, adapter), name)
    step, tx = make(lambda model, x: x.sum()), dsbp_optax.dsbp_muon(0.1)
    model, x = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    words = "opt_state", "expected the optimizer's state", "Remedy", "tx.init"
    refused(lambda: step(model, x), "got nothing", *words)
    refused(lambda: step(model, x, opt_state=tx), "the optimizer itself", *words)


@pytest.mark.parametrize("name", ["value_and_grad", "subspace_value_and_grad"])
def test_parameters_of_linen_in_the_nnx_adapter(name):
    params, tx = {"kernel": jnp.ones((64, 64))}, dsbp_optax.dsbp_muon(0.1)
    step = getattr(dsbp_optax.nnx, name)(lambda p, x: (x @ p["kernel"]).sum())
    refused(
        lambda: step(params, jnp.ones((2, 64)), opt_state=tx.init(params)),
        *("model: got dict", "expected an nnx.Module", "dsbp_optax.linen"),
    )


def test_a_model_of_nnx_in_the_linen_adapter():
    model, tx = nnx.Linear(64, 64, rngs=nnx.Rngs(0)), dsbp_optax.dsbp_muon(0.1)
    step = dsbp_optax.linen.value_and_grad(lambda model, x: model(x).sum())
    state = tx.init({"kernel": jnp.ones((64, 64))})
    said = r"'kernel': no rule says.*Remedy.*dsbp_optax\.nnx for NNX.*Activations"
    with pytest.warns(UserWarning, match=said):
        *_, statistics = step(model, jnp.ones((2, 64)), opt_state=state)
    assert statistics == {}


# ---------------------------------------------------------------- statistics


def _update(name: str = "dsbp_adamw", **extra: Any) -> Any:
    tx, params = CASES[name].optimizer(), make_params()
    return tx.update(params, tx.init(params), params, **extra)


def _sketch(**changes: Any) -> Any:
    tx, params = CASES["dsbp_adamw"].optimizer(), make_params()
    found = sketches(tx.init(params), params, make_batch(0))[FIRST]
    return found.__class__(**{**vars(found), **changes})


_COV = jnp.eye(16)
STATISTICS = {
    "width": ({FIRST: Activations(jnp.ones((24, 5)))}, ("(24, 5)", "(n, 16)")),
    "vector": ({FIRST: Activations(jnp.ones(16))}, ("(16,)", "(n, 16)")),
    "images": ({FIRST: jnp.ones((2, 3, 16))}, ("(2, 3, 16)", "(n, 16)")),
    "raw": ({FIRST: jnp.ones((24, 12))}, ("(24, 12)", "(n, 16)")),
    "covariance": ({FIRST: Covariance(jnp.eye(3))}, ("(3, 3)", "(16, 16)")),
    "covariance count": ({FIRST: Covariance(_COV, jnp.ones(3))}, ("count", "(3,)")),
    "sketch rank": (
        {FIRST: _sketch(product=jnp.ones((16, 1, 3)))},
        ("product", "(16, 1, 3)", "(16, 1, 2)"),
    ),
    "sketch count": ({FIRST: _sketch(count=jnp.ones(3))}, ("count", "(3,)")),
    "sketch trace": ({FIRST: _sketch(trace=jnp.ones(()))}, ("trace", "()")),
    "complex": ({FIRST: jnp.ones((24, 16), jnp.complex64)}, ("complex64", "real")),
    "string": ({FIRST: "activations"}, ("str", "Activations")),
    "string array": ({FIRST: np.array([["a"] * 16])}, ("expected", "real")),
    "list": ({FIRST: [[1.0] * 16]}, ("list", "Activations")),
    "nested": ({"first": {"kernel": jnp.ones((24, 16))}}, ("first", "unknown path")),
}


@pytest.mark.parametrize("kind", list(STATISTICS))
def test_statistics(kind):
    given, words = STATISTICS[kind]
    refused(lambda: _update(statistics=given), "statistics", *given, *words)


WHOLE = {
    "list": ([jnp.ones((24, 16))], ("list", "mapping")),
    "array": (jnp.ones((24, 16)), ("mapping",)),
    "string": (FIRST, ("str", "mapping")),
    "tuple": ((FIRST, jnp.ones((24, 16))), ("tuple", "mapping")),
    "unknown": (
        {"frist/kernel": jnp.ones((24, 16))},
        ("unknown path 'frist/kernel'", f"Did you mean '{FIRST}'?"),
    ),
    "unknown sketch": (
        {"frist/kernel": _sketch()},
        ("unknown path 'frist/kernel'", f"Did you mean '{FIRST}'?"),
    ),
    "number key": ({0: jnp.ones((24, 16))}, ("unknown path", "0")),
    "tuple key": ({("first", "kernel"): jnp.ones((24, 16))}, ("unknown path",)),
}


@pytest.mark.parametrize("kind", list(WHOLE))
@some_cases
def test_the_mapping(name, kind):
    given, words = WHOLE[kind]
    refused(lambda: _update(name, statistics=given), "statistics", *words)


def test_errors_reach_through_jit():
    tx, params = CASES["dsbp_sgd"].optimizer(), make_params()
    bad = {FIRST: jnp.ones((24, 5))}
    update = jax.jit(lambda p, s, x: tx.update(p, s, p, statistics=x))
    refused(lambda: update(params, tx.init(params), bad), FIRST, "(24, 5)", "(n, 16)")


#: Keywords that other links of a chain may have, near ours or not.
FOREIGN = ("stats", "activations", "batch_statistics", "statics", "Statistics")


@pytest.mark.parametrize("keyword", FOREIGN)
@pytest.mark.parametrize("name", ["dsbp_muon", "dsbp_adamw", "projection", "sharpness"])
def test_keywords_of_other_links_are_theirs(name, keyword):
    """They reach the link that asks for them, and change nothing of ours."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra.get(keyword))
        return updates, state

    link = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx, params = optax.chain(CASES[name].optimizer(), link), make_params()
    state, given = tx.init(params), activations(params, make_batch(0))
    got, after = tx.update(params, state, params, statistics=given, **{keyword: 3})
    assert seen == [3]
    expected, plain = tx.update(params, state, params, statistics=given)
    chex.assert_trees_all_equal((got, after), (expected, plain))


@some_cases
def test_foreign_keywords_pass(name):
    names = ("value", "grad", "value_fn", "obj_fn", "loss_scale", "batch_stats")
    extra = {**dict.fromkeys(names, 1.0), "statistics": None}
    updates, _ = jax.jit(functools.partial(_update, name))(**extra)
    chex.assert_tree_all_finite(updates)


# ---------------------------------------------------------------- states


def _state(name: str = "dsbp_sgd", params: Any = None, **keywords: Any) -> Any:
    return CASES[name].optimizer(**keywords).init(params or make_params())


@every_case
def test_restored_state_of_another_rank(name):
    """The state knows its own: the optimizer goes on, a checkpoint is refused."""
    case, params = CASES[name], make_params()
    tx, other = case.optimizer(rank=3), _state(name)
    grads = jax.grad(loss_fn)(params, make_batch(0))
    statistics = activations(params, make_batch(0), case.side)
    updates, after = tx.update(grads, other, params, statistics=statistics)
    plain = case.optimizer().update(grads, other, params, statistics=statistics)
    chex.assert_trees_all_equal((updates, after), plain)
    message = refused(
        lambda: dsbp_optax.check_checkpoint(other, tx.init(params)), FIRST, "2", "3"
    )
    assert "rank" in message


@every_case
def test_restored_state_of_another_tree(name):
    tx, params = CASES[name].optimizer(), make_params()
    other = _state(name, {"third": params["first"]})
    refused(lambda: tx.update(params, other, params), "'third/kernel'", "Remedy")


@every_case
def test_restored_state_of_another_shape(name):
    tx, params = CASES[name].optimizer(), make_params()
    other = _state(name, {**params, "first": {"kernel": jnp.ones((32, 24))}})
    grads = {**params, "first": {"kernel": params["first"]["kernel"]}}
    refused(lambda: tx.update(grads, other, grads), FIRST, "got shape", "Remedy")


@pytest.mark.parametrize("name", ["dsbp", "sharpness"])
def test_parameters_missing(name):
    tx, params = CASES[name].make(), make_params()
    refused(
        lambda: tx.update(params, tx.init(params)), "sharpness", "parameters", "Remedy"
    )


def test_put_statistics_without_a_place():
    for state in (_state(), optax.adam(0.1).init(make_params())):
        refused(
            functools.partial(put_statistics, state, {}),
            "put_statistics",
            "statistics_in_state=True",
        )


def test_put_statistics_of_an_unknown_path():
    state = _state(basis=Basis(statistics_in_state=True))
    refused(
        lambda: put_statistics(state, {"frist/kernel": _sketch()}),
        "frist/kernel",
        f"'{FIRST}'",
    )


@pytest.mark.parametrize("given", [jnp.ones((4, 2)), Activations(jnp.ones((4, 2)))])
def test_put_statistics_of_whole_matrices(given):
    state = _state(basis=Basis(statistics_in_state=True))
    with pytest.raises(TypeError, match=f"'{FIRST}', expected a Sketch.*Remedy"):
        put_statistics(state, {FIRST: given})


def test_two_projections_on_one_kernel():
    one = functools.partial(dsbp_optax.scale_by_spectral_projection, rank=2)
    state = optax.chain(one(), one()).init(make_params())
    refused(lambda: make_riders(state), "two spectral", f"'{FIRST}'", "Remedy")


def test_projection_and_sharpness_share_a_kernel():
    tx = optax.chain(CASES["sharpness"].make(), CASES["projection"].make())
    assert len(make_riders(tx.init(make_params()))) == 4


# ---------------------------------------------------------------- Linen and NNX

linen = pytest.importorskip("flax.linen")


class Net(linen.Module):
    """Two layers; the second is called on request."""

    both: bool = True

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.Dense(12, name="first")(x)
        return linen.Dense(8, name="second")(x) if self.both else x


class Heads(linen.Module):
    """A kernel of three axes whose reading its shape does not tell."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.DenseGeneral((4, 6), use_bias=False, name="split")(x)


def _linen_call(model: Any, params: Any, apply: Any = None, **keywords: Any) -> Any:
    state = CASES["dsbp_sgd"].make(residual=0.5).init(params)
    apply = apply or model.apply
    step = dsbp_optax.linen.value_and_grad(
        lambda params, x: jnp.mean(apply({"params": params}, x) ** 2), **keywords
    )
    return step(params, jnp.ones((6, 16)), opt_state=state)


def _linen_params(model: Any) -> Any:
    return model.init(jax.random.key(0), jnp.ones((6, 16)))["params"]


def test_linen_layer_not_called():
    params = _linen_params(Net())
    refused(
        lambda: _linen_call(Net(both=False), params, strict=True),
        "'second/kernel'",
        "not called",
        "Remedy",
        "strict=False",
    )


def test_linen_apply_compiled_before():
    model = Net()
    params = _linen_params(model)
    apply = jax.jit(model.apply)
    apply({"params": params}, jnp.ones((6, 16)))
    step = dsbp_optax.linen.value_and_grad(
        lambda params, x: jnp.mean(apply({"params": params}, x) ** 2)
    )
    state = CASES["dsbp_sgd"].make().init(params)
    jax.grad(lambda p: jnp.mean(apply({"params": p}, jnp.ones((6, 16))) ** 2))(params)
    *_, statistics = step(params, jnp.ones((6, 16)), opt_state=state)
    assert {float(s.count.max()) for s in statistics.values()} == {6.0}
    assert set(statistics) == {"first/kernel", "second/kernel"}
    apply({"params": params}, jnp.ones((6, 16)))  # is not poisoned


def test_linen_not_strict():
    params = _linen_params(Net())
    with pytest.warns(UserWarning, match="'second/kernel': its layer was not called"):
        _, grads, statistics = _linen_call(Net(both=False), params)
    assert set(statistics) == {"first/kernel"}
    assert not np.any(grads["second"]["kernel"])


def test_linen_axes_misread():
    params = _linen_params(Heads())
    with pytest.warns(UserWarning) as caught:
        *_, statistics = _linen_call(Heads(), params)
    guessed, misread = (str(warning.message) for warning in caught)
    for text in (guessed, misread):
        for word in ("'split/kernel'", "(16, 4, 6)", "axes=", "Remedy"):
            assert word in text
    assert statistics == {}


def _nnx_scan(axes: Any) -> Any:
    from flax import nnx

    class Layer(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.linear = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return jnp.tanh(self.linear(x))

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: Any) -> Any:
        return Layer(rngs)

    class Stack(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.layers = stacked(rngs)

        def __call__(self, x: Any) -> Any:
            run = nnx.scan(
                lambda layer, x: layer(x),
                in_axes=(nnx.StateAxes(axes), nnx.Carry),
                out_axes=nnx.Carry,
            )
            return run(self.layers, x)

    model = Stack(nnx.Rngs(0))
    state = CASES["dsbp_sgd"].make().init(nnx.state(model, nnx.Param))
    step = dsbp_optax.nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))
    return step(model, jnp.ones((6, 16)), opt_state=state)


def test_nnx_scan_without_probes():
    from flax import nnx

    with pytest.warns(UserWarning, match="'layers/linear/kernel'.*Probe.*StateAxes"):
        *_, statistics = _nnx_scan({nnx.Param: 0, ...: None})
    assert statistics == {}


def test_nnx_scan_with_probes():
    from flax import nnx

    *_, statistics = _nnx_scan({(nnx.Param, dsbp_optax.nnx.Probe): 0, ...: None})
    (sketch,) = statistics.values()
    assert sketch.product.shape == (3, 16, 1, 2)
    assert np.all(sketch.count == 6)


# ---------------------------------------------------------------- numbers gone wrong


def _poison(grads: Any, path: str, value: float) -> Any:
    owner, leaf = path.split("/")
    array = grads[owner][leaf]
    index = (1,) * array.ndim
    return {**grads, owner: {**grads[owner], leaf: array.at[index].set(value)}}


@functools.cache
def _settled(name: str) -> tuple[Any, Any, Any]:
    """A compiled update, and parameters and state after two good steps."""
    case, params = CASES[name], make_params()
    tx = case.make()
    params, state = train(
        jax.jit(make_step(case.optimizer(), case.side)),
        params,
        case.optimizer().init(params),
        3,
    )
    state = state if case.descends else state[0]
    update = jax.jit(lambda g, s, p, x: tx.update(g, s, p, statistics=x))
    return update, params, state


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("path", [FIRST, "first/bias", "embed/embedding"])
@every_case
def test_gradients_not_finite(name, path, value):
    update, params, state = _settled(name)
    batch = make_batch(9)
    grads = _poison(jax.grad(loss_fn)(params, batch), path, value)
    statistics = activations(params, batch, CASES[name].side)
    updates, new = update(grads, state, params, statistics)
    one_less = map_states(lambda s: s._replace(skipped=s.skipped - 1), new)
    chex.assert_trees_all_equal(one_less, state)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, grads))


def _scaled_step(tx: Any) -> Any:
    """One step under dynamic loss scaling: float16 gradients, halved on overflow."""

    def step(params: Any, state: Any, scale: Any, batch: Any) -> Any:
        grads = jax.grad(lambda p: loss_fn(p, batch) * scale)(params)
        grads = jax.tree.map(lambda g: g.astype(jnp.float16) / scale, grads)
        finite = jnp.isfinite(optax.tree.norm(grads))
        statistics = activations(params, batch)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        params = optax.apply_updates(params, updates)
        return params, state, jnp.where(finite, scale, scale / 2), finite

    return jax.jit(step)


def test_dynamic_loss_scaling_recovers():
    tx, params = CASES["dsbp_sgd"].optimizer(), make_params()
    state, scale, overflows = tx.init(params), jnp.float32(2.0**24), 0
    start, step = float(loss_fn(params, make_batch(0))), _scaled_step(tx)
    for i in range(30):
        before = params
        params, state, scale, finite = step(params, state, scale, make_batch(i))
        if not finite:
            overflows += 1
            chex.assert_trees_all_equal(params, before)
    assert finite
    assert 2 < overflows < 20
    assert int(only(state).skipped) == overflows
    assert int(only(state).step) == 30 - overflows
    assert only(state).spectrum[FIRST].activations.all()
    assert (only(state).spectrum[FIRST].failures == 0).all()
    chex.assert_tree_all_finite((params, state))
    assert float(loss_fn(params, make_batch(0))) < start


def _nan_at(array: Any) -> Any:
    return array.at[(0,) * array.ndim].set(jnp.nan)


BAD_STATISTICS = {
    "nan": _nan_at,
    "inf": lambda a: a.at[0, 0].set(jnp.inf),
    "overflow": lambda a: a * 1e30,
    "zero": jnp.zeros_like,
    "one sample": lambda a: a[:1],
}


@pytest.mark.parametrize("kind", list(BAD_STATISTICS))
@some_cases
def test_statistics_that_cannot_be_used(name, kind):
    update, params, state = _settled(name)
    batch = make_batch(9)
    seen = forward(params, batch)["input"]
    statistics = {**seen, FIRST: BAD_STATISTICS[kind](seen[FIRST])}
    grads = jax.grad(loss_fn)(params, batch)
    updates, new = update(grads, state, params, statistics)
    old, now = only(state), only(new)
    chex.assert_trees_all_equal(now.basis[FIRST], old.basis[FIRST])
    assert np.all(now.spectrum[FIRST].failures == old.spectrum[FIRST].failures + 1)
    assert np.all(now.spectrum[FIRST].eigenvalues == old.spectrum[FIRST].eigenvalues)
    assert not np.array_equal(now.basis[KERNELS[1]], old.basis[KERNELS[1]])
    assert np.all(now.spectrum[KERNELS[1]].failures == 0)
    assert int(now.skipped) == 0
    chex.assert_tree_all_finite((updates, new))
    assert np.any(updates["first"]["kernel"])


ONE_DIRECTION = {
    "constant": jnp.ones_like,
    "rank one": lambda a: a[:, :1] * jnp.ones_like(a),
    "a column like a year": lambda a: a.at[:, 0].set(2000 + 5 * a[:, 0]),
}


@pytest.mark.parametrize("kind", list(ONE_DIRECTION))
@some_cases
def test_one_direction_that_outweighs_all_others_is_found(name, kind):
    update, params, state = _settled(name)
    batch = make_batch(9)
    seen = forward(params, batch)["input"]
    inputs = ONE_DIRECTION[kind](seen[FIRST])
    grads = jax.grad(loss_fn)(params, batch)
    updates, new = update(grads, state, params, {**seen, FIRST: inputs})
    spectrum = only(new).spectrum[FIRST]
    assert (spectrum.failures == 0).all() and (spectrum.refreshed >= 0).all()
    basis = np.asarray(only(new).basis[FIRST][0], np.float64)
    leading = np.linalg.svd(np.asarray(inputs, np.float64))[2][0]
    assert np.linalg.norm(basis.T @ leading) > 0.99
    chex.assert_tree_all_finite((updates, new))


@pytest.mark.parametrize("field", ["product", "trace"])
@some_cases
def test_sketches_that_are_not_finite(name, field):
    update, params, state = _settled(name)
    batch = make_batch(9)
    statistics = sketches(state, params, batch)
    key = next(k for k in statistics if k.startswith(FIRST))
    good = vars(statistics[key])
    bad = statistics[key].__class__(**{**good, field: _nan_at(good[field])})
    grads = jax.grad(loss_fn)(params, batch)
    updates, new = update(grads, state, params, {**statistics, key: bad})
    chex.assert_trees_all_equal(only(new).basis[FIRST], only(state).basis[FIRST])
    assert np.all(only(new).spectrum[FIRST].failures == 1)
    assert np.all(only(new).spectrum[KERNELS[1]].failures == 0)
    chex.assert_tree_all_finite((updates, new))


@some_cases
def test_no_samples_are_no_failure(name):
    update, params, state = _settled(name)
    statistics = {FIRST: jnp.zeros((0, 16))}
    grads = jax.grad(loss_fn)(params, make_batch(0))
    updates, new = update(grads, state, params, statistics)
    chex.assert_trees_all_equal(only(new).basis[FIRST], only(state).basis[FIRST])
    assert np.all(only(new).spectrum[FIRST].failures == 0)
    chex.assert_tree_all_finite((updates, new))


@pytest.mark.parametrize("slice_", [0, 2])
@some_cases
def test_one_bad_slice_of_a_stack(name, slice_):
    rng = np.random.default_rng(0)
    params = {
        "stack": {
            "kernel": jnp.asarray(rng.normal(size=(3, 16, 12)), jnp.float32),
            "bias": jnp.zeros((3, 12)),
        }
    }
    tx = CASES[name].make()
    state = tx.init(params)
    path = "stack/kernel"
    assert only(state).basis[path].shape == (3, 16, 2)
    values = jnp.asarray(rng.normal(size=(3, 24, 16)), jnp.float32)
    bad = values.at[slice_, 0, 0].set(jnp.nan)
    updates, new = jax.jit(tx.update)(params, state, params, statistics={path: bad})
    moved = np.abs(only(new).basis[path] - only(state).basis[path]).max((1, 2)) > 0
    expected = np.arange(3) != slice_
    assert moved.tolist() == expected.tolist()
    failures = only(new).spectrum[path].failures
    assert failures.tolist() == (~expected).astype(int).tolist()
    chex.assert_tree_all_finite((updates, new))


@pytest.mark.parametrize("seen", [True, False])
@every_case
def test_zero_gradients(name, seen):
    case, params = CASES[name], make_params()
    tx = case.make()
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    statistics = activations(params, make_batch(0), case.side) if seen else None
    update = jax.jit(lambda s: tx.update(zeros, s, params, statistics=statistics))
    for _ in range(4):
        updates, state = update(state)
    chex.assert_tree_all_finite((updates, state))
    assert int(only(state).skipped) == 0
    if not seen and name not in ("dsbp_sgd", "dsbp_adamw", "dsbp_muon"):
        chex.assert_trees_all_equal(updates, zeros)
