"""States at another rank: what leads stays, what is new disturbs nothing."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _models import KERNELS, loss_fn, make_batch, make_params, make_step, only

import dsbp_optax
from dsbp_optax import AutoInterval, AutoRank, _spectral

SMALL = {"update_every": 4, "power_iterations": 2}
HALF = {"moment_dtype": jnp.bfloat16, "basis_dtype": jnp.bfloat16}
#: Name -> rank -> optimizer. Together: every inner state, dtype, side and wrapper.
OPTIMIZERS = {
    "muon": lambda k: dsbp_optax.dsbp_muon(0.05, rank=k, **SMALL),
    "adamw": lambda k: dsbp_optax.dsbp_adamw(0.05, rank=k, **SMALL),
    "muon in coordinates": lambda k: dsbp_optax.subspace_muon(
        0.05, rank=k, residual="int6", **SMALL
    ),
    "adamw in coordinates": lambda k: dsbp_optax.subspace_adamw(0.05, rank=k, **SMALL),
    "sgd": lambda k: dsbp_optax.dsbp_sgd(0.05, rank=k, **SMALL),
    "paper": lambda k: dsbp_optax.dsbp(0.05, rank=k, **SMALL),
    "half precision": lambda k: dsbp_optax.scale_by_spectral_projection(
        optax.scale_by_adam(), rank=k, **HALF
    ),
    "reserved, drifting": lambda k: dsbp_optax.dsbp_sgd(
        0.05,
        rank=k,
        update_every=AutoInterval(shortest=3),
        statistics_in_state=True,
    ),
    "sharpness beside": lambda k: optax.chain(
        dsbp_optax.add_spectral_sharpness(0.1, rank=k, **SMALL),
        dsbp_optax.dsbp_muon(0.05, rank=k, **SMALL),
    ),
    "sam": lambda k: dsbp_optax.subspace_sam(
        dsbp_optax.dsbp_sgd(0.05, rank=k, **SMALL), every=2
    ),
    "sam of a metric": lambda k: dsbp_optax.subspace_sam(
        dsbp_optax.dsbp_muon(0.05, rank=k, **SMALL), every=2
    ),
    "masked": lambda k: optax.masked(
        dsbp_optax.dsbp_muon(0.05, rank=k, **SMALL), lambda p: dict.fromkeys(p, True)
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
PARAMS = {
    "first": {"kernel": jnp.ones((40, 32)), "bias": jnp.ones(32)},
    "second": {"kernel": jnp.ones((32, 24))},
}
PATHS = ("first/kernel", "second/kernel")


def filled(state: Any) -> Any:
    """A state as in the middle of a run: no array of floats is zero."""
    rng = np.random.default_rng(0)

    def one(keys: Any, leaf: Any) -> Any:
        names = {getattr(key, "name", getattr(key, "key", "")) for key in keys}
        kept = names & {"basis", "reference", "statistics"}
        if kept or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, state)


@functools.cache
def example(name: str, rank: int) -> Any:
    return filled(OPTIMIZERS[name](rank).init(PARAMS))


def form(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


def accepts(tx: Any, state: Any, params: Any = PARAMS) -> bool:
    """Whether a step traces, and gives a state of the same form."""
    tx = optax.with_extra_args_support(tx)
    step = functools.partial(tx.update, grad_fn=lambda p, _: p)
    updates, after = jax.eval_shape(step, params, state, params)
    same = jax.tree.structure(after) == jax.tree.structure(state)
    return same and form((updates, after)) == form((params, state))


@every_optimizer
@pytest.mark.parametrize("ranks", [(4, 2), (2, 4)], ids=["smaller", "larger"])
def test_the_form_is_that_of_the_new_optimizer(name, ranks) -> None:
    old, new = (OPTIMIZERS[name](rank) for rank in ranks)
    fresh = jax.eval_shape(new.init, PARAMS)
    resized = dsbp_optax.resize_state(example(name, ranks[0]), rank=ranks[1])
    assert jax.tree.structure(resized) == jax.tree.structure(fresh)
    assert form(resized) == form(fresh)
    dsbp_optax.check_checkpoint(resized, fresh)
    assert accepts(new, resized)
    with pytest.raises(ValueError, match="basis of 'first/kernel': got shape"):
        accepts(old, resized)


@every_optimizer
def test_growing_then_truncating_is_the_identity(name) -> None:
    state = example(name, 2)
    larger = dsbp_optax.resize_state(state, rank=5)
    chex.assert_trees_all_equal(dsbp_optax.resize_state(larger, rank=2), state)
    chex.assert_trees_all_equal(dsbp_optax.resize_state(state, rank=2), state)
    chex.assert_trees_all_equal(dsbp_optax.resize_state(state, PARAMS, rank=5), larger)


def test_new_directions_are_orthonormal_and_orthogonal_to_the_old() -> None:
    for name, tolerance in (("paper", 1e-5), ("half precision", 2e-2)):
        state = example(name, 3)
        larger = only(dsbp_optax.resize_state(state, rank=6))
        for path, basis in larger.basis.items():
            v = np.asarray(basis, np.float64).reshape(-1, 6)
            assert np.abs(v.T @ v - np.eye(6)).max() < tolerance, path
            kept = np.asarray(only(state).basis[path], np.float64).reshape(-1, 3)
            np.testing.assert_array_equal(v[:, :3], kept)
        again = only(dsbp_optax.resize_state(state, rank=6))
        chex.assert_trees_all_equal(again, larger)


def test_a_fraction_is_that_of_the_optimizer() -> None:
    """The default of the recipes is one too."""
    rank = dsbp_optax.RankFraction(1 / 8, most=3)
    new = dsbp_optax.dsbp_muon(0.05, rank=rank, **SMALL)
    state = dsbp_optax.resize_state(example("muon", 2), PARAMS, rank=rank)
    assert form(state) == form(jax.eval_shape(new.init, PARAMS))
    assert [only(state).basis[path].shape[-1] for path in PATHS] == [3, 3]
    small = dsbp_optax.resize_state(
        state, PARAMS, rank=dsbp_optax.RankFraction(1 / 16, most=3)
    )
    assert [only(small).basis[path].shape[-1] for path in PATHS] == [2, 1]
    with pytest.raises(ValueError, match=r"RankFraction.*Remedy.*params"):
        dsbp_optax.resize_state(state, rank=rank)


def test_moments_and_eigenvalues_follow_their_directions() -> None:
    """Rows of Adam's moments against float64: kept, zero, mean of the column."""
    whole = dsbp_optax.subspace_adamw(0.05, rank=3, moment_dtype=None, **SMALL)
    state = only(filled(whole.init(PARAMS)))
    grown, cut = (dsbp_optax.resize_state(state, rank=rank) for rank in (5, 2))
    for path in PATHS:
        m, v = (np.asarray(x[path], np.float64) for x in state.inner[1:])
        np.testing.assert_array_equal(cut.inner.mu[path], m[:2])
        np.testing.assert_array_equal(cut.inner.nu[path], v[:2])
        new = np.pad(m, ((0, 2), (0, 0)))
        np.testing.assert_array_equal(grown.inner.mu[path], new)
        np.testing.assert_array_equal(grown.inner.nu[path][:3], v)
        mean = np.broadcast_to(v.mean(0), (2, v.shape[1]))
        np.testing.assert_allclose(grown.inner.nu[path][3:], mean, rtol=1e-6)
        values = np.asarray(state.spectrum[path].eigenvalues)[0, 0]
        more, less = (s.spectrum[path].eigenvalues[0, 0] for s in (grown, cut))
        np.testing.assert_array_equal(more, np.pad(values, (0, 2)))
        np.testing.assert_array_equal(less, values[:2])
    outside = [s.inner.mu["first/bias"] for s in (state, grown, cut)]
    chex.assert_trees_all_equal(*outside)
    chex.assert_trees_all_equal(state.residual, grown.residual, cut.residual)


def test_moments_of_whole_kernels_stay() -> None:
    """Those of a metric do not see its basis."""
    state = example("adamw", 4)
    for rank in (2, 6):
        resized = dsbp_optax.resize_state(state, rank=rank)
        chex.assert_trees_all_equal(only(resized).inner, only(state).inner)
    beside = dsbp_optax.resize_state(example("muon", 4), rank=2)
    chex.assert_trees_all_equal(beside[0][0], example("muon", 4)[0][0])


def test_zero_second_moments_would_take_steps_that_are_too_long() -> None:
    """Why new directions get the mean: the planted wrong answer is zeros."""
    adam, path = optax.scale_by_adam(), PATHS[0]
    draw = np.random.default_rng(1).normal(size=(5, 32))
    coordinates = jnp.asarray(draw, jnp.float32)
    old = dsbp_optax.scale_by_spectral_projection(adam, rank=3).init(PARAMS)
    nu = {**old.inner.nu, path: jnp.ones((3, 32))}
    old = old._replace(inner=old.inner._replace(count=jnp.int32(10_000), nu=nu))
    inner = dsbp_optax.resize_state(old, rank=5).inner

    def longest(nu: Any) -> float:
        state = optax.ScaleByAdamState(inner.count, inner.mu[path], nu)
        return float(jnp.abs(adam.update(coordinates, state)[0][3:]).max())

    right = inner.nu[path]
    assert longest(right) < 0.5 < 3 < longest(right.at[3:].set(0))


@pytest.fixture(scope="module")
def middle() -> Any:
    """Optimizer by rank, parameters, gradients, a state of rank 4, its update."""
    make = functools.partial(
        dsbp_optax.scale_by_spectral_projection,
        optax.trace(0.9),
        update_every=50,
        power_iterations=1,
    )
    tx = make(rank=4)
    whole = optax.chain(tx, optax.sgd(0.05))
    params = make_params()
    step = jax.jit(make_step(whole))
    params, (state, *_) = step(params, whole.init(params), make_batch(0))
    grads = jax.grad(loss_fn)(params, make_batch(1))
    return make, params, grads, state, jax.jit(tx.update)(grads, state, params)[0]


def columns(state: Any, path: str) -> np.ndarray:
    basis = np.asarray(state.basis[path], np.float64)
    return basis.reshape(-1, basis.shape[-1])


def kernel(tree: Any, path: str) -> np.ndarray:
    layer, leaf = path.split("/")
    return np.asarray(tree[layer][leaf], np.float64)


def test_a_smaller_rank_is_exactly_the_leading_part(middle) -> None:
    """Between refreshes, an update along fewer directions is that part of the whole."""
    make, params, grads, state, whole = middle
    resized = dsbp_optax.resize_state(state, rank=2)
    part, _ = jax.jit(make(rank=2).update)(grads, resized, params)
    for path in KERNELS:
        v = columns(state, path)[:, :2]
        leading = v @ (v.T @ kernel(whole, path))
        np.testing.assert_allclose(kernel(part, path), leading, atol=2e-6)
        assert np.abs(kernel(whole, path) - leading).max() > 1e-3


def test_a_larger_basis_takes_the_same_step_and_the_gradient_beside(middle) -> None:
    make, params, grads, state, whole = middle
    resized = dsbp_optax.resize_state(state, rank=6)
    more, _ = jax.jit(make(rank=6).update)(grads, resized, params)
    for path in KERNELS:
        fresh = columns(resized, path)[:, 4:]
        beside = fresh @ (fresh.T @ kernel(grads, path))
        assert np.abs(beside).max() > 1e-3
        difference = kernel(more, path) - kernel(whole, path)
        np.testing.assert_allclose(difference, beside, atol=2e-6)


STACKED = {
    "scan": {"kernel": jnp.ones((3, 40, 32))},
    "conv": {"kernel": jnp.ones((1, 1, 40, 32))},
    "square": {"kernel": jnp.eye(40)},
    "out": {"kernel": jnp.ones((4, 8, 32))},
}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)], ids=["larger", "smaller"])
@pytest.mark.filterwarnings("ignore:the axes of kernels were guessed")
def test_stacked_flipped_and_convolution_kernels(side, ranks) -> None:
    old, new = (
        dsbp_optax.scale_by_spectral_projection(
            optax.scale_by_adam(), rank=rank, side=side
        )
        for rank in ranks
    )
    state = filled(old.init(STACKED))
    assert set(state.basis) == {f"{name}/kernel" for name in STACKED}
    resized = dsbp_optax.resize_state(state, STACKED, rank=ranks[1])
    assert form(resized) == form(jax.eval_shape(new.init, STACKED))
    assert accepts(new, resized, STACKED)
    for path, nu in state.inner.nu.items():
        axis = -1 if nu.shape[-1] == ranks[0] else -2
        both = nu, resized.inner.nu[path]
        kept = [jnp.take(x, jnp.arange(min(ranks)), axis=axis) for x in both]
        np.testing.assert_array_equal(*kept)
    chex.assert_trees_all_equal(dsbp_optax.resize_state(state, rank=ranks[1]), resized)


def test_where_a_state_does_not_tell_the_axis_it_asks_for_parameters() -> None:
    params = {"conv": {"kernel": jnp.ones((1, 1, 16, 4))}}
    tx = dsbp_optax.scale_by_spectral_projection(
        optax.trace(0.9), rank=4, project="always"
    )
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"'conv/kernel', \(4, 4\).*opt_state, params"):
        dsbp_optax.resize_state(state, rank=2)
    resized = dsbp_optax.resize_state(state, params, rank=2)
    assert resized.inner.trace["conv/kernel"].shape == (2, 4)


def test_kernels_that_share_a_basis_and_ranks_by_path() -> None:
    def make(rank: Any) -> Any:
        return dsbp_optax.dsbp_muon(0.1, rank=rank, share=[("q/kernel", "k/kernel")])

    params = {name: {"kernel": jnp.ones((40, 32))} for name in ("q", "k", "mlp")}
    state, asked = make(4).init(params), {"mlp*": 5, "*": 2}
    resized = dsbp_optax.resize_state(state, params, rank=asked)
    assert only(resized).shared == {"q/kernel": {"k/kernel": {}}}
    assert only(resized).basis["mlp/kernel"].shape == (40, 1, 5)
    assert form(resized) == form(jax.eval_shape(make(asked).init, params))
    assert accepts(make(asked), resized, params)
    by_shape = dsbp_optax.resize_state(
        state, params, rank=lambda path, shape: shape[-1] // 16
    )
    assert only(by_shape).basis["q/kernel"].shape == (40, 1, 2)
    with pytest.raises(ValueError, match=r"'k/kernel': got 2, expected 3 as for 'q/k"):
        dsbp_optax.resize_state(state, rank={"k*": 2, "*": 3})
    with pytest.raises(ValueError, match=r"wants the shapes.*opt_state, params"):
        dsbp_optax.resize_state(state, rank=lambda path, shape: 2)


def test_one_chain_may_have_two_ranks() -> None:
    both = OPTIMIZERS["sharpness beside"](4)
    state = dsbp_optax.resize_state(both.init(PARAMS), rank={"*#sharpness": 3, "*": 2})
    ranks = [s.basis[PATHS[0]].shape[-1] for s in _spectral.find_states(state)]
    assert ranks == [3, 2]


def test_adaptive_ranks_stay_adaptive() -> None:
    def make(most: int) -> Any:
        return dsbp_optax.scale_by_spectral_projection(
            optax.scale_by_adam(), rank=AutoRank(most, least=1)
        )

    state = filled(make(4).init(PARAMS))
    shrunk = {
        path: s._replace(rank=jnp.full_like(s.rank, 3))
        for path, s in state.schedule.items()
    }
    state = state._replace(schedule=shrunk)
    larger = dsbp_optax.resize_state(state, rank=AutoRank(6))
    assert accepts(make(6), larger)
    for path in PATHS:
        assert int(larger.schedule[path].rank.max()) == 3
        assert not larger.inner.nu[path][4:].any(), "not in use"
    back = dsbp_optax.resize_state(larger, rank=AutoRank(4))
    chex.assert_trees_all_equal(back, state)
    smaller = dsbp_optax.resize_state(state, rank=AutoRank(2, least=1))
    assert {int(s.rank.max()) for s in smaller.schedule.values()} == {2}
    wrong = r"'first/kernel': got a fixed one, expected an adaptive"
    with pytest.raises(ValueError, match=wrong):
        dsbp_optax.resize_state(state, rank=2)
    with pytest.raises(ValueError, match="got an adaptive one, expected a fixed one"):
        dsbp_optax.resize_state(example("muon", 4), rank="auto")


def test_ranks_that_cannot_be() -> None:
    state = example("muon", 4)
    with pytest.raises(ValueError, match=r"'second/kernel': got 32, expected below 32"):
        dsbp_optax.resize_state(state, rank=32)
    with pytest.raises(ValueError, match="no rank is given for 'second/kernel'"):
        dsbp_optax.resize_state(state, rank={"first*": 2})
    with pytest.raises(ValueError, match="expected at least 1"):
        dsbp_optax.resize_state(state, rank=0)
    with pytest.raises(ValueError, match="holds no state of"):
        dsbp_optax.resize_state(optax.adam(0.1).init(PARAMS), rank=2)
    square = dsbp_optax.scale_by_spectral_projection(rank=40, project="always")
    whole = square.init(PARAMS)
    chex.assert_trees_all_equal(dsbp_optax.resize_state(whole, rank=40), whole)


def test_a_kernel_that_the_new_optimizer_would_not_project_is_named() -> None:
    """The state decides, so that nothing is lost; the check says where they differ."""
    make = functools.partial(dsbp_optax.subspace_muon, 0.1, residual="int6")
    old, new = (make(rank=rank) for rank in (4, 2))
    params = make_params()
    resized = dsbp_optax.resize_state(old.init(params), rank=2)
    assert accepts(new, resized, params)
    said = r"keeps 'second/kernel' in full space, this optimizer would not.*rank it had"
    with pytest.raises(ValueError, match=said):
        dsbp_optax.check_checkpoint(resized, jax.eval_shape(new.init, params))
    alike = make(rank={"second/kernel": 4, "*": 2})
    dsbp_optax.check_checkpoint(resized, jax.eval_shape(alike.init, params))


def test_another_model_is_named() -> None:
    state = example("muon", 4)
    with pytest.raises(ValueError, match="basis for 'first/kernel', which is not amo"):
        dsbp_optax.resize_state(state, {"other": PARAMS["first"]}, rank=2)
    wide = {**PARAMS, "first": {"kernel": jnp.ones((8, 32))}}
    with pytest.raises(ValueError, match="'first/kernel' is for a kernel of shape"):
        dsbp_optax.resize_state(state, wide, rank=2)


class Mine(NamedTuple):
    """The state of somebody's optimizer."""

    slow: Any


def test_unknown_moments_are_named_and_may_be_told() -> None:
    mine = optax.GradientTransformation(
        lambda p: Mine(jax.tree.map(jnp.ones_like, p)), lambda u, s, p=None: (u, s)
    )
    kind = {("Mine", "slow"): "second"}
    tx = dsbp_optax.scale_by_spectral_projection(mine, rank=4, transport=kind)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"keeps Mine\.slow for each kernel"):
        dsbp_optax.resize_state(state, rank=5)
    resized = dsbp_optax.resize_state(state, rank=5, transport=kind)
    np.testing.assert_array_equal(resized.inner.slow[PATHS[0]], np.ones((5, 32)))


def test_the_step_of_msam_is_taken_back_first() -> None:
    def make(rank: int) -> Any:
        return dsbp_optax.subspace_msam(dsbp_optax.dsbp_sgd(0.05, rank=rank), 0.3)

    state = make(4).init(PARAMS)
    away = state._replace(radius=jnp.float32(0.3))
    with pytest.raises(ValueError, match="evaluation_params"):
        dsbp_optax.resize_state(away, rank=2)
    resized = dsbp_optax.resize_state(away._replace(radius=0 * away.radius), rank=2)
    assert accepts(make(2), resized)


def test_linen_and_nnx_states() -> None:
    nnx = pytest.importorskip("flax.nnx")
    old, new = (
        dsbp_optax.linen.TrainState.create(
            apply_fn=None, params=PARAMS, tx=dsbp_optax.dsbp_muon(0.1, rank=rank)
        )
        for rank in (4, 2)
    )
    new = new.replace(opt_state=dsbp_optax.resize_state(old.opt_state, rank=2))
    jax.eval_shape(lambda state: state.apply_gradients(grads=PARAMS), new)

    model = nnx.Linear(40, 32, rngs=nnx.Rngs(0))
    old, new = (
        nnx.Optimizer(model, dsbp_optax.subspace_muon(0.1, rank=rank), wrt=nnx.Param)
        for rank in (8, 4)
    )
    pure = filled(dsbp_optax.nnx._pure(old.opt_state))
    nnx.update(new.opt_state, nnx.state(dsbp_optax.resize_state(pure, rank=4)))
    held = dsbp_optax.nnx._pure(new.opt_state)
    trace = held[0].inner.trace["kernel"]
    np.testing.assert_array_equal(trace, pure[0].inner.trace["kernel"][:4])
    assert accepts(new.tx, held, {"kernel": jnp.ones((40, 32)), "bias": jnp.ones(32)})


def test_states_of_another_version_are_refused_at_trace_time() -> None:
    for name in ("muon", "sharpness beside"):
        tx, state = OPTIMIZERS[name](2), example(name, 2)
        for wrong, said in (({"0": {}}, "version 0, exp"), ({}, "version none, exp")):
            old = _spectral.map_states(lambda s, v=wrong: s._replace(version=v), state)
            with pytest.raises(ValueError, match=f"{said}.*Remedy"):
                accepts(tx, old)
            with pytest.raises(ValueError, match=f"{said}.*Remedy"):
                dsbp_optax.resize_state(old, rank=1)
            assert jax.tree.structure(old) != jax.tree.structure(state)


def as_saved(tree: Any) -> Any:
    """Plain dicts and lists, as a checkpoint's metadata has them."""
    if hasattr(tree, "_asdict"):
        return {k: as_saved(v) for k, v in tree._asdict().items()}
    if isinstance(tree, tuple | list):
        return [as_saved(v) for v in tree]
    if isinstance(tree, dict):
        return {k: as_saved(v) for k, v in tree.items()}
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
    rank = "'state/0/1/basis/first/kernel' has rank 4, expected 2"
    refused(whole(example("muon", 4)), expected, rank)
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
    refused(plain, expected, "it has no .*'state/0/0/kernels/momentum/first/kernel")
    old = as_saved(expected)
    old["state"][0][1]["version"] = {"0": {}}
    refused(old, expected, "'state/0/1' is of version 0, expected 1")
    del old["state"][0][1]["version"]
    refused(old, expected, "'state/0/1' is of version none, expected 1")
