"""Data sets: read from files or embedded, never unpickled; fetched on demand alone."""

from benchmarks.data.cifar10 import CIFAR10_MEAN, CIFAR10_STD, load_cifar10
from benchmarks.data.digits import load_digits
from benchmarks.data.fashion_mnist import load_fashion_mnist
from benchmarks.data.files import DataError
from benchmarks.data.idx import read_idx
from benchmarks.data.images import augmented
from benchmarks.data.mail import load_mail
from benchmarks.data.medmnist import PNEUMONIA_COUNTS, load_medmnist
from benchmarks.data.npz import read_npz
from benchmarks.data.omniglot import (
    Alphabets,
    Characters,
    Episode,
    episodes,
    halved,
    load_omniglot_small,
    stacked,
    with_rotations,
)
from benchmarks.data.shakespeare import load_shakespeare
from benchmarks.data.sotu import load_sotu
from benchmarks.data.split import Batch, Data, Samples, drawn, hold_out, shuffled
from benchmarks.data.tiny_imagenet import (
    TINY_IMAGENET_CLASSES,
    TINY_IMAGENET_MEAN,
    TINY_IMAGENET_STD,
    load_tiny_imagenet,
)

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "PNEUMONIA_COUNTS",
    "TINY_IMAGENET_CLASSES",
    "TINY_IMAGENET_MEAN",
    "TINY_IMAGENET_STD",
    "Alphabets",
    "Batch",
    "Characters",
    "Data",
    "DataError",
    "Episode",
    "Samples",
    "augmented",
    "drawn",
    "episodes",
    "halved",
    "hold_out",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "load_mail",
    "load_medmnist",
    "load_omniglot_small",
    "load_shakespeare",
    "load_sotu",
    "load_tiny_imagenet",
    "read_idx",
    "read_npz",
    "shuffled",
    "stacked",
    "with_rotations",
]
