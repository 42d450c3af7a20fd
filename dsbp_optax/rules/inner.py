"""What a transformation that a user passes does, tried on a few numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_optax.linalg.types import Array, PyTree


def as_transformation(
    given: Any, name: str = "inner"
) -> optax.GradientTransformationExtraArgs:
    """`given` with support for extra arguments; None is the identity.

    Args:
      given: what the user passed.
      name: of the argument, for the error.
    """
    if given is None:
        given = optax.identity()
    if not (hasattr(given, "init") and hasattr(given, "update")):
        raise TypeError(
            f"{name}: got {given!r} of type {type(given).__name__}, expected an "
            "optax.GradientTransformation such as optax.scale_by_adam()."
        )
    return optax.with_extra_args_support(given)


def check_inner(inner: optax.GradientTransformation) -> None:
    """Refuse an inner optimizer that descends or that needs parameters.

    Tries it on one tiny gradient; skipped for hyperparameters that are traced.
    """
    tried = {"kernel": np.asarray([[1.0, -2.0], [0.5, 3.0]], np.float32)}
    try:
        downhill = _descends(inner, tried, None)
    except (ValueError, AttributeError, TypeError) as error:
        if "params" not in str(error) and "NoneType" not in str(error):
            raise
        raise ValueError(
            "inner: needs the parameters, which have no place beside a basis "
            f"({str(error).splitlines()[0]}). Remedy: keep weight decay and trust "
            "ratios outside, e.g. optax.chain(scale_by_spectral_projection(inner="
            "optax.scale_by_adam()), optax.add_decayed_weights(1e-4), "
            "optax.scale_by_learning_rate(1e-3))."
        ) from error
    if downhill:
        raise ValueError(
            "inner: its update points downhill already (it contains a learning "
            "rate), which a learning rate after it would turn round. Remedy: pass a "
            "scale_by_* transformation and put the learning rate after: "
            "optax.chain(scale_by_spectral_projection(inner=optax.scale_by_adam()), "
            "optax.scale_by_learning_rate(lr))."
        )


def check_fallback(
    fallback: optax.GradientTransformation, others: Mapping[str, Any]
) -> None:
    """Refuse a fallback that descends; it may use parameters.

    Tries it on a tiny gradient for each parameter, at parameters of zero, which do
    not decay. One that wants more arguments of ``update`` is not tried.

    Args:
      fallback: the transformation.
      others: path -> parameter, of those that it is for.
    """
    tried = {
        path: np.arange(1, 1 + 2 ** jnp.ndim(x), dtype=np.float32).reshape(
            (2,) * jnp.ndim(x)
        )
        for path, x in others.items()
    }
    try:
        downhill = _descends(fallback, tried, jax.tree.map(np.zeros_like, tried))
    except (TypeError, NotImplementedError):  # The latter: some loops, on jax 0.7.
        return
    if downhill:
        raise ValueError(
            "fallback: got a transformation whose update points downhill already (it "
            "contains a learning rate), expected one that ascends like those of "
            "kernels: the learning rate after the projection would turn it round. "
            "Remedy: a scale_by_* transformation; for a learning rate a of its own "
            "beside lr optax.chain(optax.scale_by_adam(), optax.scale(a / lr))."
        )


def _descends(
    tx: optax.GradientTransformation, gradient: Mapping[str, Any], params: PyTree
) -> bool:
    """Whether any update points downhill; False where it is traced."""

    @jax.jit
    def products(gradient: Mapping[str, Array], params: PyTree) -> list[Array]:
        state = tx.init(gradient if params is None else params)
        update, _ = tx.update(gradient, state, params)
        return [jnp.vdot(update[path], g) for path, g in gradient.items()]

    with jax.ensure_compile_time_eval():
        found = products(*jax.tree.map(jnp.asarray, (dict(gradient), params)))
        return any(not isinstance(x, jax.core.Tracer) and x < 0 for x in found)
