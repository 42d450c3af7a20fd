"""BERT's uncased WordPiece tokenizer: clean, split into words, longest match first."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.data.files import damaged

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_LONGEST_WORD = 100
_CJK = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))

Vocabulary = Mapping[str, int]


def read_vocabulary(path: Path) -> dict[str, int]:
    """Piece -> number, one piece a line.

    Raises:
      DataError: when the special pieces are missing.
    """
    pieces = path.read_text(encoding="utf-8").splitlines()
    missing = [piece for piece in (PAD, UNKNOWN, START, END) if piece not in pieces]
    if missing:
        raise damaged(path, f"no {', '.join(missing)}", "a WordPiece vocabulary")
    return {piece: number for number, piece in enumerate(pieces)}


def encode(texts: Sequence[str], vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Numbers ``(n, length)``, int32: start, pieces, end, then padding."""
    encoded = np.full((len(texts), length), vocabulary[PAD], np.int32)
    for row, text in zip(encoded, texts, strict=True):
        pieces = [START]
        for word in words(text):
            if len(pieces) >= length - 1:
                break
            pieces += _pieces(word, vocabulary)
        pieces = [*pieces[: length - 1], END]
        row[: len(pieces)] = [vocabulary[piece] for piece in pieces]
    return encoded


def words(text: str) -> Iterator[str]:
    """Lower-case words without accents; punctuation and Chinese stand alone."""
    text = unicodedata.normalize("NFD", text.lower())
    word = ""
    for char in text:
        category = unicodedata.category(char)
        if category == "Mn" or (category[0] == "C" and not char.isspace()):
            continue
        if char.isspace() or _alone(char, category):
            if word:
                yield word
            word = ""
            if not char.isspace():
                yield char
        else:
            word += char
    if word:
        yield word


def _alone(char: str, category: str) -> bool:
    if category[0] == "P" or (char.isascii() and category[0] == "S"):
        return True
    return any(low <= ord(char) <= high for low, high in _CJK)


def _pieces(word: str, vocabulary: Vocabulary) -> list[str]:
    if len(word) > _LONGEST_WORD:
        return [UNKNOWN]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(len(word), start, -1):
            if prefix + word[start:end] in vocabulary:
                break
        else:
            return [UNKNOWN]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces
