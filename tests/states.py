"""What tests say to optimizers and read out of their states, in few words."""

import dataclasses
from typing import Any

import dsbp_optax
from dsbp_optax.core.layout import to_kernel_form
from dsbp_optax.core.state import wide_basis

_OF_THE_BASIS = {field.name for field in dataclasses.fields(dsbp_optax.Basis)}


def with_basis(**keywords: Any) -> dict[str, Any]:
    """Keywords of a transformation, the fields of `Basis` among them as one ``basis``.

    Those are told apart by their names; ``dtype`` is the bases' own.
    """
    own = {name: x for name, x in keywords.items() if name in _OF_THE_BASIS}
    rest = {name: x for name, x in keywords.items() if name not in own}
    return {**rest, "basis": dsbp_optax.Basis(**own)}


def layer(opt_state: Any, path: str) -> dsbp_optax.Layer:
    """What a state holds of one kernel."""
    return dsbp_optax.by_path(opt_state)[path]


def basis_of(opt_state: Any, path: str) -> Any:
    """The basis of a kernel in kernel form, as sketches have it."""
    one = layer(opt_state, path)
    return to_kernel_form(wide_basis(one), one.kernel.view)


def owners(opt_state: Any) -> set[str]:
    """Paths of the kernels that keep a basis: their own, or for others too."""
    layers = dsbp_optax.by_path(opt_state)
    return {
        path
        for path, one in layers.items()
        if one.kernel.rank and one.kernel.owner == one.kernel.path
    }
