"""All that this package touches of Flax Linen's private parts.

A scope keeps its collections in ``_variables``; flax has no public way to replace one
of them for a single ``apply``. Holds for flax 0.11.2 to 0.12.12.
"""

from typing import Any


def parameters(scope: Any) -> Any:
    """The ``params`` collection of a scope, as its modules will read it."""
    return scope._variables.get("params") or {}


def set_parameters(scope: Any, params: Any) -> None:
    """Replace it for what is still to come in this ``apply``; the user's tree stays."""
    scope._variables["params"] = params
