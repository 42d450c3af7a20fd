"""Images kept as bytes, and crops and flips of a batch on the device."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data.split import Batch, Samples, orders


@dataclass(frozen=True, eq=False)
class Pixels:
    """Bytes ``(n, h, w, c)``; an index array gives float32, normalised by channel.

    Attributes:
      raw: the bytes.
      mean: of pixels in [0, 1], taken off each channel.
      std: what each channel is divided by then.
    """

    raw: Any
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __getitem__(self, chosen: Any) -> Any:
        """A slice stays bytes; an index array gives images."""
        part = replace(self, raw=self.raw[chosen])
        return part if isinstance(chosen, slice) else normalized(part, np)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.raw)


def normalized(pixels: Pixels, namespace: Any = jnp) -> Any:
    """Float32 images ``(n, h, w, c)``; `namespace` is that of the bytes."""
    mean, std = (namespace.asarray(x, np.float32) for x in (pixels.mean, pixels.std))
    return (pixels.raw.astype(np.float32) / 255 - mean) / std


def augmented(
    train: Samples, size: int, rng: np.random.Generator, padding: int = 4
) -> Iterator[Batch]:
    """Shuffled batches, each image flipped at random and cropped after padding.

    What is drawn comes from `rng`; pixels are normalised and moved on the device.
    Images kept as `Pixels` travel there as bytes.

    Args:
      train: the samples.
      size: samples a batch.
      rng: source of the order, the flips and the crops.
      padding: pixels of zeros, the mean colour, on each side.
    """
    for chosen in orders(len(train), size, rng):
        flips = rng.random(size) < 0.5
        corners = rng.integers(0, 2 * padding + 1, (2, size))
        inputs = train.inputs
        if isinstance(inputs, Pixels):
            batch = jnp.asarray(inputs.raw[chosen]), inputs.mean, inputs.std
            images = _normalized(*batch)
        else:
            images = jnp.asarray(inputs[chosen])
        yield crop_and_flip(images, flips, corners, padding), train.targets[chosen]


@functools.partial(jax.jit, static_argnames="padding")
def crop_and_flip(
    images: jax.Array, flips: jax.Array, corners: jax.Array, padding: int
) -> jax.Array:
    """Mirror some images, then cut each out of itself between zeros.

    Args:
      images: ``(n, h, w, c)``.
      flips: ``(n,)``, whether to mirror left and right.
      corners: ``(2, n)``, top and left of the cut, from 0 to twice the padding.
      padding: zeros on each side.
    """
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
    images: jax.Array = normalized(Pixels(raw, mean, std))
    return images
