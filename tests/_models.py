"""A small problem and one table of the transformations, for the contract tests."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from dsbp_optax import Activations, Basis, Sketch
from dsbp_optax.core.state import find_states

KERNELS = ("first/kernel", "second/kernel")
TABLE, WIDTH, HIDDEN, OUT = 5, 16, 12, 8


class Batch(NamedTuple):
    """Token ids ``(n,)`` and targets ``(n, out)``."""

    ids: Any
    targets: Any


def make_params(dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """Two kernels that are worth a projection, their biases, an embedding."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    return {
        "embed": {"embedding": draw(TABLE, WIDTH) * 3},
        "first": {"kernel": draw(WIDTH, HIDDEN), "bias": draw(HIDDEN)},
        "second": {"kernel": draw(HIDDEN, OUT), "bias": draw(OUT)},
    }


def make_batch(seed: int, n: int = 24, dtype: Any = jnp.float32) -> Batch:
    rng = np.random.default_rng(1000 + seed)
    ids, targets = rng.integers(0, TABLE, n), rng.normal(size=(n, OUT))
    return Batch(jnp.asarray(ids, jnp.int32), jnp.asarray(targets, dtype))


def forward(params: Any, batch: Batch) -> dict[str, Any]:
    """What enters and leaves each layer."""
    x = params["embed"]["embedding"][batch.ids]
    h = x @ params["first"]["kernel"] + params["first"]["bias"]
    a = jnp.tanh(h)
    y = a @ params["second"]["kernel"] + params["second"]["bias"]
    return {
        "input": {KERNELS[0]: x, KERNELS[1]: a},
        "output": dict(zip(KERNELS, (h, y), strict=True)),
    }


def loss_fn(params: Any, batch: Batch) -> Any:
    y = forward(params, batch)["output"][KERNELS[1]]
    return jnp.mean((y - batch.targets) ** 2)


class Case(NamedTuple):
    """One transformation under contract.

    Attributes:
      make: keywords -> transformation, with small p, q and k unless told otherwise.
      side: the side of the activations that it wants.
      descends: whether it holds its learning rate already.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    side: str = "input"
    descends: bool = True

    def optimizer(self, **keywords: Any) -> optax.GradientTransformationExtraArgs:
        tx = self.make(**keywords)
        return tx if self.descends else optax.chain(tx, optax.sgd(0.05))


def _with(factory: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    def make(*, basis: Basis | None = None, **keywords: Any) -> Any:
        basis = basis or Basis()
        if basis.power_iterations is None:
            basis = dataclasses.replace(basis, power_iterations=2)
        small = {"rank": 2, "update_every": 3, "basis": basis}
        return factory(*args, **{**small, **keywords})

    return make


#: The contract table.
CASES: Mapping[str, Case] = {
    "dsbp": Case(_with(dsbp_optax.dsbp, 0.05), side="output"),
    "dsbp_sgd": Case(_with(dsbp_optax.dsbp_sgd, 0.05)),
    "dsbp_adamw": Case(_with(dsbp_optax.dsbp_adamw, 0.05)),
    "dsbp_muon": Case(_with(dsbp_optax.dsbp_muon, 0.05)),
    "projection": Case(
        _with(dsbp_optax.scale_by_spectral_projection, optax.scale_by_adam()),
        descends=False,
    ),
    "sharpness": Case(_with(dsbp_optax.add_spectral_sharpness, 0.1), descends=False),
}


def activations(params: Any, batch: Batch, side: str = "input") -> dict[str, Any]:
    """Statistics in the form that users pass by hand."""
    return {p: Activations(x) for p, x in forward(params, batch)[side].items()}


def sketches(opt_state: Any, params: Any, batch: Batch, side: str = "input") -> Any:
    """Statistics in the form that adapters pass: taken with the state's own bases."""
    seen = forward(params, batch)[side]
    return {
        path: sketch(seen[layer.kernel.path], layer)
        for path, layer in dsbp_optax.by_path(opt_state).items()
        if layer.basis is not None
    }


def sketch(values: Any, layer: dsbp_optax.Layer) -> Sketch:
    """``A^T (A V)`` of an ordinary kernel, in kernel form."""
    basis = layer.basis.astype(layer.spectrum.trace.dtype)
    a, form = values.astype(basis.dtype), layer.kernel.view.form
    return Sketch(
        (a.T @ (a @ basis)).reshape(form(True, basis.shape[-1])),
        jnp.full(form(False, 1), a.shape[0], basis.dtype),
        jnp.sum(a * a).reshape(form(False, 1)),
    )


def make_step(
    tx: Any, side: str = "input", kind: Callable[..., Any] | None = None
) -> Callable[[Any, Any, Batch], tuple[Any, Any]]:
    """``(params, state, batch) -> (params, state)`` of a whole training step.

    Args:
      tx: the optimizer.
      side: side of the activations.
      kind: ``(state, params, batch, side) -> statistics``; None for activations.
    """

    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        grads = jax.grad(loss_fn)(params, batch)
        if kind is None:
            statistics = activations(params, batch, side)
        else:
            statistics = kind(state, params, batch, side)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return step


def train(step: Any, params: Any, state: Any, steps: int, start: int = 0) -> Any:
    """`steps` steps on batches `start`, `start` + 1, ..."""
    for i in range(start, start + steps):
        params, state = step(params, state, make_batch(i))
    return params, state


def signature(tree: Any) -> Any:
    """Shape, dtype and weak type of every leaf."""
    return jax.tree.map(
        lambda x: (jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", None)),
        tree,
    )


def only(opt_state: Any) -> Any:
    """The one spectral state inside `opt_state`."""
    (state,) = find_states(opt_state)
    return state
