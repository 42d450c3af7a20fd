"""Shared fixtures; one device, no accelerator, so that numbers repeat.

Most tests compile much and run little: XLA leaves its optimizations out, here and in
the processes that tests start.
"""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ.setdefault(_QUICK, "1")


@pytest.fixture(scope="module")
def optimized():
    """XLA as users have it: for numbers that count, and programs that are read."""
    import jax

    name = _QUICK.lower()
    before = jax.config.read(name)
    jax.config.update(name, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_QUICK, "0")
        yield
    jax.config.update(name, before)
