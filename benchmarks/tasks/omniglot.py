"""Omniglot-small: 242 characters of 8 alphabets, 20 drawings each; few-shot episodes.

Alphabets, not characters, are split, so that a test shows a script never seen.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks.base import locate, reading

_SOURCE = (
    "Omniglot-small: x, bytes (characters, 20, 28, 28), and names, "
    "'Alphabet/character01' (drawings of github.com/brendenlake/omniglot, scaled)"
)
DRAWINGS, _SIDE = 20, 28
#: Alphabets to train on, to tune on and to test on.
TRAIN = ("Balinese", "Early_Aramaic", "Greek", "Japanese_(katakana)", "Korean")
VALIDATION, TEST = ("Latin",), ("Sanskrit", "Tagalog")


class Characters(NamedTuple):
    """Drawings ``(c, 20, h, w, 1)`` in [0, 1], and the alphabet of each character."""

    images: np.ndarray
    alphabets: np.ndarray

    def __len__(self) -> int:
        """Number of characters."""
        return len(self.images)


class Alphabets(NamedTuple):
    """Characters to train on, to tune on, and to test on: no alphabet in two parts."""

    train: Characters
    validation: Characters
    test: Characters


class Episode(NamedTuple):
    """One task: some characters, in an order of its own; queries are other drawings."""

    support: np.ndarray  # ``(ways * shots, h, w, 1)``
    support_labels: np.ndarray  # int32, from 0 to ways
    query: np.ndarray
    query_labels: np.ndarray


def load_omniglot(data_dir: Path | None) -> Alphabets:
    """157 characters of 5 alphabets, 26 of one, and 59 of two; 14 by 14 pixels.

    Those to train on are turned by 0, 90, 180 and 270 degrees, a character each.
    """
    path = locate(data_dir, "omniglot_small_28.npz", _SOURCE)
    with reading(path, _SOURCE), np.load(path, allow_pickle=False) as archive:
        drawn, names = archive["x"], archive["names"]
        if drawn.dtype != np.uint8 or drawn.shape[1:] != (DRAWINGS, _SIDE, _SIDE):
            raise ValueError(f"x {drawn.dtype} {drawn.shape}")
        alphabets = np.asarray([str(name).partition("/")[0] for name in names])
        missing = {*TRAIN, *VALIDATION, *TEST} - {*alphabets}
        if missing or len(names) != len(drawn):
            raise ValueError(f"{len(names)} names, none of {sorted(missing)}")
        parts = Alphabets(
            *(_part(drawn, alphabets, x) for x in (TRAIN, VALIDATION, TEST))
        )
    return parts._replace(train=with_rotations(parts.train))


def _part(drawn: np.ndarray, alphabets: np.ndarray, some: Sequence[str]) -> Characters:
    """Of some alphabets; half the side, by means of two by two pixels."""
    chosen = np.isin(alphabets, some)
    images = drawn[chosen].astype(np.float32) / 255
    blocks = images.reshape(*images.shape[:2], _SIDE // 2, 2, _SIDE // 2, 2)
    return Characters(blocks.mean((3, 5))[..., None], alphabets[chosen])


def with_rotations(characters: Characters) -> Characters:
    """Each character four times; a character and its turned self count as two."""
    turned = [np.rot90(characters.images, turns, axes=(2, 3)) for turns in range(4)]
    return Characters(np.concatenate(turned), np.tile(characters.alphabets, 4))


def episodes(
    characters: Characters,
    ways: int,
    shots: int,
    queries: int,
    rng: np.random.Generator,
) -> Iterator[Episode]:
    """Without end: `ways` characters, labelled drawings of each, and others to ask."""
    images = characters.images
    count, drawings = images.shape[:2]
    if not 1 <= ways <= count or min(shots, queries) < 1 or shots + queries > drawings:
        raise ValueError(
            f"episodes: got {ways} ways, {shots} shots and {queries} queries, expected "
            f"at most {count} ways and {drawings} drawings in all. Remedy: fewer."
        )
    labels = np.arange(ways, dtype=np.int32)
    while True:
        who = rng.choice(count, ways, replace=False)[:, None]
        which = np.argsort(rng.random((ways, drawings)), axis=1)
        parts = which[:, :shots], which[:, shots : shots + queries]
        support, query = (
            images[who, part].reshape(-1, *images.shape[2:]) for part in parts
        )
        yield Episode(
            support, np.repeat(labels, shots), query, np.repeat(labels, queries)
        )


def stacked(drawn: Iterator[Episode], count: int) -> Episode:
    """The next `count` episodes as one, along a new first axis."""
    parts = zip(*(next(drawn) for _ in range(count)), strict=True)
    return Episode(*(np.stack(part) for part in parts))


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
    """The fully connected network of MAML's experiments on Omniglot.

    Images are normalized by the mean and variance of those that are passed together,
    in training and after it, as in MAML.
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
