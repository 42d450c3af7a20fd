"""The IDX format of the MNIST family, read by hand from gzip files.

Layout: two zero bytes, one byte of type (8: unsigned bytes), one byte of rank, the
sizes as big-endian 32-bit integers, the values.
"""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from benchmarks.data.files import DataError, damaged

_UNSIGNED_BYTE = 0x08


def read_idx(
    path: Path, shape: tuple[int, ...] | None = None, sha256: str | None = None
) -> np.ndarray:
    """The array in one gzip-compressed IDX file of unsigned bytes.

    Args:
      path: the file.
      shape: the shape it must have; None for whatever its header says.
      sha256: hexadecimal digest of the uncompressed bytes; None for no check.

    Returns:
      A read-only array, uint8.

    Raises:
      DataError: naming the path, what was found, what was expected, and a remedy.
    """
    content = _decompress(path)
    found = _shape_of(path, content)
    if shape is not None and found != shape:
        raise damaged(path, f"an array of shape {found}", f"{shape}")
    header = 4 + 4 * len(found)
    expected = header + int(np.prod(found, dtype=np.int64))
    if len(content) != expected:
        raise damaged(
            path,
            f"{len(content)} bytes (uncompressed)",
            f"{expected}, from its header {found}",
        )
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise damaged(path, f"content with SHA-256 {digest}", sha256)
    return np.frombuffer(content, np.uint8, offset=header).reshape(found)


def _decompress(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(
            f"{path}: got no such file, expected a gzip-compressed IDX file. Remedy: "
            "point --data-dir at the folder that holds it under this very name."
        )
    try:
        with gzip.open(path, "rb") as file:
            return file.read()
    except EOFError as error:
        raise damaged(path, "a gzip stream that ends early", "a whole file") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, f"damaged gzip data ({error})", "intact gzip") from error


def _shape_of(path: Path, content: bytes) -> tuple[int, ...]:
    wanted = f"00 00 {_UNSIGNED_BYTE:02x} and the rank (IDX of unsigned bytes)"
    if len(content) < 4:
        raise damaged(path, f"{len(content)} bytes (uncompressed)", wanted)
    zeros, kind, rank = struct.unpack(">HBB", content[:4])
    if zeros != 0 or kind != _UNSIGNED_BYTE or rank == 0:
        raise damaged(path, f"leading bytes {content[:4].hex(' ')}", wanted)
    if len(content) < 4 + 4 * rank:
        raise damaged(path, "a header cut short", f"{rank} sizes of 4 bytes")
    return struct.unpack_from(f">{rank}I", content, 4)
