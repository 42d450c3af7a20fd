"""From the inner optimizer's changes to the update of each kernel."""

from collections.abc import Mapping

import jax.numpy as jnp

from dsbp_optax import _eigenbasis, _filter, _layout, _plan, _residual, _subspace
from dsbp_optax._refresh import Step
from dsbp_optax._residual import Contribution, Outside
from dsbp_optax._rule import Rule
from dsbp_optax._types import Array, PyTree


def coordinates(step: Step) -> dict[str, Array]:
    """``P = V^T G`` of each projected kernel, by path; as they came where they did."""
    taken = {
        path: _subspace.project(step.bases[path], matrix, step.views[path].flipped)
        for path, matrix in step.matrices.items()
    }
    return taken | step.given


def combine(
    rule: Rule,
    step: Step,
    path: str,
    change: Array,
    coordinates: Array,
    held: Mapping[str, PyTree],
    rows: Mapping[str, Array],
) -> tuple[Array, PyTree]:
    """``V u + s (G - V P)`` and what a rule adds; one lift serves all factors.

    Args:
      rule: the rule.
      step: the step.
      path: of the kernel.
      change: ``u``, the inner optimizer's update of the coordinates.
      coordinates: ``P``.
      held: path -> state of the residual rule; empty where it keeps none.
      rows: the sharpness term's part along ``e_1``, where there is one; left to
        `directed` where that follows.

    Returns:
      The update as a matrix, and the state of the residual rule.
    """
    view, basis = step.views[path], step.bases[path]
    inside, factor, kept = change, None, held.get(path, ())
    added = Contribution()
    if path in step.matrices:
        matrix = step.matrices[path]
        energy = _subspace.squared_norm(matrix)
        seen = Outside(change, coordinates, energy, matrix, basis, view.flipped)
        added, kept = rule.residual.update(seen, kept)
        inside, factor = _with_factor(rule, step, path, seen, added.factor)
    if rule.direction is not None and path in step.given:
        inside = rule.direction(inside, *_plan.fans(path, view, rule.choices))
    if path in rows and not _directed_whole(rule, step, path):
        inside = _subspace.add_leading(inside, rows[path], view.flipped)
    whole = _subspace.lift(basis, inside, view.flipped)
    if factor is not None:
        whole = whole + factor * step.matrices[path]
    return whole if added.addition is None else whole + added.addition, kept


def _with_factor(
    rule: Rule, step: Step, path: str, seen: Outside, factor: Array | None
) -> tuple[Array, Array | None]:
    """Coordinates to lift and the factor of the gradient; a cold layer passes it."""
    inside = seen.update
    if factor is not None:
        inside = inside - factor * seen.coordinates
    if not rule.residual.stateless or rule.project_cold:
        return inside, factor
    iterations = step.layers[path].spectrum.iterations
    done = _layout.from_kernel_form(iterations, step.views[path])
    warm = done >= _eigenbasis.to_int(rule.refresh.iterations)
    cold = _residual.pass_through(seen.update, seen.coordinates, seen.energy)
    factor = jnp.where(warm, 0 if factor is None else factor, cold)
    return jnp.where(warm, inside, 0), factor


def _directed_whole(rule: Rule, step: Step, path: str) -> bool:
    """Whether `directed` gives a projected kernel its direction, as a whole matrix."""
    return rule.direction is not None and path not in step.given


def directed(
    rule: Rule,
    step: Step,
    changes: Mapping[str, Array],
    updates: PyTree,
    rows: Mapping[str, Array],
) -> dict[str, Array]:
    """Every update shaped as its parameter, those of kernels given their direction.

    Kernels in full space get the same as projected ones. Those whose gradients came as
    coordinates have it: the polar factor of ``V u`` is V times that of ``u``. The
    sharpness term has a size of its own, and is added behind.

    Args:
      rule: the rule.
      step: the step.
      changes: path -> update, a matrix for projected kernels.
      updates: the incoming tree.
      rows: as in `combine`.
    """
    done = dict(changes)
    if rule.direction is None:
        for path, view in step.views.items():
            done[path] = _layout.from_matrices(changes[path], view)
        return done
    known = _plan.kernels(updates, rule.choices, step.views)
    for path, view in known.items():
        matrix = changes[path]
        if path not in step.views:
            matrix = _layout.to_matrices(matrix, view)
        if _directed_whole(rule, step, path):
            matrix = rule.direction(matrix, *_plan.fans(path, view, rule.choices))
            if path in rows:
                leading = step.bases[path][..., :1]
                matrix = matrix + _subspace.lift(leading, rows[path], view.flipped)
        done[path] = _layout.from_matrices(matrix, view)
    return done


def filtered(
    rule: Rule, step: Step, coordinates: Mapping[str, Array]
) -> Mapping[str, Array]:
    """Coordinates times the spectral filter; without a spectrum as they are."""
    if rule.spectral_filter is None:
        return coordinates
    done = {}
    for path, view in step.views.items():
        spectrum = step.layers[path].spectrum
        eigenvalues, trace = (
            _layout.from_kernel_form(x, view)[..., 0, :]
            for x in (spectrum.eigenvalues, spectrum.trace)
        )
        rest = _filter.remaining_mean(eigenvalues, trace, view.size)
        factors = jnp.where(trace > 0, rule.spectral_filter(eigenvalues, rest), 1)
        shaped = factors[..., None, :] if view.flipped else factors[..., :, None]
        done[path] = coordinates[path] * shaped
    return done
