"""How the layers of Flax Linen act through their kernels.

A layer type is one function and one entry of `RULES`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import recurrent

from dsbp_optax.capture.einsum import einsum_map
from dsbp_optax.capture.tap import LinearMap, hash_of
from dsbp_optax.linalg.convolution import shifted_convolution
from dsbp_optax.linalg.types import Array

#: ``layer -> LinearMap``, or None where this very layer cannot be tapped.
LayerRule: TypeAlias = Callable[[Any], LinearMap | None]
#: The name of copies of a layer, which nobody observes.
DETACHED = "dsbp_detached"


@dataclasses.dataclass(frozen=True)
class _Clone:
    """The layer's own map for any number of features, without bias or mask.

    Equal for layers with the same settings, which are traced once.
    """

    layer: Any

    def __call__(self, x: Array, kernel: Array) -> Array:
        layer = self.layer.clone(
            features=kernel.shape[-1], dtype=kernel.dtype, param_dtype=kernel.dtype
        )
        return jnp.asarray(layer.apply({"params": {"kernel": kernel}}, x))

    def __hash__(self) -> int:
        return hash_of(self, self.layer)


def _by_clone(module: Any, inputs: int, batch: int = 0, **changes: Any) -> LinearMap:
    layer = module.clone(
        parent=None, name=DETACHED, features=1, use_bias=False, **changes
    )
    return LinearMap(_Clone(layer), inputs, batch)


def _dense(module: Any) -> LinearMap:
    return _by_clone(module, 1)


def _dense_general(module: Any) -> LinearMap:
    axes = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
    return _by_clone(module, len(axes), len(module.batch_dims))


def _conv(module: Any) -> LinearMap | None:
    size = module.kernel_size
    spatial = 1 if isinstance(size, int) else len(size)
    if module.mask is not None or module.feature_group_count != 1:
        return None
    return _by_clone(module, spatial + 1, conv_general_dilated_cls=_shifted)


def _shifted() -> Any:
    return shifted_convolution


def _conv_transpose(module: Any) -> LinearMap | None:
    if module.mask is not None or module.transpose_kernel:
        return None
    size = module.kernel_size
    return _by_clone(module, (1 if isinstance(size, int) else len(size)) + 1)


def _einsum(module: Any) -> LinearMap | None:
    return None if module.einsum_str is None else einsum_map(module.einsum_str)


def _dense_params(module: Any) -> LinearMap:
    """Of `nn.OptimizedLSTMCell`, which multiplies all its kernels at once."""
    del module
    return LinearMap(jnp.matmul, 1, gives_kernel=True)


#: Layers that rewrite all parameters of the layer in them: no rider gets through.
REWRITERS = (nn.WeightNorm, nn.SpectralNorm)
RULES: Mapping[type, LayerRule] = {
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Conv: _conv,
    nn.ConvTranspose: _conv_transpose,
    nn.Einsum: _einsum,
    recurrent.DenseParams: _dense_params,
}
