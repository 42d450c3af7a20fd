"""The Optax contract: every transformation through every wrapper and JAX transform."""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _models import (
    CASES,
    HIDDEN,
    KERNELS,
    activations,
    loss_fn,
    make_batch,
    make_params,
    make_step,
    only,
    signature,
    sketches,
    train,
)
from jax import export
from versions import x64

import dsbp_optax
from dsbp_optax import Basis, by_path, put_statistics
from dsbp_optax.capture.state import riders as make_riders
from dsbp_optax.core.state import find_states

STEPS = 12
every_case = pytest.mark.parametrize("name", list(CASES))
some_cases = pytest.mark.parametrize("name", ["dsbp_adamw", "sharpness"])
IN_STATE = Basis(statistics_in_state=True)


@functools.cache
def _compiled(name: str, kind: Any = None) -> tuple[Any, Any]:
    """A bare transformation with its defaults, and its step, compiled once for all."""
    case = CASES[name]
    tx = case.optimizer()
    return tx, jax.jit(make_step(tx, case.side, kind))


@functools.cache
def _reference(name: str, steps: int = STEPS) -> tuple[Any, Any]:
    """Parameters and state after a few steps of the bare transformation."""
    (tx, step), params = _compiled(name), make_params()
    return train(step, params, tx.init(params), steps)


@every_case
def test_a_step_that_is_not_compiled_is_the_compiled_one(name):
    case, params = CASES[name], make_params()
    tx = case.optimizer()
    new, state = make_step(tx, case.side)(params, tx.init(params), make_batch(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
    chex.assert_tree_all_finite((new, state))
    expected, reached = _reference(name, 1)
    chex.assert_trees_all_close(new, expected, rtol=2e-4, atol=2e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, reached)
    assert not np.allclose(new["first"]["kernel"], params["first"]["kernel"])
    assert only(state).spectrum[KERNELS[0]].activations.all()


def _traced_once(step: Any) -> Any:
    """`step`, compiled; a second trace raises."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(step, n=1))


# ---------------------------------------------------------------- wrappers

_ALL_TRAIN = jax.tree.map(lambda _: "train", make_params())


def _injected(tx: Any) -> Any:
    def factory(scale: float) -> Any:
        return optax.chain(tx, optax.scale(scale))

    return optax.inject_hyperparams(factory)(scale=1.0)


def _always(step: Any) -> Any:
    return jnp.asarray(step >= 0)


#: Wrappers that pass keywords on and, so used, change nothing.
TRANSPARENT = {
    "chain": lambda tx: optax.chain(optax.identity(), tx, optax.identity()),
    "named_chain": lambda tx: optax.named_chain(("ours", tx)),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "partition": lambda tx: optax.partition({"train": tx}, _ALL_TRAIN),
    "multi_transform": lambda tx: optax.multi_transform({"train": tx}, _ALL_TRAIN),
    "inject_hyperparams": _injected,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, _always),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, _always),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "nested": lambda tx: optax.chain(
        optax.apply_if_finite(optax.chain(optax.named_chain(("ours", tx))), 3)
    ),
}


if hasattr(optax, "selective_transform"):  # since optax 0.2.6
    TRANSPARENT["selective"] = lambda tx: optax.selective_transform(
        tx, freeze_mask=False
    )


@pytest.mark.parametrize("wrapper", list(TRANSPARENT))
def test_wrapper_passes_statistics_and_changes_nothing(wrapper):
    expected, reached = _reference("dsbp_sgd", 5)
    tx, params = TRANSPARENT[wrapper](CASES["dsbp_sgd"].optimizer()), make_params()
    step = jax.jit(make_step(tx))
    new, state = train(step, params, tx.init(params), 5)
    chex.assert_trees_all_close(new, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(only(state), only(reached), rtol=1e-3, atol=1e-4)
    assert int(only(state).step) == 5
    assert only(state).spectrum[KERNELS[1]].activations.all()


#: Wrappers that pass keywords on and do something of their own.
ACTIVE = {
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.05),
    "mechanize": optax.contrib.mechanize,
}


@pytest.mark.parametrize("wrapper", list(ACTIVE))
def test_active_wrapper_passes_statistics(wrapper):
    tx, params = ACTIVE[wrapper](CASES["dsbp_sgd"].optimizer(rank=2)), make_params()
    step = jax.jit(make_step(tx))
    new, state = train(step, params, tx.init(params), 5)
    chex.assert_tree_all_finite((new, state))
    for spectrum in only(state).spectrum.values():
        assert spectrum.activations.all()
        assert (spectrum.iterations == 4).all()


# ---------------------------------------------------------------- masks and partitions


def _first_only(params: Any) -> Any:
    chosen = jax.tree.map(lambda _: True, params)
    chosen["second"] = jax.tree.map(lambda _: False, params["second"])
    return chosen


@some_cases
def test_masked_kernels_keep_the_whole_mapping(name):
    case, params = CASES[name], make_params()
    tx = optax.masked(case.optimizer(), _first_only)
    state = tx.init(params)
    assert set(only(state).basis) == {KERNELS[0]}
    statistics = activations(params, make_batch(0), case.side)
    assert set(statistics) == set(KERNELS)
    grads = jax.grad(loss_fn)(params, make_batch(0))
    updates, state = tx.update(grads, state, params, statistics=statistics)
    chex.assert_trees_all_equal(updates["second"], grads["second"])
    assert only(state).spectrum[KERNELS[0]].activations.all()
    assert not np.allclose(updates["first"]["kernel"], grads["first"]["kernel"])


def test_masked_refuses_a_path_that_is_nowhere():
    params = make_params()
    tx = optax.masked(CASES["dsbp_adamw"].optimizer(), _first_only)
    with pytest.raises(ValueError, match=r"secnd/kernel.*Did you mean 'second/kernel'"):
        tx.update(
            params,
            tx.init(params),
            params,
            statistics={"secnd/kernel": jnp.ones((2, 2))},
        )


def test_labels_and_masks_of_whole_branches():
    """A prefix of the tree hides paths behind it: they are no misspellings."""
    params, x = make_params(), make_batch(0)
    case = CASES["dsbp_sgd"]
    tx = optax.partition(
        {
            "train": case.optimizer(rank={"first/*": 2, "second/*": 3}),
            "rest": case.optimizer(),
        },
        {"first": "train", "second": "rest", "embed": "rest"},
    )
    state = tx.init(params)
    statistics = activations(params, x, case.side)
    grads = jax.grad(loss_fn)(params, x)
    _, state = tx.update(grads, state, params, statistics=statistics)
    for inner in find_states(state):
        assert all(one.activations.all() for one in inner.spectrum.values())
    with pytest.raises(ValueError, match="pattern 'frist/\\*' matches no parameter"):
        optax.masked(
            case.optimizer(rank={"frist/*": 2}),
            {"first": True, "second": False, "embed": True},
        ).init(params)


def _labels(params: Any) -> Any:
    return {k: jax.tree.map(lambda _, k=k: k, v) for k, v in params.items()}


@some_cases
@pytest.mark.parametrize("split", [optax.partition, optax.multi_transform])
def test_frozen_leaves_allocate_nothing(name, split):
    case, params = CASES[name], make_params()
    tx = split(
        {
            "first": case.optimizer(),
            "second": optax.set_to_zero(),
            "embed": optax.sgd(0.1),
        },
        _labels,
    )
    state = tx.init(params)
    frozen = {x.shape for x in jax.tree.leaves(params["second"])}
    assert set(only(state).basis) == {KERNELS[0]}
    sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert not any(shape[start:] in frozen for shape in sizes for start in (0, 1))
    assert not any(HIDDEN in shape[:-1] for shape in sizes)
    assert {one.kernel.path for one in by_path(state).values()} == {KERNELS[0]}
    new, state = train(jax.jit(make_step(tx, case.side)), params, state, 4)
    chex.assert_trees_all_equal(new["second"], params["second"])
    assert not np.allclose(new["first"]["kernel"], params["first"]["kernel"])
    assert only(state).spectrum[KERNELS[0]].activations.all()


def test_two_projections_on_disjoint_groups():
    params = make_params()
    labels = {"embed": "b", "first": "a", "second": "b"}
    tx = optax.partition(
        {
            "a": CASES["dsbp_sgd"].optimizer(),
            "b": CASES["dsbp_adamw"].optimizer(rank=3),
        },
        {k: jax.tree.map(lambda _, k=k: labels[k], v) for k, v in params.items()},
    )
    step = jax.jit(make_step(tx, kind=sketches))
    _, state = train(step, params, tx.init(params), 5)
    ranks = {path: layer.kernel.rank for path, layer in by_path(state).items()}
    assert ranks == {KERNELS[0]: 2, KERNELS[1]: 3}
    for inner in find_states(state):
        for spectrum in inner.spectrum.values():
            assert spectrum.activations.all()
    grads = {**params, "first": jax.tree.map(lambda x: x * jnp.nan, params["first"])}
    _, state = tx.update(grads, state, params)
    assert dsbp_optax.diagnostics.metrics(state)["dsbp/skipped"] == 1


def test_a_group_without_parameters_is_harmless():
    """A label that nothing carries, and a partition whose group is empty."""
    params = make_params()
    case = CASES["dsbp_sgd"]
    tx = optax.partition(
        {"train": case.optimizer(), "none": case.optimizer()}, _ALL_TRAIN
    )
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    new, state = train(step, params, state, 2)
    expected, _ = _reference("dsbp_sgd", 2)
    chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)
    assert make_riders(state).keys() == set(KERNELS)
    assert dsbp_optax.diagnostics.metrics(state)["dsbp/step"] == 2


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("name", ["sharpness"])
def test_multi_steps(name):
    case, params = CASES[name], make_params()
    tx = optax.MultiSteps(case.optimizer(), 2)
    step = jax.jit(make_step(tx, case.side))
    state = tx.init(params)
    once, state = step(params, state, make_batch(0))
    chex.assert_trees_all_equal(once, params)
    assert int(only(state).step) == 0
    assert not only(state).spectrum[KERNELS[0]].iterations.any()
    twice, state = step(once, state, make_batch(1))
    assert not np.allclose(twice["first"]["kernel"], params["first"]["kernel"])
    assert int(only(state).step) == 1
    assert only(state).spectrum[KERNELS[0]].activations.all()


def _bare_step(tx: Any, fast: Any = lambda p: p) -> Any:
    """A step that hands statistics over inside the state only."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        current = fast(params)
        grads = jax.grad(loss_fn)(current, batch)
        state = put_statistics(state, sketches(state, current, batch))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


@some_cases
def test_multi_steps_inside_a_chain(name):
    inner = CASES[name].optimizer(basis=IN_STATE)
    tx = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.MultiSteps(inner, 2).gradient_transformation(),
    )
    params = make_params()
    step, state = _bare_step(tx), tx.init(params)
    before = signature(state)
    new, state = train(step, params, state, 4)
    assert int(only(state).step) == 2
    for spectrum in only(state).spectrum.values():
        assert spectrum.activations.all()
        assert (spectrum.iterations == 2).all()
    assert signature(state) == before
    assert not np.allclose(new["first"]["kernel"], params["first"]["kernel"])


def test_multi_steps_takes_the_sum_of_micro_batches():
    """Summed in the user's own loop, two halves are one whole batch."""
    params, whole = make_params(), make_batch(0, n=24)
    halves = [
        jax.tree.map(lambda x, s=s: x[s], whole) for s in (slice(12), slice(12, 24))
    ]
    case = CASES["dsbp_sgd"]
    tx = case.optimizer(moment_dtype=None, basis=Basis(dtype="float32"))
    state = tx.init(params)
    seen = [sketches(state, params, half) for half in halves]
    summed = dsbp_optax.add_statistics(*seen)
    grads = jax.grad(loss_fn)(params, whole)
    accumulate = optax.MultiSteps(tx, 2)
    _, one = jax.jit(tx.update)(
        grads, state, params, statistics=sketches(state, params, whole)
    )
    update, many = jax.jit(accumulate.update), accumulate.init(params)
    for half in halves:
        grads = jax.grad(loss_fn)(params, half)
        _, many = update(grads, many, params, statistics=summed)
    chex.assert_trees_all_close(only(many), only(one), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- lookahead and SAM


@pytest.mark.parametrize(("reset", "chained"), [(False, True), (True, False)])
def test_lookahead_through_the_state(reset, chained):
    fast = CASES["dsbp_sgd"].optimizer(basis=IN_STATE)
    tx = optax.lookahead(fast, sync_period=3, slow_step_size=0.5, reset_state=reset)
    tx = optax.chain(tx) if chained else tx
    params = optax.LookaheadParams.init_synced(make_params())
    state = tx.init(params)
    before = signature(state)
    step = _bare_step(tx, fast=lambda p: p.fast)
    params, state = train(step, params, state, 2)
    assert only(state).spectrum[KERNELS[0]].activations.all()
    assert (only(state).spectrum[KERNELS[0]].iterations == 2).all()
    params, state = train(step, params, state, 2, start=2)
    assert int(only(state).step) == (1 if reset else 4)
    assert signature(state) == before
    assert float(loss_fn(params.slow, make_batch(0))) < float(
        loss_fn(make_params(), make_batch(0))
    )


def test_bare_lookahead_refuses_the_keyword():
    tx = optax.lookahead(CASES["dsbp_sgd"].optimizer(), 3, 0.5)
    params = optax.LookaheadParams.init_synced(make_params())
    with pytest.raises(TypeError, match="statistics"):
        tx.update(params.fast, tx.init(params), params, statistics={})


def test_sam_through_the_state():
    outer = CASES["dsbp_sgd"].optimizer(basis=IN_STATE)
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    tx = optax.contrib.sam(outer, adversary, sync_period=2)
    params = make_params()
    state = tx.init(params)
    before = signature(state)
    params, state = train(_bare_step(tx), params, state, 4)
    assert int(only(state).step) == 2
    assert only(state).spectrum[KERNELS[0]].activations.all()
    assert signature(state) == before
    chex.assert_tree_all_finite((params, state))


def test_sam_as_the_adversary_resets():
    params = make_params()
    tx = optax.contrib.sam(optax.sgd(0.05), CASES["dsbp_sgd"].optimizer(), 2)
    step = jax.jit(
        lambda p, s, b: (lambda u, s: (optax.apply_updates(p, u), s))(
            *tx.update(jax.grad(loss_fn)(p, b), s, p)
        )
    )
    params, state = train(step, params, tx.init(params), 4)
    assert int(only(state).step) == 0
    chex.assert_tree_all_finite((params, state))


def test_flatten_leaves_nothing_to_project():
    """One vector has no kernels: the inner optimizer alone acts."""
    params = make_params()
    tx = optax.flatten(CASES["dsbp_adamw"].optimizer(weight_decay=0.0))
    state = tx.init(params)
    assert only(state).basis == {}
    grads = jax.grad(loss_fn)(params, make_batch(0))
    updates, state = tx.update(grads, state, params, statistics={})
    expected, _ = optax.adam(0.05).update(grads, optax.adam(0.05).init(params))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- hyperparameters


def test_injected_hyperparameters_may_change_without_recompiling():
    factory = optax.inject_hyperparams(dsbp_optax.dsbp, static_args=("rank",))
    tx = factory(
        0.05,
        rank=2,
        update_every=3,
        power_iterations=2,
        sharpness=0.1,
        basis=Basis(side="input"),
    )
    params = make_params()
    state = tx.init(params)
    assert {"learning_rate", "sharpness", "update_every", "power_iterations"} <= set(
        state.hyperparams
    )
    step = _traced_once(make_step(tx))
    moved, _ = step(params, state, make_batch(0))
    state = optax.tree.set(state, learning_rate=jnp.float32(0.0))
    still, _ = step(params, state, make_batch(0))
    assert not np.allclose(moved["first"]["kernel"], params["first"]["kernel"])
    chex.assert_trees_all_equal(still, params)


@pytest.mark.parametrize(
    ("every", "iterations", "total"), [(3, 2, 4), (2, 1, 3), (6, 1, 1), (1, 1, 6)]
)
def test_injected_periods_are_those_of_plain_numbers(every, iterations, total):
    tx = _injected_sgd()
    params = make_params()
    state = optax.tree.set(
        tx.init(params), update_every=every, power_iterations=iterations
    )
    _, state = train(_injected_step(), params, state, 6)
    assert (only(state).spectrum[KERNELS[0]].iterations == total).all()


@functools.cache
def _injected_sgd() -> Any:
    """A field of `Basis` is injected by a function of one's own."""

    def factory(update_every: Any, power_iterations: Any) -> Any:
        basis = Basis(power_iterations=power_iterations)
        return dsbp_optax.dsbp_sgd(0.05, rank=2, update_every=update_every, basis=basis)

    return optax.inject_hyperparams(factory)(jnp.asarray(3), jnp.asarray(2))


@functools.cache
def _injected_step() -> Any:
    return jax.jit(make_step(_injected_sgd(), kind=sketches))


def test_injected_hyperparameters_equal_plain_ones():
    factory = optax.inject_hyperparams(dsbp_optax.dsbp_adamw, static_args=("rank",))
    settings = {"rank": 2, "update_every": 3, "moment_dtype": "float32"}
    settings["basis"] = Basis(power_iterations=2, dtype="float32")  # no level may flip
    tx, plain = factory(0.05, **settings), dsbp_optax.dsbp_adamw(0.05, **settings)
    params = make_params()
    new, state = train(jax.jit(make_step(tx)), params, tx.init(params), 5)
    expected, reached = train(jax.jit(make_step(plain)), params, plain.init(params), 5)
    chex.assert_trees_all_close(new, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(only(state), only(reached), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    "factory",
    [
        dsbp_optax.dsbp,
        dsbp_optax.dsbp_sgd,
        dsbp_optax.dsbp_adamw,
        dsbp_optax.dsbp_muon,
        dsbp_optax.subspace_muon,
    ],
)
def test_traced_rank_is_a_clear_error(factory, jitted):
    tx = optax.inject_hyperparams(factory)(0.1, rank=2)
    init = jax.jit(tx.init) if jitted else tx.init
    with pytest.raises(TypeError, match=r"rank.*static_args=\('rank',\)"):
        init(make_params())


def test_schedules_reach_learning_rate_and_sharpness():
    params = make_params()
    zero = optax.constant_schedule(0.0)
    tx = dsbp_optax.dsbp(zero, 2, 3, 2, zero)
    new, _ = train(jax.jit(make_step(tx, "output")), params, tx.init(params), 1)
    chex.assert_trees_all_equal(new, params)
    flat = dsbp_optax.dsbp(0.05, 2, 3, 2, zero)
    none = dsbp_optax.dsbp(0.05, 2, 3, 2, 0.0)
    runs = [
        train(jax.jit(make_step(t, "output")), params, t.init(params), 2)
        for t in (flat, none)
    ]
    chex.assert_trees_all_close(*(p for p, _ in runs), rtol=1e-6)


# ---------------------------------------------------------------- optax.tree


@every_case
def test_map_params_maps_copies_of_the_parameters_only(name):
    tx = optax.chain(CASES[name].optimizer(), optax.ema(0.9, debias=False))
    params = make_params()
    step = jax.jit(make_step(tx, CASES[name].side))
    _, state = train(step, params, tx.init(params), 1)
    mapped = optax.tree.map_params(tx, lambda x, _: x + 1, state, params)
    chex.assert_trees_all_equal(
        mapped[-1].ema, jax.tree.map(lambda x: x + 1, state[-1].ema)
    )
    chex.assert_trees_all_equal(mapped[0], state[0])
    chex.assert_trees_all_equal_structs(mapped, state)
    blank = optax.tree.map_params(
        tx, lambda _: 1, state, transform_non_params=lambda _: 0
    )
    assert set(jax.tree.leaves(blank[0])) == {0}
    assert set(jax.tree.leaves(blank[-1].ema)) == {1}


@every_case
def test_tree_get_and_set(name):
    tx, params = CASES[name].optimizer(), make_params()
    state = tx.init(params)
    assert set(optax.tree.get(state, "basis")) == set(KERNELS)
    assert int(optax.tree.get(state, "step")) == 0
    later = optax.tree.set(state, step=jnp.asarray(7, jnp.int32))
    assert int(only(later).step) == 7
    chex.assert_trees_all_equal(
        only(later)._replace(step=only(state).step), only(state)
    )


def test_tree_set_is_put_statistics():
    tx, params = CASES["dsbp_sgd"].optimizer(basis=IN_STATE), make_params()
    state = tx.init(params)
    found = sketches(state, params, make_batch(0))
    by_optax = optax.tree.set(state, statistics=found)
    chex.assert_trees_all_equal(by_optax, put_statistics(state, found))
    grads = jax.grad(loss_fn)(params, make_batch(0))
    _, through_state = tx.update(grads, by_optax, params)
    _, by_keyword = tx.update(grads, state, params, statistics=found)
    chex.assert_trees_all_equal(through_state, by_keyword)
    assert only(through_state).spectrum[KERNELS[0]].activations.all()
    assert not any(np.any(x) for x in jax.tree.leaves(only(through_state).statistics))


# ---------------------------------------------------------------- JAX


@every_case
def test_eval_shape_of_init_is_its_shape(name):
    tx = CASES[name].optimizer(basis=IN_STATE)
    shapes, state = jax.eval_shape(tx.init, make_params()), tx.init(make_params())
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert signature(shapes) == signature(state)
    abstract = jax.eval_shape(make_params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, abstract), state
    )
    chex.assert_trees_all_close(jax.jit(tx.init)(make_params()), state, atol=1e-6)


def test_state_is_stable_without_jit():
    name = "dsbp_sgd"
    case, params = CASES[name], make_params()
    tx = case.optimizer()
    state = tx.init(params)
    expected = signature(state)
    params, state = train(make_step(tx, case.side, sketches), params, state, 3)
    assert signature(state) == expected
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)


@every_case
def test_compiles_once_and_keeps_its_state(name):
    case, params = CASES[name], make_params()
    tx = case.optimizer(update_every=20)
    state = tx.init(params)
    expected, structure = signature(state), jax.tree.structure(state)
    step = _traced_once(make_step(tx, case.side, sketches))
    batches = [make_batch(i) for i in range(4)]
    for i in range(300):
        params, state = step(params, state, batches[i % 4])
        if i < 24:
            assert signature(state) == expected, i
            assert jax.tree.structure(state) == structure
    assert int(only(state).step) == 300
    assert (only(state).spectrum[KERNELS[0]].iterations == 30).all()
    chex.assert_tree_all_finite((params, state))


@some_cases
def test_scan(name):
    case, params = CASES[name], make_params()
    tx = case.optimizer()
    step = make_step(tx, case.side)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *(make_batch(i) for i in range(5)))

    @jax.jit
    def run(carry: Any) -> Any:
        return jax.lax.scan(lambda c, b: (step(*c, b), None), carry, batches)[0]

    new, state = run((params, tx.init(params)))
    expected, reached = _reference(name, 5)
    chex.assert_trees_all_close(new, expected, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, reached)
    assert int(only(state).step) == 5


@some_cases
def test_vmap_over_an_ensemble(name):
    tx, compiled = _compiled(name)
    members = [make_params(seed=s) for s in (0, 7)]
    states = [tx.init(p) for p in members]
    single = [train(compiled, p, s, 4) for p, s in zip(members, states, strict=True)]

    def stack(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    both = jax.jit(jax.vmap(compiled, in_axes=(0, 0, None)))
    together = train(both, stack(members), stack(states), 4)
    chex.assert_trees_all_close(together, stack(single), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["dsbp_sgd"])
def test_donation(name):
    case = CASES[name]
    tx = case.optimizer()
    params = make_params()
    state = tx.init(params)
    step = make_step(tx, case.side)
    donating = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    old = jax.tree.leaves((params, state))
    for i in range(5):
        params, state = donating(params, state, make_batch(i))
        if i == 0:
            assert all(leaf.is_deleted() for leaf in old)
    expected, _ = _reference(name, 5)
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("params", [{}, make_params()], ids=["empty", "whole"])
@every_case
def test_no_buffer_is_in_the_state_twice(name, params):
    """XLA refuses to donate one buffer in two places."""
    state = CASES[name].optimizer(basis=IN_STATE).init(params)
    leaves = jax.tree.leaves(state)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(pointers)) == len(pointers)


# ---------------------------------------------------------------- trees and dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["dsbp_adamw", "sharpness"])
def test_dtypes(name, dtype):
    case = CASES[name]
    with x64(dtype == "float64"):
        params = make_params(dtype)
        # As for optax.adamw, the default eps is zero in float16.
        compute = jnp.promote_types(dtype, jnp.float32)
        whole = {"eps": 1e-3, "basis": Basis(dtype=compute)}
        tx = case.optimizer(**(whole if name == "dsbp_adamw" else {}))
        state = tx.init(params)
        before = signature(state)
        step = jax.jit(make_step(tx, case.side))
        new = params
        for i in range(4):
            new, state = step(new, state, make_batch(i, dtype=dtype))
        chex.assert_trees_all_equal_dtypes(new, params)
        assert only(state).basis
        for basis in only(state).basis.values():
            assert basis.dtype == compute
        for spectrum in only(state).spectrum.values():
            assert spectrum.eigenvalues.dtype == compute
            assert (spectrum.failures == 0).all()
        assert signature(state) == before
        chex.assert_tree_all_finite((new, state))


@every_case
def test_updates_keep_the_dtype_of_the_gradients(name):
    tx = CASES[name].optimizer()
    params = make_params(jnp.bfloat16)
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


ODD_TREES = {
    "empty dict": {},
    "empty tuple": (),
    "none leaves": {"a": None, "kernel": jnp.ones((16, 12)), "b": {"c": None}},
    "scalar": jnp.array(2.0, jnp.float32),
    "scalars": {"x": jnp.array(2.0, jnp.float32), "y": jnp.asarray([1.0])},
    "bare kernel": jnp.ones((16, 12)),
    "list": [jnp.ones((16, 12)), (jnp.ones(12), jnp.array(1.0, jnp.float32))],
    "zero size": {"kernel": jnp.ones((0, 12)), "other": jnp.ones((16, 0))},
}


@pytest.mark.parametrize("tree", list(ODD_TREES))
@pytest.mark.parametrize("name", ["dsbp", "dsbp_adamw", "sharpness"])
def test_odd_trees(name, tree):
    params = ODD_TREES[tree]
    tx = CASES[name].optimizer()
    state = tx.init(params)
    before = signature(state)
    update = jax.jit(lambda g, s: tx.update(g, s, params, statistics={}))
    for _ in range(2):
        updates, state = update(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_tree_all_finite(updates)
    assert signature(state) == before
    assert make_riders(state) is not None
    assert dsbp_optax.diagnostics.metrics(state) is not None
    assert dsbp_optax.diagnostics.explain(tx, params) is not None


@every_case
def test_nothing_in_place_of_parameters(name):
    """Integer leaves and frozen (zero) gradients pass through a step unharmed."""
    params = {"kernel": jnp.ones((16, 12)), "steps": jnp.asarray([3], jnp.int32)}
    tx = optax.masked(CASES[name].optimizer(), {"kernel": True, "steps": False})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["steps"].dtype == jnp.int32


# ---------------------------------------------------------------- checkpoints


def _mid_window(name: str) -> tuple[Any, Any, Any]:
    """A compiled step, and parameters and state one step into a window of two."""
    (tx, step), params = _compiled(name, sketches), make_params()
    params, state = train(step, params, tx.init(params), 4)
    assert bool(only(state).collect)
    assert int(only(state).step) % 3 == 1
    return step, params, state


def _continue(step: Any, params: Any, state: Any) -> Any:
    return train(step, params, state, 5, start=4)


@some_cases
def test_msgpack_round_trip_continues_bit_for_bit(name):
    serialization = pytest.importorskip("flax.serialization")
    step, params, state = _mid_window(name)
    data = serialization.to_bytes((params, state))
    blank = jax.tree.map(jnp.zeros_like, (params, state))
    restored = serialization.from_bytes(blank, data)
    chex.assert_trees_all_equal(restored, (params, state))
    chex.assert_trees_all_equal(
        _continue(step, *restored), _continue(step, params, state)
    )


@pytest.mark.filterwarnings("default")
@some_cases
def test_orbax_round_trip_continues_bit_for_bit(name, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    step, params, state = _mid_window(name)
    with warnings.catch_warnings(), checkpoint.StandardCheckpointer() as checkpointer:
        warnings.simplefilter("ignore")
        checkpointer.save(tmp_path / "at4", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        tx = CASES[name].optimizer()
        target = {
            "params": jax.eval_shape(make_params),
            "state": jax.eval_shape(tx.init, make_params()),
        }
        restored = checkpointer.restore(tmp_path / "at4", target)
    chex.assert_trees_all_equal(restored, {"params": params, "state": state})
    chex.assert_trees_all_equal_structs(restored["state"], state)
    resumed = _continue(step, restored["params"], restored["state"])
    chex.assert_trees_all_equal(resumed, _continue(step, params, state))


# ---------------------------------------------------------------- a whole Flax step


def _linen_step(tx: Any) -> tuple[Any, Any]:
    """A training step of a Linen model, and its arguments."""
    nn = pytest.importorskip("flax.linen")
    from dsbp_optax import linen

    class Model(nn.Module):
        @nn.compact
        def __call__(self, image: Any) -> Any:
            x = nn.relu(nn.Conv(8, (3, 3))(image))
            x = nn.tanh(nn.Dense(12)(x.reshape(x.shape[0], -1)))
            return nn.Dense(4)(x)

    model, image = Model(), jnp.ones((6, 4, 4, 3))
    params = model.init(jax.random.key(0), image)["params"]

    def loss(params: Any, image: Any) -> Any:
        return jnp.mean(model.apply({"params": params}, image) ** 2)

    value_and_grad = linen.value_and_grad(loss)

    def step(params: Any, state: Any, image: Any) -> Any:
        value, grads, statistics = value_and_grad(params, image, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return value, optax.apply_updates(params, updates), state

    return step, (params, tx.init(params), image)


@every_case
def test_whole_linen_step_lowers_everywhere(name):
    step, arguments = _linen_step(CASES[name].optimizer(rank=1))
    assert len(only(arguments[1]).basis) >= 2
    shapes = jax.eval_shape(lambda *x: x, *arguments)
    compiled = jax.jit(step)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        exported = export.export(compiled, platforms=[platform])(*shapes)
        assert exported.platforms == (platform,)
        assert "stablehlo.case" in exported.mlir_module()


@some_cases
def test_whole_linen_step_runs(name):
    step, (params, state, image) = _linen_step(CASES[name].optimizer(rank=1))
    compiled = _traced_once(step)
    for _ in range(4):
        value, params, state = compiled(params, state, image)
    assert np.isfinite(value)
    for spectrum in only(state).spectrum.values():
        assert spectrum.activations.all()


def test_an_inner_optimizer_with_a_random_key():
    """Random keys cannot be cast; noise in the subspace is an inner optimizer too."""
    noisy = optax.chain(optax.add_noise(0.01, 0.5, 0), optax.scale_by_adam())
    tx = dsbp_optax.scale_by_spectral_projection(noisy, rank=2, project="always")
    params = make_params()
    state = tx.init(params)
    step = jax.jit(tx.update)
    one, state = step(params, state, params)
    two, state = step(params, state, params)
    assert optax.tree.norm(optax.tree.sub(one, two)) > 1e-4
    broken = jax.tree.map(lambda p: p * jnp.nan, params)
    _, after = step(broken, state, params)
    chex.assert_trees_all_equal(after.inner, state.inner)
    assert dsbp_optax.diagnostics.state_bytes(state) > 0
