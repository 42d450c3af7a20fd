"""What is trained: model, data, schedule, length; and the loss of a batch."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import data, models
from benchmarks.data import Batch, Data, Samples
from benchmarks.metrics import ACCURACY, LOSS, Metric

Params = Any
Schedule = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Sampler = Callable[[Samples, int, np.random.Generator], Iterator[Batch]]

_WARM_UP = 1 / 12


def constant(step: jax.Array, rate: jax.Array, steps: jax.Array) -> jax.Array:
    """constant"""  # noqa: D403, D415 - records quote it
    del step, steps
    return rate


def cosine(step: jax.Array, rate: jax.Array, steps: jax.Array) -> jax.Array:
    """linear over the first twelfth, then a cosine to 0"""  # noqa: D403, D415 - records quote it
    warm = _WARM_UP * steps
    share = jnp.clip((step - warm) / (steps - warm), 0, 1)
    return rate * jnp.minimum(step / warm, 0.5 * (1 + jnp.cos(jnp.pi * share)))


def images(height: int, channels: int, classes: int = 10) -> Callable[[int], Batch]:
    """Random square images and labels, so many a batch: right in shape and type."""

    def example(size: int) -> Batch:
        rng = np.random.default_rng(0)
        pixels = rng.random((size, height, height, channels), np.float32)
        return pixels, rng.integers(0, classes, size, np.int32)

    return example


def tokens(context: int, vocabulary: int = 65) -> Callable[[int], Batch]:
    """Random tokens and the tokens after them."""

    def example(size: int) -> Batch:
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, vocabulary, (size, context + 1), np.int32)
        return drawn[:, :-1], drawn[:, 1:]

    return example


def vectors(length: int, width: int) -> Callable[[int], Batch]:
    """Random word vectors without padding, and two classes."""

    def example(size: int) -> Batch:
        rng = np.random.default_rng(0)
        words = rng.standard_normal((size, length, width), np.float32)
        inputs = words, np.ones((size, length), bool)
        return inputs, rng.integers(0, 2, size, np.int32)

    return example


@dataclass(frozen=True)
class Workload:
    """One training task.

    Attributes:
      name: as typed on the command line.
      summary: one line for people.
      model: inputs to logits.
      example: number of samples -> a random batch of the right shapes.
      load: data folder -> data.
      batch_size: samples a step.
      steps: length of a run.
      quick_steps: length with ``--quick``: at most three minutes on two cores.
      metric: what judges.
      sampler: ``(training samples, batch size, rng) -> batches`` without end.
      schedule: ``(step, rate, steps) -> learning rate``; its docstring names it.
      clip: largest norm of the whole gradient, for every contender; None for any.
      grid_shift: half decades by which every grid of learning rates is moved.
      curve_samples: samples that judge along the way; None for all. The last
        evaluation always takes all.
      heavy: for accelerators; a campaign leaves it out unless it is named.
      pixel_mean: of images, what was taken off pixels in [0, 1].
      pixel_std: of images, what they were divided by then.
    """

    name: str
    summary: str
    model: nn.Module
    example: Callable[[int], Batch]
    load: Callable[[Path | None], Data]
    batch_size: int
    steps: int
    quick_steps: int
    metric: Metric = ACCURACY
    sampler: Sampler = data.shuffled
    schedule: Schedule = cosine
    clip: float | None = None
    grid_shift: int = 0
    curve_samples: int | None = None
    heavy: bool = False
    pixel_mean: tuple[float, ...] = (0.0,)
    pixel_std: tuple[float, ...] = (1.0,)

    def to_pixels(self, inputs: Any) -> Any:
        """Images as pixels in [0, 1]."""
        return inputs * np.asarray(self.pixel_std) + np.asarray(self.pixel_mean)

    def from_pixels(self, pixels: Any) -> Any:
        """The inverse of `to_pixels`."""
        return (pixels - np.asarray(self.pixel_mean)) / np.asarray(self.pixel_std)

    def init(self, seed: int, pretrained: Params = None) -> Params:
        """Fresh parameters, those in `pretrained` replaced by theirs."""
        inputs, _ = self.example(1)
        params = _init(self.model, seed, inputs)
        return params if pretrained is None else _replaced(params, pretrained)

    def loss(self, params: Params, batch: Any) -> jax.Array:
        """Mean cross entropy of a batch."""
        inputs, targets = batch
        logits = self.model.apply({"params": params}, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    def measure(self, params: Params, samples: Samples, count: int | None) -> float:
        """The metric over the first `count` samples (None: all)."""
        total, count = 0.0, len(samples) if count is None else count
        size = 4 * self.batch_size
        for start in range(0, count, size):
            batch = samples.take(np.arange(start, min(start + size, count)))
            mean = _measure(self.model, self.metric, params, batch)
            total += float(mean) * len(batch[1])
        return total / count


@functools.partial(jax.jit, static_argnums=0)
def _init(model: nn.Module, seed: int, inputs: Any) -> Params:
    return model.init(jax.random.key(seed), inputs)["params"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(model: nn.Module, metric: Metric, params: Params, batch: Any) -> jax.Array:
    inputs, targets = batch
    return metric.function(model.apply({"params": params}, inputs), targets)


def _replaced(params: Params, pretrained: Params) -> Params:
    if not isinstance(pretrained, dict):
        if pretrained.shape != params.shape:
            raise data.DataError(
                f"pretrained weights: got shape {pretrained.shape}, expected "
                f"{params.shape}. Remedy: the weights of the named model."
            )
        return jnp.array(pretrained)  # A copy: the step donates its parameters.
    known = {name: _replaced(params[name], value) for name, value in pretrained.items()}
    return {**params, **known}


def _gpt(name: str, summary: str, model: models.Gpt, **settings: Any) -> Workload:
    return Workload(
        name=name,
        summary=f"{summary} on Tiny Shakespeare's characters",
        model=model,
        example=tokens(model.context),
        load=data.load_shakespeare(model.context),
        batch_size=24,
        metric=LOSS,
        sampler=data.drawn,
        clip=1.0,
        curve_samples=96,
        **settings,
    )


def _cifar(name: str, summary: str, model: models.ResNet, **settings: Any) -> Workload:
    return Workload(
        name=name,
        summary=f"{summary} on CIFAR-10, flips and crops",
        model=model,
        example=images(32, 3),
        load=data.load_cifar10,
        batch_size=128,
        sampler=data.augmented,
        pixel_mean=data.CIFAR10_MEAN,
        pixel_std=data.CIFAR10_STD,
        curve_samples=2_000,
        **settings,
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="digits_cnn",
            summary="2 conv + 2 dense on scikit-learn's 8x8 digits; no files needed",
            model=models.DigitsCnn(),
            example=images(8, 1),
            load=data.load_digits,
            batch_size=64,
            steps=300,
            quick_steps=300,
            schedule=constant,
        ),
        Workload(
            name="fashion_mnist_mlp",
            summary="784-512-256-10 on Fashion-MNIST",
            model=models.Mlp(),
            example=images(28, 1),
            load=data.load_fashion_mnist,
            batch_size=128,
            steps=3_440,
            quick_steps=860,
        ),
        Workload(
            name="fashion_mnist_cnn",
            summary="3 conv with GroupNorm + 2 dense on Fashion-MNIST",
            model=models.FashionCnn(),
            example=images(28, 1),
            load=data.load_fashion_mnist,
            batch_size=128,
            steps=2_150,
            quick_steps=860,
        ),
        Workload(
            name="pneumonia_cnn",
            summary="3 conv with GroupNorm + 2 dense on PneumoniaMNIST",
            model=models.FashionCnn(classes=2),
            example=images(28, 1, 2),
            load=data.load_medmnist("pneumoniamnist", 2, data.PNEUMONIA_COUNTS),
            batch_size=64,
            steps=2_190,
            quick_steps=730,
        ),
        _cifar(
            "cifar10_resnet",
            "ResNet-8 of 16-32-64 channels with GroupNorm",
            models.ResNet(),
            steps=3_510,
            quick_steps=400,
        ),
        _cifar(
            "cifar10_resnet18",
            "ResNet-18 with GroupNorm, for accelerators,",
            models.ResNet(widths=(64, 128, 256, 512), blocks=2),
            steps=10_530,
            quick_steps=1_053,
            heavy=True,
        ),
        Workload(
            name="tiny_imagenet_resnet",
            summary="ResNet-18 with GroupNorm on Tiny ImageNet, for accelerators",
            model=models.ResNet(
                (64, 128, 256, 512), blocks=2, classes=data.TINY_IMAGENET_CLASSES
            ),
            example=images(64, 3, data.TINY_IMAGENET_CLASSES),
            load=data.load_tiny_imagenet,
            batch_size=128,
            steps=22_260,
            quick_steps=742,
            sampler=functools.partial(data.augmented, padding=8),
            pixel_mean=data.TINY_IMAGENET_MEAN,
            pixel_std=data.TINY_IMAGENET_STD,
            curve_samples=2_000,
            heavy=True,
        ),
        _gpt(
            "shakespeare_gpt",
            "GPT of 4 layers, width 128,",
            models.Gpt(),
            steps=600,
            quick_steps=600,
        ),
        _gpt(
            "shakespeare_gpt_wide",
            "GPT of 6 layers, width 256, context 128,",
            models.Gpt(width=256, layers=6, heads=8, context=128),
            steps=600,
            quick_steps=50,
        ),
        Workload(
            name="minilm_mail",
            summary="fine-tuned MiniLM (6 layers), spam or ham, headers stripped",
            model=models.MailClassifier(),
            example=vectors(64, 384),
            load=data.load_mail,
            batch_size=16,
            steps=600,
            quick_steps=80,
            clip=1.0,
            grid_shift=-2,
            curve_samples=128,
        ),
    )
}
