"""Data sets: read from files or embedded, never fetched, never unpickled."""

from benchmarks.data.cifar10 import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    augmented,
    load_cifar10,
)
from benchmarks.data.digits import load_digits
from benchmarks.data.fashion_mnist import load_fashion_mnist
from benchmarks.data.files import DataError
from benchmarks.data.idx import read_idx
from benchmarks.data.mail import load_mail
from benchmarks.data.shakespeare import load_shakespeare
from benchmarks.data.split import Batch, Data, Samples, drawn, hold_out, shuffled

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "Batch",
    "Data",
    "DataError",
    "Samples",
    "augmented",
    "drawn",
    "hold_out",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "load_mail",
    "load_shakespeare",
    "read_idx",
    "shuffled",
]
