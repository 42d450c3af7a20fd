"""How the layers of Flax NNX act through their kernels.

A layer type is one function and one entry of `RULES`.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx

from dsbp_optax.capture.einsum import einsum_map
from dsbp_optax.capture.tap import LinearMap, hash_of
from dsbp_optax.linalg.convolution import shifted_convolution
from dsbp_optax.linalg.types import Array

#: ``layer -> LinearMap``, or None where this very layer cannot be tapped.
LayerRule: TypeAlias = Callable[[Any], LinearMap | None]


@dataclasses.dataclass(frozen=True)
class _Shadow:
    """A layer's own call on a stand-in whose kernel has any number of features.

    Equal for layers with the same settings, which are traced once.
    """

    call: Callable[..., Any]
    settings: Mapping[str, Any]

    def __call__(self, x: Array, kernel: Array) -> Array:
        mine = {"kernel": nnx.Param(kernel), "dtype": kernel.dtype}
        stand_in = types.SimpleNamespace(**{**self.settings, **mine})
        return jnp.asarray(self.call(stand_in, x))

    def __hash__(self) -> int:
        return hash_of(self, self.call, *sorted(self.settings.items()))


def _by_shadow(layer: Any, inputs: int, batch: int = 0, **others: Any) -> LinearMap:
    call = getattr(type(layer), "__wrapped_type__", type(layer)).__call__
    settings = {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith("_") and not isinstance(value, nnx.Variable)
    }
    settings |= {"bias": None, "use_bias": False, "preferred_element_type": None}
    return LinearMap(_Shadow(call, {**settings, **others}), inputs, batch)


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
