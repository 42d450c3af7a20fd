"""Few-shot episodes: lawful tasks, the right meta-gradient, runs that go on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("flax")

from states import layer
from typer.testing import CliRunner

import dsbp_optax
from benchmarks.core import records
from benchmarks.report import page
from benchmarks.studies import app, fewshot
from benchmarks.studies.fewshot import LEARNERS, Plan, linear_probe, nearest_mean
from benchmarks.studies.maml import Inner, adapt, in_bases, keep_bases, meta_loss
from benchmarks.tasks import omniglot
from benchmarks.tasks.base import DataError
from benchmarks.tasks.omniglot import Characters, DrawingsMlp, Episode

# Episodes.

DRAWINGS = 20


def coded(count=12):
    """Characters whose drawings say, by their grey, of what they are and which."""
    grey = np.arange(count * DRAWINGS, dtype=np.float32).reshape(count, DRAWINGS)
    images = np.broadcast_to(grey[..., None, None, None], (*grey.shape, 4, 4, 1))
    return Characters(images, np.asarray(["Latin"] * count))


def broken_laws(tasks, ways, shots, queries):
    """What is wrong with stacked episodes of `coded` characters."""
    broken = set()
    for task in map(Episode._make, zip(*tasks, strict=True)):
        support = task.support[:, 0, 0, 0].astype(int)
        query = task.query[:, 0, 0, 0].astype(int)
        if len(set(support)) != ways * shots or len(set(query)) != ways * queries:
            broken.add("a drawing comes twice")
        if set(support) & set(query):
            broken.add("a support is asked for")
        names = {}
        for drawing, label in zip(support, task.support_labels, strict=True):
            names.setdefault(label, set()).add(drawing // DRAWINGS)
        if sorted(names) != list(range(ways)) or any(
            len(n) > 1 for n in names.values()
        ):
            broken.add("a label stands for several characters")
        if len(set().union(*names.values())) != ways:
            broken.add("a character has several labels")
        if any(
            names.get(label) != {drawing // DRAWINGS}
            for drawing, label in zip(query, task.query_labels, strict=True)
        ):
            broken.add("a query is labelled otherwise than its supports")
    return broken


def drawn(shots=3, seed=0):
    found = omniglot.episodes(coded(), 5, shots, 4, np.random.default_rng(seed))
    return omniglot.stacked(found, 8)


@pytest.mark.parametrize("shots", [1, 5])
def test_episodes_keep_the_laws(shots):
    tasks = drawn(shots)
    assert broken_laws(tasks, 5, shots, 4) == set()
    again, other = drawn(shots), drawn(shots, 1)
    np.testing.assert_array_equal(tasks.query, again.query)
    assert np.any(tasks.support != other.support)


def test_a_wrong_sampler_is_rejected():
    tasks, query = drawn(), drawn().query.copy()
    query[:, 0] = tasks.support[:, 0]
    wrong = {
        "a support is asked for": tasks._replace(query=query),
        "a query is labelled otherwise than its supports": tasks._replace(
            query_labels=np.roll(tasks.query_labels, 4, axis=1)
        ),
        "a label stands for several characters": tasks._replace(
            support_labels=np.roll(tasks.support_labels, 1, axis=1)
        ),
    }
    for law, given in wrong.items():
        assert law in broken_laws(given, 5, 3, 4)
    for told in ((13, 1, 1), (5, 10, 11), (5, 0, 1)):
        with pytest.raises(ValueError, match="Remedy"):
            next(omniglot.episodes(coded(), *told, np.random.default_rng(0)))


def write_drawings(folder):
    """An archive whose pixels are the number of their alphabet, and not 0."""
    names = (*omniglot.TRAIN, *omniglot.VALIDATION, *omniglot.TEST)
    grey = np.repeat(np.arange(1, 1 + len(names), dtype=np.uint8), 6)
    noise = np.random.default_rng(0).integers(0, 2, (len(grey), 20, 28, 28), np.uint8)
    drawings = 16 * grey[:, None, None, None] + noise
    labels = np.asarray([f"{name}/character{n:02}" for name in names for n in range(6)])
    np.savez(folder / "omniglot_small_28.npz", x=drawings, names=labels)


def test_no_alphabet_of_the_test_is_trained_on(tmp_path):
    write_drawings(tmp_path)
    parts = omniglot.load_omniglot(tmp_path)
    seen = [set(np.unique((255 * p.images).round() // 16)) for p in parts]
    assert seen == [{1, 2, 3, 4, 5}, {6}, {7, 8}]
    assert [len(part) for part in parts] == [4 * 30, 6, 12]
    tasks = fewshot.judging(parts, 1, final=True)
    assert set(np.unique((255 * tasks.support).round() // 16)) <= seen[2]
    tasks = fewshot.judging(parts, 1, final=False)
    assert set(np.unique((255 * tasks.query).round() // 16)) == seen[1]
    np.savez(tmp_path / "omniglot_small_28.npz", x=np.zeros((2, 3)), names=["a"])
    with pytest.raises(DataError, match=r"float64.*Remedy"):
        omniglot.load_omniglot(tmp_path)


def test_turned_characters_are_others():
    images = np.random.default_rng(0).random((2, 20, 4, 4, 1)).astype(np.float32)
    found = omniglot.with_rotations(Characters(images, np.asarray(["Latin", "Greek"])))
    assert len(found) == 8 and list(found.alphabets[:2]) == ["Latin", "Greek"]
    np.testing.assert_array_equal(found.images[:2], images)
    for turns in range(1, 4):
        expected = np.rot90(images[1, 3, :, :, 0], turns)
        np.testing.assert_array_equal(found.images[2 * turns + 1, 3, :, :, 0], expected)


# The meta-gradient, against differences of an oracle that imports nothing of ours.

ALPHA = 0.5


def oracle_loss_and_grad(weights, x, labels):
    """Two layers, tanh between them, cross-entropy; in float64, by hand."""
    first, second = weights
    hidden = np.tanh(x @ first)
    logits = hidden @ second
    logits -= logits.max(1, keepdims=True)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = np.arange(len(x))
    loss = -np.log(share[rows, labels]).mean()
    share[rows, labels] -= 1
    delta = share / len(x)
    back = (delta @ second.T) * (1 - hidden**2)
    return loss, (x.T @ back, hidden.T @ delta)


def oracle_meta_loss(weights, tasks, steps):
    total = []
    for support, labels, query, asked in tasks:
        mine = weights
        for _ in range(steps):
            grads = oracle_loss_and_grad(mine, support, labels)[1]
            mine = tuple(w - ALPHA * g for w, g in zip(mine, grads, strict=True))
        total.append(oracle_loss_and_grad(mine, query, asked)[0])
    return np.mean(total)


def oracle_meta_grad(weights, tasks, steps, step=1e-5):
    grads = []
    for place, weight in enumerate(weights):
        found = np.zeros_like(weight)
        for index in np.ndindex(weight.shape):
            ends = []
            for sign in (1, -1):
                moved = [w.copy() for w in weights]
                moved[place][index] += sign * step
                ends.append(oracle_meta_loss(tuple(moved), tasks, steps))
            found[index] = (ends[0] - ends[1]) / (2 * step)
        grads.append(found)
    return grads


def tiny_loss(params, x, labels):
    logits = jnp.tanh(x @ params["first"]) @ params["second"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.fixture
def tiny():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, 4)), rng.normal(size=(4, 3))
    labels = np.arange(3, dtype=np.int32)
    tasks = [
        (rng.normal(size=(3, 5)), labels, rng.normal(size=(6, 5)), np.repeat(labels, 2))
        for _ in range(2)
    ]
    return weights, tasks


def meta_grad(weights, tasks, steps, **how):
    params = {
        name: jnp.asarray(w, jnp.float32)
        for name, w in zip(("first", "second"), weights, strict=True)
    }
    parts = [np.stack(part) for part in zip(*tasks, strict=True)]
    stacked = Episode(*(p.astype(np.float32) if p.ndim > 2 else p for p in parts))
    inner = Inner(ALPHA, steps, **how)
    found = jax.jit(jax.grad(lambda p: meta_loss(tiny_loss, p, stacked, inner)))(params)
    return [np.asarray(found[name]) for name in ("first", "second")]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_meta_gradient_is_that_of_the_oracle(tiny, steps):
    expected = oracle_meta_grad(*tiny, steps)
    for one, two in zip(meta_grad(*tiny, steps), expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


def test_a_first_order_gradient_is_another(tiny):
    weights, tasks = tiny
    expected = oracle_meta_grad(weights, tasks, 1)
    found = meta_grad(weights, tasks, 1, first_order=True)
    assert np.abs(found[0] - expected[0]).max() > 0.05 * np.abs(expected[0]).max()
    adapted = []
    for support, labels, query, asked in tasks:
        grads = oracle_loss_and_grad(weights, support, labels)[1]
        mine = tuple(w - ALPHA * g for w, g in zip(weights, grads, strict=True))
        adapted.append(oracle_loss_and_grad(mine, query, asked)[1][0])
    np.testing.assert_allclose(found[0], np.mean(adapted, 0), rtol=1e-3, atol=1e-5)


# Inner steps in the eigenbases.


def network(rank):
    """A small network, its loss, and an optimizer that keeps bases."""
    model = DrawingsMlp(3, (8, 6))
    images = jax.random.normal(jax.random.key(0), (12, 4, 4, 1))
    params = model.init(jax.random.key(1), images)["params"]
    tx = keep_bases(optax.adam(0.1), rank=rank, update_every=4)

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, params, tx, (images, jnp.arange(12) % 3)


def test_an_inner_step_stays_in_the_bases():
    loss, params, tx, batch = network(2)
    state = tx.init(params)
    move = in_bases(state)
    moved = jax.jit(lambda p: adapt(loss, p, *batch, Inner(0.5, 1, move)))(params)
    grads = jax.jit(jax.grad(loss))(params, *batch)
    old, new, slope = (
        dict(jax.tree_util.tree_leaves_with_path(tree))
        for tree in (params, moved, grads)
    )
    for path, before in old.items():
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        change = np.asarray(before - new[path]) / 0.5
        if name.endswith("kernel"):
            basis = np.asarray(layer(state.bases, name).basis)
            expected = basis @ basis.T @ np.asarray(slope[path])
            assert np.abs(expected - slope[path]).max() > 1e-3
        else:
            expected = np.asarray(slope[path])
        np.testing.assert_allclose(change, expected, atol=2e-5)


def test_bases_of_full_rank_are_maml():
    loss, params, tx, batch = network(16)
    state = tx.init(params)
    adapted = [
        jax.jit(lambda p, inner=inner: adapt(loss, p, *batch, inner))(params)
        for inner in (Inner(0.5, 2, in_bases(state)), Inner(0.5, 2))
    ]
    for one, two in zip(*map(jax.tree.leaves, adapted), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_bases_follow_the_queries_and_leave_the_optimizer_alone():
    loss, params, tx, (images, labels) = network(2)
    state, plain = tx.init(params), optax.adam(0.1)
    alone = plain.init(params)
    tasks = Episode(*(x[None] for x in (images[:3], labels[:3], images, labels)))

    def outer(params, tasks):
        return meta_loss(loss, params, tasks, Inner(0.0, 1, in_bases(state)))

    step = jax.jit(
        lambda params, state: dsbp_optax.linen.value_and_grad(outer)(
            params, tasks, opt_state=state
        )
    )
    update, update_alone = jax.jit(tx.update), jax.jit(plain.update)
    for _ in range(60):
        _, grads, statistics = step(params, state)
        updates, state = update(grads, state, params, statistics=statistics)
        expected, alone = update_alone(grads, alone, params)
    for one, two in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
    # Of the first layer, the supports are seen too: its input depends on no parameter.
    assert float(statistics["trunk/Dense_0/kernel"].count.ravel()[0]) == 15
    assert float(statistics["trunk/Dense_1/kernel"].count.ravel()[0]) == 12
    seen = np.concatenate([images, images[:3]]).reshape(15, -1)
    top = np.linalg.eigh(seen.T @ seen)[1][:, -2:]
    basis = np.asarray(layer(state.bases, "trunk/Dense_0/kernel").basis)
    assert np.linalg.norm(top.T @ basis) ** 2 == pytest.approx(2, abs=0.02)


# Learners.


def test_classifiers_of_features_find_clear_classes():
    rng = np.random.default_rng(0)
    means, labels = 3 * np.eye(5, 8), np.repeat(np.arange(5), 4)
    support, query = (
        (means[labels] + 0.1 * rng.normal(size=(20, 8))).astype(np.float32)
        for _ in range(2)
    )
    for classifier in (nearest_mean, linear_probe):
        scores = classifier(support, labels, query, 0.4)
        np.testing.assert_array_equal(np.asarray(scores).argmax(1), labels)
        scores = classifier(support, (labels + 1) % 5, query, 0.4)
        np.testing.assert_array_equal(np.asarray(scores).argmax(1), (labels + 1) % 5)


@pytest.mark.parametrize("name", ["maml_spectral", "nearest_mean"])
def test_learners_learn(name):
    rng = np.random.default_rng(0)
    prototypes = rng.random((30, 1, 14, 14, 1)) > 0.7
    flips = rng.random((30, 20, 14, 14, 1)) > 0.9
    images = np.asarray(prototypes ^ flips, np.float32)
    characters = Characters(images, np.asarray(["Greek"] * 30))
    fitted = LEARNERS[name].make(1)(characters, Plan(3e-3, 0.4, 20, 0))
    tasks = omniglot.stacked(omniglot.episodes(characters, 5, 1, 15, rng), 10)
    assert fitted.judge(tasks, 0.4).mean() > 0.6
    assert fitted.loss < np.log(30) and fitted.state_bytes > 0


@pytest.mark.parametrize("tx", [dsbp_optax.dsbp_adamw(1e-3), dsbp_optax.dsbp_muon(1)])
def test_the_outer_loss_shows_the_activations_of_every_kernel(tx):
    model = DrawingsMlp()
    tasks = omniglot.stacked(
        omniglot.episodes(coded(), 5, 1, 2, np.random.default_rng(0)), 2
    )

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def collect():
        params = model.init(jax.random.key(0), tasks.query[0])["params"]
        outer = functools.partial(meta_loss, loss)
        return dsbp_optax.linen.value_and_grad(outer)(
            params, tasks, Inner(0.4, 1), opt_state=tx.init(params)
        )

    _, grads, statistics = jax.eval_shape(collect)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(grads)
    ]
    kernels = {name for name in names if name.endswith("kernel")}
    assert len(kernels) == 5 and kernels - {"head/kernel"} <= set(statistics) <= kernels


# Runs.


def drive(lane, score):
    """Every run that a lane asks for, with a made-up result; their order."""
    asked = []
    while (run := lane.next_run()) is not None:
        order, inner = run
        asked.append((order.phase, order.round, order.rate, inner, order.seed))
        value = score(order.rate, inner)
        row = {"optimizer": lane.learner.name, "workload": lane.workload}
        row |= {"phase": order.phase, "round": order.round, "inner_rate": inner}
        row |= {"learning_rate": order.rate, "seed": order.seed, "full_steps": 300}
        key = "test_accuracy" if order.phase == "final" else "validation_accuracy"
        records.append(lane.file, "fewshot", [{**row, key: value}])
    return asked


def test_a_lane_tunes_then_judges_and_others_take_its_rates(tmp_path):
    def score(rate, inner):
        return 0.9 - abs(np.log10(rate / 0.003)) / 10 - abs(inner - 1.0) / 10

    file = tmp_path / "fewshot.jsonl"
    with pytest.raises(DataError, match=r"tuned rates of maml_spectral.*Remedy"):
        fewshot.Lane(file, LEARNERS["spectral_random"], 1, 1).next_run()
    lane = fewshot.Lane(file, LEARNERS["maml_spectral"], 1, 2)
    order = drive(lane, score)
    assert len({*order}) == len(order)
    assert [one[3] for one in order if one[1] == 3] == [0.1, 1.0]
    assert order[-2:] == [("final", 0, 0.003, 1.0, seed) for seed in (0, 1)]
    assert drive(lane._replace(seeds=3), score) == [("final", 0, 0.003, 1.0, 2)]
    for name, shots in (("maml_spectral", 5), ("spectral_random", 1)):
        other = fewshot.Lane(file, LEARNERS[name], shots, 1)
        assert drive(other, score) == [("final", 0, 0.003, 1.0, 0)]
    with pytest.raises(DataError, match=r"got runs of 300 steps.*Remedy"):
        lane._replace(steps=400).next_run()
    lane = fewshot.Lane(file, LEARNERS["maml"], 1, 1)
    order = drive(lane, lambda rate, inner: None if rate > 0.002 else 0.5)
    assert order[-1][0] == "final" and order[-1][2] <= 0.001


def test_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch):
    write_drawings(tmp_path)
    monkeypatch.setattr(fewshot, "VALIDATION_EPISODES", 3)
    monkeypatch.setattr(fewshot, "TEST_EPISODES", 4)
    out = tmp_path / "out"
    words = ["fewshot", "--data-dir", str(tmp_path), "--out", str(out), "--steps", "3"]
    words += ["--learner", "pixels", "--learner", "linear_probe", "--seeds"]
    result = CliRunner().invoke(app, [*words, "2"])
    assert result.exit_code == 0, result.output
    assert "1 shot(s)" in result.output
    before = fewshot.finals(out / "fewshot.jsonl", 5)
    names = [one["optimizer"] for one in before]
    assert names == ["linear_probe"] * 2 + ["pixels"] * 2
    assert {one["episodes"] for one in before} == {4}
    assert all(records.problems(one) == [] for one in before)
    result = CliRunner().invoke(app, [*words, "3", "--quiet"])
    assert result.exit_code == 0 and result.output == ""
    after = fewshot.finals(out / "fewshot.jsonl", 5)
    assert after[:2] == before[:2] and len(after) == 6
    text = page.document(page.Found(out))
    assert "Few-shot episodes, 1 shot(s)" in text and "against linear_probe" in text
