"""Steps away from the parameters, inside the eigenbases that a state holds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import checks, layout, paths, state
from dsbp_optax.core.layout import Coordinates, MatrixView
from dsbp_optax.core.state import SpectralState
from dsbp_optax.linalg import subspace
from dsbp_optax.linalg.types import Array, PyTree, compute_dtype


class Subspace(NamedTuple):
    """The eigenbasis of one kernel.

    Attributes:
      basis: ``V (count, d, k)``.
      view: how the kernel is read as matrices.
    """

    basis: Array
    view: MatrixView

    def project(self, kernel: Array | Coordinates) -> Array:
        """``V^T G (count, k, m)``."""
        if isinstance(kernel, Coordinates):
            values = layout.to_coordinates(kernel.values, self.view)
            return values.astype(self.basis.dtype)
        wide = kernel.astype(self.basis.dtype)[None]
        return subspace.project(self.basis, layout.to_matrices(wide, self.view))

    def held(self, coordinates: Array) -> Coordinates:
        """Coordinates in the form in which they stand for a gradient."""
        return Coordinates(layout.from_coordinates(coordinates, self.view))

    def lift(self, coordinates: Array) -> Array:
        """``V u``, shaped as the kernel."""
        matrices = subspace.lift(self.basis, coordinates)
        return layout.from_matrices(matrices, self.view)[0]


def with_bases(opt_state: PyTree, who: str) -> list[SpectralState]:
    """The states of projections and metrics in `opt_state`.

    Raises:
      ValueError: when there is none.
    """
    states = state.find_states(opt_state, "projection", "metric", "momentum_metric")
    if not states:
        raise ValueError(
            f"{who}: got an optimizer without an eigenbasis, expected one with "
            "scale_by_spectral_projection or scale_by_activation_metric in it. Remedy: "
            "wrap dsbp_sgd, dsbp_adamw, dsbp_muon or a chain with one of the two."
        )
    return states


def projections(opt_state: PyTree, who: str) -> list[SpectralState]:
    """The projections' states in `opt_state`.

    Raises:
      ValueError: when there is none.
    """
    states = state.find_states(opt_state, "projection")
    if not states:
        raise ValueError(
            f"{who}: got an optimizer without scale_by_spectral_projection, expected "
            "one with a momentum in coordinates. Remedy: wrap dsbp_sgd, "
            "subspace_adamw, subspace_muon or a chain with the projection in it."
        )
    return states


def subspaces(
    states: Sequence[SpectralState], leaves: Mapping[str, Any]
) -> dict[str, Subspace]:
    """The subspace of every projected kernel, by path.

    Args:
      states: of `with_bases` or `projections`.
      leaves: parameters or gradients by path.

    Raises:
      ValueError: when a kernel of a state is not among the leaves.
    """
    found = {}
    for one in states:
        for path, layer in state.by_path(one).items():
            if layer.basis is None:
                continue
            if path not in leaves:
                raise ValueError(
                    f"the state holds a basis for '{path}', which is not among the "
                    f"parameters ({checks.some(leaves)}). Remedy: pass the whole tree "
                    "that init saw."
                )
            found[path] = Subspace(state.wide_basis(layer), layer.kernel.view)
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
    leaves, treedef = paths.flatten(tree)
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


def check_radius(who: str, radius: optax.ScalarOrSchedule) -> None:
    """Raise for a radius that is negative or no number."""
    checks.check_number(f"{who}: radius", radius, 0.0, schedule=True)
