"""Data sets: read from files or embedded, never fetched, never unpickled."""

from benchmarks.data.digits import load_digits
from benchmarks.data.fashion_mnist import load_fashion_mnist
from benchmarks.data.idx import DataError, read_idx
from benchmarks.data.split import Split, batches

__all__ = [
    "DataError",
    "Split",
    "batches",
    "load_digits",
    "load_fashion_mnist",
    "read_idx",
]
