"""The benchmarks: data errors, records, ratios, the command line."""

import gzip
import hashlib
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

import dsbp_optax
from benchmarks import plots, records, speed, timing
from benchmarks.cli import app
from benchmarks.data import (
    DataError,
    Split,
    batches,
    load_digits,
    load_fashion_mnist,
    read_idx,
)
from benchmarks.data.fashion_mnist import FILES
from benchmarks.experiment import Result
from benchmarks.optimizers import CONTENDERS, learning_rate_for
from benchmarks.train import Program, Run
from benchmarks.workloads import WORKLOADS, cosine


def idx_bytes(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def idx_file(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(array)))
    return path, array


def test_idx_returns_what_was_written(idx_file):
    path, array = idx_file
    digest = hashlib.sha256(idx_bytes(array)).hexdigest()
    np.testing.assert_array_equal(read_idx(path, (2, 3, 4), digest), array)


def damaged(array, kind):
    content, packed = idx_bytes(array), gzip.compress(idx_bytes(array))
    return {
        "truncated gzip": packed[:-9],
        "not gzip": b"plain text",
        "altered gzip": packed[:20] + bytes([packed[20] ^ 255]) + packed[21:],
        "truncated values": gzip.compress(content[:-1]),
        "extra values": gzip.compress(content + b"\0"),
        "cut header": gzip.compress(content[:9]),
        "empty": gzip.compress(b""),
        "other type": gzip.compress(b"\0\0\x0d" + content[3:]),
        "other shape": gzip.compress(idx_bytes(array.reshape(2, 4, 3))),
        "altered values": gzip.compress(content[:-1] + b"\0"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "truncated gzip",
        "not gzip",
        "altered gzip",
        "truncated values",
        "extra values",
        "cut header",
        "empty",
        "other type",
        "other shape",
        "altered values",
    ],
)
def test_a_damaged_idx_file_is_refused_with_path_and_remedy(idx_file, kind):
    path, array = idx_file
    digest = hashlib.sha256(idx_bytes(array)).hexdigest()
    path.write_bytes(damaged(array, kind))
    with pytest.raises(DataError, match=r"got .*, expected .*\. Remedy: ") as caught:
        read_idx(path, (2, 3, 4), digest)
    assert str(path) in str(caught.value)


def test_a_missing_idx_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"got no such file.*Remedy"):
        read_idx(tmp_path / "absent.gz")


def test_fashion_mnist_names_what_is_missing_or_foreign(tmp_path):
    with pytest.raises(DataError, match="--data-dir"):
        load_fashion_mnist(None)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: got no such"):
        load_fashion_mnist(tmp_path)
    name = next(iter(FILES))
    tiny = idx_bytes(np.zeros((3, 28, 28), np.uint8))
    (tmp_path / name).write_bytes(gzip.compress(tiny))
    with pytest.raises(DataError, match=r"\(3, 28, 28\), expected \(60000, 28, 28\)"):
        load_fashion_mnist(tmp_path)


def test_digits_are_split_once_and_for_all():
    one, two = load_digits(), load_digits()
    assert one.train_images.shape == (1437, 8, 8, 1)
    assert one.test_images.shape == (360, 8, 8, 1)
    assert one.train_images.min() >= 0 and one.train_images.max() == 1
    np.testing.assert_array_equal(one.test_labels, two.test_labels)


def test_batches_follow_the_seed_and_cover_the_epoch_once():
    labels = np.arange(10, dtype=np.int32)
    split = Split(labels, labels, labels[:0], labels[:0])

    def epoch(seed):
        rng = np.random.default_rng(seed)
        return [tuple(y) for _, y in batches(split, 3, rng)]

    assert epoch(0) == epoch(0) != epoch(1)
    assert len(epoch(0)) == 3
    assert len(set().union(*epoch(0))) == 9


def test_held_out_samples_come_from_the_training_set_alone():
    labels = np.arange(10, dtype=np.int32)
    kept = Split(labels, labels, -labels, -labels).held_out(0.2)
    np.testing.assert_array_equal(kept.train_labels, np.arange(8))
    np.testing.assert_array_equal(kept.test_labels, [8, 9])


def test_ratio_of_medians_of_common_noise_is_exact():
    noise = np.random.default_rng(0).lognormal(size=50)
    ratio = timing.ratio_of_medians(2 * noise, noise, resamples=200)
    np.testing.assert_allclose(ratio, (2, 2, 2), rtol=1e-12)


def test_ratio_of_medians_covers_the_truth_and_tells_a_difference():
    rng = np.random.default_rng(1)
    slow, fast = (m * rng.lognormal(0, 0.1, size=200) for m in (1.5, 1.0))
    ratio = timing.ratio_of_medians(slow, fast, resamples=500)
    assert ratio.low < 1.5 < ratio.high
    assert ratio.low > 1.2 and ratio.high < 1.8


def test_strata_weigh_as_often_as_they_occur():
    strata = np.asarray([1] * 5 + [0] * 95)
    seconds = np.where(strata == 1, 11.0, 1.0)
    assert timing.stratified_median(seconds, strata) == pytest.approx(1.5)
    ratio = timing.ratio_of_medians(seconds, np.ones(100), strata, resamples=50)
    np.testing.assert_allclose(ratio, (1.5, 1.5, 1.5))


def test_interleave_takes_turns_and_leaves_the_warmup_out():
    calls = []
    seconds = timing.interleave(
        {name: (lambda name=name: calls.append(name)) for name in "ab"}, 2, warmup=1
    )
    assert calls == list("ababab")
    assert seconds["a"].shape == (2,)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_optimizer_builds_and_states_what_it_does(name):
    contender = CONTENDERS[name]
    params = {"conv": jnp.ones((3, 3, 16, 32)), "kernel": jnp.ones((64, 64))}
    tx = contender.build(cosine(0.1, 10))
    shapes = jax.eval_shape(tx.init, params)
    assert dsbp_optax.diagnostics.state_bytes(shapes) > 0
    assert len(contender.grid) == 5
    assert learning_rate_for(contender, "digits_cnn")[0] in contender.grid
    json.dumps(contender.hyperparameters())


def test_refresh_steps_are_those_of_the_period():
    flags = [CONTENDERS["dsbp_sgd"].refreshes(step) for step in range(200)]
    assert flags == ([True] * 5 + [False] * 95) * 2
    assert not any(CONTENDERS["adam"].refreshes(step) for step in range(200))


def test_list_names_everything():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    for name in (*WORKLOADS, *CONTENDERS):
        assert name in result.output


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("name", ["dsbp", "sam"])
def test_run_writes_a_whole_record(name, tmp_path):
    path = tmp_path / "record.json"
    result = invoke(
        *("run", "digits_cnn", "--optimizer", name, "--epochs", 1, "--limit", 200),
        *("--json", path, "--seeds", 2, "--learning-rate", 0.05),
    )
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert set(record["versions"]) >= {"python", "jax", "optax", "flax", "dsbp_optax"}
    assert record["machine"]["backend"] == jax.default_backend()
    assert record["seeds"] == [0, 1] and record["train_samples"] == 200
    entry = record["optimizers"][name]
    assert entry["learning_rate"] == 0.05
    assert entry["learning_rate_source"] == "given"
    assert entry["state_bytes"] > 0 and entry["compile_seconds"] > 0
    assert [run["seed"] for run in entry["runs"]] == [0, 1]
    for run in entry["runs"]:
        assert run["steps"] == 3
        assert len(run["test_accuracy"]) == len(run["train_loss"]) == 1
        assert 0 <= run["test_accuracy"][0] <= 1
    refreshing = entry["refresh_step_seconds_median"]
    assert (refreshing is None) == (name == "sam")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "cifar"], "digits_cnn"),
        (["run", "digits_cnn", "--optimizer", "adamm"], "dsbp_sgd"),
        (["run", "fashion_mnist_mlp"], "--data-dir"),
        (["run", "digits_cnn", "--limit", "10"], "--batch-size"),
    ],
)
def test_mistakes_on_the_command_line_say_what_to_do(args, words):
    result = invoke(*args)
    assert result.exit_code != 0
    assert words in result.output


def test_records_turn_what_is_not_finite_into_null(tmp_path):
    path = tmp_path / "deep" / "record.json"
    records.write(path, {"loss": float("nan"), "grid": (1.0, float("inf"))})
    assert json.loads(path.read_text()) == {"loss": None, "grid": [1.0, None]}


def test_plots_are_written(tmp_path):
    results = []
    for number, contender in enumerate(CONTENDERS.values()):
        program = Program(contender, 0.1, None, None, 1.0, 1000 * (number + 1))
        runs = [Run(seed, [1.0, 0.5], [0.5, 0.9], [0.1], [False]) for seed in (0, 1)]
        results.append(Result(program, "given", runs))
    for plot in (plots.plot_curves, plots.plot_memory):
        path = tmp_path / f"{plot.__name__}.png"
        plot(results, "title", path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_speed_rows_hold_a_ratio_for_each_contender(monkeypatch):
    monkeypatch.setattr(speed, "KERNELS", ((64, 64),))
    rows = speed.update_alone(rounds=5)
    names = ["dsbp_adamw", "dsbp_sgd", "dsbp_sgd, k=8", "dsbp"]
    assert [row["contender"] for row in rows] == names
    for row in rows:
        ratio = row["ratio"]
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
