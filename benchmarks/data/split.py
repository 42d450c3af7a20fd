"""Train, validation and test samples, and mini-batches drawn on the host."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Batch = tuple[Any, np.ndarray]


class Samples(NamedTuple):
    """Inputs and targets, one row a sample.

    Attributes:
      inputs: an array, or anything that an index array turns into model inputs.
      targets: int32, ``(n,)`` labels or ``(n, t)`` tokens.
    """

    inputs: Any
    targets: np.ndarray

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.targets)

    def take(self, chosen: Any) -> Batch:
        """The batch of some rows."""
        return self.inputs[chosen], self.targets[chosen]

    def part(self, chosen: slice) -> "Samples":
        """The samples of a slice."""
        return Samples(self.inputs[chosen], self.targets[chosen])


class Data(NamedTuple):
    """A data set in three parts.

    Attributes:
      train: what gradients see.
      validation: what tuning sees.
      test: what the final figures see.
      pretrained: parameters that replace those of a fresh model; a nested dict.
    """

    train: Samples
    validation: Samples
    test: Samples
    pretrained: Any = None

    def limited(self, count: int | None) -> "Data":
        """The same with only the first `count` training samples."""
        return self._replace(train=self.train.part(slice(count)))


def hold_out(train: Samples, test: Samples, count: int) -> Data:
    """The last `count` training samples become the validation set."""
    kept = len(train) - count
    return Data(train.part(slice(kept)), train.part(slice(kept, None)), test)


def shuffled(train: Samples, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Full batches without end; each epoch in an order drawn from `rng`.

    Args:
      train: the samples.
      size: samples a batch; the remainder of an epoch is left out.
      rng: source of the order.
    """
    for chosen in orders(len(train), size, rng):
        yield train.take(chosen)


def orders(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Which samples form each batch of `shuffled`."""
    while True:
        order = rng.permutation(count)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def drawn(train: Samples, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Full batches without end, drawn with replacement."""
    while True:
        yield train.take(rng.integers(0, len(train), size))
