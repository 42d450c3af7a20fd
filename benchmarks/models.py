"""The Flax Linen models of the workloads."""

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
    """Three convolutions with GroupNorm, two dense layers; for 28 x 28 images."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, 28, 28, 1)`` to logits ``(n, 10)``."""
        for features in (16, 32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(_CLASSES)(x)


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
