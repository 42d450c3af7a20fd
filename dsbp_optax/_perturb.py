"""Steps away from the parameters, inside the eigenbases that a state holds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsbp_optax import _adapt, _checks, _layout, _spectral, _subspace
from dsbp_optax._layout import Coordinates, MatrixView
from dsbp_optax._spectral import ActivationMetricState, SpectralProjectionState
from dsbp_optax._types import Array, PyTree, compute_dtype

#: States of transformations that keep the basis of a kernel's update.
BasisState: TypeAlias = SpectralProjectionState | ActivationMetricState


class Subspace(NamedTuple):
    """The eigenbasis of one kernel.

    Attributes:
      basis: ``V (*batch, d, k)``, zero in directions that are not in use.
      view: how the kernel is read as matrices.
    """

    basis: Array
    view: MatrixView

    def project(self, kernel: Array | Coordinates) -> Array:
        """``V^T G``, shaped as moments in the inner state are."""
        if isinstance(kernel, Coordinates):
            values = _layout.to_coordinates(kernel.values, self.view)
            return values.astype(self.basis.dtype)
        matrix = _layout.to_matrices(kernel.astype(self.basis.dtype), self.view)
        return _subspace.project(self.basis, matrix, self.view.flipped)

    def held(self, coordinates: Array) -> Coordinates:
        """Coordinates in the form in which they stand for a gradient."""
        return Coordinates(
            _layout.from_coordinates(self._shaped(coordinates), self.view)
        )

    def lift(self, coordinates: Array) -> Array:
        """``V u``, shaped as the kernel."""
        shaped = self._shaped(coordinates)
        matrix = _subspace.lift(self.basis, shaped, self.view.flipped)
        return _layout.from_matrices(matrix, self.view)

    def _shaped(self, coordinates: Array) -> Array:
        return coordinates.reshape(self.view.coordinate_shape(self.basis.shape[-1]))


def with_bases(opt_state: PyTree, who: str) -> list[BasisState]:
    """The states of projections and metrics in `opt_state`.

    Raises:
      ValueError: when there is none.
    """
    found = _spectral.find_states(opt_state)
    states = [state for state in found if isinstance(state, BasisState)]
    if not states:
        raise ValueError(
            f"{who}: got an optimizer without an eigenbasis, expected one with "
            "scale_by_spectral_projection or scale_by_activation_metric in it. Remedy: "
            "wrap dsbp_sgd, dsbp_adamw, dsbp_muon or a chain with one of the two."
        )
    return states


def projections(opt_state: PyTree, who: str) -> list[SpectralProjectionState]:
    """The projections' states in `opt_state`.

    Raises:
      ValueError: when there is none.
    """
    found = _spectral.find_states(opt_state)
    states = [state for state in found if isinstance(state, SpectralProjectionState)]
    if not states:
        raise ValueError(
            f"{who}: got an optimizer without scale_by_spectral_projection, expected "
            "one with a momentum in coordinates. Remedy: wrap dsbp_sgd, "
            "subspace_adamw, subspace_muon or a chain with the projection in it."
        )
    return states


def projected(opt_state: PyTree, who: str, leaves: Mapping[str, Any]) -> list[str]:
    """Paths of the projected kernels.

    Args:
      opt_state: any nest of optax states.
      who: asks.
      leaves: parameters or gradients by path.

    Raises:
      ValueError: without a projection, or when a kernel is not among the leaves.
    """
    paths = [p for s in projections(opt_state, who) for p in _spectral.owners_of(s)]
    for path in paths:
        _spectral.check_path(path, leaves)
    return paths


def subspaces(
    states: Sequence[BasisState], leaves: Mapping[str, Any]
) -> dict[str, Subspace]:
    """The subspace of every projected kernel, by path.

    Args:
      states: of `with_bases` or `projections`.
      leaves: parameters or gradients by path.

    Raises:
      ValueError: when a kernel of a state is not among the leaves.
    """
    found = {}
    for state in states:
        layers = _spectral.split_layers(state)
        for path, owner in _spectral.owners_of(state).items():
            _spectral.check_path(path, leaves)
            basis = _adapt.basis_in_use(layers[owner])
            stacked = state.spectrum[owner].trace.shape
            view = _layout.view_of(jnp.shape(leaves[path]), basis.shape, stacked)
            found[path] = Subspace(_layout.from_kernel_form(basis, view), view)
    return found


def scaled_to(
    radius: Array, parts: Mapping[str, Array], joined: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """`parts` times ``radius / norm``, zero where the norm is.

    Args:
      radius: ``()``, length of the whole step.
      parts: path -> part of the step; the norm is over all of them.
      joined: parts of the norm, if not the same.
    """
    norm = optax.tree.norm(dict(parts if joined is None else joined))
    factor = jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1), 0)
    return {path: (factor * part).astype(part.dtype) for path, part in parts.items()}


def add(
    tree: PyTree, changes: Mapping[str, Array | Coordinates], sign: int = 1
) -> PyTree:
    """`tree` plus (or minus) `changes` by path, in the dtype of its leaves.

    Coordinates are added to coordinates.
    """
    leaves, treedef = _layout.flatten_with_paths(tree)
    for path, change in changes.items():
        leaf = leaves[path]
        if isinstance(change, Coordinates):
            leaves[path] = jax.tree.map(lambda x, y: x + sign * y, leaf, change)
            continue
        wide = leaf.astype(compute_dtype(leaf.dtype)) + sign * change
        leaves[path] = wide.astype(leaf.dtype)
    return treedef.unflatten(leaves.values())


def lifted(
    parts: Mapping[str, Array], spaces: Mapping[str, Subspace]
) -> dict[str, Array]:
    """Coordinates lifted to kernels; other parts as they are."""
    return {
        path: spaces[path].lift(part) if path in spaces else part
        for path, part in parts.items()
    }


def value_at(radius: optax.ScalarOrSchedule, step: Array) -> Array:
    """The radius at a step: a number, or what the schedule says."""
    return jnp.asarray(radius(step) if callable(radius) else radius)


def check_radius(who: str, radius: optax.ScalarOrSchedule) -> None:
    """Raise for a radius that is negative or no number."""
    if not callable(radius):
        _checks.check_number(f"{who}: radius", radius, 0.0)
