"""Gradients in the coordinates of a state's bases, for accumulation in ``k x m``."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from dsbp_optax import _checks, _layout, _sharding, _spectral
from dsbp_optax._layout import Coordinates
from dsbp_optax._spectral import SpectralProjectionState
from dsbp_optax._types import Array, PyTree, compute_dtype


def project_gradients(grads: PyTree, opt_state: PyTree) -> PyTree:
    """Gradients of projected kernels as coordinates ``V^T G`` in the state's bases.

    For micro-batches: an accumulator of ``k m`` numbers a kernel in the place of
    ``d m``. Trees of them add up with ``jax.tree.map(jnp.add, ...)``, and ``update``
    of a transformation without a residual takes them as gradients:

    * on a refresh they turn with the basis, ``V_new^T V_old P``, so what the old basis
      did not hold is not seen in that step;
    * a basis is refreshed from activation statistics alone; without any it stays;
    * before the first window of refreshes is complete they are used as they are, in
      the random basis that a state begins with.

    Args:
      grads: gradients, shaped as the parameters.
      opt_state: the state that ``update`` will be given, any nest of optax states.

    Returns:
      `grads` with `Coordinates` in the place of each projected kernel, and all other
      leaves as they are.

    Raises:
      ValueError: when the state holds no projection, or it does not fit `grads`.

    Cost: ``2 d k m`` FLOPs a kernel.

    Example:
      >>> import jax, jax.numpy as jnp, dsbp_optax
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=4, residual=0.0)
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}
      >>> state = tx.init(params)
      >>> total = jax.tree.map(
      ...     jnp.zeros_like, dsbp_optax.project_gradients(params, state))
      >>> for grads in (params, params):  # of two micro-batches
      ...     small = dsbp_optax.project_gradients(grads, state)
      ...     total = jax.tree.map(jnp.add, total, small)
      >>> total["kernel"].values.shape
      (1, 32, 4)
      >>> updates, state = tx.update(total, state, params)
      >>> updates["kernel"].shape
      (64, 32)
    """
    states = [
        state
        for state in _spectral.find_states(opt_state)
        if isinstance(state, SpectralProjectionState)
    ]
    if not states:
        raise ValueError(
            f"project_gradients: got {type(opt_state).__name__}, which holds no state "
            "of scale_by_spectral_projection. Remedy: an optimizer with one, such as "
            "subspace_muon, and gradients first: project_gradients(grads, opt_state)."
        )
    leaves, treedef = _layout.flatten_with_paths(grads)
    for state in states:
        layers = _spectral.split_layers(state)
        for path, owner in _spectral.owners_of(state).items():
            basis, stacked = layers[owner].basis, layers[owner].spectrum.trace.shape
            leaves[path] = _project(path, leaves, basis, stacked)
    return treedef.unflatten(leaves.values())


def _project(
    path: str, leaves: Mapping[str, Any], basis: Array, stacked: tuple[int, ...]
) -> Coordinates:
    """``V^T G`` of one kernel, summed over the axes of its input."""
    if path not in leaves:
        raise ValueError(
            f"the state holds a basis for '{path}', which is not among the gradients "
            f"({_checks.some(leaves)}). Remedy: pass the whole tree of gradients."
        )
    gradient, form = leaves[path], basis.shape[:-1]
    whole = not isinstance(gradient, Coordinates)
    shape = jnp.shape(gradient) if whole else ()
    fits = all(n == d or d == 1 for n, d in zip(shape, form, strict=False))
    if len(shape) != len(form) or not fits:
        got = f"shape {shape}" if whole else "Coordinates"
        raise ValueError(
            f"gradient of '{path}': got {got}, expected a whole gradient that fits the "
            f"state's basis {basis.shape}. Remedy: pass the gradients of the "
            "parameters that init saw, each once."
        )
    every = range(len(shape))
    rows = [a for a in every if form[a] != stacked[a]]
    used = [a for a in every if form[a] > 1]
    kept = [a for a in every if a not in rows]
    dtype = compute_dtype(jnp.result_type(gradient))

    def product(gradient: Array, basis: Array) -> Array:
        values = jnp.einsum(
            _layout.astype(gradient, dtype),
            list(every),
            basis.astype(dtype).reshape(*(form[a] for a in used), basis.shape[-1]),
            [*used, len(shape)],
            [*kept, len(shape)],
        )
        return jnp.expand_dims(values, rows)

    small = (*(1 if a in rows else n for a, n in enumerate(shape)), basis.shape[-1])
    place = _sharding.beside(gradient, small)
    return Coordinates(_sharding.in_place(product, place, gradient, basis))


def find(tree: PyTree) -> dict[str, Coordinates]:
    """All coordinates in a tree of gradients, by path."""
    leaves, _ = _layout.flatten_with_paths(tree)
    return {path: x for path, x in leaves.items() if isinstance(x, Coordinates)}


def refuse(paths: Iterable[str], who: str) -> None:
    """Raise for coordinates where the whole gradient is needed."""
    some = list(itertools.islice(paths, 6))
    if some:
        raise ValueError(
            f"updates: got Coordinates for {_checks.some(some)}, but {who} needs the "
            "gradient outside of the subspace too, which they do not hold. Remedy: "
            "residual=None, as subspace_muon and subspace_adamw have it, and "
            "add_spectral_sharpness after the projection; or accumulate whole "
            "gradients."
        )
