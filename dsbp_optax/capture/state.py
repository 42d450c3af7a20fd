"""All that capture reads out of an optimizer state, and the one thing it writes.

`riders` says what to collect, by key (a parameter's path, with the suffix of the
transformation that it serves), `shared` who uses whose basis, `statistics` gives the
form that ``update`` takes. Nothing else in this package looks into a state.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from dsbp_optax import _checks, _eigenbasis, _layout, _sharding, _spectral
from dsbp_optax._basis import power_iteration
from dsbp_optax._eigenbasis import Refresh
from dsbp_optax._layout import Coordinates, MatrixView, Shape
from dsbp_optax._statistics import Sketch
from dsbp_optax._types import PyTree
from dsbp_optax.capture.tap import Rider


def riders(opt_state: PyTree) -> dict[str, Rider]:
    """A rider for each basis of each spectral state in `opt_state`, by key.

    Its `count` is 1 where the next step's statistics will be used, else 0.
    """
    if opt_state is None or isinstance(opt_state, optax.GradientTransformation):
        got = "nothing" if opt_state is None else "the optimizer itself"
        raise TypeError(
            f"opt_state: got {got}, expected the optimizer's state, by keyword. "
            "Remedy: value_and_grad(loss_fn)(params, batch, opt_state=opt_state), "
            "where opt_state = tx.init(params) at first."
        )
    found = {}
    for state in _spectral.find_states(opt_state):
        for path, layer in _spectral.split_layers(state).items():
            key = path + _spectral.STATES[type(state)]
            if key in found:
                raise ValueError(
                    f"two spectral transformations of one kind hold a basis for "
                    f"'{path}'. Remedy: give each its own parameters with "
                    "optax.masked or optax.partition."
                )
            trace = jnp.zeros_like(layer.spectrum.trace)
            collect = jnp.broadcast_to(_spectral.collects(state, path), trace.shape)
            found[key] = Rider(layer.basis, collect.astype(layer.basis.dtype), trace)
    return found


def shared(opt_state: PyTree) -> dict[str, list[str]]:
    """Owner -> the kernels that use its basis, in all states of `opt_state`."""
    found: dict[str, list[str]] = defaultdict(list)
    for state in _spectral.find_states(opt_state):
        for owner, members in state.shared.items():
            found[owner] += members
    return dict(found)


def view(rider: Rider, kernel: Shape) -> MatrixView:
    """How the optimizer reads the kernel of a rider, which has the shape `kernel`."""
    return _layout.view_of(kernel, rider.basis.shape[:-1], rider.count.shape[:-1])


def statistics(
    cotangents: Mapping[str, Rider], tapped: Collection[str]
) -> dict[str, Sketch]:
    """Statistics by key out of the riders' cotangents, of those that were tapped."""
    return {k: _sketch(c) for k, c in cotangents.items() if k in tapped}


def _sketch(found: Rider) -> Sketch:
    return Sketch(found.basis, found.count, found.trace)


def coordinate_riders(
    owners: Mapping[str, Rider],
    opt_state: PyTree,
    leaves: Mapping[str, Any],
    displacement: Mapping[str, Coordinates] | None = None,
) -> dict[str, Rider]:
    """A rider for each projected kernel, those that share a basis included.

    Args:
      owners: of `riders`, one for each basis.
      opt_state: any nest of optax states.
      leaves: path -> parameter.
      displacement: path -> S of kernels that stand for ``K + V S``.

    Raises:
      ValueError: when the state holds no projection, or a basis of no parameter; when
        a displacement does not fit.
    """
    made, found, steps = dict(owners), False, dict(displacement or {})
    for state in _spectral.find_states(opt_state):
        if not isinstance(state, _spectral.SpectralProjectionState):
            continue
        found = True
        for path, owner in _spectral.owners_of(state).items():
            _spectral.check_path(path, leaves)
            rider, kernel = made[owner], jnp.shape(leaves[path])
            if path != owner:  # Its statistic would be the owner's once more.
                rider = dataclasses.replace(rider, count=jnp.zeros_like(rider.count))
            stacked, form = rider.count.shape[:-1], rider.basis.shape
            lengths = zip(kernel, form[:-1], stacked, strict=True)
            shape = (*(1 if v != own else n for n, v, own in lengths), form[-1])
            place = _sharding.beside(leaves[path], shape)
            made[path] = _with_step(path, rider, shape, steps.pop(path, None), place)
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
    return made


def _with_step(
    path: str, rider: Rider, shape: Shape, step: Coordinates | None, place: Any
) -> Rider:
    """The rider with coordinates: zeros, or S of a displaced kernel."""
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


def warm_start(
    collect: Callable[[PyTree], Mapping[str, Sketch]],
    opt_state: PyTree,
    iterations: int,
) -> PyTree:
    """`iterations` power steps of every basis on one batch, before training.

    Args:
      collect: ``opt_state -> sketches`` on the batch.
      opt_state: a fresh optimizer state.
      iterations: number of steps.
    """
    refresh = Refresh(1, 1, power_iteration, 0.0)
    for _ in range(iterations):
        sketches = collect(opt_state)

        def absorb(
            state: _spectral.SpectralState, sketches: Mapping[str, Sketch] = sketches
        ) -> _spectral.SpectralState:
            return _absorb(state, sketches, refresh)

        opt_state = _spectral.map_states(absorb, opt_state)
    return opt_state


def _absorb(
    state: _spectral.SpectralState, sketches: Mapping[str, Sketch], refresh: Refresh
) -> _spectral.SpectralState:
    basis, spectrum = dict(state.basis), dict(state.spectrum)
    for path, layer in _spectral.split_layers(state).items():
        sketch = sketches.get(path + _spectral.STATES[type(state)])
        if sketch is not None:
            shape, stacked = layer.basis.shape[:-1], layer.spectrum.trace.shape[:-1]
            batch = tuple(a for a, n in enumerate(stacked) if n > 1)
            rows = tuple(a for a, n in enumerate(shape) if n > 1 and a not in batch)
            columns = tuple(a for a in range(len(shape)) if a not in batch + rows)
            read = MatrixView(shape, batch, rows, columns)
            gradient = jnp.zeros((*read.batch_shape, read.size, 1), layer.basis.dtype)
            new, _ = _eigenbasis.refresh_layer(layer, sketch, gradient, read, refresh)
            basis[path] = new.basis.astype(state.basis[path].dtype)
            spectrum[path] = new.spectrum
    return state._replace(basis=basis, spectrum=spectrum)
