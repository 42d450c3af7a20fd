"""Finding data files below the folder that the user names."""

from pathlib import Path

_DEPTH = 3


class DataError(ValueError):
    """A data file that is missing, truncated or altered; says which and what to do."""


def locate(data_dir: Path | None, name: str, source: str) -> Path:
    """A file or folder: ``data_dir/name``, or up to three folders further down.

    Args:
      data_dir: what the user passed as ``--data-dir``.
      name: relative path, as in the published package.
      source: where it can be had, for the message.

    Raises:
      DataError: when no folder was given or nothing of that name lies in it.
    """
    if data_dir is None:
        raise DataError(
            f"{name}: got no folder, expected one that holds {source}. Remedy: pass "
            "--data-dir DIR."
        )
    for depth in range(_DEPTH + 1):
        found = sorted(data_dir.glob("*/" * depth + name))
        if found:
            return found[0]
    raise DataError(
        f"{data_dir / name}: got no such file, expected {source}. Remedy: "
        "`python -m benchmarks fetch --list` says how to get it; then point "
        "--data-dir at the folder."
    )


def damaged(path: Path, got: str, expected: str) -> DataError:
    """The error of a file that is there but not what it should be."""
    return DataError(
        f"{path}: got {got}, expected {expected}. Remedy: get the file again from its "
        "source; it must not be edited."
    )
