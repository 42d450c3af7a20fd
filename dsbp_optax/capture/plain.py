"""Statistics out of losses in plain JAX, Equinox or Haiku, whose layers say `tap`."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from dsbp_optax.capture import recorder
from dsbp_optax.capture.inspection import Inspection
from dsbp_optax.capture.recorder import Recorder
from dsbp_optax.capture.tap import LinearMap, parameter_path, rider_side
from dsbp_optax.linalg.types import Array, PyTree

_RECORDER: contextvars.ContextVar[tuple[Mapping[str, Any], Recorder] | None] = (
    contextvars.ContextVar("dsbp_optax.capture recorder", default=None)
)
_DENSE = LinearMap(jnp.matmul)


def tap(x: Array, path: str, linear: LinearMap | None = None) -> Array:
    """Return the input of a layer; inside `value_and_grad` it is observed.

    Args:
      x: what enters the layer, ``(*samples, d)`` for a product ``x @ kernel``.
      path: of the kernel in the differentiated parameters, as ``"layer/kernel"``.
      linear: how the layer acts through its kernel, where that is no ``x @ kernel``.

    Returns:
      `x`; use it in the place of what was passed. Outside of `value_and_grad`, and on
      steps that refresh nothing, this costs nothing.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> params, x = {"kernel": jnp.ones((16, 8))}, jnp.ones((4, 16))
      >>> def loss_fn(params, x):
      ...     return ((dsbp_optax.tap(x, "kernel") @ params["kernel"]) ** 2).mean()
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2)
      >>> step = dsbp_optax.capture.value_and_grad(loss_fn)
      >>> loss, grads, statistics = step(params, x, opt_state=tx.init(params))
      >>> float(statistics["kernel"].count[0, 0, 0])
      4.0
    """
    if (current := _RECORDER.get()) is None or path not in current[0]:
        return x
    leaves, recording = current
    linear = linear or _DENSE
    kernel = jnp.shape(leaves[path])
    axes = linear.axes_of(len(kernel))
    if recording.notes is not None:
        recording.notes.note(linear, leaves[path], x, None, path=path)
        return x
    mine = {
        key: rider
        for key, rider in recording.riders.items()
        if parameter_path(key) == path and rider_side(rider, axes, kernel) == "input"
    }
    observed: Array = recording.observe(
        lambda x: x, (x,), {}, linear, leaves[path], mine
    )
    return observed


def value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False, *, strict: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad` that also returns the statistics of layers that call `tap`.

    Args:
      loss_fn: ``(params, *args, **kwargs) -> loss`` or ``(loss, aux)``, pure; `params`
        is any tree of arrays.
      has_aux: as in `jax.value_and_grad`.
      strict: whether it is an error when the layer of a projected kernel is never
        called.

    Returns:
      ``(params, *args, opt_state, **kwargs) -> (value, grads, statistics)``.

    Raises:
      ValueError: at trace time, where `strict`.

    Warns:
      UserWarning: at trace time, once, of kernels without statistics, with the reasons.

    Cost: on q of every p steps, ``4 n d k`` FLOPs a layer; when it is traced, one trace
    of the loss on shapes.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> params, x = {"kernel": jnp.ones((16, 8))}, jnp.ones((4, 16))
      >>> def loss_fn(params, x):
      ...     return ((dsbp_optax.tap(x, "kernel") @ params["kernel"]) ** 2).mean()
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2)
      >>> opt_state = tx.init(params)
      >>> step = dsbp_optax.capture.value_and_grad(loss_fn)
      >>> loss, grads, statistics = step(params, x, opt_state=opt_state)
      >>> updates, opt_state = tx.update(
      ...     grads, opt_state, params, statistics=statistics)
    """

    def wrapped(
        params: PyTree, *args: Any, opt_state: PyTree = None, **kwargs: Any
    ) -> Any:
        loss = _Loss(loss_fn, has_aux, params, args, kwargs)
        return recorder.collect(loss, opt_state, strict)

    return wrapped


def inspect(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> Inspection:
    """What a loss tells of the kernels in it, see `dsbp_optax.linen.inspect`.

    Args:
      loss_fn: as for `value_and_grad`.
      params: parameters, or their shapes.
      *args: a batch, or its shapes.
      has_aux: as for `value_and_grad`.
      **kwargs: passed to the loss.

    Returns:
      `Inspection`, for ``axes=`` of a `dsbp_optax.Basis`.

    Cost: one abstract trace of the loss; nothing is computed.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> params, x = {"kernel": jnp.ones((8, 16))}, jnp.ones((4, 16))
      >>> loss_fn = lambda params, x: (x @ params["kernel"].T).mean()
      >>> print(dsbp_optax.capture.inspect(loss_fn, params, x).axes)
      (('kernel', Axes(inputs=(1,), outputs=(0,), batch=())),)
    """
    make = functools.partial(_Loss, loss_fn, has_aux)
    return recorder.inspect_on_shapes(make, params, args, kwargs)


class _Loss(recorder.TreeLoss):
    def run(self, leaves: dict[str, Any], recorder: Recorder) -> Any:
        token = _RECORDER.set((self.leaves, recorder))
        try:
            return self.call(leaves)
        finally:
            _RECORDER.reset(token)
