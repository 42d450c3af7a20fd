"""NumPy's .npz archives, read without pickle."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.data.files import DataError, damaged

#: What a file raises that is no archive, or whose bytes were changed.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,  # Flags or a version that stand for encryption or later formats.
    TypeError,  # A lone .npy: an array is no context.
)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays, whole.

    Raises:
      DataError: when the file is no archive, cut short or altered, lacks an array, or
        holds Python objects.
    """
    wanted = f"an .npz archive of {', '.join(names)}"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise damaged(path, f"no array {', '.join(missing)}", wanted)
            return {name: archive[name] for name in names}
    except DataError:
        raise
    except ValueError as error:
        raise damaged(path, f"what is no plain array ({error})", wanted) from error
    except (*_BROKEN, OSError, EOFError) as error:
        raise damaged(path, f"no intact archive ({error})", wanted) from error
