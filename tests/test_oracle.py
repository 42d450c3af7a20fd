"""Twenty steps of the whole rule against the float64 oracle, over several refreshes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import NETWORKS, batch, init
from oracle import Layer, Rule, step
from versions import x64

import dsbp_optax
from dsbp_optax import Activations

RULE = Rule(learning_rate=0.05, sharpness=0.1, update_every=8, power_iterations=3)
STEPS, RANK = 20, 3

#: kernel shape, axes of the basis side, other axes, stacked axes
SHAPES = {
    "dense": ((16, 12), (0,), (1,), ()),
    "conv": ((3, 2, 4, 10), (0, 1, 2), (3,), ()),
    "attention": ((2, 6, 9), (0, 1), (2,), ()),
    "scan": ((3, 14, 11), (1,), (2,), (0,)),
}


def matrices(kernel: Any, rows: Any, columns: Any, stacked: Any) -> np.ndarray:
    """The kernel as float64 ``(stack, d, m)``."""
    array = np.asarray(kernel, np.float64).transpose(*stacked, *rows, *columns)
    stack = int(np.prod([kernel.shape[a] for a in stacked]))
    return array.reshape(stack, int(np.prod([kernel.shape[a] for a in rows])), -1)


def planted(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Samples whose second moment has eigenvalues 3^-i in directions that drift."""
    directions, _ = np.linalg.qr(rng.normal(size=(d, d)))
    left, _ = np.linalg.qr(rng.normal(size=(n, d)))
    return left * 3.0 ** (-0.5 * np.arange(d)) @ directions.T * 4


def relative(got: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def bases(state: Any, path: str) -> np.ndarray:
    """The bases of a kernel as float64 ``(stack, d, k)``."""
    basis = np.asarray(dsbp_optax.by_path(state)[path].basis, np.float64)
    return basis.reshape(-1, *basis.shape[-2:])


def owner(name: str, kernel: Any) -> dict[str, Any]:
    layer = {"dense": "dense", "conv": "conv", "attention": "out", "scan": "dense"}
    return {layer[name]: {"kernel": kernel}}


def run_planted(
    name: str, side: str, dtype: Any, rule: Rule, tamper: Any = None
) -> tuple[list[float], list[float]]:
    """Largest relative errors of updates and projectors, step by step."""
    shape, ins, outs, stacked = SHAPES[name]
    rows, columns = (ins, outs) if side == "input" else (outs, ins)
    rng = np.random.default_rng(7)
    params = owner(name, jnp.asarray(rng.normal(size=shape), dtype))
    (path,) = dsbp_optax.diagnostics.explain(dsbp_optax.dsbp(), params)
    tx = dsbp_optax.dsbp(
        rule.learning_rate,
        RANK,
        rule.update_every,
        rule.power_iterations,
        rule.sharpness,
        basis=dsbp_optax.Basis(side=side),
    )
    state = tx.init(params)
    weights = matrices(jax.tree.leaves(params)[0], rows, columns, stacked)
    starts = bases(state, path)
    layers = [Layer(w, v) for w, v in zip(weights, starts, strict=True)]
    target = rng.normal(size=shape)
    update = jax.jit(tx.update)
    errors, drifts = [], []
    for count in range(STEPS):
        gradient = jax.tree.map(lambda w: w - jnp.asarray(target, w.dtype), params)
        samples = [planted(rng, 40, w.shape[0]) for w in weights]
        stack = np.stack(samples) if stacked else samples[0]
        statistics = {path: Activations(jnp.asarray(stack, dtype))}
        updates, state = update(gradient, state, params, statistics=statistics)
        if tamper is not None:
            updates = tamper(updates, count)
        got = matrices(jax.tree.leaves(updates)[0], rows, columns, stacked)
        g = matrices(jax.tree.leaves(gradient)[0], rows, columns, stacked)
        expected = np.stack(
            [
                step(layer, g[i], samples[i], count, rule, sketched=False)
                for i, layer in enumerate(layers)
            ]
        )
        errors.append(relative(got, expected))
        drifts.append(
            max(
                float(np.abs(v @ v.T - layer.basis @ layer.basis.T).max())
                for v, layer in zip(bases(state, path), layers, strict=True)
            )
        )
        params = optax.apply_updates(params, updates)
    return errors, drifts


TOLERANCE = {"float64": 1e-5, "float32": 1e-3}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_paper_rule_equals_the_oracle(name: str, side: str, dtype: str) -> None:
    with x64(dtype == "float64"):
        errors, drifts = run_planted(name, side, dtype, RULE)
    assert max(errors) < TOLERANCE[dtype]
    assert max(drifts) < TOLERANCE[dtype]


WRONG = {
    "unprojected": lambda u, count: jax.tree.map(lambda x: x * 1.001, u),
    "late": lambda u, count: jax.tree.map(lambda x: x * (1 + 0.01 * (count == 19)), u),
    "noisy": lambda u, count: jax.tree.map(lambda x: x + 1e-3, u),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_oracle_rejects_tampered_updates(wrong: str) -> None:
    with x64(True):
        errors, _ = run_planted("dense", "output", "float64", RULE, WRONG[wrong])
    assert max(errors) > 10 * TOLERANCE["float64"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("sharpness", 0.11),
        ("update_every", 9),
        ("power_iterations", 1),
        ("learning_rate", 0.0501),
    ],
)
def test_oracle_tells_every_number_of_the_rule(field: str, value: float) -> None:
    """An oracle that were told another number would not agree."""
    other = dataclasses.replace(RULE, **{field: value})
    with x64(True):
        shape, *_ = SHAPES["dense"]
        rng = np.random.default_rng(0)
        w, v = (
            rng.normal(size=shape),
            np.linalg.qr(rng.normal(size=(shape[0], RANK)))[0],
        )
        one, two = Layer(w, v), Layer(w, v)
        for count in range(STEPS):
            a, g = planted(rng, 40, shape[0]), rng.normal(size=shape)
            left = step(one, g, a, count, RULE, sketched=False)
            right = step(two, g, a, count, other, sketched=False)
    assert relative(left, right) > TOLERANCE["float64"]


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_trained_through_flax_equals_the_oracle(
    name: str, side: str, dtype: str
) -> None:
    """The same through Linen and sketches: one iteration a step, fresh batches."""
    with x64(dtype == "float64"):
        error = run_network(name, side, jnp.dtype(dtype))
    assert error < TOLERANCE[dtype]


def run_network(name: str, side: str, dtype: Any) -> float:
    network = NETWORKS[name]
    params = init(network, dtype)
    rule = Rule(0.02, 0.1, 8, 3)
    tx = dsbp_optax.dsbp(0.02, 2, 8, 3, 0.1, basis=dsbp_optax.Basis(side=side))
    state = tx.init(params)

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean(network.linen.apply({"params": params}, x) ** 2)

    collect = dsbp_optax.linen.value_and_grad(loss_fn)

    @jax.jit
    def train(params: Any, state: Any, x: Any) -> Any:
        _, grads, statistics = collect(params, x, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        _, seen = network.by_hand(params, x)
        return optax.apply_updates(params, updates), state, grads, updates, seen

    views = {p: one.kernel.view for p, one in dsbp_optax.by_path(state).items()}
    assert set(views) == {f"{p}/kernel" for p in network.paths}
    oracles: dict[str, list[Layer]] = {}
    for path, view in views.items():
        w = matrices(leaf(params, path), view.rows, view.columns, view.batch)
        pairs = zip(w, bases(state, path), strict=True)
        oracles[path] = [Layer(a, b) for a, b in pairs]
    worst = 0.0
    for count in range(STEPS):
        x = batch(network, count + 1, dtype)
        old = params
        params, state, grads, updates, seen = train(params, state, x)
        for path, layers in oracles.items():
            view = views[path]
            axes = (view.rows, view.columns, view.batch)
            samples = np.asarray(seen[path][side == "output"], np.float64)
            samples = samples.reshape(len(layers), -1, samples.shape[-1])
            g = matrices(leaf(grads, path), *axes)
            got = matrices(leaf(updates, path), *axes)
            for i, layer in enumerate(layers):
                layer.weight = matrices(leaf(old, path), *axes)[i]
                change = step(layer, g[i], samples[i], count, rule, sketched=True)
                worst = max(worst, relative(got[i], change))
    return worst


def leaf(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree
