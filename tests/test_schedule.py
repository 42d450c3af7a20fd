"""When bases refresh; an interval and ranks that follow the activations."""

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
    AutoInterval,
    AutoRank,
    Basis,
    Layer,
    RankFraction,
    Sketch,
)
from dsbp_optax.core import schedule
from dsbp_optax.diagnostics import explain, metrics
from dsbp_optax.linalg import subspace

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

    @property
    def interval(self) -> Any:
        return only(self.state).interval


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


# ------------------------------------------------------------- adaptive intervals

RULE = AutoInterval(shortest=4, longest=32, low=0.05, high=0.2)


def flutters(rule: Callable[[int, float], int], noise: np.ndarray) -> int:
    """How often a rule changes its mind under noise, once settled."""
    values = [8]
    for x in noise:
        values.append(int(rule(values[-1], x)))
    return int(np.sum(np.diff(values[4:]) != 0))


def test_interval_has_a_dead_band() -> None:
    noise = 0.1 + 0.04 * np.random.default_rng(3).uniform(-1, 1, 50)
    bare = AutoInterval(4, 32, low=0.1, high=0.1 + 1e-9)
    for rule, expected in ((RULE, True), (bare, False)):
        count = flutters(
            lambda p, x, r=rule: schedule.next_interval(r, jnp.asarray(p), x, 0.0),
            noise,
        )
        assert (count == 0) == expected


def test_the_interval_follows_the_drift() -> None:
    """Still, it lengthens; turning, it shortens; one still layer of two halves that."""
    stream = Stream(
        projection(update_every=RULE, power_iterations=3), kernels("a", "b")
    )
    trail: list[int] = []
    for i in range(300):
        moving = planted(np.pi / 3 * (i // 4))  # as far after 4, 8, 16 and 32
        still = i < 150
        stream.step(a=planted() if still else moving, b=planted())
        trail.append(int(stream.interval.length))
        if i == 149:
            assert float(metrics(stream.state)["dsbp/drift"]) < RULE.low
    assert stream.traces == 1
    assert set(trail) == {4, 8, 16, 32}
    assert trail[149] == 32
    assert trail[299] == 4
    figures = metrics(stream.state)
    assert int(figures["dsbp/interval"]) == 4
    assert float(figures["dsbp/drift"]) > RULE.high
    staleness = [int(figures[f"dsbp/staleness/{path}"]) for path in "ab"]
    assert staleness[0] == staleness[1] < 4


@pytest.mark.parametrize("sketched", [True, False])
def test_drift_is_that_of_the_principal_angles(sketched: bool) -> None:
    """Between the bases before and after a window, not along the way."""
    tx = projection(update_every=RULE, power_iterations=3)
    stream = Stream(tx, kernels("a"), sketched)
    rng = np.random.default_rng(4)
    before, compared, along = None, 0, np.eye(K)
    for _ in range(40):
        old = only(stream.state)
        start = int(old.interval.start)
        basis = np.asarray(stream.layer("a").basis, np.float64)
        if int(old.step) == start:
            before, along = basis, np.eye(K)
        stream.step(a=planted(rng.uniform(0, 1.5)))
        new = np.asarray(stream.layer("a").basis, np.float64)
        along = new.T @ basis @ along
        if int(stream.interval.start) != start and start:
            angles = subspace.principal_angles(jnp.asarray(before), jnp.asarray(new))
            exact = np.mean(np.sin(np.asarray(angles)) ** 2)
            got = float(stream.interval.drift)
            np.testing.assert_allclose(got, exact, atol=4e-3)
            wrong = 1 - np.sum(along**2) / K
            compared += not sketched and np.isclose(wrong, exact, atol=1e-5)
            compared += sketched and abs(wrong - exact) > 2e-2
    assert compared >= 3


def test_noise_of_small_batches_is_no_drift() -> None:
    """The drift alone would keep the interval short, for nothing."""
    rng = np.random.default_rng(7)
    stream = Stream(projection(update_every=RULE), kernels("a"))
    scale = np.sqrt(1 / np.arange(1, D + 1))
    drifts, jitters, intervals = [], [], []
    for i in range(260):
        turn = planted(1.25 * (i // 4) * (i >= 160), values=np.arange(K, 0, -1) * 9.0)
        spread = np.linalg.cholesky(turn) if i >= 160 else np.diag(scale)
        a = rng.normal(size=(24, D)) @ spread.T
        stream.step(a=a.T @ a / 24)
        drifts.append(float(stream.interval.drift))
        jitters.append(float(stream.interval.jitter))
        intervals.append(int(stream.interval.length))
    assert max(intervals[:160]) == 32
    assert np.median(drifts[40:160]) > RULE.high
    pairs = zip(drifts[40:160], jitters[40:160], strict=True)
    longer = [schedule.next_interval(RULE, 8, *pair) == 16 for pair in pairs]
    assert np.mean(longer) > 0.5
    assert intervals[-1] == 4


def test_what_saw_nothing_decides_nothing() -> None:
    stream = Stream(projection(update_every=RULE), kernels("a"))
    for _ in range(9):
        stream.step(a=planted())
    known = stream.interval
    for _ in range(40):
        stream.step(a=np.zeros((D, D)))
    new = stream.interval
    np.testing.assert_array_equal(new.length, known.length)
    np.testing.assert_array_equal(new.drift, known.drift)
    assert new.start > known.start
    assert int(metrics(stream.state)["dsbp/staleness/a"]) >= 40


# ------------------------------------------------------------------ adaptive ranks


def test_needed_rank_of_a_planted_spectrum() -> None:
    values, trace = jnp.array([4.0, 2.0, 1.0, 0.5, 0.0]), jnp.array(8.0)
    for missing, expected in ((0.6, 1), (0.5, 1), (0.25, 2), (0.2, 3), (0.05, 5)):
        assert int(schedule.needed_rank(values, trace, missing)) == expected
    assert int(schedule.needed_rank(jnp.ones(5), jnp.array(5.0), 0.25)) == 4
    assert int(schedule.needed_rank(jnp.zeros(5), jnp.array(0.0), 0.25)) == 1


def test_rank_has_a_dead_band() -> None:
    """On the very threshold, under noise of a few percent of each eigenvalue."""
    rng = np.random.default_rng(5)
    values = 0.7 ** np.arange(12)
    trace = values.sum()
    rule = AutoRank(most=12, least=1, share=float(values[:6].sum() / trace))
    noisy = values * (1 + 0.03 * rng.normal(size=(60, 12)))

    def adaptive(rank: int, x: np.ndarray) -> int:
        found = schedule.next_rank(
            rule.least, rule.share, jnp.asarray(rank), jnp.asarray(x), x.sum()
        )
        return int(found)

    def bare(_: int, x: np.ndarray) -> int:
        return int(schedule.needed_rank(jnp.asarray(x), x.sum(), 1 - rule.share))

    assert flutters(adaptive, noisy) == 0
    assert flutters(bare, noisy) > 5
    assert abs(adaptive(12, values) - 6) <= 1
    assert abs(adaptive(1, values) - 6) <= 1


@pytest.mark.parametrize("side", ["input", "output"])
def test_rank_follows_the_spectrum(side: str) -> None:
    """It shrinks, grows again, and what is not in use is zero."""
    flat, steep = np.ones(K), 10.0 ** -np.arange(K)
    params = kernels("a") if side == "input" else {"a": kernels("a")["a"].T}
    tx = projection(
        rank=AutoRank(most=K, least=2, share=0.9), update_every=5, side=side
    )
    stream = Stream(tx, params)
    ranks = []
    for i in range(60):
        updates = stream.step(a=planted(values=steep if 20 <= i < 40 else flat))
        rank = int(metrics(stream.state)["dsbp/active_rank/a"])
        ranks.append(rank)
        layer = stream.layer("a")
        basis = np.asarray(layer.basis)
        np.testing.assert_allclose(basis.T @ basis, np.eye(K), atol=1e-5)
        update = np.asarray(updates["a"])
        coordinates = basis.T @ (update if side == "input" else update.T)
        assert np.abs(coordinates[rank:]).max(initial=0) < 1e-5
        adam, _ = layer.inner
        for held in map(np.asarray, (adam.mu, adam.nu)):
            assert not held[rank:].any()
            assert held[:rank].any(axis=1).all()
    assert stream.traces == 1
    assert ranks[5:20] == [6] * 15
    assert ranks[27:40] == [2] * 13
    assert ranks[47:] == [6] * 13


@pytest.mark.parametrize(("rank", "failures"), [(AutoRank(K, 1), 0), (K, 12)])
def test_an_adaptive_rank_takes_activations_of_lower_rank(
    rank: Any, failures: int
) -> None:
    stream = Stream(projection(rank=rank, update_every=2), kernels("a"))
    matrix = np.diag([4.0, 2.0, 1.0] + [0.0] * (D - 3))
    for _ in range(12):
        stream.step(a=matrix)
    assert int(metrics(stream.state)["dsbp/failures/a"]) == failures
    if not failures:
        assert int(metrics(stream.state)["dsbp/active_rank/a"]) == 3
        basis = np.asarray(stream.layer("a").basis)
        np.testing.assert_allclose(basis.T @ basis, np.eye(K), atol=1e-5)
        np.testing.assert_allclose(np.abs(basis[:3, :3]), np.eye(3), atol=1e-2)


def test_all_of_an_adaptive_rank_is_the_fixed_rank() -> None:
    """At its greatest it changes nothing."""
    streams = [
        Stream(projection(rank=rank, update_every=3), kernels("a"))
        for rank in (K, AutoRank(most=K, least=K))
    ]
    for i in range(7):
        left, right = (stream.step(a=planted(0.1 * i)) for stream in streams)
        chex.assert_trees_all_close(left, right, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the axes of kernels were guessed")
def test_matrices_of_a_stack_have_ranks_of_their_own() -> None:
    """And one interval, by the mean of their drifts, with all other matrices."""
    tx = projection(rank=AutoRank(most=K, least=1, share=0.9), update_every=RULE)
    params = {"stack": jnp.ones((2, D, M))}
    state = tx.init(params)
    update = jax.jit(
        lambda s, c: tx.update(
            params, s, statistics={"stack": dsbp_optax.Covariance(c)}
        )[1]
    )
    steep = [8, 0.2, 0.1, 0.05, 0.02, 0.01]
    for i in range(30):
        both = [planted(), planted(np.pi / 3 * (i // 4), steep)]
        state = update(state, jnp.asarray(np.stack(both), jnp.float32))
    layer = dsbp_optax.by_path(state)["stack"]
    assert layer.spectrum.rank.tolist() == [4, 1]  # (8 + 4 + 2 + 1) / 15.8, 8 / 8.4
    assert not np.any(layer.inner[0].mu[1, 1:])
    assert int(only(state).interval.length) == 4


# ------------------------------------------------------------------ how it is told


def test_settings_by_path_and_by_word() -> None:
    params = {"q": jnp.ones((64, 64)), "v": jnp.ones((64, 64)), "o": jnp.ones((64, 64))}
    rank = {"q": 8, "v": "auto", "*": AutoRank(most=12)}
    tx = dsbp_optax.subspace_adamw(1e-3, rank=rank, update_every="auto")
    reasons = {path: found[0].reason for path, found in explain(tx, params).items()}
    assert reasons == {
        "q": "input side, rank 8 of 64",
        "v": "input side, rank up to 32 of 64",
        "o": "input side, rank up to 12 of 64",
    }
    state = jax.eval_shape(tx.init, params)
    layers = dsbp_optax.by_path(state)
    assert layers["v"].basis.shape == (64, 32)
    assert layers["q"].spectrum.rank is None
    assert layers["o"].spectrum.rank.shape == ()
    held = only(state)
    assert all(x.dtype == jnp.bfloat16 for x in held.interval.reference.values())
    assert held.interval.length.shape == ()


def test_words_survive_inject_hyperparams() -> None:
    factory = optax.inject_hyperparams(dsbp_optax.dsbp_adamw)
    params, outcomes = {"a": jnp.ones((64, 64)), "b": jnp.ones(64)}, []
    for settings in (
        {"rank": "auto", "update_every": "auto"},
        {"rank": AutoRank(), "update_every": AutoInterval()},
    ):
        tx = factory(1e-3, **settings)
        state = tx.init(params)
        updates, state = jax.eval_shape(tx.update, params, state, params)
        assert dsbp_optax.by_path(state)["a"].spectrum.rank.shape == ()
        assert only(state).interval.length.shape == ()
        outcomes.append((updates, state))
    assert outcomes[0] == outcomes[1]


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
        (lambda: AutoInterval(shortest=0), "1 <= shortest <= longest"),
        (lambda: AutoInterval(shortest=9, longest=8), "got shortest=9, longest=8"),
        (lambda: AutoInterval(low=0.3, high=0.2), "0 <= low < high <= 1"),
        (lambda: AutoRank(most=2, least=4), "1 <= least <= most"),
        (lambda: AutoRank(most=jnp.asarray(8)), "they set array shapes"),
        (lambda: AutoRank(share=1.0), "above 0 and below 1"),
        (lambda: RankFraction(0.0), "fraction=0.0, expected a number above 0"),
        (lambda: RankFraction(16), "Remedy: a fixed rank is a plain integer"),
        (lambda: RankFraction(most=0), "most=0, expected an integer of at least 1"),
        (lambda: projection(rank="Auto"), "rank: got 'Auto'"),
        (lambda: projection(rank=jnp.asarray(4)), "static_args=\\('rank',\\)"),
        (lambda: projection(update_every="often"), "update_every: got 'often'"),
    ],
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_state_of_other_settings_is_refused() -> None:
    """An interval of another kind; the rank is that of the state."""
    params = kernels("a", "b")
    for old, new, message in (
        ({}, {"update_every": "auto"}, "got a fixed interval, expected an adaptive"),
        ({"update_every": "auto"}, {}, "got an adaptive interval, expected a fixed"),
    ):
        state = projection(**old).init(params)
        with pytest.raises(ValueError, match=f"the optimizer state: {message}"):
            jax.eval_shape(projection(**new).update, params, state)
    state = projection(rank=AutoRank(K)).init(params)
    _, state = jax.eval_shape(projection(rank=3).update, params, state)
    assert dsbp_optax.by_path(state)["a"].spectrum.rank.shape == ()


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
def adaptive() -> Stream:
    """Everything adaptive, one step into the second window."""
    tx = projection(
        rank=AutoRank(most=K, least=2, share=0.9),
        update_every=AutoInterval(shortest=4, longest=12),
    )
    stream = Stream(tx, {**kernels("a", "b"), "bias": jnp.ones(M)})
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


def test_a_checkpoint_within_a_window_continues_bit_for_bit(adaptive: Any) -> None:
    serialization = pytest.importorskip("flax.serialization")
    state = adaptive.state
    assert int(only(state).collect) == 1
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), data)
    chex.assert_trees_all_equal(
        go_on(adaptive.update, state, 20), go_on(adaptive.update, restored, 20)
    )


def test_compiled_and_not_agree(adaptive: Any) -> None:
    (left, one), (right, two) = (
        go_on(update, adaptive.state, 3) for update in (adaptive.update, adaptive.plain)
    )
    chex.assert_trees_all_close(left, right, rtol=1e-3, atol=1e-4)
    intervals = [only(state).interval for state in (one, two)]
    for name in ("start", "length"):
        np.testing.assert_array_equal(*(getattr(x, name) for x in intervals))
    ranks = [dsbp_optax.by_path(x)["a"].spectrum.rank for x in (one, two)]
    np.testing.assert_array_equal(*ranks)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_steps_that_are_skipped_change_nothing(adaptive: Any, value: float) -> None:
    """Nor does the window go on without them."""
    c = jnp.asarray(planted(), jnp.float32)
    old = only(adaptive.state)
    _, state = adaptive.update(adaptive.state, {"a": c, "b": c}, value)
    new = only(state)
    assert (int(new.step), int(new.skipped)) == (5, 1)
    chex.assert_trees_all_equal(new._replace(skipped=old.skipped), old)
    assert int(new.collect) == 1


@pytest.mark.parametrize("every", [6, AutoInterval(shortest=6, longest=12)])
def test_linen_collects_when_layers_refresh(every: Any) -> None:
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
            update_every=every,
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
    known = [int(i % 6 < 2) for i in range(26)]
    assert (collected == known) == isinstance(every, int)
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
