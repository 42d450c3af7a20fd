"""Members of MedMNIST with one label an image, from their .npz files."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.data.files import damaged, locate
from benchmarks.data.images import Pixels
from benchmarks.data.npz import read_npz
from benchmarks.data.split import Data, Samples

_PARTS = ("train", "val", "test")
#: Images in each part, as published.
PNEUMONIA_COUNTS = (4_708, 524, 624)


def load_medmnist(
    name: str, classes: int, counts: tuple[int, int, int] | None = None
) -> Callable[[Path | None], Data]:
    """A loader of ``<name>.npz``, split as published; images in [0, 1].

    Args:
      name: of the file, "pneumoniamnist" say. It may lie where MedMNIST's own package
        puts it.
      classes: labels are 0 to this, exclusive.
      counts: images in the three parts; None for any.

    The loader raises:
      DataError: when the file is missing, altered, of another shape, or has several
        labels an image.
    """
    return functools.partial(_load, name, classes, counts)


def _load(
    name: str,
    classes: int,
    counts: tuple[int, int, int] | None,
    data_dir: Path | None,
) -> Data:
    file = f"{name}.npz"
    source = f"{file} of MedMNIST (medmnist.com; Python package medmnist)"
    path = locate(data_dir, file, source)
    keys = [f"{part}_{kind}" for part in _PARTS for kind in ("images", "labels")]
    arrays = read_npz(path, keys)
    parts = [
        _samples(path, arrays[f"{part}_images"], arrays[f"{part}_labels"], classes)
        for part in _PARTS
    ]
    found = tuple(map(len, parts))
    if counts is not None and found != counts:
        raise damaged(path, f"{found} images", f"{counts} to train, tune and test")
    return Data(*parts)


def _samples(
    path: Path, images: np.ndarray, labels: np.ndarray, classes: int
) -> Samples:
    grey, coloured = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    square = images.ndim >= 3 and images.shape[1] == images.shape[2]
    if images.dtype != np.uint8 or not square or not (grey or coloured):
        raise damaged(
            path,
            f"images of shape {images.shape} and type {images.dtype}",
            "bytes (n, h, h) or (n, h, h, 3)",
        )
    if labels.shape != (len(images), 1) or labels.dtype.kind not in "ui":
        raise damaged(
            path,
            f"labels of shape {labels.shape} and type {labels.dtype}",
            f"whole numbers ({len(images)}, 1): one label an image",
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise damaged(path, "other labels", f"some, from 0 to {classes - 1}")
    raw = images[..., None] if grey else images
    return Samples(Pixels(raw), labels[:, 0].astype(np.int32))
