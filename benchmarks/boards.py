"""What the scoreboard trains: models, lengths, corpora and the parts of the data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import models
from benchmarks.data import DataError, load_fashion_mnist, shakespeare, sotu
from benchmarks.sweep import Part, Task

#: Shares of a text at which its validation and its test part begin.
_ENDS = (0.9, 0.95)
#: Arrays are padded to multiples of these, so that corpora share a program.
_TRAIN, _HELD = 2**24, 2**20


@dataclass(frozen=True)
class Board:
    """One workload of the scoreboard.

    Attributes:
      name: as typed on the command line, and that of its file of records.
      task: what is trained.
      steps: length of each run.
      corpus: "shakespeare", "sotu" or "fashion_mnist".
      judge: "loss" or "error": what chooses settings and makes the table.
      runs: most runs at once, where memory is short.
      brief: whether the two rates alone are tuned, without weight decay.
    """

    name: str
    task: Task
    steps: int
    corpus: str = "shakespeare"
    judge: str = "loss"
    runs: int = 16
    brief: bool = False


def _gpt(
    name: str,
    batch: int,
    steps: int = 600,
    corpus: str = "shakespeare",
    runs: int = 16,
    brief: bool = True,
    **model: int,
) -> Board:
    gpt = models.Gpt(**model)
    task = Task(gpt, batch, gpt.context, 1.0)
    return Board(name, task, steps, corpus, runs=runs, brief=brief)


#: The most telling first.
BOARDS: Mapping[str, Board] = {
    board.name: board
    for board in (
        _gpt("gpt_d128_b24", 24, brief=False),
        _gpt("sotu_d128_b24", 24, corpus="sotu"),
        _gpt("gpt_d128_b24_long", 24, steps=2400),
        _gpt("gpt_d128_b96", 96),
        _gpt("gpt_wide", 24, width=256, layers=6, heads=8, context=128),
        _gpt("gpt_d256_b24", 24, width=256, heads=8),
        _gpt("gpt_d128_b384", 384, runs=8),
        _gpt("gpt_d256_b96", 96, width=256, heads=8),
        _gpt("gpt_d128_b8", 8),
        _gpt("gpt_d256_b8", 8, width=256, heads=8),
        _gpt("gpt_d256_b384", 384, width=256, heads=8, runs=4),
        Board(
            "fashion_cnn",
            Task(models.FashionCnn(), 128, windows=4992, mapped=True),
            2150,
            "fashion_mnist",
            "error",
        ),
    )
}


def dry(board: Board) -> Board:
    """The same with tiny sizes, for tests."""
    model, sizes = models.Gpt(width=16, layers=1, heads=2, context=8), {"context": 8}
    if not board.task.context:
        model, sizes = models.DigitsCnn(), {}
    small = {"batch": 4, "windows": 16, "chunk": 2, **sizes}
    task = dataclasses.replace(board.task, model=model, **small)
    return dataclasses.replace(board, task=task, steps=24)


def load(corpus: str, folder: Path | None) -> tuple[Part, ...]:
    """Training, validation and test part, as arrays of the host.

    Args:
      corpus: as in `Board`.
      folder: holds ``shakespeare.txt`` and ``sotu.txt``, or the files that the loaders
        of `benchmarks.data` look for.

    Raises:
      DataError: where they are missing.
    """
    if corpus == "fashion_mnist":
        found = load_fashion_mnist(folder)
        return tuple(
            Part(np.round(255 * x).astype(np.uint8), y, np.int32(len(y)))
            for x, y in (found.train, found.validation, found.test)
        )
    tokens = sotu.encode(_text(corpus, folder)).astype(np.uint8)
    ends = [int(share * len(tokens)) for share in _ENDS]
    parts = np.split(tokens, ends)
    return tuple(
        padded(part, size)
        for part, size in zip(parts, (_TRAIN, _HELD, _HELD), strict=True)
    )


def random_parts(task: Task) -> tuple[Part, ...]:
    """Random data of the right shapes."""
    rng = np.random.default_rng(0)
    if task.context:
        tokens = rng.integers(0, 65, (3, 512), np.uint8)
        return tuple(Part(each, (), np.int32(len(each))) for each in tokens)
    images = rng.integers(0, 256, (3, 64, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 10, (3, 64), np.int32)
    return tuple(Part(*each, np.int32(64)) for each in zip(images, labels, strict=True))


def padded(tokens: np.ndarray, size: int) -> Part:
    """A part of text, filled with zeros that do not count."""
    length = len(tokens)
    return Part(np.pad(tokens, (0, -length % size)), (), np.int32(length))


def _text(corpus: str, folder: Path | None) -> str:
    path = None if folder is None else folder / f"{corpus}.txt"
    if path is not None and path.exists():
        return path.read_text(encoding="utf-8")
    if corpus == "shakespeare":
        return shakespeare.locate_text(folder).read_text(encoding="utf-8")
    addresses = sorted(sotu.locate_texts(folder).glob("*.txt"))
    if not addresses:
        raise DataError(f"{folder}: got no address, expected {corpus}.txt.")
    return "\n".join(path.read_text(encoding="utf-8") for path in addresses)
