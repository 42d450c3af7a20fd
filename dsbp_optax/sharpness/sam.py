"""Sharpness-aware minimisation whose ascent lies in the eigenbases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import coordinates, paths, sharding
from dsbp_optax.core.layout import Coordinates
from dsbp_optax.core.transform import value_at
from dsbp_optax.linalg.types import Array, PyTree, compute_dtype
from dsbp_optax.sharpness import subspace
from dsbp_optax.sharpness.subspace import Subspace

#: (parameters, 0) -> gradients, as `optax.contrib.sam` takes it; see `subspace_sam` for
#: gradients in coordinates.
GradFn: TypeAlias = Callable[[PyTree, Any], PyTree]

_WHO = "subspace_sam"


class SubspaceSamState(NamedTuple):
    """State of `subspace_sam`.

    Attributes:
      step: int32, updates seen.
      optimizer: state of the wrapped optimizer.
    """

    step: Array
    optimizer: PyTree


class Rule(NamedTuple):
    """Everything that the wrapper is told; see `subspace_sam`."""

    optimizer: optax.GradientTransformationExtraArgs
    radius: optax.ScalarOrSchedule
    adaptive: bool
    unprojected: bool


def subspace_sam(
    optimizer: optax.GradientTransformation,
    radius: optax.ScalarOrSchedule = 0.05,
    *,
    adaptive: bool = False,
    unprojected: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation whose ascent lies in the eigenbases.

        G' = gradient at W + rho V normalize(V^T G),  then the optimizer's step with G'

    Args:
      optimizer: one that holds a `scale_by_spectral_projection` or a
        `scale_by_activation_metric`.
      radius: rho, length of the ascent over all parameters; a number or a schedule.
      adaptive: whether each coordinate is scaled by that of the parameters, as ASAM
        does; a sensible radius is then larger by a factor of about ten.
      unprojected: whether parameters without a basis take part, in full space.

    Returns:
      An optimizer; call ``update(grads, state, params, grad_fn=..., statistics=...)``
      with ``grad_fn(params, i) -> gradients``, as `optax.contrib.sam` takes it. Where
      the gradients are `Coordinates`, the kernels stay where they are, ``grad_fn`` gets
      the step ``{path: Coordinates}`` in the place of i, and is to take its gradient
      there: ``lambda params, step: subspace_value_and_grad(loss_fn)(params, ...,
      displacement=step)[1]``.

    Raises:
      ValueError: without `grad_fn`, without parameters, or without an eigenbasis.

    Cost: one more gradient and ``4 d k m`` FLOPs a kernel each step; one temporary set
    of parameters and gradients, ``k m`` numbers a kernel of each where gradients are
    coordinates. State: one counter.

    Reference: Foret et al., SAM, arXiv 2010.01412; Kwon et al., ASAM, 2102.11600.

    Example:
      >>> import jax, jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.subspace_sam(dsbp_optax.dsbp_sgd(0.1, rank=2), 0.05)
      >>> params = {"kernel": jnp.ones((16, 16))}
      >>> grad_fn = jax.grad(lambda params, i: jnp.sum(params["kernel"] ** 4))
      >>> grads, state = grad_fn(params, 0), tx.init(params)
      >>> updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    """
    subspace.check_radius(_WHO, radius)
    wrapped = optax.with_extra_args_support(optimizer)
    rule = Rule(wrapped, radius, adaptive, unprojected)
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, rule),
        lambda updates, state, params=None, **extra: _update(
            rule, updates, state, params, **extra
        ),
    )


def _init(rule: Rule, params: PyTree) -> SubspaceSamState:
    held = rule.optimizer.init(params)
    leaves, _ = paths.flatten(params)
    subspace.subspaces(subspace.with_bases(held, _WHO), leaves)  # Raises without any.
    return SubspaceSamState(jnp.zeros([], jnp.int32), held)


def _update(
    rule: Rule,
    updates: PyTree,
    state: SubspaceSamState,
    params: PyTree | None,
    *,
    grad_fn: GradFn | None = None,
    **extra: Any,
) -> tuple[PyTree, SubspaceSamState]:
    if grad_fn is None or params is None:
        raise ValueError(
            f"{_WHO}: got no {'parameters' if params is None else 'grad_fn'}, expected "
            "parameters and a grad_fn. Remedy: tx.update(grads, state, params, "
            "grad_fn=lambda params, i: jax.grad(loss_fn)(params, batch))."
        )
    before, given = state.optimizer, coordinates.find(updates)
    radius = jnp.asarray(value_at(rule.radius, state.step))
    away, steps = sharding.in_place(
        functools.partial(_uphill, rule),
        (params, given),
        params,
        updates,
        before,
        radius,
    )

    used = jax.tree.map(
        lambda g, u: g.astype(u.dtype), grad_fn(away, steps if given else 0), updates
    )
    changes, held = rule.optimizer.update(used, before, params, **extra)
    return changes, SubspaceSamState(optax.safe_increment(state.step), held)


def _uphill(
    rule: Rule, params: PyTree, updates: PyTree, held: PyTree, radius: Array
) -> tuple[PyTree, dict[str, Coordinates]]:
    """The parameters after the ascent, and the steps of kernels that stay behind.

    Those are the ones whose gradients are coordinates.
    """
    spaces = _spaces(held, params)
    gradient = _divided(updates, spaces, rule.unprojected)
    weight = _divided(params, spaces, rule.unprojected) if rule.adaptive else None
    ascent = _ascent(gradient, weight, radius)
    given = coordinates.find(updates)
    steps = {path: spaces[path].held(ascent.pop(path)) for path in given}
    return subspace.add(params, subspace.lifted(ascent, spaces)), steps


def _spaces(held: PyTree, params: PyTree) -> dict[str, Subspace]:
    leaves, _ = paths.flatten(params)
    return subspace.subspaces(subspace.with_bases(held, _WHO), leaves)


def _divided(
    tree: PyTree, spaces: Mapping[str, Subspace], unprojected: bool
) -> dict[str, Array]:
    """Coordinates of projected kernels and, if asked for, the other leaves whole."""
    leaves, _ = paths.flatten(tree)
    parts = {}
    for path, leaf in leaves.items():
        if path in spaces:
            parts[path] = spaces[path].project(leaf)
        elif unprojected and jnp.issubdtype(leaf.dtype, jnp.floating):
            parts[path] = leaf.astype(compute_dtype(leaf.dtype))
    return parts


def _ascent(
    gradient: Mapping[str, Array], weight: Mapping[str, Array] | None, radius: Array
) -> dict[str, Array]:
    """SAM's ascent; with weights ASAM's, ``rho T^2 g / |T g|`` with ``T = |w|``."""
    if weight is None:
        return subspace.scaled_to(radius, gradient)
    once = {path: jnp.abs(weight[path]) * part for path, part in gradient.items()}
    twice = {path: jnp.abs(weight[path]) * part for path, part in once.items()}
    return subspace.scaled_to(radius, twice, once)
