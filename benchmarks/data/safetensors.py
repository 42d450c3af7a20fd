"""The safetensors format, read by hand: a JSON header and raw arrays behind it."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.files import damaged

_LONGEST_HEADER = 10_000_000


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Name -> array, float32; arrays of other types are left out.

    Raises:
      DataError: when the file is cut short or its header is not valid.
    """
    content = path.read_bytes()
    try:
        (size,) = struct.unpack_from("<Q", content)
        if size > min(_LONGEST_HEADER, len(content) - 8):
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(content[8 : 8 + size])
        values = memoryview(content)[8 + size :]
        return {
            name: _array(values, entry)
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] == "F32"
        }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise damaged(path, f"no safetensors ({error})", "such a file") from error


def _array(values: memoryview, entry: dict[str, Any]) -> np.ndarray:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not 0 <= start <= end <= len(values) or end - start != 4 * math.prod(shape):
        raise ValueError(f"offsets {start} to {end} for shape {shape}")
    return np.frombuffer(values[start:end], "<f4").reshape(shape)
