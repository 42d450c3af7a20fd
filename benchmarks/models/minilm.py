"""A BERT encoder over word vectors, its mean, and a classifier on top."""

import flax.linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-12
_LONGEST = 512

Inputs = tuple[jax.Array, jax.Array]


class Layer(nn.Module):
    """Attention and a GELU layer, each followed by its norm.

    Attributes:
      heads: of the attention.
      hidden: width of the GELU layer.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(n, t, d)`` to the same; `mask` is ``(n, t)``, true for what counts."""
        n, t, d = x.shape
        q, k, v = (
            nn.Dense(d, name=name)(x).reshape(n, t, self.heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / jnp.sqrt(d // self.heads)
        scores = jnp.where(mask[:, None, None, :], scores, -1e9)
        a = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
        a = nn.Dense(d, name="out")(a.reshape(n, t, d))
        x = nn.LayerNorm(_EPSILON, name="attention_norm")(x + a)
        h = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        h = nn.Dense(d, name="down")(h)
        return nn.LayerNorm(_EPSILON, name="norm")(x + h)


class Encoder(nn.Module):
    """Word vectors to one vector a text: positions, layers, mean.

    Attributes:
      layers: number of layers.
      heads: of each.
    """

    layers: int = 6
    heads: int = 12

    @nn.compact
    def __call__(self, inputs: Inputs) -> jax.Array:
        """Vectors ``(n, t, d)`` and their mask ``(n, t)`` to ``(n, d)``."""
        x, mask = inputs
        length, d = x.shape[1:]
        normal = nn.initializers.normal(0.02)
        x = x + self.param("pos_embed", normal, (_LONGEST, d))[:length]
        x = x + self.param("type_embed", normal, (d,))
        x = nn.LayerNorm(_EPSILON, name="embed_norm")(x)
        for number in range(self.layers):
            x = Layer(self.heads, 4 * d, name=f"layer_{number}")(x, mask)
        weights = mask[..., None].astype(x.dtype)
        return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


class MailClassifier(nn.Module):
    """An encoder with a Dense layer on its mean.

    Attributes:
      layers: of the encoder.
      heads: of each.
    """

    layers: int = 6
    heads: int = 12

    @nn.compact
    def __call__(self, inputs: Inputs) -> jax.Array:
        """Vectors and mask to logits ``(n, 2)``."""
        pooled = Encoder(self.layers, self.heads, name="encoder")(inputs)
        return nn.Dense(2, name="head")(pooled)
