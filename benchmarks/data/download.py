"""One file of the web: resumed where it stopped, kept only if its checksum is right.

Bytes go to ``<file>.part``; a part that is there already is continued by a range
request. The file gets its name once it is whole and verified.
"""

import hashlib
import http.client
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data.files import DataError
from benchmarks.data.registries import Registries, open_address

_BLOCK = 1 << 16
#: Attempts, and seconds before the second; twice as many before each further one.
_ATTEMPTS, _PAUSE = 4, 0.5

#: Told how many bytes there are so far, and how many there will be, if that is known.
Progress = Callable[[int, int | None], None]


def download(
    address: str,
    path: Path,
    sha256: str,
    registries: Registries,
    after_block: Progress = lambda done, total: None,
) -> None:
    """Write `path`.

    Args:
      address: of the file.
      path: where to.
      sha256: of the whole file, hexadecimal.
      registries: whose certificates are trusted.
      after_block: called as bytes arrive.

    Raises:
      DataError: when the connection breaks too often (the part is kept), or the file
        is not the one expected (the part is removed).
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        try:
            _continue(address, part, registries, after_block)
            break
        except (OSError, http.client.HTTPException, ValueError) as error:
            if attempt == _ATTEMPTS - 1 or _final(error):
                size = part.stat().st_size if part.exists() else 0
                raise DataError(
                    f"{address}: got '{error}' after {size} bytes, expected the whole "
                    "file. Remedy: this command again; it goes on from there."
                ) from error
            time.sleep(_PAUSE * 2**attempt)
    verify(part, sha256, address)
    part.replace(path)


def verify(path: Path, sha256: str, source: str) -> None:
    """Remove a file that is not the expected one, and say so.

    Raises:
      DataError: when it is not.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        path.unlink()
        raise DataError(
            f"{source}: got a file with SHA-256 {digest}, expected {sha256}; {path} is "
            "removed. Remedy: this command again; should it fail again, the source has "
            "another file under this name."
        )


def _final(error: Exception) -> bool:
    """Whether asking once more is in vain."""
    refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
    return refused or isinstance(error, ValueError)


def _continue(
    address: str, part: Path, registries: Registries, after_block: Progress
) -> None:
    """Fetch what the part lacks."""
    size = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={size}-"} if size else {}
    try:
        response = open_address(address, registries, **headers)
    except urllib.error.HTTPError as error:
        if not size or error.code != 416:
            raise
        error.close()
        return  # Nothing is beyond the part: whole already, or not of this file.
    with response, part.open("ab" if size else "wb") as file:
        if size and not _continues(response, size):
            size = 0
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = None if length is None else size + int(length)
        _copy(response, file, size, total, after_block)


def _continues(response: Any, size: int) -> bool:
    """Whether the server sends what comes after `size` bytes, not the whole again."""
    found = str(response.headers.get("Content-Range"))
    return bool(response.status == 206) and found.startswith(f"bytes {size}-")


def _copy(
    response: Any, file: Any, size: int, total: int | None, after_block: Progress
) -> None:
    after_block(size, total)
    while block := response.read(_BLOCK):
        file.write(block)
        size += len(block)
        after_block(size, total)
    if total is not None and size < total:
        raise OSError(f"the connection closed at byte {size} of {total}")
