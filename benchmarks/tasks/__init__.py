"""Tasks: model, data and workload together, a file for each kind.

A new kind is a new file here with a table `WORKLOADS`; it is found by itself.
"""

import importlib
import pkgutil

from benchmarks.tasks.base import Workload

WORKLOADS: dict[str, Workload] = {}
for _module in pkgutil.iter_modules(__path__):
    _found = importlib.import_module(f"{__name__}.{_module.name}")
    WORKLOADS |= getattr(_found, "WORKLOADS", {})
