"""A small GPT over characters: pre-norm blocks, no biases, joint query-key-value."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Causal attention and a GELU layer, each on the normalised residual stream.

    Attributes:
      heads: of the attention.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, t, d)`` to the same."""
        n, t, d = x.shape
        h = nn.LayerNorm(use_bias=False)(x)
        qkv = nn.Dense(3 * d, use_bias=False, name="qkv")(h)
        q, k, v = (a.reshape(n, t, self.heads, -1) for a in jnp.split(qkv, 3, -1))
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / jnp.sqrt(d // self.heads)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        a = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
        x = x + nn.Dense(d, use_bias=False, name="proj")(a.reshape(n, t, d))
        h = nn.LayerNorm(use_bias=False)(x)
        h = nn.gelu(nn.Dense(4 * d, use_bias=False, name="up")(h))
        return x + nn.Dense(d, use_bias=False, name="down")(h)


class Gpt(nn.Module):
    """A decoder with learned positions and a head of its own.

    Attributes:
      vocabulary: number of tokens.
      width: d.
      layers: number of blocks.
      heads: of each block.
      context: longest input.
    """

    vocabulary: int = 65
    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens ``(n, t)`` to logits ``(n, t, vocabulary)``."""
        shape = (self.context, self.width)
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        positions = self.param("pos_embed", nn.initializers.normal(0.02), shape)
        x = x + positions[: tokens.shape[1]]
        for number in range(self.layers):
            x = Block(self.heads, name=f"block_{number}")(x)
        x = nn.LayerNorm(use_bias=False)(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="head_embed")(x)
