"""Studies: one question a file, with its command and the records it leaves.

A new study is a new file here that adds a command to `app`; it is found by itself.
"""

import importlib
import pkgutil

from benchmarks.cli import app

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
importlib.import_module("benchmarks.report.page")  # It shows what studies know.

__all__ = ["app"]
