"""Few-shot episodes: lawful tasks, the right meta-gradient, runs that go on."""

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
from benchmarks.core.train import Order
from benchmarks.report import page
from benchmarks.studies import app, fewshot
from benchmarks.studies.coordinates import _enable_x64
from benchmarks.studies.fewshot import LEARNERS, Lane
from benchmarks.studies.maml import Inner, adapt, in_bases, keep_bases, meta_loss
from benchmarks.tasks import omniglot
from benchmarks.tasks.base import DataError
from benchmarks.tasks.omniglot import Characters, DrawingsMlp, Episode

# Episodes.


@pytest.mark.parametrize("shots", [1, 5])
def test_episodes_keep_the_laws(shots):
    """The grey of a drawing says of which character it is, and which."""
    grey = np.arange(12 * 20, dtype=np.float32).reshape(12, 20)
    images = np.broadcast_to(grey[..., None, None, None], (12, 20, 4, 4, 1))
    characters = Characters(images, np.asarray(["Latin"] * 12))

    def drawn(seed):
        rng = np.random.default_rng(seed)
        found = omniglot.episodes(characters, 5, shots, 4, rng)
        return omniglot.stacked(found, 8)

    for task in map(Episode._make, zip(*drawn(0), strict=True)):
        support, query = (x[:, 0, 0, 0].astype(int) for x in (task.support, task.query))
        assert len({*support, *query}) == 5 * (shots + 4), "a drawing comes once"
        labels = np.concatenate([task.support_labels, task.query_labels])
        pairs = {*zip(np.concatenate([support, query]) // 20, labels, strict=True)}
        assert len(pairs) == 5 and {label for _, label in pairs} == {*range(5)}
    np.testing.assert_array_equal(drawn(0).query, drawn(0).query)
    assert np.any(drawn(0).support != drawn(1).support)
    for told in ((13, 1, 1), (5, 10, 11), (5, 0, 1)):
        with pytest.raises(ValueError, match="Remedy"):
            next(omniglot.episodes(characters, *told, np.random.default_rng(0)))


def write_drawings(folder):
    """An archive whose pixels are the number of their alphabet, and not 0."""
    names = (*omniglot.TRAIN, *omniglot.VALIDATION, *omniglot.TEST)
    grey = np.repeat(np.arange(1, 1 + len(names), dtype=np.uint8), 6)
    noise = np.random.default_rng(0).integers(0, 2, (len(grey), 20, 28, 28), np.uint8)
    drawings = 16 * grey[:, None, None, None] + noise
    labels = np.asarray([f"{name}/character{n:02}" for name in names for n in range(6)])
    np.savez(folder / "omniglot_small_28.npz", x=drawings, names=labels)
    return {"x": drawings, "names": labels}


def test_no_alphabet_of_the_test_is_trained_on(tmp_path):
    write_drawings(tmp_path)
    parts = omniglot.load_omniglot(tmp_path)
    seen = [set(np.unique((255 * p.images).round() // 16)) for p in parts]
    assert seen == [{1, 2, 3, 4, 5}, {6}, {7, 8}]
    assert [len(part) for part in parts] == [4 * 30, 6, 12]
    turned = np.rot90(parts.train.images[3, 2], 1)
    np.testing.assert_array_equal(parts.train.images[33, 2], turned)
    tasks = fewshot.judging(parts, 1, final=True)
    assert set(np.unique((255 * tasks.support).round() // 16)) <= seen[2]
    tasks = fewshot.judging(parts, 1, final=False)
    assert set(np.unique((255 * tasks.query).round() // 16)) == seen[1]


def test_a_file_that_is_something_else_is_refused(tmp_path):
    whole, file = write_drawings(tmp_path), tmp_path / "omniglot_small_28.npz"
    for wrong, told in (
        ({"x": np.zeros((2, 3))}, "float64"),
        ({"names": whole["names"][1:]}, "47 names"),
        ({"names": np.asarray(["Greek/character01"] * 48)}, "Sanskrit"),
    ):
        np.savez(file, **{**whole, **wrong})
        with pytest.raises(DataError, match=f"(?s){told}.*Remedy"):
            omniglot.load_omniglot(tmp_path)
    file.write_bytes(b"no archive")
    with pytest.raises(DataError, match="Remedy"):
        omniglot.load_omniglot(tmp_path)


# MAML.


def tiny_loss(params, x, labels):
    logits = jnp.tanh(x @ params["first"]) @ params["second"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_the_meta_gradient_is_that_of_differences():
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(5, 4)), "second": rng.normal(size=(4, 3))}
    way = {name: rng.normal(size=p.shape) for name, p in params.items()}
    labels = np.tile(np.arange(3), (2, 2))
    support, query = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 6, 5))
    tasks = Episode(support, labels[:, :3], query, labels)

    def loss(reach, steps, first=False):
        moved = jax.tree.map(lambda p, w: p + reach * w, params, way)
        inner = Inner(0.5, steps, first_order=first)
        return meta_loss(tiny_loss, moved, tasks, inner)

    with _enable_x64(True):
        function = jax.jit(loss, static_argnums=(1, 2))
        slope = jax.jit(jax.grad(loss), static_argnums=(1, 2))
        for steps in (1, 3):
            difference = (function(1e-5, steps) - function(-1e-5, steps)) / 2e-5
            np.testing.assert_allclose(slope(0.0, steps), difference, rtol=1e-6)
        assert not np.allclose(slope(0.0, 1, True), slope(0.0, 1), rtol=0.01)


def network(rank):
    """A small network, its loss, and an optimizer that keeps bases."""
    model = DrawingsMlp(3, (8, 6))
    images = jax.random.normal(jax.random.key(0), (12, 4, 4, 1))
    params = model.init(jax.random.key(1), images)["params"]
    tx = optax.chain(keep_bases(rank=rank, update_every=4), optax.adam(0.1))

    def loss(params, images, labels):
        return fewshot.cross_entropy(model, params, images, labels)

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
        change, expected = np.asarray(before - new[path]) / 0.5, np.asarray(slope[path])
        if name.endswith("kernel"):
            basis = np.asarray(layer(state[0], name).basis)
            expected = basis @ basis.T @ expected
            assert np.abs(expected - slope[path]).max() > 1e-3
        np.testing.assert_allclose(change, expected, atol=2e-5)


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
    basis = np.asarray(layer(state[0], "trunk/Dense_0/kernel").basis)
    assert np.linalg.norm(top.T @ basis) ** 2 == pytest.approx(2, abs=0.02)


# Learners and runs.


@pytest.mark.parametrize("name", ["maml_spectral", "nearest_mean", "linear_probe"])
def test_learners_learn(name):
    rng = np.random.default_rng(0)
    prototypes = rng.random((30, 1, 14, 14, 1)) > 0.7
    flips = rng.random((30, 20, 14, 14, 1)) > 0.9
    images = np.asarray(prototypes ^ flips, np.float32)
    characters = Characters(images, np.asarray(["Greek"] * 30))
    order = Order("final", 3e-3, 0, 20)
    fitted = LEARNERS[name].make(characters, 1)(order, 0.4)
    tasks = omniglot.stacked(omniglot.episodes(characters, 5, 1, 15, rng), 10)
    assert fitted.judge(tasks).mean() > 0.6
    assert fitted.loss < np.log(30) and fitted.state_bytes > 0


def drive(lane, score):
    """Every run that a lane asks for, with a made-up result; their order."""
    asked = []
    while (run := lane.next_run()) is not None:
        order, inner = run
        asked.append((order.phase, order.round, order.rate, inner, order.seed))
        row = {"optimizer": lane.learner.name, "workload": lane.workload}
        row |= {"phase": order.phase, "round": order.round, "inner_rate": inner}
        row |= {"learning_rate": order.rate, "seed": order.seed, "full_steps": 300}
        key = "test_accuracy" if order.phase == "final" else "validation_accuracy"
        records.append(lane.file, "fewshot", [{**row, key: score(order.rate, inner)}])
    return asked


def test_a_lane_tunes_then_judges_and_others_take_its_rates(tmp_path):
    def score(rate, inner):
        return 0.9 - abs(np.log10(rate / 0.003)) / 10 - abs(inner - 1.0) / 10

    file = tmp_path / "fewshot.jsonl"
    with pytest.raises(DataError, match=r"tuned rates of maml_spectral.*Remedy"):
        Lane(file, LEARNERS["spectral_random"], 1, 1).next_run()
    lane = Lane(file, LEARNERS["maml_spectral"], 1, 2)
    order = drive(lane, score)
    assert len({*order}) == len(order)
    assert [one[3] for one in order if one[1] == 3] == [0.1, 1.0]
    assert order[-2:] == [("final", 0, 0.003, 1.0, seed) for seed in (0, 1)]
    assert drive(lane._replace(seeds=3), score) == [("final", 0, 0.003, 1.0, 2)]
    for name, shots in (("maml_spectral", 5), ("spectral_random", 1)):
        other = Lane(file, LEARNERS[name], shots, 1)
        assert drive(other, score) == [("final", 0, 0.003, 1.0, 0)]
    with pytest.raises(DataError, match=r"got runs of 300 steps.*Remedy"):
        lane._replace(steps=400).next_run()
    lane = Lane(file, LEARNERS["maml"], 1, 1)
    order = drive(lane, lambda rate, inner: None if rate > 0.002 else 0.5)
    assert order[-1][0] == "final" and order[-1][2] <= 0.001


def test_of_the_committed_record_no_run_is_missing():
    file = records.RESULTS / "fewshot.jsonl"
    for learner in LEARNERS.values():
        for shots in fewshot.SHOTS:
            assert Lane(file, learner, shots, 3).next_run() is None


def test_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch):
    write_drawings(tmp_path)
    monkeypatch.setattr(fewshot, "VALIDATION_EPISODES", 3)
    monkeypatch.setattr(fewshot, "TEST_EPISODES", 4)
    out = tmp_path / "out"
    words = ["fewshot", "--data-dir", str(tmp_path), "--out", str(out), "--steps", "3"]
    words += ["--learner", "linear_probe", "--learner", "pixels", "--seeds"]
    result = CliRunner().invoke(app, [*words, "1"])
    assert result.exit_code == 0, result.output
    assert "1 shot(s)" in result.output
    wanted = {"phase": "final", "workload": "omniglot_5_shot"}
    before = records.read(out / "fewshot.jsonl", **wanted)
    assert [one["optimizer"] for one in before] == ["linear_probe", "pixels"]
    assert {one["episodes"] for one in before} == {4}
    assert all(records.problems(one) == [] for one in before)
    result = CliRunner().invoke(app, [*words, "2"])
    assert result.exit_code == 0, result.output
    after = records.read(out / "fewshot.jsonl", **wanted)
    assert after[:2] == before and len(after) == 4
    text = page.document(page.Found(out))
    assert "Few-shot episodes, 1 shot(s)" in text and "against linear_probe" in text
