"""Shared fixtures; one device, no accelerator, so that numbers repeat.

Most tests compile much and run little: XLA leaves its optimizations out, here and in
the processes that tests start, and has the older of its two emitters of fusions, which
compile in less than half the time.
"""

import os
from importlib import metadata

import pytest
from packaging.version import Version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ.setdefault(_QUICK, "1")
_FLAGS = "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=0"
if Version(metadata.version("jaxlib")) < Version("0.11.1"):  # ends at unknown flags
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)


@pytest.fixture(scope="module")
def optimized():
    """XLA's optimizations, for numbers that count; in new processes, all its defaults.

    The flags of a process that runs cannot be changed.
    """
    import jax

    name = _QUICK.lower()
    before = jax.config.read(name)
    jax.config.update(name, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_QUICK, "0")
        if os.environ["XLA_FLAGS"] == _FLAGS:
            patch.delenv("XLA_FLAGS")
        yield
    jax.config.update(name, before)
