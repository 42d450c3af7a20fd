"""Kernels held constant while a loss is differentiated; knows no framework.

A kernel that enters the loss through its layer alone needs no gradient of its own: its
coordinates in the basis come out of the layer's rider, see
`dsbp_optax._coordinate_tap`. One that enters elsewhere too (a penalty, a tied
head) has a gradient that the layer does not see, and must not be held.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from dsbp_optax import _checks, _origin, _sharding, _spectral
from dsbp_optax._layout import Coordinates
from dsbp_optax._rider import Rider
from dsbp_optax._spectral import SpectralProjectionState
from dsbp_optax._types import Array, PyTree

#: Path -> S of kernels that stand for ``K + V S``.
Displacement: TypeAlias = Mapping[str, Coordinates] | None


def add_coordinates(
    owners: Mapping[str, Rider],
    opt_state: PyTree,
    leaves: Mapping[str, Any],
    displacement: Displacement = None,
) -> dict[str, Rider]:
    """A rider for each projected kernel, those that share a basis included.

    Args:
      owners: of `_tap.make_riders`, one for each basis.
      opt_state: any nest of optax states.
      leaves: path -> parameter.
      displacement: path -> S of kernels that stand for ``K + V S``.

    Raises:
      ValueError: when the state holds no projection, or a basis of no parameter; when
        a displacement does not fit.
    """
    riders, found, steps = dict(owners), False, dict(displacement or {})
    for state in _spectral.find_states(opt_state):
        if not isinstance(state, SpectralProjectionState):
            continue
        found = True
        for path, owner in _spectral.owners_of(state).items():
            _spectral.check_path(path, leaves)
            stacked = state.spectrum[owner].trace.shape[:-1]
            rider = riders[owner]
            if path != owner:  # Its statistic would be the owner's once more.
                rider = dataclasses.replace(rider, count=jnp.zeros_like(rider.count))
            shape = _shape(jnp.shape(leaves[path]), rider.basis.shape, stacked)
            place = _sharding.beside(leaves[path], shape)
            riders[path] = _with_step(path, rider, shape, steps.pop(path, None), place)
    if steps:
        raise ValueError(
            f"displacement: got {_checks.some(sorted(steps))}, for which the state "
            "holds no basis. Remedy: pass what subspace_sam gives its grad_fn."
        )
    if not found:
        raise ValueError(
            f"subspace_value_and_grad: got {type(opt_state).__name__}, which holds no "
            "state of scale_by_spectral_projection. Remedy: pass what tx.init(params) "
            "gave, of an optimizer for gradients in coordinates such as subspace_muon."
        )
    return riders


def _with_step(
    path: str,
    rider: Rider,
    shape: tuple[int, ...],
    step: Coordinates | None,
    place: Any,
) -> Rider:
    """The rider with coordinates of that shape: the step, or zeros."""
    dtype = rider.basis.dtype
    if step is None:
        zeros = _sharding.put(jnp.zeros(shape, dtype), place)
        return dataclasses.replace(rider, coordinates=zeros)
    values = step.values.astype(dtype)
    if values.shape != shape:
        raise ValueError(
            f"displacement of '{path}': got {values.shape}, expected {shape}. Remedy: "
            "pass what subspace_sam gives its grad_fn."
        )
    return dataclasses.replace(rider, coordinates=values, displaced=True)


def _shape(
    kernel: tuple[int, ...], basis: tuple[int, ...], stacked: tuple[int, ...]
) -> tuple[int, ...]:
    """Of the coordinates in kernel form: 1 along the axes that carry the basis."""
    lengths = zip(kernel, basis[:-1], stacked, strict=True)
    return (*(1 if form != own else n for n, form, own in lengths), basis[-1])


def find_held(
    loss: Callable[[dict[str, Any], set[str]], Array],
    leaves: Mapping[str, Any],
    strict: bool,
) -> set[str]:
    """The kernels that can be held constant.

    Args:
      loss: (parameters by path, a set to note kernels in) -> loss, its layers probed.
      leaves: path -> parameter.
      strict: whether it is an error when the loss depends on such a kernel elsewhere.

    Raises:
      ValueError: for such a kernel.
    """
    held: set[str] = set()
    with _origin.apart():  # A probed layer gives zeros, which no cache may keep.
        closed = jax.make_jaxpr(
            lambda values: loss(dict(zip(leaves, values, strict=True)), held)
        )(list(leaves.values()))
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    elsewhere = {path for path, flag in zip(leaves, used, strict=True) if flag} & held
    if elsewhere and strict:
        raise ValueError(
            f"the loss depends on {_checks.some(sorted(elsewhere))} not through a "
            "layer alone (a penalty, a tied head), and the gradient of that would be "
            "lost. Remedy: weight_decay= of the optimizer in place of a penalty, or "
            "rank={...} that leaves these kernels out; strict=False takes the gradient "
            "of the layer alone."
        )
    return held


def release(
    riders: Mapping[str, Rider], held: Collection[str], owners: Collection[str]
) -> dict[str, Rider]:
    """Riders for kernels some of which are not held, and take no coordinates then.

    Args:
      riders: of `add_coordinates`.
      held: paths that are held.
      owners: keys of the riders that collect statistics; the rest is dropped.
    """
    free = {key: riders[key] for key in owners if key not in held}
    taken = {key: rider for key, rider in riders.items() if key in held}
    moved = [
        key for key, rider in riders.items() if rider.displaced and key not in held
    ]
    if moved:
        raise ValueError(
            f"displacement of {_checks.some(moved)}: these kernels are not held "
            "constant, so nothing takes the step. Remedy: pass what subspace_sam gives "
            "its grad_fn, for the same loss."
        )
    plain = {k: dataclasses.replace(r, coordinates=None) for k, r in free.items()}
    return {**taken, **plain}


def join(
    leaves: Collection[str],
    gradients: Mapping[str, Any],
    cotangents: Mapping[str, Rider],
    held: Collection[str],
) -> list[Any]:
    """The gradient of each parameter, in the order of `leaves`."""
    taken = {path: cotangents[path].coordinates for path in held}
    return [
        gradients[path] if (values := taken.get(path)) is None else Coordinates(values)
        for path in leaves
    ]
