"""When bases refresh, and how large they are."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _models import KERNELS, only

import dsbp_optax
from dsbp_optax import (
    Activations,
    Basis,
    Layer,
    RankFraction,
    Sketch,
)
from dsbp_optax.diagnostics import explain

D, M, K = 16, 6, 6
Covariances = Mapping[str, np.ndarray]


def planted(angle: float = 0.0, values: Any = (8, 4, 2, 1, 0.5, 0.25)) -> np.ndarray:
    """``(D, D)`` with the given leading eigenvalues, its top eigenspace turned."""
    spectrum = np.full(D, 1e-3)
    spectrum[: len(values)] = values
    turn = np.eye(D)
    c, s = np.cos(angle), np.sin(angle)
    for i in range(K):
        turn[np.ix_([i, i + K], [i, i + K])] = [[c, -s], [s, c]]
    return turn @ np.diag(spectrum) @ turn.T


def sketch(matrix: Any, layer: Layer) -> Sketch:
    """What an adapter leaves of activations with this second moment; 0 for none."""
    form = layer.kernel.view.form
    return Sketch(
        (matrix @ layer.basis).reshape(form(True, layer.basis.shape[-1])),
        jnp.any(matrix).astype(jnp.float32).reshape(form(False, 1)),
        jnp.trace(matrix).reshape(form(False, 1)),
    )


class Stream:
    """A compiled update fed with planted second moments; counts its traces."""

    def __init__(self, tx: Any, params: Any, sketched: bool = True) -> None:
        self.state, self.traces = tx.init(params), 0

        def update(state: Any, matrices: Any, scale: float) -> Any:
            self.traces += 1
            layers = dsbp_optax.by_path(state)
            statistics = {
                path: sketch(c, layers[path]) if sketched else dsbp_optax.Covariance(c)
                for path, c in matrices.items()
            }
            grads = jax.tree.map(lambda x: x * scale, params)
            return tx.update(grads, state, params, statistics=statistics)

        self.plain, self.update = update, jax.jit(update)

    def step(self, scale: float = 1.0, **matrices: np.ndarray) -> Any:
        given = {path: jnp.asarray(c, jnp.float32) for path, c in matrices.items()}
        updates, self.state = self.update(self.state, given, scale)
        return updates

    def layer(self, path: str) -> Layer:
        return dsbp_optax.by_path(self.state)[path]


def kernels(*names: str, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=(D, M)), jnp.float32) for n in names}


def projection(power_iterations: int = 2, side: Any = "input", **keywords: Any) -> Any:
    basis = Basis(power_iterations=power_iterations, side=side)
    settings = {"rank": K, "basis": basis, "project": "always", **keywords}
    return dsbp_optax.scale_by_spectral_projection(optax.scale_by_adam(), **settings)


# ------------------------------------------------------------------------- turns


def turns(tx: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Which kernels' bases changed on each step, and whether it was said to collect."""
    rng = np.random.default_rng(1)
    stream = Stream(tx, kernels("a", "b", "c", "d"))
    changed, collected = [], []
    for _ in range(steps):
        collected.append(bool(only(stream.state).collect))
        angle = rng.uniform(0, 0.5)
        old = dsbp_optax.by_path(stream.state)
        stream.step(**{path: planted(angle) for path in old})
        new = dsbp_optax.by_path(stream.state)
        changed.append([bool((new[p].basis != old[p].basis).any()) for p in old])
    assert stream.traces == 1
    return np.array(changed), np.array(collected)


class Part(nn.Module):
    """A layer and a stack of two."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        stacked = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        x = jnp.tanh(nn.Dense(12, name="first")(x))
        return stacked(6, name="stack")(jnp.stack([x, x]))


def test_a_gradient_does_not_follow_a_statistic_within_its_window() -> None:
    """Activations may be passed on the first step of a period alone."""
    model, x = Part(), jax.random.normal(jax.random.key(0), (20, 12))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    tx = dsbp_optax.scale_by_spectral_projection(
        optax.trace(0.9), rank=2, update_every=8, project="always"
    )
    update, state = jax.jit(tx.update), tx.init(params)
    grads = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, x) ** 2).mean()))
    seen, counts = {"stack/kernel": Activations(jnp.stack([x, 2 * x]))}, []
    state = first = update(grads(params), state, params, statistics=seen)[1]
    for _ in range(8):
        layers = dsbp_optax.by_path(state)
        _, basis, spectrum, _ = layers["stack/kernel"]
        counts.append(int(layers["first/kernel"].spectrum.iterations))
        assert (basis == dsbp_optax.by_path(first)["stack/kernel"].basis).all()
        assert (spectrum.activations == 1).all()
        assert (spectrum.iterations == 5).all()
        assert (spectrum.refreshed == 0).all()
        state = update(grads(params), state, params)[1]
    assert counts == [1, 2, 3, 4, 5, 5, 5, 5], "gradients alone go on"
    layer = dsbp_optax.by_path(state)["stack/kernel"]
    assert (layer.spectrum.activations == 0).all(), "the next window"
    assert float(jnp.abs(layer.basis - basis).max()) > 1e-2


@pytest.mark.parametrize("make", ["projection", "traced", "dsbp"])
def test_all_layers_refresh_together(make: str) -> None:
    """On q of every p steps."""
    if make == "dsbp":
        factory = optax.inject_hyperparams(dsbp_optax.dsbp, static_args=("rank",))
        tx = factory(0.1, K, 7, 2, basis=Basis(side="input"))
    else:
        factory = dsbp_optax.scale_by_spectral_projection
        if make == "traced":
            factory = optax.inject_hyperparams(factory, static_args=("rank",))
        basis = Basis(power_iterations=2)
        tx = factory(rank=K, update_every=7, project="always", basis=basis)
    changed, collected = turns(tx, 16)
    expected = [i % 7 < 2 for i in range(16)]
    np.testing.assert_array_equal(collected, expected)
    np.testing.assert_array_equal(changed.T, [expected] * 4)


# ------------------------------------------------------------------ how it is told


def test_ranks_by_path() -> None:
    params = {"q": jnp.ones((64, 64)), "v": jnp.ones((64, 64)), "o": jnp.ones((64, 64))}
    rank = {"q": 8, "v": RankFraction(1 / 16), "*": RankFraction(1 / 4, most=12)}
    tx = dsbp_optax.subspace_adamw(1e-3, rank=rank)
    reasons = {path: found[0].reason for path, found in explain(tx, params).items()}
    assert reasons == {
        "q": "input side, rank 8 of 64",
        "v": "input side, rank 4 of 64",
        "o": "input side, rank 12 of 64",
    }


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_fraction_follows_the_narrower_side(side) -> None:
    shapes = {"wide": (300, 200), "narrow": (300, 40), "thin": (9, 40)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    params["conv"] = {"kernel": jnp.ones((3, 3, 16, 32))}
    rank = RankFraction(1 / 8, most=6)
    state = projection(rank=rank, side=side, update_every=3).init(params)
    layers = dsbp_optax.by_path(state)
    found = {path: layer.basis.shape[-1] for path, layer in layers.items()}
    conv = 144 if side == "input" else 32
    assert found == {
        "wide/kernel": 6,
        "narrow/kernel": 5,
        "thin/kernel": 1,
        "conv/kernel": min(6, min(conv, 144, 32) // 8),
    }


def test_a_fraction_bounds_the_share_of_a_basis_and_its_moments() -> None:
    """``k (d + m) <= 2 fraction d m``, unless a single direction is more."""
    rule = RankFraction(1 / 16, most=10**6)
    for d, m in itertools.product((16, 31, 64, 500, 4096), repeat=2):
        rank = rule.of(d, m)
        assert rank >= 1 and rank * (d + m) <= 2 / 16 * d * m * max(1, 16 / min(d, m))
        assert (rank + 1) * 16 > min(d, m)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankFraction(0.0), "fraction=0.0, expected a number above 0"),
        (lambda: RankFraction(16), "Remedy: a fixed rank is a plain integer"),
        (lambda: RankFraction(most=0), "most=0, expected an integer of at least 1"),
        (lambda: projection(rank="auto"), "rank: got 'auto'"),
        (lambda: projection(rank=jnp.asarray(4)), "static_args=\\('rank',\\)"),
        (lambda: projection(update_every="auto"), "update_every: got 'auto'"),
    ],
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_the_rank_is_that_of_the_state() -> None:
    params = kernels("a", "b")
    state = projection(rank=5).init(params)
    _, state = jax.eval_shape(projection(rank=3).update, params, state)
    assert dsbp_optax.by_path(state)["a"].basis.shape == (D, 5)


@pytest.mark.parametrize("given", ["ab", "a", "b", ""])
def test_a_turn_does_not_depend_on_whose_statistics_came(given: str) -> None:
    tx = projection(update_every=8, power_iterations=1)
    stream = Stream(tx, kernels("a", "b"))
    for _ in range(15):
        stream.step(**{path: planted() for path in given})
    refreshed = {p: int(stream.layer(p).spectrum.refreshed) for p in "ab"}
    assert refreshed == {"a": 8, "b": 8}


# ----------------------------------------------------------- in a training script


@pytest.fixture(scope="module")
def begun() -> Stream:
    """One step into the second window."""
    params = {**kernels("a", "b"), "bias": jnp.ones(M)}
    stream = Stream(projection(update_every=4), params)
    for i in range(5):
        stream.step(a=planted(0.1 * i), b=planted())
    return stream


def go_on(update: Any, state: Any, steps: int) -> Any:
    trail = []
    for i in range(steps):
        c = jnp.asarray(planted(0.3 * i), jnp.float32)
        updates, state = update(state, {"a": c, "b": c}, 1.0)
        trail.append(updates)
    return trail, state


def test_a_checkpoint_within_a_window_continues_bit_for_bit(begun: Any) -> None:
    serialization = pytest.importorskip("flax.serialization")
    state = begun.state
    assert int(only(state).collect) == 1
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), data)
    chex.assert_trees_all_equal(
        go_on(begun.update, state, 20), go_on(begun.update, restored, 20)
    )


def test_compiled_and_not_agree(begun: Any) -> None:
    (left, one), (right, two) = (
        go_on(update, begun.state, 3) for update in (begun.update, begun.plain)
    )
    chex.assert_trees_all_close(left, right, rtol=1e-3, atol=1e-4)
    layers = [dsbp_optax.by_path(state)["a"] for state in (one, two)]
    chex.assert_trees_all_close(*(x.basis for x in layers), atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_steps_that_are_skipped_change_nothing(begun: Any, value: float) -> None:
    """Nor does the window go on without them."""
    c = jnp.asarray(planted(), jnp.float32)
    old = only(begun.state)
    _, state = begun.update(begun.state, {"a": c, "b": c}, value)
    new = only(state)
    assert (int(new.step), int(new.skipped)) == (5, 1)
    chex.assert_trees_all_equal(new._replace(skipped=old.skipped), old)
    assert int(new.collect) == 1


def test_linen_collects_when_layers_refresh() -> None:
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.tanh(nn.Dense(12, name="first")(x))
            return nn.Dense(8, name="second")(x)

    model, rng = Network(), np.random.default_rng(6)
    tx = optax.chain(
        dsbp_optax.scale_by_spectral_projection(
            rank=2,
            update_every=6,
            basis=Basis(power_iterations=2),
            project="always",
        ),
        optax.sgd(0.05),
    )
    params = model.init(jax.random.key(0), jnp.ones((1, 10)))["params"]
    observe = dsbp_optax.linen.value_and_grad(
        lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2)
    )

    @jax.jit
    def step(params: Any, state: Any, x: Any) -> Any:
        _, grads, statistics = observe(params, x, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        counts = {path: jnp.max(s.count) for path, s in statistics.items()}
        return optax.apply_updates(params, updates), state, counts

    x = jnp.asarray(rng.normal(size=(20, 10)), jnp.float32)
    state, collected = tx.init(params), []
    for _ in range(26):
        old = only(state)
        before = dsbp_optax.by_path(state)
        params, state, counts = step(params, state, x)
        after = dsbp_optax.by_path(state)
        for path in KERNELS:
            new = after[path].spectrum.iterations - before[path].spectrum.iterations
            assert (float(counts[path]) == 20) == bool(old.collect)
            assert int(new) == int(old.collect)
        collected.append(int(old.collect))
    assert collected == [int(i % 6 < 2) for i in range(26)]
    for path in KERNELS:
        spectrum = dsbp_optax.by_path(state)[path].spectrum
        assert spectrum.activations.all()
        assert not spectrum.failures.any()


def test_names_of_blocks_say_nothing_of_the_kernels_in_them() -> None:
    kernel, table = jnp.ones((64, 64)), jnp.ones((64, 64))
    params = {
        "PreNorm_0": {"Attention_0": {"query": {"kernel": kernel}}},
        "UpscaleBlock_0": {"Conv_0": {"kernel": jnp.ones((3, 3, 16, 32))}},
        "time_embed": {"Dense_0": {"kernel": kernel}},
        "blocks": {"LayerNorm_0": {"scale": table, "bias": table}},
        "embed": {"embedding": table},
        "patch_embed": {"kernel": table},
        "pos_embed": table,
    }
    found = explain(dsbp_optax.dsbp_muon(0.02), params)
    projected = {path for path, (one, *_) in found.items() if one.projected}
    assert projected == {
        "PreNorm_0/Attention_0/query/kernel",
        "UpscaleBlock_0/Conv_0/kernel",
        "time_embed/Dense_0/kernel",
    }
