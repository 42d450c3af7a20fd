"""Omniglot-small: 242 characters of 8 alphabets, 20 drawings each; few-shot episodes.

Alphabets, not characters, are split, so that a test shows a script never seen.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.data.files import damaged, locate
from benchmarks.data.npz import read_npz

_FILE = "omniglot_small_28.npz"
_SOURCE = (
    "Omniglot-small: x, bytes (characters, 20, 28, 28), and names, "
    "'Alphabet/character01' (drawings of github.com/brendenlake/omniglot, scaled)"
)
DRAWINGS, _SIDE = 20, 28

TRAIN = ("Balinese", "Early_Aramaic", "Greek", "Japanese_(katakana)", "Korean")
VALIDATION, TEST = ("Latin",), ("Sanskrit", "Tagalog")


class Characters(NamedTuple):
    """Characters of some alphabets.

    Attributes:
      images: ``(c, 20, 28, 28, 1)``, float32 in [0, 1], ink is 1.
      alphabets: ``(c,)``, the name of each one's alphabet.
    """

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
    """One task: `ways` characters, in an order of its own.

    Attributes:
      support: ``(ways * shots, 28, 28, 1)``.
      support_labels: ``(ways * shots,)``, int32, 0 to ways.
      query: ``(ways * queries, 28, 28, 1)``: other drawings of the same characters.
      query_labels: likewise.
    """

    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray


def load_omniglot_small(data_dir: Path | None) -> Alphabets:
    """157 characters of 5 alphabets, 26 of one, and 59 of two.

    Raises:
      DataError: when the file is missing, altered or of another shape, or lacks an
        alphabet.
    """
    path = locate(data_dir, _FILE, _SOURCE)
    drawn, names = read_npz(path, ("x", "names")).values()
    if drawn.dtype != np.uint8 or drawn.shape[1:] != (DRAWINGS, _SIDE, _SIDE):
        raise damaged(
            path,
            f"x of shape {drawn.shape} and type {drawn.dtype}",
            f"bytes (characters, {DRAWINGS}, {_SIDE}, {_SIDE})",
        )
    if names.dtype.kind != "U" or names.shape != (len(drawn),):
        raise damaged(path, f"names of shape {names.shape}", f"{len(drawn)} names")
    alphabets = np.asarray([str(name).partition("/")[0] for name in names])
    return Alphabets(
        *(_part(path, drawn, alphabets, some) for some in (TRAIN, VALIDATION, TEST))
    )


def halved(characters: Characters) -> Characters:
    """Drawings of half the side: means of two by two pixels."""
    count, drawings, height, width, _ = characters.images.shape
    blocks = characters.images.reshape(count, drawings, height // 2, 2, width // 2, 2)
    return Characters(blocks.mean((3, 5))[..., None], characters.alphabets)


def with_rotations(characters: Characters) -> Characters:
    """Each character four times, turned by 0, 90, 180 and 270 degrees: so many more.

    Customary in training; a character and its turned self count as two.
    """
    turned = [np.rot90(characters.images, turns, axes=(2, 3)) for turns in range(4)]
    return Characters(np.concatenate(turned), np.tile(characters.alphabets, 4))


def stacked(drawn: Iterator[Episode], count: int) -> Episode:
    """The next `count` episodes as one, along a new first axis."""
    parts = zip(*(next(drawn) for _ in range(count)), strict=True)
    return Episode(*(np.stack(part) for part in parts))


def _part(
    path: Path, drawn: np.ndarray, alphabets: np.ndarray, wanted: Sequence[str]
) -> Characters:
    missing = sorted(set(wanted) - set(alphabets))
    if missing:
        raise damaged(path, f"no character of {', '.join(missing)}", _SOURCE)
    chosen = np.isin(alphabets, wanted)
    images = drawn[chosen][..., None].astype(np.float32) / 255
    return Characters(images, alphabets[chosen])


def episodes(
    characters: Characters,
    ways: int,
    shots: int,
    queries: int,
    rng: np.random.Generator,
) -> Iterator[Episode]:
    """Episodes without end: `ways` characters, `shots` drawings of each to learn from.

    Args:
      characters: of one part.
      ways: characters an episode, drawn from all alphabets of the part.
      shots: drawings of each that are labelled.
      queries: drawings of each that are asked for; none of them is a labelled one.
      rng: source of both.

    Raises:
      ValueError: when there are not as many characters or drawings.
    """
    if not 1 <= ways <= len(characters):
        raise ValueError(
            f"ways: got {ways}, expected 1 to {len(characters)}, the number of "
            "characters. Remedy: fewer."
        )
    drawings = characters.images.shape[1]
    if min(shots, queries) < 1 or shots + queries > drawings:
        raise ValueError(
            f"shots and queries: got {shots} and {queries}, expected one of each at "
            f"least and {drawings} drawings in all. Remedy: fewer."
        )
    return _episodes(characters.images, ways, shots, queries, rng)


def _episodes(
    images: np.ndarray, ways: int, shots: int, queries: int, rng: np.random.Generator
) -> Iterator[Episode]:
    count, drawings = images.shape[:2]
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
