"""Loaders of data sets: what they read, and files that were cut or changed."""

import functools
import zipfile

import jax
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("PIL")

from benchmarks import data
from benchmarks.data import DataError, Samples, omniglot, sotu
from benchmarks.data.images import Pixels, crop_and_flip
from benchmarks.workloads import WORKLOADS

REMEDY = r"got .*, expected .*\. Remedy: "


def refused(load, path, words=""):
    with pytest.raises(DataError, match=REMEDY) as caught:
        load()
    assert str(path) in str(caught.value) and words in str(caught.value)


# Archives of arrays.


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "arrays.npz"
    arrays = {"a": np.arange(3000, dtype=np.int64), "b": np.ones((2, 2), np.uint8)}
    np.savez_compressed(path, **arrays)
    return path, arrays


def test_an_archive_returns_what_was_written(archive):
    path, arrays = archive
    found = data.read_npz(path, ("b", "a"))
    assert list(found) == ["b", "a"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def objects(path):
    np.savez(path, a=np.asarray([{"no": "plain array"}], object), b=np.ones(1))


def flagged(path):
    """The first member's flags say that it is encrypted: one bit."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("plain"),
    "one array, no archive": one_array,
    "flagged as encrypted": flagged,
    "without a": lambda path: np.savez(path, b=np.ones(3)),
    "objects": objects,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_archive_is_refused(archive, kind):
    path, _ = archive
    DAMAGE[kind](path)
    refused(lambda: data.read_npz(path, ("a", "b")), path)


def test_any_changed_byte_of_an_array_is_noticed(archive):
    path, _ = archive
    with zipfile.ZipFile(path) as members:
        info = members.getinfo("a.npy")
    start = info.header_offset + 80
    content = path.read_bytes()
    for place in range(start, start + info.compress_size - 120, 97):
        changed = bytearray(content)
        changed[place] ^= 255
        path.write_bytes(changed)
        refused(lambda: data.read_npz(path, ("a",)), path)


# MedMNIST.


def medmnist(path, shape=(28, 28), classes=2, count=80, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, images in (("train", count), ("val", 16), ("test", 24)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (images, *shape), np.uint8)
        arrays[f"{part}_labels"] = np.arange(images)[:, None] % classes
    np.savez(path, **{**arrays, **changes})
    return arrays


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (64, 64)])
def test_any_member_of_medmnist_is_read_by_its_name(tmp_path, shape):
    (tmp_path / "medmnist").mkdir()
    arrays = medmnist(tmp_path / "medmnist/bloodmnist.npz", shape, classes=8)
    found = data.load_medmnist("bloodmnist", 8)(tmp_path)
    assert [len(part) for part in found[:3]] == [80, 16, 24]
    images, labels = found.test.take(np.asarray([3, 5]))
    wanted = arrays["test_images"][[3, 5]].reshape(2, *shape[:2], -1) / 255
    np.testing.assert_allclose(images, wanted, rtol=1e-6)
    np.testing.assert_array_equal(labels, [3, 5])
    assert images.dtype == np.float32 and labels.dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_images": np.zeros((16, 28, 28), np.float32)}, "type float32"),
        ({"val_images": np.zeros((16, 28, 27), np.uint8)}, "(16, 28, 27)"),
        ({"val_images": np.zeros((16, 28, 28, 28), np.uint8)}, "(16, 28, 28, 28)"),
        ({"val_labels": np.zeros((16, 14), np.uint8)}, "one label an image"),
        ({"val_labels": np.zeros((15, 1), np.uint8)}, "(15, 1)"),
        ({"val_labels": np.zeros((16, 1), np.float32)}, "type float32"),
        ({"val_labels": np.full((16, 1), 2, np.uint8)}, "from 0 to 1"),
        ({"val_labels": np.full((16, 1), -1, np.int8)}, "from 0 to 1"),
        ({}, "(4708, 524, 624)"),
    ],
)
def test_foreign_arrays_are_refused(tmp_path, changes, words):
    path = tmp_path / "pneumoniamnist.npz"
    medmnist(path, **changes)
    refused(lambda: WORKLOADS["pneumonia_cnn"].load(tmp_path), path, words)


def test_the_pneumonia_workload_takes_its_files(tmp_path):
    medmnist(tmp_path / "pneumoniamnist.npz")
    fits(WORKLOADS["pneumonia_cnn"], data.load_medmnist("pneumoniamnist", 2)(tmp_path))


def fits(workload, found):
    """What the workload is compiled for is what its sampler gives."""
    example = workload.example(8)
    batch = next(workload.sampler(found.train, 8, np.random.default_rng(0)))
    assert jax.tree.map(shape_of, batch) == jax.tree.map(shape_of, example)
    logits = jax.eval_shape(
        lambda x: workload.model.init_with_output(jax.random.key(0), x)[0], batch[0]
    )
    assert logits.shape[0] == 8 and logits.shape[1] > max(found.train.targets)


def shape_of(array):
    return np.shape(array), array.dtype


# Omniglot.


def write_omniglot(path, **changes):
    names = np.asarray(
        [
            f"{alphabet}/character{number:02}"
            for alphabet in (*omniglot.TRAIN, *omniglot.VALIDATION, *omniglot.TEST)
            for number in range(1, 5)
        ]
    )
    # Each drawing is of one grey: 20 times its character, plus its own number.
    grey = np.arange(32 * 20, dtype=np.uint16).reshape(32, 20) % 256
    x = np.broadcast_to(grey[..., None, None], (32, 20, 28, 28)).astype(np.uint8)
    np.savez(path, **{"x": x, "names": names, **changes})


def test_no_alphabet_is_in_two_parts(tmp_path):
    write_omniglot(tmp_path / "omniglot_small_28.npz")
    parts = data.load_omniglot_small(tmp_path)
    assert [len(part) for part in parts] == [20, 4, 8]
    seen = [set(part.alphabets) for part in parts]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    np.testing.assert_allclose(parts.validation.images[0, 3], (400 + 3 - 256) / 255)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.zeros((32, 19, 28, 28), np.uint8)}, "(32, 19, 28, 28)"),
        ({"x": np.zeros((32, 20, 28, 28), np.float32)}, "float32"),
        ({"names": np.asarray(["Latin/character01"] * 31)}, "32 names"),
        ({"names": np.asarray(["Latin/character01"] * 32)}, "Balinese"),
    ],
)
def test_foreign_drawings_are_refused(tmp_path, changes, words):
    path = tmp_path / "omniglot_small_28.npz"
    write_omniglot(path, **changes)
    refused(lambda: data.load_omniglot_small(tmp_path), path, words)


@pytest.fixture
def characters():
    """Ten characters; a drawing says of which it is, and which."""
    grey = np.arange(200, dtype=np.float32).reshape(10, 20)
    images = np.broadcast_to(grey[..., None, None, None], (10, 20, 28, 28, 1))
    return omniglot.Characters(images, np.asarray(["Latin"] * 10))


def test_an_episode_asks_for_other_drawings_of_its_characters(characters):
    drawn = data.episodes(characters, 5, 3, 4, np.random.default_rng(0))
    orders = set()
    for episode in (next(drawn) for _ in range(20)):
        support = episode.support[:, 0, 0, 0].astype(int)
        query = episode.query[:, 0, 0, 0].astype(int)
        assert len(support) == 15 and len(query) == 20
        assert not set(support) & set(query) and len(set(query)) == 20
        names = dict(zip(episode.support_labels, support // 20, strict=True))
        assert len(set(names.values())) == 5
        for label, grey in zip(episode.query_labels, query, strict=True):
            assert grey // 20 == names[label]
        for label, grey in zip(episode.support_labels, support, strict=True):
            assert grey // 20 == names[label]
        orders.add(tuple(names.values()))
    assert len(orders) > 10


def test_episodes_follow_the_seed(characters):
    one, two, three = (
        next(data.episodes(characters, 4, 1, 1, np.random.default_rng(seed)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.query, two.query)
    assert np.any(one.query != three.query)


@pytest.mark.parametrize(
    ("ways", "shots", "queries"), [(11, 1, 1), (5, 10, 11), (5, 0, 1)]
)
def test_an_episode_needs_as_many_characters_and_drawings(
    characters, ways, shots, queries
):
    with pytest.raises(ValueError, match=REMEDY):
        data.episodes(characters, ways, shots, queries, np.random.default_rng(0))


# Tiny ImageNet.

WNIDS = ("n02124075", "n04067472")


def write_tiny_imagenet(folder, count=20):
    from PIL import Image

    root = folder / "tiny-imagenet-200"
    rng = np.random.default_rng(0)
    for label, name in enumerate(WNIDS):
        images = root / "train" / name / "images"
        images.mkdir(parents=True)
        for number in range(count):
            grey = 200 * label + rng.integers(0, 20)
            mode, color = ("L", int(grey)) if number == 0 else ("RGB", (int(grey),) * 3)
            Image.new(mode, (64, 64), color).save(images / f"{name}_{number}.JPEG")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "val/images").mkdir(parents=True)
    lines = []
    for number in range(8):
        label = number % 2
        image = Image.new("RGB", (64, 64), (200 * label,) * 3)
        image.save(root / f"val/images/val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{WNIDS[label]}\t0\t0\t62\t62")
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


load_two = functools.partial(data.load_tiny_imagenet, classes=2)


def test_tiny_imagenet_is_read_from_its_folders(tmp_path):
    write_tiny_imagenet(tmp_path)
    found = load_two(tmp_path)
    assert [len(part) for part in found[:3]] == [38, 2, 8]
    for part in found[:3]:
        images, labels = part.take(np.arange(len(part)))
        assert images.shape[1:] == (64, 64, 3)
        pixels = WORKLOADS["tiny_imagenet_resnet"].to_pixels(images)
        np.testing.assert_array_equal(pixels.mean((1, 2, 3)) > 0.5, labels == 1)
    assert len(set(found.train.targets)) == 2


def damage_tiny_imagenet(root, kind):
    from PIL import Image

    image = root / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_3.JPEG"
    notes = root / "val/val_annotations.txt"
    if kind == "cut":
        image.write_bytes(image.read_bytes()[:-150])
    elif kind == "text":
        image.write_text("plain")
    elif kind == "small":
        Image.new("RGB", (32, 64)).save(image)
    elif kind == "empty class":
        for path in (root / "train" / WNIDS[1] / "images").iterdir():
            path.unlink()
    elif kind == "unknown class":
        notes.write_text("val_0.JPEG\tn00000000\t0\t0\t1\t1\n")
    elif kind == "absent image":
        notes.write_text(f"val_99.JPEG\t{WNIDS[0]}\t0\t0\t1\t1\n")
    elif kind == "no notes":
        notes.unlink()
    elif kind == "one class":
        (root / "wnids.txt").write_text(WNIDS[0])


@pytest.mark.parametrize(
    "kind",
    [
        *("cut", "text", "small", "empty class", "unknown class", "absent image"),
        *("no notes", "one class"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, kind):
    root = write_tiny_imagenet(tmp_path)
    damage_tiny_imagenet(root, kind)
    refused(lambda: load_two(tmp_path), root)


def test_a_file_named_outside_is_not_opened(tmp_path):
    root = write_tiny_imagenet(tmp_path)
    image = root / "val/images/val_0.JPEG"
    image.rename(tmp_path / "secret.JPEG")
    notes = root / "val/val_annotations.txt"
    notes.write_text(f"../../../secret.JPEG\t{WNIDS[0]}\t0\t0\t1\t1\n")
    refused(lambda: load_two(tmp_path), root, "secret.JPEG")


def test_the_tiny_imagenet_workload_takes_its_files(tmp_path):
    write_tiny_imagenet(tmp_path)
    fits(WORKLOADS["tiny_imagenet_resnet"], load_two(tmp_path))


# State of the Union.


def test_the_alphabet_is_that_of_tiny_shakespeare():
    text = " ".join(sotu.ALPHABET)
    symbols = "".join(sorted(set(text)))
    assert symbols == sotu.ALPHABET and len(symbols) == data.shakespeare.SYMBOLS
    np.testing.assert_array_equal(
        sotu.encode(text), [symbols.index(symbol) for symbol in text]
    )


def decoded(tokens):
    return "".join(sotu.ALPHABET[token] for token in tokens)


def test_foreign_symbols_become_the_nearest():
    assert decoded(sotu.encode("In 1862 (“café”) — 50%")) == "In 3333 ,'cafe', - 33 "


def test_whole_addresses_are_in_one_part(tmp_path):
    folder = tmp_path / "sotu/package/sotu/data"
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
    for number, letter in enumerate(letters):
        (folder / f"{1800 + number}.txt").write_text(letter * 50)
    found = data.load_sotu(8)(tmp_path)
    seen = [set(decoded(part.targets.ravel())) for part in found[:3]]
    assert [len(some) for some in seen] == [36, 2, 2]
    assert len(set.union(*seen)) == 40
    inputs, targets = found.train.take(np.arange(5))
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize(
    ("count", "content", "words"),
    [(19, b"text", "19 *.txt"), (20, b"\xff\xfe", "no UTF-8"), (20, b"te", "40 char")],
)
def test_foreign_addresses_are_refused(tmp_path, count, content, words):
    folder = tmp_path / "sotu/data"
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_bytes(content)
    refused(lambda: data.load_sotu(8)(tmp_path), folder, words)


@pytest.mark.parametrize(
    "load",
    [
        *(WORKLOADS["pneumonia_cnn"].load, WORKLOADS["tiny_imagenet_resnet"].load),
        *(data.load_omniglot_small, data.load_sotu(8)),
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(load, tmp_path):
    with pytest.raises(DataError, match=r"--data-dir DIR"):
        load(None)
    with pytest.raises(DataError, match=r"got no such file.*(package|github|cs231n)"):
        load(tmp_path)


# Augmentation.


def numpy_crop_and_flip(images, flips, corners, padding):
    cut = []
    for image, flip, top, left in zip(images, flips, *corners, strict=True):
        around = ((padding, padding), (padding, padding), (0, 0))
        padded = np.pad(image[:, ::-1] if flip else image, around)
        h, w = image.shape[:2]
        cut.append(padded[top : top + h, left : left + w])
    return np.stack(cut)


def test_crops_and_flips_are_those_of_numpy():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(9, 6, 8, 3)).astype(np.float32)
    flips, corners = rng.random(9) < 0.5, rng.integers(0, 7, (2, 9))
    found = crop_and_flip(images, flips, corners, 3)
    assert isinstance(found, jax.Array)
    right = numpy_crop_and_flip(images, flips, corners, 3)
    np.testing.assert_array_equal(found, right)
    wrong = numpy_crop_and_flip(images, ~flips, corners, 3)
    assert np.abs(found - wrong).max() > 0.1


def test_bytes_are_normalised_on_the_device_as_on_the_host():
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)
    labels = np.arange(16, dtype=np.int32)
    pixels = Pixels(raw, data.CIFAR10_MEAN, data.CIFAR10_STD)
    host = Samples(pixels[np.arange(16)], labels)
    one, two = (
        next(data.augmented(samples, 16, np.random.default_rng(2)))
        for samples in (Samples(pixels, labels), host)
    )
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(one[1], two[1])
    assert sorted(one[1]) == list(range(16)) and list(one[1]) != sorted(one[1])


def test_batches_of_bytes_compile_once(monkeypatch):
    traces = []

    def counted(images, flips, corners, padding):
        traces.append(images.shape)
        return crop_and_flip.__wrapped__(images, flips, corners, padding)

    compiled = jax.jit(counted, static_argnames="padding")
    monkeypatch.setattr("benchmarks.data.images.crop_and_flip", compiled)
    raw = np.zeros((64, 10, 8, 3), np.uint8)
    samples = Samples(Pixels(raw), np.zeros(64, np.int32))
    batches = data.augmented(samples, 16, np.random.default_rng(0))
    for _ in range(10):
        next(batches)
    assert len(traces) == 1


def test_a_slice_of_pixels_stays_bytes():
    pixels = Pixels(np.zeros((8, 2, 2, 1), np.uint8), (0.5,), (0.25,))
    part = pixels[2:5]
    assert isinstance(part, Pixels) and len(part) == 3 and part.mean == (0.5,)
    np.testing.assert_allclose(part[np.asarray([0])], -2.0)
