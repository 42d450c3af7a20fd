"""Convolutional networks and a perceptron for images."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

_CLASSES = 10


class DigitsCnn(nn.Module):
    """Two convolutions, one pooling, two dense layers; for 8 x 8 images."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, 8, 8, 1)`` to logits ``(n, 10)``."""
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(_CLASSES)(x)


class FashionCnn(nn.Module):
    """Three convolutions with GroupNorm, two dense layers; for 28 x 28 images.

    Attributes:
      classes: number of logits.
    """

    classes: int = _CLASSES

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, 28, 28, c)`` to logits ``(n, classes)``."""
        for features in (16, 32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(self.classes)(x)


class Mlp(nn.Module):
    """Dense layers with ReLU between them, over flattened images.

    Attributes:
      hidden: widths of the hidden layers.
    """

    hidden: Sequence[int] = (512, 256)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, ...)`` to logits ``(n, 10)``."""
        x = jnp.reshape(x, (x.shape[0], -1))
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(_CLASSES)(x)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, pre-activation, with GroupNorm.

    Attributes:
      features: channels out.
      stride: of the first convolution.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, h, w, c)`` to ``(n, h / stride, w / stride, features)``."""
        strides = (self.stride, self.stride)
        h = nn.relu(nn.GroupNorm(num_groups=8)(x))
        if x.shape[-1] != self.features or self.stride != 1:
            x = nn.Conv(self.features, (1, 1), strides, use_bias=False)(h)
        h = nn.Conv(self.features, (3, 3), strides, use_bias=False)(h)
        h = nn.relu(nn.GroupNorm(num_groups=8)(h))
        return x + nn.Conv(self.features, (3, 3), use_bias=False)(h)


class ResNet(nn.Module):
    """A residual network for images of 32 or 64 pixels a side.

    Attributes:
      widths: channels of each stage; all but the first halve the image.
      blocks: residual blocks a stage.
      classes: number of logits.
    """

    widths: Sequence[int] = (16, 32, 64)
    blocks: int = 1
    classes: int = _CLASSES

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, h, h, 3)`` to logits ``(n, classes)``."""
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)
        for stage, features in enumerate(self.widths):
            for block in range(self.blocks):
                x = Residual(features, 2 if stage and not block else 1)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x)).mean((1, 2))
        return nn.Dense(self.classes)(x)
