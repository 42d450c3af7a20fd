"""Train and test arrays, and mini-batches shuffled on the host."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

Batch = tuple[np.ndarray, np.ndarray]


class Split(NamedTuple):
    """Images ``(n, height, width, channels)`` in [0, 1] and labels ``(n,)``.

    Attributes:
      train_images: float32.
      train_labels: int32.
      test_images: float32.
      test_labels: int32.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def limited(self, count: int | None) -> "Split":
        """The same with only the first `count` training samples."""
        return self._replace(
            train_images=self.train_images[:count],
            train_labels=self.train_labels[:count],
        )

    def held_out(self, share: float = 0.2) -> "Split":
        """The end of the training set in the place of the test set: for tuning."""
        kept = round(len(self.train_labels) * (1 - share))
        return Split(
            self.train_images[:kept],
            self.train_labels[:kept],
            self.train_images[kept:],
            self.train_labels[kept:],
        )


def batches(split: Split, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One epoch of full training batches in an order drawn from `rng`.

    Args:
      split: the data.
      size: samples a batch; the remainder of an epoch is left out.
      rng: source of the order.

    Yields:
      Images and labels.
    """
    order = rng.permutation(len(split.train_labels))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield split.train_images[chosen], split.train_labels[chosen]
