"""All that capture reads out of an optimizer state, and the one thing it writes.

`riders` says what to collect, by key (a parameter's path, with the suffix of the
transformation that it serves), `shared` who uses whose basis, `statistics` gives the
form that ``update`` takes. Nothing else in `capture` looks into a state.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from dsbp_optax.capture.tap import Rider
from dsbp_optax.core import checks, paths, plan, refresh, sharding, state
from dsbp_optax.core.layout import Coordinates, MatrixView, Shape, to_kernel_form
from dsbp_optax.core.statistics import Sketch
from dsbp_optax.linalg.types import PyTree


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
    for one in state.find_states(opt_state):
        for stack in one.bases:
            whole = one.basis[stack.name].astype(stack.first.dtype)
            for kernel in stack.kernels:
                if (key := kernel.path + one.suffix) in found:
                    raise ValueError(
                        "two spectral transformations of one kind hold a basis for "
                        f"'{kernel.path}'. Remedy: give each its own parameters with "
                        "optax.masked or optax.partition."
                    )
                basis = to_kernel_form(whole[stack.rows(kernel.path)], kernel.view)
                form = kernel.view.form(False, 1)
                count = jnp.broadcast_to(one.collect, form).astype(basis.dtype)
                found[key] = Rider(basis, count, jnp.zeros(form, basis.dtype))
    return found


def known(opt_state: PyTree) -> bool:
    """Whether `opt_state` holds any state of this package."""
    return bool(state.find_states(opt_state))


def shared(opt_state: PyTree) -> dict[str, list[str]]:
    """Owner -> the kernels that use its basis, in all states of `opt_state`."""
    found: dict[str, list[str]] = defaultdict(list)
    for one in state.find_states(opt_state):
        for kernel in one.kernels:
            if kernel.owner != kernel.path:
                found[kernel.owner].append(kernel.path)
    return dict(found)


def view(rider: Rider, kernel: Shape) -> MatrixView:
    """How the optimizer reads the kernel of a rider, as far as its shapes betray it.

    Axes of length 1 count as stacked.
    """
    form, stacked = rider.basis.shape[:-1], rider.count.shape[:-1]
    axes = range(len(kernel))
    rows = [a for a in axes if form[a] > stacked[a]]
    columns = [a for a in axes if form[a] == 1 and kernel[a] > 1]
    if not columns:  # One column: the last axis that can be it.
        columns = [max(a for a in axes if kernel[a] == 1)]
    if not rows:  # One row, likewise.
        rows = [max(a for a in axes if kernel[a] == 1 and a not in columns)]
    batch = tuple(a for a in axes if a not in rows and a not in columns)
    return MatrixView(kernel, batch, tuple(rows), tuple(columns))


def statistics(
    cotangents: Mapping[str, Rider], tapped: Collection[str]
) -> dict[str, Sketch]:
    """Statistics by key out of the riders' cotangents, of those that were tapped."""
    return {
        key: Sketch(one.basis, one.count, one.trace)
        for key, one in cotangents.items()
        if key in tapped
    }


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
    made, steps = dict(owners), dict(displacement or {})
    found = state.find_states(opt_state, "projection")
    for one in found:
        state.check_leaves(one, leaves)
        for kernel in one.kernels:
            if not kernel.rank:
                continue
            path, rider = kernel.path, made[kernel.owner]
            if path != kernel.owner:  # Its statistic would be the owner's once more.
                rider = dataclasses.replace(rider, count=jnp.zeros_like(rider.count))
            form = kernel.view.coordinate_form(kernel.rank)
            place = sharding.beside(leaves[path], form)
            made[path] = _with_step(path, rider, form, steps.pop(path, None), place)
    if steps:
        raise ValueError(
            f"displacement: got {checks.some(sorted(steps))}, for which the state "
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
    path: str, rider: Rider, form: Shape, step: Coordinates | None, place: Any
) -> Rider:
    """The rider with coordinates: zeros, or S of a displaced kernel."""
    dtype = rider.basis.dtype
    if step is None:
        zeros = sharding.put(jnp.zeros(form, dtype), place)
        return dataclasses.replace(rider, coordinates=zeros)
    values = step.values.astype(dtype)
    if values.shape != form:
        raise ValueError(
            f"displacement of '{path}': got {values.shape}, expected {form}. Remedy: "
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
    asked = plan.choices(1, 1, None, 1, None, "always")
    now = refresh.Turn(jnp.asarray(True), jnp.asarray(True))
    for _ in range(iterations):
        sketches = collect(opt_state)

        def absorb(
            one: state.SpectralState, sketches: Mapping[str, Sketch] = sketches
        ) -> state.SpectralState:
            if not one.bases:
                return one
            known = paths.KnownPaths([*sketches], [])
            told = state.gather_statistics(sketches, one, known)
            wide = {s.name: one.basis[s.name].astype(s.first.dtype) for s in one.bases}
            past = dict(one.spectrum)
            held = refresh.Bases(wide, past)
            new, _ = refresh.refreshed(
                *(asked, one.kernels, held, told, {}, one.step, now), unsure=False
            )
            spectrum = {  # Training has not begun: no step has refreshed anything.
                name: x._replace(refreshed=past[name].refreshed)
                for name, x in new.spectrum.items()
            }
            return state.cast_like(
                one._replace(basis=new.basis, spectrum=spectrum), one
            )

        opt_state = state.map_states(absorb, opt_state)
    return opt_state
