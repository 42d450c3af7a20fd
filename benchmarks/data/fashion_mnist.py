"""Fashion-MNIST from its four published IDX files."""

from pathlib import Path

import numpy as np

from benchmarks.data.files import locate
from benchmarks.data.idx import read_idx
from benchmarks.data.split import Data, Samples, hold_out

_VALIDATION = 5_000
_SOURCE = (
    "the four IDX files of Fashion-MNIST (Debian package dataset-fashion-mnist, or "
    "github.com/zalandoresearch/fashion-mnist)"
)

#: File name -> shape and SHA-256 of the uncompressed bytes.
FILES = {
    "train-images-idx3-ubyte.gz": (
        (60_000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte.gz": (
        (60_000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "t10k-images-idx3-ubyte.gz": (
        (10_000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        (10_000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


def load_fashion_mnist(data_dir: Path | None) -> Data:
    """55 000 training, 5 000 validation, 10 000 test images of 28 x 28 in grey.

    Args:
      data_dir: folder of the four files.

    Raises:
      DataError: when the folder is not given, or a file is missing or not the
        published one.
    """
    arrays = [
        read_idx(locate(data_dir, name, _SOURCE), *checks)
        for name, checks in FILES.items()
    ]
    train = Samples(_images(arrays[0]), arrays[1].astype(np.int32))
    test = Samples(_images(arrays[2]), arrays[3].astype(np.int32))
    return hold_out(train, test, _VALIDATION)


def _images(raw: np.ndarray) -> np.ndarray:
    return raw[..., None].astype(np.float32) / 255
