"""Moments in few bits: exact where they say so, bounded elsewhere, on every shape."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import metric_oracle as oracle
import numpy as np
import optax
import pytest
from states import layer
from versions import x64

import dsbp_optax
from dsbp_optax.linalg import quantize
from dsbp_optax.rules.moments import storage

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
#: Least mean square of the error of uniform levels for a normal variable (Max, 1960).
ERRORS = dict(
    zip(
        BITS,
        (0.3634, 0.1188, 0.0374, 0.01154, 3.5e-3, 1.04e-3, 3.04e-4, 8.2e-5),
        strict=True,
    )
)
#: Every kind of parameter: odd sizes, one row, one column, windows, stacks, none.
SHAPES = {
    "dense/kernel": (64, 48),
    "odd/kernel": (7, 13),
    "row/kernel": (1, 9),
    "column/kernel": (9, 1),
    "one/kernel": (1, 1),
    "Conv_0/kernel": (3, 3, 5, 7),
    "scan/dense/kernel": (2, 6, 4),
    "query/kernel": (8, 2, 4),
    "embed/embedding": (5, 16),
    "dense/bias": (48,),
    "scale": (),
    "empty/kernel": (0, 3),
}
PARAMS = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
MATRICES = [path for path, shape in SHAPES.items() if len(shape) > 1 and 0 not in shape]
OTHERS = [path for path in SHAPES if path not in MATRICES]
MAKERS = {
    "momentum": dsbp_optax.scale_by_quantized_momentum,
    "adam": dsbp_optax.scale_by_quantized_adam,
}
every_rule = pytest.mark.parametrize("name", MAKERS)
nesterov_or_not = pytest.mark.parametrize("nesterov", [False, True])


def gradients(seed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=s), dtype) for path, s in SHAPES.items()}


def run(tx: Any, steps: int = 6, update: Any = None) -> list[Any]:
    """Updates of steps on random gradients, each step compiled."""
    state, found, update = tx.init(PARAMS), [], update or jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(step), state)
        found.append(updates)
    return found


@functools.cache
def made(name: str, bits: int = 5) -> tuple[Any, Any]:
    """A rule with its defaults, and its update, compiled once for all tests."""
    tx = MAKERS[name](bits=bits)
    return tx, jax.jit(tx.update)


@functools.cache
def ran(name: str, bits: int = 5) -> list[Any]:
    """`run` of it."""
    tx, update = made(name, bits)
    return run(tx, update=update)


def whole(held: Any, bits: int) -> np.ndarray:
    """What a state keeps, as float64."""
    return np.asarray(storage(bits).decode(held), np.float64)


# ---------------------------------------------------------------- floats


@nesterov_or_not
def test_momentum_in_floats_is_that_of_optax(nesterov) -> None:
    tx = dsbp_optax.scale_by_quantized_momentum(0.9, bits=32, nesterov=nesterov)
    expected = run(optax.trace(0.9, nesterov))
    chex.assert_trees_all_equal(run(tx), expected)
    other = run(optax.trace(0.9, not nesterov))
    assert np.abs(other[-1]["dense/kernel"] - expected[-1]["dense/kernel"]).max() > 0.1


@nesterov_or_not
def test_adam_of_what_is_no_matrix_is_that_of_optax(nesterov) -> None:
    tx = dsbp_optax.scale_by_quantized_adam(0.8, 0.95, 1e-6, nesterov=nesterov)
    got, expected = (
        [{path: one[path] for path in OTHERS} for one in run(made)]
        for made in (tx, optax.scale_by_adam(0.8, 0.95, 1e-6, nesterov=nesterov))
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def oracle_adam(seen: list[np.ndarray], nesterov: bool, factored: bool) -> np.ndarray:
    """The last update of Adam after gradients ``(a, b)``, in float64."""
    b1, b2, eps = 0.8, 0.95, 1e-6
    m = v = rows = columns = 0.0
    for count, g in enumerate(seen, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        rows = b2 * rows + (1 - b2) * (g**2).mean(1, keepdims=True)
        columns = b2 * columns + (1 - b2) * (g**2).mean(0, keepdims=True)
        second = rows * columns / rows.mean() if factored else v
        first = m / (1 - b1 ** (count + nesterov))
        if nesterov:
            first = b1 * first + (1 - b1) * g / (1 - b1**count)
        update = first / (np.sqrt(second / (1 - b2**count)) + eps)
    return update


@nesterov_or_not
def test_adam_in_floats_is_that_of_the_factored_second_moment(nesterov) -> None:
    tx = dsbp_optax.scale_by_quantized_adam(0.8, 0.95, 1e-6, 32, nesterov=nesterov)
    with x64():
        params = {"kernel": jnp.ones((20, 12))}
        rng = np.random.default_rng(0)
        spread = np.exp(rng.normal(size=(20, 12)))
        seen = [spread * rng.normal(size=(20, 12)) for _ in range(6)]
        state, update = tx.init(params), jax.jit(tx.update)
        for g in seen:
            updates, state = update({"kernel": jnp.asarray(g)}, state)
    got = np.asarray(updates["kernel"])
    np.testing.assert_allclose(got, oracle_adam(seen, nesterov, True), rtol=1e-9)
    for wrong in ((nesterov, False), (not nesterov, True)):
        assert np.abs(got - oracle_adam(seen, *wrong)).max() > 1e-2


@nesterov_or_not
def test_adam_is_adam_where_the_squares_have_rank_one(nesterov) -> None:
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.normal(size=(20, 1))) * np.exp(rng.normal(size=(1, 12)))
    seen = [n * sizes * np.sign(rng.normal(size=(20, 12))) for n in range(1, 6)]
    one, two = (oracle_adam(seen, nesterov, factored) for factored in (True, False))
    np.testing.assert_allclose(one, two, rtol=1e-9)
    tx = dsbp_optax.scale_by_quantized_adam(0.8, 0.95, 1e-6, 32, nesterov=nesterov)
    adam = optax.scale_by_adam(0.8, 0.95, 1e-6, nesterov=nesterov)
    params = {"kernel": jnp.ones((20, 12))}
    for made in (tx, adam):
        state = made.init(params)
        for g in seen:
            updates, state = made.update({"kernel": jnp.asarray(g, jnp.float32)}, state)
        np.testing.assert_allclose(updates["kernel"], two, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- few bits


@pytest.mark.parametrize("bits", [1, 3, 8])
@every_rule
def test_the_first_step_is_exact_whatever_the_bits(name, bits) -> None:
    """A momentum is used before it is rounded."""
    few, exact = (ran(name, b)[0] for b in (bits, 32))
    chex.assert_trees_all_close(few, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_the_error_of_what_is_kept_is_that_of_its_bits(bits) -> None:
    """Of one step that of the best levels; of many the sum that the decay leaves."""
    tx = dsbp_optax.scale_by_quantized_momentum(0.9, bits=bits)
    rng = np.random.default_rng(2)
    state = tx.init({"kernel": jnp.ones((256, 128))})
    update, exact, errors = jax.jit(tx.update), 0.0, []
    for _ in range(12):
        g = rng.normal(size=(256, 128))
        exact = 0.9 * exact + g
        _, state = update({"kernel": jnp.asarray(g, jnp.float32)}, state)
        gap = whole(layer(state, "kernel#moments").inner, bits) - exact
        errors.append(float((gap**2).mean() / (exact**2).mean()))
    assert errors[0] == pytest.approx(ERRORS[bits], rel=0.1)
    assert max(errors) < 1.1 * ERRORS[bits] / (1 - 0.9**2)
    if bits > 2:
        assert max(errors) < 0.5 * ERRORS[bits - 1] / (1 - 0.9**2), "a bit is worth it"


@pytest.mark.parametrize("path", ["dense/kernel", "scan/dense/kernel", "Conv_0/kernel"])
@pytest.mark.parametrize("name", ["muon", "adam"])
def test_moments_in_five_bits_are_those_of_the_oracle(name, path) -> None:
    """Each matrix of a stack by itself, windows as rows."""
    rule = oracle.Rule(moments=name, bits=5, b2=0.95)
    tx = dsbp_optax.scale_by_quantized_momentum(0.95, bits=5, nesterov=False)
    if name == "adam":
        tx = dsbp_optax.scale_by_quantized_adam(0.9, 0.95, bits=5)
    shape = SHAPES[path]
    stack = shape[0] if path.startswith("scan") else 1
    with x64():
        rng = np.random.default_rng(4)
        state, update = tx.init({path: jnp.ones(shape)}), jax.jit(tx.update)
        blank = np.zeros((1, 1))
        kernels = [oracle.Kernel(blank, blank) for _ in range(stack)]
        for count in range(1, 7):
            g = rng.normal(size=shape)
            updates, state = update({path: jnp.asarray(g)}, state)
            matrices = g.reshape(stack, -1, shape[-1])
            expected = [
                oracle.moments(kernel, one, count, rule)
                for kernel, one in zip(kernels, matrices, strict=True)
            ]
            got = np.asarray(updates[path]).reshape(stack, -1, shape[-1])
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    coarse = oracle.few_bits(matrices[0], 5) - oracle.few_bits(matrices[0], 6)
    assert np.abs(coarse).max() > 1e-2


@pytest.mark.parametrize("bits", [1, 3, 5, 8, 32])
@every_rule
def test_every_shape_keeps_its_own(name, bits) -> None:
    for updates in ran(name, bits):
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
        chex.assert_tree_all_finite(updates)
        for path in SHAPES:
            assert updates[path].size == 0 or jnp.abs(updates[path]).max() > 0, path


@pytest.mark.parametrize("path", ["row/kernel", "column/kernel", "one/kernel"])
@every_rule
def test_one_row_or_column_is_not_lost(name, path) -> None:
    """Scales of a row and of a column hold it; levels hold its sign."""
    few, exact = (ran(name, bits) for bits in (5, 32))
    left, right = (np.stack([one[path] for one in found]) for found in (few, exact))
    assert np.linalg.norm(left - right) < 0.3 * np.linalg.norm(right)


@pytest.mark.parametrize("bits", [1, 5, 32])
@every_rule
def test_zeros_stay_zeros_and_everything_stays_finite(name, bits) -> None:
    """Of all numbers, and of one row and one column beside others."""
    tx, update = made(name, bits)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = update(nothing, state)
        chex.assert_trees_all_equal(updates, nothing)
    dead = gradients(0)
    dead["dense/kernel"] = dead["dense/kernel"].at[3].set(0).at[:, 5].set(0)
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = update(dead, state)
        chex.assert_tree_all_finite((updates, state))
        got = np.asarray(updates["dense/kernel"])
        assert not got[3].any(), "a row without gradients has no scale"
        assert np.abs(got[:, 5]).max() < 1e-6
        assert np.abs(got).max() > 0


@pytest.mark.parametrize("bits", [*BITS, 32])
@every_rule
def test_bytes_are_those_of_the_docstring(name, bits) -> None:
    d, m = 256, 512
    shapes = jax.eval_shape(MAKERS[name](bits=bits).init, {"kernel": jnp.ones((d, m))})
    leaves = [x for x in jax.tree.leaves(shapes) if x.ndim and x.dtype != jnp.int32]
    held = sum(x.size * x.dtype.itemsize for x in leaves)
    scales = 0 if bits == 32 else 2 * (d + m)
    factors = 4 * (d + m) if name == "adam" else 0
    assert held == bits * d * m // 8 + scales + factors


# ---------------------------------------------------------------- dtypes and programs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@every_rule
def test_updates_have_the_dtype_of_the_gradients(name, dtype) -> None:
    """And are computed in float32 at least."""
    with x64(dtype == "float64"):
        grads = gradients(0, dtype)
        tx, update = made(name)
        state = tx.init(grads)
        form = jax.tree.map(jax.typeof, state)
        wide = jnp.promote_types(dtype, jnp.float32)
        held = None
        for step in range(3):
            grads = gradients(step, dtype)
            updates, state = update(grads, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
            assert jax.tree.map(jax.typeof, state) == form
            above = jax.tree.map(lambda g: g.astype(wide), grads)
            held = tx.init(above) if held is None else held
            expected, held = update(above, held)
            rounded = jax.tree.map(lambda u, g: u.astype(g.dtype), expected, grads)
            # What is no matrix is left to optax, which computes in what it is given.
            got, expected = (
                {path: one[path] for path in MATRICES} for one in (updates, rounded)
            )
            chex.assert_trees_all_close(got, expected, rtol=2e-2, atol=1e-3)


@every_rule
def test_it_compiles_once_and_scans(name) -> None:
    tx = MAKERS[name](bits=5)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state, found = tx.init(PARAMS), []
    form = jax.tree.map(jax.typeof, state)
    for step in range(4):
        updates, state = update(gradients(step), state)
        found.append(updates)
        assert jax.tree.map(jax.typeof, state) == form
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(gradients(n) for n in range(4)))

    def body(state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state)
        return state, updates

    last, scanned = jax.lax.scan(body, tx.init(PARAMS), stacked)
    whole = jax.tree.map(lambda *x: jnp.stack(x), *found)
    chex.assert_trees_all_close(scanned, whole, rtol=1e-4, atol=1e-4)
    assert jax.tree.map(jax.typeof, last) == form
    assert jax.tree.structure(jax.eval_shape(tx.init, PARAMS)) == jax.tree.structure(
        state
    )


# ---------------------------------------------------------------- Optax around it


def same_update(got: Any, expected: Any) -> None:
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@every_rule
def test_chains_masks_and_partitions(name) -> None:
    tx, make = made(name)[0], MAKERS[name]
    expected = ran(name)
    chained = run(optax.chain(optax.identity(), tx, optax.scale(2.0)))
    for one, twice in zip(expected, chained, strict=True):
        same_update(twice, jax.tree.map(lambda x: 2 * x, one))
    kernels = {path: path in MATRICES for path in SHAPES}
    masked = optax.masked(tx, kernels)
    state = masked.init(PARAMS)
    kept = {path.removesuffix("#moments") for path in dsbp_optax.by_path(state)}
    assert kept == set(MATRICES)
    for step, (one, updates) in enumerate(zip(expected, run(masked), strict=True)):
        for path in SHAPES:
            wanted = one if path in MATRICES else gradients(step)
            np.testing.assert_allclose(
                updates[path], wanted[path], rtol=1e-5, atol=1e-6
            )
    labels = {path: "few" if path in MATRICES else "floats" for path in SHAPES}
    parts = {"few": make(bits=5), "floats": make(bits=32)}
    for one, updates in zip(expected, run(optax.partition(parts, labels)), strict=True):
        same_update(updates, one)


@every_rule
def test_hyperparameters_may_be_traced_and_wrappers_pass(name) -> None:
    tx = MAKERS[name](0.8, bits=5)
    expected = run(tx)
    first = "decay" if name == "momentum" else "b1"
    injected = optax.inject_hyperparams(MAKERS[name], static_args=("bits",))
    same_update(run(injected(**{first: 0.8}, bits=5)), expected)
    same_update(run(optax.apply_if_finite(tx, 3)), expected)
    every_step = optax.MultiSteps(tx, 1).gradient_transformation()
    same_update(run(every_step), expected)
    empty = optax.masked(tx, dict.fromkeys(SHAPES, False))
    chex.assert_trees_all_equal(run(empty, 1)[0], gradients(0))


@every_rule
def test_moments_by_path_are_no_copies_of_the_parameters(name) -> None:
    """`optax.tree.map_params` leaves them alone."""
    tx = optax.chain(MAKERS[name](bits=5), optax.ema(0.9))
    _, state = jax.jit(tx.update)(gradients(0), tx.init(PARAMS))
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped[0], state[0])
    chex.assert_trees_all_equal(
        mapped[1].ema, jax.tree.map(lambda x: x + 1, state[1].ema)
    )


@pytest.mark.parametrize("tree", [{}, (), {"a": None}])
@every_rule
def test_trees_of_nothing(name, tree) -> None:
    tx = MAKERS[name]()
    updates, state = tx.update(tree, tx.init(tree))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(tree))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("path", ["dense/kernel", "dense/bias"])
@every_rule
def test_what_is_not_finite_changes_nothing(name, path, value) -> None:
    tx, update = made(name)
    _, state = update(gradients(0), tx.init(PARAMS))
    grads = gradients(1)
    grads[path] = grads[path].at[(1,) * grads[path].ndim].set(value)
    for step in (update, tx.update) if value == 1e30 else (update,):
        updates, after = step(grads, state)
        chex.assert_trees_all_equal(after, state._replace(skipped=after.skipped))
        assert int(after.skipped) == int(state.skipped) + 1
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, grads))
    updates, after = update(gradients(1), state)
    chex.assert_tree_all_finite((updates, after))
    assert jnp.abs(updates[path]).max() > 0


@pytest.mark.parametrize("bits", [0, 9, 16, 2.5, 5.0, True, "5", None, [5]])
@every_rule
def test_bits_that_cannot_be(name, bits) -> None:
    with pytest.raises(ValueError, match=r"bits: got .*expected one of \(1, 2.*32\)"):
        MAKERS[name](bits=bits)
    assert MAKERS[name](bits=np.int64(5)).init({"a": jnp.ones((4, 4))})


@every_rule
def test_traced_bits_are_a_clear_error(name) -> None:
    said = "bits: got .*a Python integer: it sets the shapes"
    injected = optax.inject_hyperparams(MAKERS[name])(bits=5)
    for init in (injected.init, jax.jit(injected.init)):
        with pytest.raises(ValueError, match=said):
            init(PARAMS)
    with pytest.raises(ValueError, match=said):
        jax.jit(lambda bits: MAKERS[name](bits=bits).init(PARAMS))(5)


def test_decays_out_of_range() -> None:
    for value in (1.0, -0.1, float("nan"), "much"):
        with pytest.raises((ValueError, TypeError), match="decay: got"):
            dsbp_optax.scale_by_quantized_momentum(value)
        for keyword in ("b1", "b2"):
            with pytest.raises((ValueError, TypeError), match=f"{keyword}: got"):
                dsbp_optax.scale_by_quantized_adam(**{keyword: value})
    with pytest.raises(ValueError, match="eps: got -1"):
        dsbp_optax.scale_by_quantized_adam(eps=-1)


@every_rule
def test_restored_states_of_something_else_are_named(name) -> None:
    tx = MAKERS[name](bits=5)
    state, kernel = tx.init(PARAMS), "dense/kernel"
    third = {**PARAMS, "third": jnp.ones((4, 4))}
    fewer = {path: x for path, x in PARAMS.items() if path != kernel}
    wide = {**PARAMS, kernel: jnp.ones((64, 49))}
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"no place for 'third'.*Remedy"):
            update(third, state)
        with pytest.raises(ValueError, match=f"place for '{kernel}', which is not am"):
            update(fewer, state)
        said = rf"'{kernel}': got shape \(64, 49\), expected \(64, 48\).*Remedy"
        with pytest.raises(ValueError, match=said):
            update(wide, state)
        with pytest.raises(ValueError, match=r"moments of 'Conv_0.*Remedy"):
            update(PARAMS, MAKERS[name](bits=6).init(PARAMS))


def test_the_levels_are_the_best_uniform_ones() -> None:
    """Widths of levels that the oracle has too."""
    for bits, width in oracle.WIDTHS.items():
        assert quantize.STEPS[bits] == width
