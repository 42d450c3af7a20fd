"""What has moved between the supported versions of JAX."""

from typing import Any

import jax


def x64(on: bool = True) -> Any:
    """The context manager that turns float64 on."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64

    return enable_x64(on)
