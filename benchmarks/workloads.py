"""What is trained: model, data, schedule, and the loss ``(params, batch) -> loss``."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.data import Split, load_digits, load_fashion_mnist
from benchmarks.models import DigitsCnn, FashionCnn, Mlp

Params = Any
Batch = tuple[Any, Any]
Schedule = Callable[[float, int], optax.ScalarOrSchedule]


@dataclass(frozen=True)
class Workload:
    """One training task.

    Attributes:
      name: as typed on the command line.
      summary: one line for people.
      model: images to logits.
      image_shape: shape of one image.
      load: data folder -> data.
      schedule: ``(learning rate, number of steps) -> learning rate or schedule``.
      schedule_name: for the record.
      epochs: default length.
      batch_size: default size.
    """

    name: str
    summary: str
    model: nn.Module
    image_shape: tuple[int, int, int]
    load: Callable[[Path | None], Split]
    schedule: Schedule
    schedule_name: str
    epochs: int
    batch_size: int

    def init(self, seed: int) -> Params:
        """Fresh parameters."""
        return _init(self.model, self.image_shape, seed)

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """Mean cross entropy of a batch."""
        images, labels = batch
        logits = self.model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def correct(self, params: Params, batch: Batch) -> jax.Array:
        """How many samples of a batch are classified rightly; jitted."""
        return _correct(self.model, params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(model: nn.Module, image_shape: tuple[int, ...], seed: int) -> Params:
    return model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))["params"]


@functools.partial(jax.jit, static_argnums=0)
def _correct(model: nn.Module, params: Params, batch: Batch) -> jax.Array:
    images, labels = batch
    logits = model.apply({"params": params}, images)
    return (logits.argmax(-1) == labels).sum()


def constant(learning_rate: float, steps: int) -> optax.ScalarOrSchedule:
    """The same learning rate at every step."""
    del steps
    return learning_rate


def cosine(learning_rate: float, steps: int) -> optax.ScalarOrSchedule:
    """From the learning rate down to 0 along a cosine."""
    return optax.cosine_decay_schedule(learning_rate, steps)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="digits_cnn",
            summary="2 conv + 2 dense on scikit-learn's 8x8 digits; no files needed",
            model=DigitsCnn(),
            image_shape=(8, 8, 1),
            load=lambda data_dir: load_digits(),
            schedule=constant,
            schedule_name="constant",
            epochs=14,
            batch_size=64,
        ),
        Workload(
            name="fashion_mnist_cnn",
            summary="3 conv with GroupNorm + 2 dense on Fashion-MNIST",
            model=FashionCnn(),
            image_shape=(28, 28, 1),
            load=load_fashion_mnist,
            schedule=constant,
            schedule_name="constant",
            epochs=2,
            batch_size=128,
        ),
        Workload(
            name="fashion_mnist_mlp",
            summary="784-512-256-10 on Fashion-MNIST, cosine schedule",
            model=Mlp(),
            image_shape=(28, 28, 1),
            load=load_fashion_mnist,
            schedule=cosine,
            schedule_name="cosine to 0",
            epochs=8,
            batch_size=128,
        ),
    )
}
