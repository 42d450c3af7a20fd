"""Checkpoints: what does not fit is named, by path and by version."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from _models import make_params

import dsbp_optax
from dsbp_optax.core.state import map_states

SMALL = {"update_every": 4, "basis": dsbp_optax.Basis(power_iterations=2)}
OPTIMIZERS = {
    "muon": lambda k: dsbp_optax.dsbp_muon(0.05, rank=k, **SMALL),
    "sharpness beside": lambda k: optax.chain(
        dsbp_optax.add_spectral_sharpness(0.1, rank=k, **SMALL),
        dsbp_optax.dsbp_muon(0.05, rank=k, **SMALL),
    ),
}
PARAMS = {
    "first": {"kernel": jnp.ones((40, 32)), "bias": jnp.ones(32)},
    "second": {"kernel": jnp.ones((32, 24))},
}


@functools.cache
def example(name: str, rank: int) -> Any:
    return OPTIMIZERS[name](rank).init(PARAMS)


def update(tx: Any, state: Any) -> Any:
    """A step, traced only."""
    tx = optax.with_extra_args_support(tx)
    return jax.eval_shape(tx.update, PARAMS, state, PARAMS)


def test_a_state_goes_on_with_the_rank_it_was_made_with() -> None:
    """What was decided at ``init`` lies in the state; a checkpoint of it is refused."""
    state = example("muon", 4)
    _, after = update(OPTIMIZERS["muon"](2), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert dsbp_optax.by_path(after)["first/kernel"].basis.shape == (40, 4)
    with pytest.raises(ValueError, match=r"'first/kernel'.*rank 4.*expected.*rank 2"):
        dsbp_optax.check_checkpoint(state, example("muon", 2))


def test_a_kernel_that_the_other_optimizer_would_not_project_is_named() -> None:
    make = functools.partial(dsbp_optax.subspace_muon, 0.1, residual="int6")
    old, new = (make(rank=rank) for rank in ({"first*": 2, "*": 8}, 2))
    params = make_params()
    state = jax.eval_shape(old.init, params)
    said = r"'second/kernel' of.* no basis, .*expected.* rank 2, .*Remedy: .*the rank"
    with pytest.raises(ValueError, match=said):
        dsbp_optax.check_checkpoint(state, jax.eval_shape(new.init, params))
    alike = make(rank={"second/kernel": 4, "*": 2})
    dsbp_optax.check_checkpoint(
        jax.eval_shape(make(rank={"second*": 4, "*": 2}).init, params),
        jax.eval_shape(alike.init, params),
    )


OLD = {"1": {"metric": {}}}


def test_states_of_another_version_are_refused_at_trace_time() -> None:
    for name in ("muon", "sharpness beside"):
        tx, state = OPTIMIZERS[name](2), example(name, 2)
        for wrong, said in ((OLD, "version 1, exp"), ({}, "version none, exp")):
            old = map_states(lambda s, v=wrong: s._replace(form=v), state)
            with pytest.raises(ValueError, match=f"{said}.*Remedy"):
                update(tx, old)
            assert jax.tree.structure(old) != jax.tree.structure(state)


def as_saved(tree: Any) -> Any:
    """Plain dicts and lists, as a checkpoint's metadata has them."""
    if hasattr(tree, "_asdict"):
        return {k: as_saved(v) for k, v in tree._asdict().items()}
    if isinstance(tree, tuple | list):
        return [as_saved(v) for v in tree]
    if isinstance(tree, dict):
        return {k: as_saved(v) for k, v in tree.items()}
    if tree is None:
        return None
    return jax.ShapeDtypeStruct(tree.shape, tree.dtype)


def test_a_checkpoint_is_checked_by_path() -> None:
    def whole(state: Any, params: Any = PARAMS) -> Any:
        return {"params": params, "state": state}

    def refused(saved: Any, expected: Any, said: str) -> None:
        with pytest.raises(ValueError, match=f"(?s){said}.*Remedy"):
            dsbp_optax.check_checkpoint(as_saved(saved), expected)

    expected = whole(example("muon", 2))
    dsbp_optax.check_checkpoint(as_saved(expected), expected)
    dsbp_optax.check_checkpoint(expected, jax.eval_shape(lambda: expected))
    rank = "'first/kernel' of the state 'state/0': got .* rank 4, .*expected .* rank 2"
    refused(whole(example("muon", 4)), expected, rank)
    side = dsbp_optax.Basis(side={"first/*": "output", "*": "input"})
    other = dsbp_optax.dsbp_muon(0.05, rank=2, basis=side).init(PARAMS)
    refused(whole(other), expected, "'first/kernel'.*got output side.*expected input")
    third = {"first": PARAMS["first"], "third": PARAMS["second"]}
    model = whole(OPTIMIZERS["muon"](2).init(third), third)
    refused(model, expected, "it has no 'params/second/kernel'.*'params/third/kernel'")
    wide = {**PARAMS, "first": {**PARAMS["first"], "bias": jnp.ones(9)}}
    said = r"'params/first/bias': got shape \(32,\), expected \(9,\)"
    refused(expected, {**expected, "params": wide}, said)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    said = "'params/first/bias': got dtype float32, expected bfloat16"
    refused(expected, {**expected, "params": half}, said)
    plain = whole(optax.adam(0.1).init(PARAMS))
    refused(plain, expected, "it has no .*'state/0/basis/first/kernel'")
    old = as_saved(expected)
    old["state"][0]["form"] = OLD
    refused(old, expected, "'state/0' is of version 1, expected 3")
    del old["state"][0]["form"]
    refused(old, expected, "'state/0' is of version none, expected 3")


def test_the_version_of_moments_without_bases_is_checked_too() -> None:
    tx = dsbp_optax.scale_by_quantized_momentum(0.9)
    expected = {"state": tx.init(PARAMS)}
    old = as_saved(expected)
    dsbp_optax.check_checkpoint(old, expected)
    old["state"]["form"] = OLD
    with pytest.raises(ValueError, match="'state' is of version 1, expected 3"):
        dsbp_optax.check_checkpoint(old, expected)
