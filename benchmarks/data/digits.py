"""The 8x8 digits that scikit-learn carries: 1 797 samples, 10 classes."""

from pathlib import Path

import numpy as np

from benchmarks.data.split import Data, Samples, hold_out

_VALIDATION, _TEST = 287, 360
_SPLIT_SEED = 0


def load_digits(data_dir: Path | None = None) -> Data:
    """1 150 training, 287 validation, 360 test samples, the same in every run.

    Args:
      data_dir: not needed; every loader takes it.
    """
    from sklearn import datasets

    del data_dir
    digits = datasets.load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    images = (digits.images[order, ..., None] / 16).astype(np.float32)
    samples = Samples(images, digits.target[order].astype(np.int32))
    train, test = samples.part(slice(_TEST, None)), samples.part(slice(_TEST))
    return hold_out(train, test, _VALIDATION)
