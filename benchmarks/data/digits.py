"""The 8x8 digits that scikit-learn carries: 1 797 samples, 10 classes."""

import numpy as np

from benchmarks.data.split import Split

_TEST_SAMPLES = 360
_SPLIT_SEED = 0


def load_digits() -> Split:
    """1 437 training and 360 test samples; the split is the same in every run."""
    from sklearn import datasets

    digits = datasets.load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    images = (digits.images[order, ..., None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    return Split(
        images[_TEST_SAMPLES:],
        labels[_TEST_SAMPLES:],
        images[:_TEST_SAMPLES],
        labels[:_TEST_SAMPLES],
    )
