"""How the layers of Flax NNX act through their kernels.

A layer type is one function and one entry of `RULES`.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx

from dsbp_optax._convolution import shifted_convolution
from dsbp_optax._types import Array
from dsbp_optax.capture.einsum import einsum_map
from dsbp_optax.capture.tap import LinearMap

#: ``layer -> LinearMap``, or None where this very layer cannot be tapped.
LayerRule: TypeAlias = Callable[[Any], LinearMap | None]


def _by_shadow(layer: Any, inputs: int, batch: int = 0, **others: Any) -> LinearMap:
    """The layer's own call on a stand-in whose kernel has any number of features."""
    call = getattr(type(layer), "__wrapped_type__", type(layer)).__call__

    def apply(x: Array, kernel: Array) -> Array:
        changes = {
            "kernel": nnx.Param(kernel),
            "bias": None,
            "use_bias": False,
            "dtype": kernel.dtype,
            "preferred_element_type": None,
            **others,
        }
        stand_in = types.SimpleNamespace(**{**vars(layer), **changes})
        return jnp.asarray(call(stand_in, x))

    return LinearMap(apply, inputs, batch)


def _linear(layer: Any) -> LinearMap:
    return _by_shadow(layer, 1)


def _linear_general(layer: Any) -> LinearMap:
    return _by_shadow(layer, len(layer.axis), len(layer.batch_axis))


def _conv(layer: Any) -> LinearMap | None:
    if layer.mask is not None or layer.feature_group_count != 1:
        return None
    spatial = len(layer.kernel_size)
    return _by_shadow(layer, spatial + 1, conv_general_dilated=shifted_convolution)


def _conv_transpose(layer: Any) -> LinearMap | None:
    if layer.mask is not None or layer.transpose_kernel:
        return None
    return _by_shadow(layer, len(layer.kernel_size) + 1)


def _einsum(layer: Any) -> LinearMap | None:
    return einsum_map(layer.einsum_str)


RULES: Mapping[type, LayerRule] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv_transpose,
    nnx.Einsum: _einsum,
}
