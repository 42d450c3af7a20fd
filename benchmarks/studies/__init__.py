"""Studies: one question a file, with its command and the records it leaves.

A new study is a new file here that adds a command to `app`; it is found by itself.
"""

import importlib
import pkgutil
from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    """`app` with all commands, once it is asked for: `accelerator` goes without it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from benchmarks.cli import app

    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    importlib.import_module("benchmarks.report.page")  # It shows what studies know.
    return app
