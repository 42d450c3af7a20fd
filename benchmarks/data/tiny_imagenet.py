"""Tiny ImageNet from its folders: 200 classes, 64 x 64 pixels in colour.

``tiny-imagenet-200/wnids.txt``, one class a line; ``train/<class>/images/*.JPEG``;
``val/images/*.JPEG`` and ``val/val_annotations.txt``, a file and its class a line,
tab-separated. The labels of ``test`` were never published: ``val`` is the test part.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.data.files import damaged, locate
from benchmarks.data.images import Pixels
from benchmarks.data.split import Data, Samples, hold_out

TINY_IMAGENET_CLASSES = 200
#: The usual ones of ImageNet, by channel.
TINY_IMAGENET_MEAN, TINY_IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ROOT = "tiny-imagenet-200"
_SOURCE = f"the folder {_ROOT} of Tiny ImageNet (cs231n.stanford.edu/{_ROOT}.zip)"
_SIDE, _SPLIT_SEED, _VALIDATION_SHARE = 64, 0, 20


def load_tiny_imagenet(
    data_dir: Path | None, classes: int = TINY_IMAGENET_CLASSES
) -> Data:
    """95 000 training, 5 000 validation and 10 000 test images, decoded to bytes.

    Takes 1.4 GB of memory. The validation part is drawn from ``train`` once and for
    all.

    Args:
      data_dir: folder that holds ``tiny-imagenet-200``.
      classes: lines of ``wnids.txt``.

    Raises:
      DataError: when a file or folder is missing, or not as published.
    """
    root = locate(data_dir, _ROOT, _SOURCE)
    names = _lines(root / "wnids.txt")
    if len(set(names)) != classes or len(names) != classes:
        raise damaged(root / "wnids.txt", f"{len(names)} lines", f"{classes} classes")
    paths, labels = _train_files(root, names)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(paths))
    train = _read([paths[i] for i in order], [labels[i] for i in order])
    test = _read(*_validation_files(root, names))
    return hold_out(train, test, len(train) // _VALIDATION_SHARE)


def _train_files(root: Path, names: Sequence[str]) -> tuple[list[Path], list[int]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        folder = root / "train" / name / "images"
        found = sorted(folder.glob("*.JPEG"))
        if not found:
            raise damaged(folder, "no *.JPEG", "the images of a class")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _validation_files(root: Path, names: Sequence[str]) -> tuple[list[Path], list[int]]:
    path, known = (
        root / "val" / "val_annotations.txt",
        {n: i for i, n in enumerate(names)},
    )
    rows = [line.split("\t")[:2] for line in _lines(path)]
    if not rows or any(len(row) < 2 or row[1] not in known for row in rows):
        raise damaged(path, "a line without a file and a known class", "'file\\tclass'")
    paths = [root / "val" / "images" / Path(file).name for file, _ in rows]
    return paths, [known[name] for _, name in rows]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"no readable text ({error})", _SOURCE) from error


def _read(paths: Sequence[Path], labels: Sequence[int]) -> Samples:
    raw = np.empty((len(paths), _SIDE, _SIDE, 3), np.uint8)
    with ThreadPoolExecutor() as pool:
        for number, image in enumerate(pool.map(_decode, paths, chunksize=64)):
            raw[number] = image
    pixels = Pixels(raw, TINY_IMAGENET_MEAN, TINY_IMAGENET_STD)
    return Samples(pixels, np.asarray(labels, np.int32))


def _decode(path: Path) -> np.ndarray:
    """Bytes ``(64, 64, 3)``; some of the published files are grey."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["JPEG"]) as image:
            size = image.size
            content = (
                np.asarray(image.convert("RGB")) if size == (_SIDE, _SIDE) else None
            )
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise damaged(path, f"no intact JPEG ({error})", "a JPEG file") from error
    if content is None:
        raise damaged(path, f"{size[0]} x {size[1]} pixels", f"{_SIDE} x {_SIDE}")
    return content
