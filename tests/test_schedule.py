"""When layers refresh; intervals and ranks that follow the activations."""

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


def sketch(matrix: Any, basis: Any) -> Sketch:
    """What an adapter leaves of activations with this second moment; 0 for none."""
    whole = basis.reshape(D, -1)
    scale = jnp.any(matrix).astype(jnp.float32).reshape(1, 1, 1)
    return Sketch(
        (matrix @ whole).reshape(basis.shape),
        scale,
        jnp.trace(matrix).reshape(1, 1, 1),
    )


class Stream:
    """A compiled update fed with planted second moments; counts its traces."""

    def __init__(self, tx: Any, params: Any, sketched: bool = True) -> None:
        self.state, self.traces = tx.init(params), 0

        def update(state: Any, matrices: Any, scale: float) -> Any:
            self.traces += 1
            basis = only(state).basis
            statistics = {
                path: sketch(c, basis[path]) if sketched else dsbp_optax.Covariance(c)
                for path, c in matrices.items()
            }
            grads = jax.tree.map(lambda x: x * scale, params)
            return tx.update(grads, state, params, statistics=statistics)

        self.plain, self.update = update, jax.jit(update)

    def step(self, scale: float = 1.0, **matrices: np.ndarray) -> Any:
        given = {path: jnp.asarray(c, jnp.float32) for path, c in matrices.items()}
        updates, self.state = self.update(self.state, given, scale)
        return updates

    def schedule(self, path: str) -> Any:
        return only(self.state).schedule[path]


def kernels(*names: str, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=(D, M)), jnp.float32) for n in names}


def projection(**keywords: Any) -> Any:
    settings = {"rank": K, "power_iterations": 2, "project": "always", **keywords}
    return dsbp_optax.scale_by_spectral_projection(optax.scale_by_adam(), **settings)


def scalar(array: Any) -> Any:
    return np.max(np.asarray(array))


# ------------------------------------------------------------------------- turns


def turns(tx: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Which layers' bases changed on each step, and which were said to collect."""
    rng = np.random.default_rng(1)
    stream = Stream(tx, kernels("a", "b", "c", "d"))
    changed, collected = [], []
    for _ in range(steps):
        old = only(stream.state)
        flags = [
            old.schedule[p].collect if p in old.schedule else old.collect
            for p in old.basis
        ]
        collected.append([bool(scalar(flag)) for flag in flags])
        angle = rng.uniform(0, 0.5)
        stream.step(**{path: planted(angle) for path in old.basis})
        new = only(stream.state).basis
        changed.append([bool((new[p] != old.basis[p]).any()) for p in old.basis])
        assert bool(old.collect) == any(collected[-1])
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
        basis, spectrum = state.basis["stack/kernel"], state.spectrum["stack/kernel"]
        counts.append(int(state.spectrum["first/kernel"].iterations.max()))
        assert (basis == first.basis["stack/kernel"]).all()
        assert (spectrum.activations == 1).all()
        assert (spectrum.iterations == 5).all()
        assert (spectrum.refreshed == 0).all()
        state = update(grads(params), state, params)[1]
    assert counts == [1, 2, 3, 4, 5, 5, 5, 5], "gradients alone go on"
    assert (state.spectrum["stack/kernel"].activations == 0).all(), "the next window"
    assert float(jnp.abs(state.basis["stack/kernel"] - basis).max()) > 1e-2


@pytest.mark.parametrize("traced", [False, True])
def test_all_layers_refresh_together(traced: bool) -> None:
    """On q of every p steps."""
    make = dsbp_optax.scale_by_spectral_projection
    if traced:
        make = optax.inject_hyperparams(make, static_args=("rank",))
    tx = make(rank=K, update_every=7, power_iterations=2, project="always")
    changed, collected = turns(tx, 16)
    np.testing.assert_array_equal(changed, collected)
    assert {tuple(column) for column in changed.T} == {
        tuple(i % 7 < 2 for i in range(16))
    }


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
            lambda p, x, r=rule: schedule.next_interval(r, jnp.asarray(p), x), noise
        )
        assert (count == 0) == expected


def test_intervals_follow_the_drift_of_each_layer() -> None:
    """Still, it lengthens; turning, it shortens; one layer leaves the other alone."""
    stream = Stream(
        projection(update_every=RULE, power_iterations=3), kernels("a", "b")
    )
    trail: list[tuple[int, int]] = []
    for i in range(300):
        moving = planted(1.25 * (i // 4))  # not half a turn after 4, 8, 16, 32
        a, b = (planted(), moving) if i < 150 else (moving, planted())
        stream.step(a=a, b=b)
        seen = [int(scalar(stream.schedule(p).interval)) for p in "ab"]
        assert all(4 <= p <= 32 for p in seen)
        trail.append((seen[0], seen[1]))
    assert stream.traces == 1
    assert trail[149] == (32, 4)
    assert trail[299] == (4, 32)
    figures = metrics(stream.state)
    assert int(figures["dsbp/interval/a"]) == 4
    assert float(figures["dsbp/drift/a"]) > RULE.high
    assert float(figures["dsbp/drift/b"]) < RULE.low
    assert 0 <= int(figures["dsbp/staleness/a"]) < 4
    assert int(figures["dsbp/staleness/b"]) < 32


@pytest.mark.parametrize("sketched", [True, False])
def test_drift_is_that_of_the_principal_angles(sketched: bool) -> None:
    """Between the bases before and after a window, not along the way."""
    tx = projection(update_every=RULE, power_iterations=3)
    stream = Stream(tx, kernels("a"), sketched)
    rng = np.random.default_rng(4)
    before, compared, along = None, 0, np.eye(K)
    for _ in range(40):
        old = only(stream.state)
        start = int(scalar(old.schedule["a"].start))
        basis = np.asarray(old.basis["a"][:, 0], np.float64)
        if int(old.step) == start:
            before, along = basis, np.eye(K)
        stream.step(a=planted(rng.uniform(0, 1.5)))
        new = np.asarray(only(stream.state).basis["a"][:, 0], np.float64)
        along = new.T @ basis @ along
        if int(scalar(stream.schedule("a").start)) != start and start:
            angles = subspace.principal_angles(jnp.asarray(before), jnp.asarray(new))
            exact = np.mean(np.sin(np.asarray(angles)) ** 2)
            got = float(scalar(stream.schedule("a").drift))
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
        schedule = stream.schedule("a")
        drifts.append(float(scalar(schedule.drift)))
        jitters.append(float(scalar(schedule.jitter)))
        intervals.append(int(scalar(schedule.interval)))
    assert max(intervals[:160]) == 32
    assert np.median(drifts[40:160]) > RULE.high
    moves = schedule.move(np.array(drifts[40:160]), np.array(jitters[40:160]))
    assert np.median(moves) < RULE.low
    assert intervals[-1] == 4


def test_what_saw_nothing_decides_nothing() -> None:
    stream = Stream(projection(update_every=RULE), kernels("a"))
    for _ in range(9):
        stream.step(a=planted())
    known = stream.schedule("a")
    for _ in range(40):
        stream.step(a=np.zeros((D, D)))
    new = stream.schedule("a")
    np.testing.assert_array_equal(new.interval, known.interval)
    np.testing.assert_array_equal(new.drift, known.drift)
    assert new.start > known.start
    assert int(metrics(stream.state)["dsbp/staleness/a"]) >= 40


# ------------------------------------------------------------------ adaptive ranks


def test_needed_rank_of_a_planted_spectrum() -> None:
    values, trace = jnp.array([4.0, 2.0, 1.0, 0.5, 0.0]), jnp.array([8.0])
    for missing, expected in ((0.6, 1), (0.5, 1), (0.25, 2), (0.2, 3), (0.05, 5)):
        assert int(schedule.needed_rank(values, trace, missing)) == expected
    stack = jnp.stack([values, values[::-1] * 0 + 1])
    rank = schedule.needed_rank(stack, jnp.array([[8.0], [5.0]]), 0.25)
    np.testing.assert_array_equal(rank, [2, 4])


def test_rank_has_a_dead_band() -> None:
    """On the very threshold, under noise of a few percent of each eigenvalue."""
    rng = np.random.default_rng(5)
    values = 0.7 ** np.arange(12)
    trace = values.sum()
    rule = AutoRank(most=12, least=1, share=float(values[:6].sum() / trace))
    noisy = values * (1 + 0.03 * rng.normal(size=(60, 12)))

    def adaptive(rank: int, x: np.ndarray) -> int:
        total = jnp.asarray([x.sum()])
        return int(schedule.next_rank(rule, jnp.asarray(rank), jnp.asarray(x), total))

    def bare(_: int, x: np.ndarray) -> int:
        total = jnp.asarray([x.sum()])
        return int(schedule.needed_rank(jnp.asarray(x), total, 1 - rule.share))

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
        basis = np.asarray(only(stream.state).basis["a"]).reshape(D, K)
        np.testing.assert_allclose(basis.T @ basis, np.eye(K), atol=1e-5)
        update = np.asarray(updates["a"])
        coordinates = basis.T @ (update if side == "input" else update.T)
        assert np.abs(coordinates[rank:]).max(initial=0) < 1e-5
        for moment in (only(stream.state).inner.mu, only(stream.state).inner.nu):
            held = np.asarray(moment["a"] if side == "input" else moment["a"].T)
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
        basis = np.asarray(only(stream.state).basis["a"][:, 0])
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
def test_one_decision_for_a_stack() -> None:
    """The matrix that moves most, and the one that needs most directions."""
    tx = projection(rank=AutoRank(most=K, least=1, share=0.9), update_every=RULE)
    params = {"stack": jnp.ones((2, D, M))}
    state = tx.init(params)
    update = jax.jit(
        lambda s, c: tx.update(
            params, s, statistics={"stack": dsbp_optax.Covariance(c)}
        )[1]
    )
    steep = [8, 0.4, 0.2, 0.1, 0.05, 0.025]
    for i in range(30):
        both = [planted(), planted(0.33 * i, steep)]
        state = update(state, jnp.asarray(np.stack(both), jnp.float32))
    schedule = only(state).schedule["stack"]
    assert schedule.rank.shape == (2, 1, 1, 1)
    assert np.unique(schedule.rank).tolist() == [4]  # (8 + 4 + 2 + 1) / 15.8
    assert np.unique(schedule.interval).tolist() == [4]
    assert np.unique(schedule.drift).size == 1


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
    held = only(state)
    assert held.basis["v"].shape == (64, 1, 32)
    assert held.schedule["q"].rank is None
    assert held.schedule["o"].rank.shape == (1, 1, 1)
    assert held.schedule["q"].reference.dtype == jnp.bfloat16


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
        assert only(state).schedule["a"].rank.shape == (1, 1, 1)
        outcomes.append((updates, state))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_fraction_follows_the_narrower_side(side) -> None:
    shapes = {"wide": (300, 200), "narrow": (300, 40), "thin": (9, 40)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    params["conv"] = {"kernel": jnp.ones((3, 3, 16, 32))}
    rank = RankFraction(1 / 8, most=6)
    state = only(
        projection(rank=rank, side=side, project="always", update_every=3).init(params)
    )
    found = {path: basis.shape[-1] for path, basis in state.basis.items()}
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
    params = kernels("a", "b")
    for old, new, message in (
        ({}, {"update_every": "auto"}, "got none, expected collect, interval"),
        ({"update_every": "auto"}, {}, "got collect, interval, expected none"),
        ({"rank": AutoRank(K)}, {}, "got rank, expected none"),
    ):
        state = projection(**old).init(params)
        with pytest.raises(ValueError, match=f"schedule of 'a': {message}"):
            jax.eval_shape(projection(**new).update, params, state)


@pytest.mark.parametrize("given", ["ab", "a", "b", ""])
def test_a_turn_does_not_depend_on_whose_statistics_came(given: str) -> None:
    tx = projection(update_every=8, power_iterations=1)
    stream = Stream(tx, kernels("a", "b"))
    for _ in range(15):
        stream.step(**{path: planted() for path in given})
    refreshed = {p: scalar(only(stream.state).spectrum[p].refreshed) for p in "ab"}
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
    schedule = only(state).schedule
    assert [int(scalar(schedule[p].collect)) for p in "ab"] == [1, 1]
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
    for path in "ab":
        chex.assert_trees_all_equal(
            *(
                only(state).schedule[path]._replace(reference=None, drift=None)
                for state in (one, two)
            )
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_steps_that_are_skipped_change_nothing(adaptive: Any, value: float) -> None:
    """Nor does the window go on without them."""
    c = jnp.asarray(planted(), jnp.float32)
    old = only(adaptive.state)
    _, state = adaptive.update(adaptive.state, {"a": c, "b": c}, value)
    new = only(state)
    assert (int(new.step), int(new.skipped)) == (6, 1)
    for name in ("basis", "spectrum", "inner"):
        chex.assert_trees_all_equal(getattr(new, name), getattr(old, name))
    chex.assert_trees_all_equal(new.schedule["a"], old.schedule["a"])
    assert int(scalar(new.schedule["a"].collect)) == 1


@pytest.mark.parametrize("every", [6, AutoInterval(shortest=6, longest=12)])
def test_linen_collects_when_each_layer_refreshes(every: Any) -> None:
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
            basis=dsbp_optax.Basis(power_iterations=2),
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

    state, alone = tx.init(params), 0
    for _ in range(26):
        old = only(state)
        x = jnp.asarray(rng.normal(size=(20, 10)), jnp.float32)
        params, state, counts = step(params, state, x)
        seen = {path: float(count) for path, count in counts.items()}
        for path in KERNELS:
            new = only(state).spectrum[path].iterations - old.spectrum[path].iterations
            told = old.schedule.get(path, old)
            collects = int(scalar(told.collect))
            assert (seen[path] == 20) == bool(collects)
            assert int(scalar(new)) == collects
        alone += len(set(seen.values())) == 2
    assert (alone >= 4) == isinstance(every, AutoInterval)
    for spectrum in only(state).spectrum.values():
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
