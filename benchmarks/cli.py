"""The command line; `python -m benchmarks --help` lists what there is."""

from benchmarks.commands import (
    data,
    finetuning,
    minima,
    rules,
    scale,
    tasks,
    training,
)
from benchmarks.commands.shared import app

__all__ = [
    "app",
    "data",
    "finetuning",
    "minima",
    "rules",
    "scale",
    "tasks",
    "training",
]
