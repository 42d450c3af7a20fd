"""Four small networks three times over: Linen, NNX, and by hand with all activations.

By hand means explicit matrix products, patches unfolded with NumPy's own windows, and
the input and output of every kernel returned as sample matrices ``(*batch, n, d)``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

Seen = dict[str, tuple[Any, Any]]  # parameter path -> (inputs, outputs)


class Network(NamedTuple):
    """One network in three forms."""

    linen: nn.Module
    nnx: Callable[[nnx.Rngs], nnx.Module]
    by_hand: Callable[[Any, Any], tuple[Any, Seen]]
    example: tuple[int, ...]  # shape of a batch
    paths: dict[str, str]  # Linen path -> NNX path


def rows(x: Any, axes: int = 1) -> Any:
    """Samples as rows: the last `axes` axes are flattened into one."""
    width = 1
    for n in x.shape[x.ndim - axes :]:
        width *= n
    return x.reshape(-1, width)


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(6, name="second")(jnp.tanh(nn.Dense(9, name="first")(x)))


class DenseNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(12, 9, rngs=rngs)
        self.second = nnx.Linear(9, 6, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(jnp.tanh(self.first(x)))


def dense_by_hand(p: Any, x: Any) -> tuple[Any, Seen]:
    a = x @ p["first"]["kernel"] + p["first"]["bias"]
    h = jnp.tanh(a)
    y = h @ p["second"]["kernel"] + p["second"]["bias"]
    seen = {"first/kernel": (rows(x), rows(a)), "second/kernel": (rows(h), rows(y))}
    return y, seen


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(nn.Conv(7, (3, 3), strides=2, name="first")(x))
        return nn.Conv(6, (2, 3), padding="VALID", name="second")(x)


class ConvNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 7, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(7, 6, (2, 3), padding="VALID", rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(jnp.tanh(self.first(x)))


def unfold(x: Any, size: tuple[int, int], stride: int, same: bool) -> Any:
    """Patches ``(batch, height, width, kh, kw, channel)``, zero-padded if `same`."""
    if same:
        pads = [(0, 0)]
        for n, k in zip(x.shape[1:3], size, strict=True):
            total = max((-(-n // stride) - 1) * stride + k - n, 0)
            pads.append((total // 2, total - total // 2))
        x = jnp.pad(x, [*pads, (0, 0)])
    high = (x.shape[1] - size[0]) // stride + 1
    wide = (x.shape[2] - size[1]) // stride + 1
    return jnp.stack(
        [
            jnp.stack(
                [
                    x[:, i : i + high * stride : stride, j : j + wide * stride : stride]
                    for j in range(size[1])
                ],
                axis=3,
            )
            for i in range(size[0])
        ],
        axis=3,
    )


def conv_by_hand(p: Any, x: Any) -> tuple[Any, Seen]:
    first = unfold(x, (3, 3), 2, same=True)
    a = jnp.einsum("bhwijc,ijco->bhwo", first, p["first"]["kernel"])
    a = a + p["first"]["bias"]
    second = unfold(jnp.tanh(a), (2, 3), 1, same=False)
    y = jnp.einsum("bhwijc,ijco->bhwo", second, p["second"]["kernel"])
    y = y + p["second"]["bias"]
    seen = {
        "first/kernel": (rows(first, 3), rows(a)),
        "second/kernel": (rows(second, 3), rows(y)),
    }
    return y, seen


class AttentionNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.MultiHeadDotProductAttention(2, name="attn")(x)


class AttentionNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.attn(x)


def attention_by_hand(p: Any, x: Any) -> tuple[Any, Seen]:
    p, seen, split = p["attn"], {}, {}
    for name in ("query", "key", "value"):
        out = jnp.einsum("bte,ehd->bthd", x, p[name]["kernel"]) + p[name]["bias"]
        split[name] = out
        seen[f"attn/{name}/kernel"] = (rows(x), rows(out, 2))
    scores = jnp.einsum("bqhd,bkhd->bhqk", split["query"], split["key"]) / 2.0
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), split["value"])
    y = jnp.einsum("bqhd,hde->bqe", mixed, p["out"]["kernel"]) + p["out"]["bias"]
    seen["attn/out/kernel"] = (rows(mixed, 2), rows(y))
    return y, seen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
        return jnp.tanh(nn.Dense(8, name="dense")(x)), None


class ScanNet(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="blocks")(x, None)[0]


class ScanNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: nnx.Linear, x: Any) -> Any:
            return jnp.tanh(layer(x))

        return run(self.blocks, x)


def scan_by_hand(p: Any, x: Any) -> tuple[Any, Seen]:
    p, inputs, outputs = p["blocks"]["dense"], [], []
    for kernel, bias in zip(p["kernel"], p["bias"], strict=True):
        inputs.append(x)
        outputs.append(x @ kernel + bias)
        x = jnp.tanh(outputs[-1])
    seen = {"blocks/dense/kernel": (jnp.stack(inputs), jnp.stack(outputs))}
    return x, seen


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


NETWORKS = {
    "dense": Network(
        DenseNet(), DenseNnx, dense_by_hand, (40, 12), same("first", "second")
    ),
    "conv": Network(
        ConvNet(), ConvNnx, conv_by_hand, (6, 7, 8, 3), same("first", "second")
    ),
    "attention": Network(
        AttentionNet(),
        AttentionNnx,
        attention_by_hand,
        (6, 7, 8),
        same("attn/query", "attn/key", "attn/value", "attn/out"),
    ),
    "scan": Network(
        ScanNet(), ScanNnx, scan_by_hand, (40, 8), {"blocks/dense": "blocks"}
    ),
}


def batch(network: Network, seed: int, dtype: Any = jnp.float32) -> Any:
    """Inputs with a decaying spectrum and a mean, so that eigenvalues are apart."""
    dtype = jnp.dtype(jnp.float64 if dtype is None else dtype)
    return _batch(jax.random.key(seed), network.example, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _batch(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    x = jax.random.normal(key, shape, dtype)
    decay = 1.6 ** -jnp.arange(shape[-1], dtype=x.dtype)
    return x * decay * 3 + 0.3


def init(network: Network, dtype: Any = jnp.float32) -> Any:
    """Linen parameters, the biases not zero."""
    return _init(network.linen, batch(network, 0), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(model: nn.Module, x: Any, dtype: Any) -> Any:
    params = model.init(jax.random.key(0), x)["params"]
    return jax.tree.map(lambda p: (p + 0.01).astype(dtype), params)
