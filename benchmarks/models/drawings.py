"""The fully connected network of MAML's experiments on Omniglot."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class _Trunk(nn.Module):
    hidden: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.reshape(x, (x.shape[0], -1))
        for width in self.hidden:
            x = nn.Dense(width, use_bias=False)(x)
            # Batch normalization by the images at hand, which keeps no averages.
            x = nn.relu(nn.LayerNorm(reduction_axes=0, feature_axes=-1)(x))
        return x


class DrawingsMlp(nn.Module):
    """Dense layers with batch normalization and ReLU, then a linear one.

    Images are normalized by the mean and variance of those that are passed together,
    in training and after it, as in MAML.

    Attributes:
      classes: number of logits.
      hidden: widths of the hidden layers.
    """

    classes: int = 5
    hidden: Sequence[int] = (256, 128, 64, 64)

    def setup(self) -> None:
        """The trunk and the linear layer on it."""
        self.trunk, self.head = _Trunk(self.hidden), nn.Dense(self.classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(n, h, w, 1)`` to logits ``(n, classes)``."""
        return self.head(self.trunk(x))

    def features(self, x: jax.Array) -> jax.Array:
        """What the linear layer sees, ``(n, width of the last hidden layer)``."""
        return self.trunk(x)
