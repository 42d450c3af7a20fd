"""Which parameters count as kernels, and how much state belongs to them."""

import re
from typing import Any

import jax

from dsbp_optax.core import state
from dsbp_optax.diagnostics import state_bytes

_OTHERS = re.compile("embed|head")


def path_of(keys: Any) -> str:
    """A key path as ``a/b/c``."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_kernel(path: str, parameter: Any) -> bool:
    """Whether this is a dense or convolution kernel, no embedding and no head of text.

    Muon orthogonalises these and GaLore projects them; the rest gets Adam.
    """
    return parameter.ndim >= 2 and not _OTHERS.search(path)


def map_kernels(function: Any, params: Any) -> Any:
    """`function` of each kernel, None in the place of other parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function(leaf) if is_kernel(path_of(keys), leaf) else None,
        params,
    )


def kernel_bytes(opt_state: Any, params: Any) -> int:
    """Bytes of the leaves of the state whose path holds that of a kernel.

    The set is the same for every optimizer, whether it projects them all or not. Of an
    array in which kernels alike lie, the part that is theirs.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [path_of(keys) for keys, leaf in leaves if is_kernel(path_of(keys), leaf)]
    parts = []

    def taken_apart(one: state.SpectralState) -> state.SpectralState:
        for layer in state.by_path(one._replace(fallback=())).values():
            path, owner, basis = layer.kernel.path, layer.kernel.owner, ()
            if owner == path:
                basis = layer.basis, layer.spectrum
            if path in paths:
                parts.append((basis, layer.inner))
        return one._replace(basis={}, spectrum={}, inner={})

    rest = state.map_states(taken_apart, opt_state)
    return state_bytes(parts) + sum(
        leaf.nbytes
        for keys, leaf in jax.tree_util.tree_leaves_with_path(rest)
        if any(f"/{path}/" in f"/{path_of(keys)}/" for path in paths)
    )
