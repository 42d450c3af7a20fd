"""PNG files in 8-bit RGB, read with numpy alone."""

import struct
import zlib
from pathlib import Path

import numpy as np

_SIGNATURE, _RGB = b"\x89PNG\r\n\x1a\n", (8, 2, 0, 0, 0)


def read_rgb(path: Path) -> np.ndarray:
    """``(height, width, 3)`` bytes; interlaced files are refused.

    Each pixel was stored as its difference from a guess, which its neighbours on the
    left and above give. Pixels of one diagonal do not depend on each other.
    """
    content = path.read_bytes()
    if not content.startswith(_SIGNATURE):
        raise ValueError("no PNG")
    place, packed, head = len(_SIGNATURE), [], b""
    while place < len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place + 8 : place + 8 + size]
        packed += [chunk] * (kind == b"IDAT")
        head, place = head or chunk, place + size + 12
    width, height, *form = struct.unpack(">II5B", head)
    if tuple(form) != _RGB:
        raise ValueError(f"depth, colours and form {form}")
    rows = np.frombuffer(zlib.decompress(b"".join(packed)), np.uint8)
    rows = rows.reshape(height, 1 + 3 * width)
    kinds = rows[:, 0]
    # Of row y and column x, at [x + y + 2, y + 1]: a diagonal is a row here.
    skewed = np.zeros((height + width + 1, height + 1, 3), np.int16)
    numbers = np.arange(height)
    places = numbers[:, None] + np.arange(width) + 2, numbers[:, None] + 1
    skewed[places] = rows[:, 1:].reshape(height, width, 3)
    for diagonal in range(2, len(skewed)):
        low, high = max(0, diagonal - 1 - width), min(height, diagonal - 1)
        kind = kinds[low:high, None]
        left = skewed[diagonal - 1, low + 1 : high + 1]
        above = skewed[diagonal - 1, low:high]
        corner = skewed[diagonal - 2, low:high]
        to_left, to_above = np.abs(above - corner), np.abs(left - corner)
        to_corner = np.abs(left + above - 2 * corner)
        nearest = np.where(to_above <= to_corner, above, corner)
        first = (to_left <= to_above) & (to_left <= to_corner)
        paeth = np.where(first, left, nearest)
        guesses = 0 * left, left, above, (left + above) // 2, paeth
        found = skewed[diagonal, low + 1 : high + 1]
        found += np.choose(kind, guesses)
        found &= 255
    return skewed[places].astype(np.uint8)
