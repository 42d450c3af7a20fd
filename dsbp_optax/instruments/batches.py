"""Means over batches: stacked for compiled loops, or read one by one on the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from dsbp_optax.linalg.types import Array, PyTree

#: (operand, batch) -> tree
Figure: TypeAlias = Callable[[PyTree, Any], PyTree]


class Stream:
    """Batches that are read on the host, from the start each time; `stream_batches`."""

    def __init__(self, read: Callable[[], Iterable[PyTree]]):
        self.read = read


class StreamedMean:
    """The mean of a figure over a `Stream`: compiled for one batch, looped outside."""

    def __init__(self, figure: Figure, stream: Stream):
        self._one, self._stream = jax.jit(figure), stream

    def __call__(self, operand: PyTree) -> PyTree:
        """The mean at `operand`."""
        leaves, form = jax.tree.flatten(operand)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self.on_host(operand)
        shapes = jax.eval_shape(self._one, operand, next(iter(self._batches())))
        kept, structure = jax.tree.flatten(shapes)
        found = _mean_p.bind(*leaves, mean=self, form=form, shapes=tuple(kept))
        return jax.tree.unflatten(structure, found)

    def on_host(self, operand: PyTree) -> PyTree:
        """The mean, one batch after the other."""
        total, count = None, 0
        with jax.disable_jit(False):  # Whoever loops on the host has turned it off.
            for batch in self._batches():
                part = self._one(operand, batch)
                total = part if total is None else optax.tree.add(total, part)
                count += 1
        return jax.tree.map(lambda x: x / count, total)

    def _batches(self) -> Iterator[Any]:
        batches = iter(self._stream.read())
        first = next(batches, None)
        if first is None:
            raise ValueError(
                "stream_batches: got no batch, expected at least one. Remedy: a "
                "function that returns a new iterator at each call."
            )
        return itertools.chain([first], batches)


def _run(*leaves: Array, mean: StreamedMean, form: Any, shapes: Any) -> list[Array]:
    del shapes
    return jax.tree.leaves(mean.on_host(form.unflatten(leaves)))


def _shapes(*_: Any, shapes: Any, **__: Any) -> list[Any]:
    return [jax.core.ShapedArray(leaf.shape, leaf.dtype) for leaf in shapes]


def _refuse(*_: Any, **__: Any) -> Any:
    raise ValueError(
        "stream_batches: got a computation to compile, expected one on the host, where "
        "a stream is read. Remedy: no jax.jit around it, jax.disable_jit() around "
        "loops of your own, or stack_batches."
    )


# An operation of its own, so that libraries can trace what is to run on the host.
_mean_p = Primitive("mean_of_stream")
_mean_p.multiple_results = True
_mean_p.def_impl(_run)
_mean_p.def_abstract_eval(_shapes)
mlir.register_lowering(_mean_p, _refuse)


def stack_batches(batches: Iterable[PyTree]) -> PyTree:
    """Batches of one shape, stacked into one tree with a leading axis.

    Args:
      batches: trees of arrays.

    Returns:
      One tree, ``(batches, ...)``.

    Raises:
      ValueError: without any batch, or where shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> diagnostics.stack_batches([jnp.ones((4, 3)), jnp.zeros((4, 3))]).shape
      (2, 4, 3)
    """
    found = list(batches)
    if not found:
        raise ValueError("stack_batches: got no batch, expected at least one.")
    shapes = {str(jax.tree.map(np.shape, batch)) for batch in found}
    if len(shapes) > 1:
        raise ValueError(
            f"stack_batches: got batches of shapes {', '.join(sorted(shapes))}, "
            "expected one shape. Remedy: leave out the incomplete last batch."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def stream_batches(read: Callable[[], Iterable[PyTree]]) -> Stream:
    """Batches from a data iterator, read one after the other.

    What uses them runs its loops on the host and compiles what is done with one batch.
    On a CPU that is also the fast way for convolutions: XLA runs those of a compiled
    loop about ten times slower (jax-ml/jax issue 12868).

    Args:
      read: returns a new iterator over trees of arrays at each call, always the same
        batches. Their mean is taken batch by batch.

    Returns:
      `Stream`, in the place of stacked batches; not for use under `jax.jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics
      >>> batches = diagnostics.stream_batches(lambda: (jnp.full(3, i) for i in (1, 3)))
      >>> product = diagnostics.hessian_product(
      ...     lambda w, x: jnp.sum(x * w * w) / 2, jnp.ones(3), batches)
      >>> product(jnp.array([1.0, 0.0, 0.0]))
      Array([2., 0., 0.], dtype=float32)
    """
    if not callable(read):
        raise ValueError(
            f"stream_batches: got {type(read).__name__}, expected a function that "
            "returns an iterator. Remedy: lambda: iter(loader)."
        )
    return Stream(read)


def averaged(figure: Figure, batches: PyTree) -> Callable[[PyTree], Any]:
    """``operand -> mean over batches of figure(operand, batch)``.

    Args:
      figure: of one batch.
      batches: stacked, or a `Stream`.
    """
    if isinstance(batches, Stream):
        return StreamedMean(figure, batches)

    def mean(operand: PyTree) -> PyTree:
        first = jax.tree.map(lambda x: x[0], batches)
        count = len(jax.tree.leaves(batches)[0])
        shapes = jax.eval_shape(figure, operand, first)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total: PyTree, batch: Any) -> tuple[PyTree, None]:
            return optax.tree.add(total, figure(operand, batch)), None

        total, _ = jax.lax.scan(add, zero, batches)
        return jax.tree.map(lambda x: x / count, total)

    return mean


def loops_for(mean: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Where loops around `mean` belong: on the host for streams, else as they are."""
    return jax.disable_jit() if isinstance(mean, StreamedMean) else nullcontext()
