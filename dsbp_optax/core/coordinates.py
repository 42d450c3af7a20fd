"""Gradients in the coordinates of a state's bases, for accumulation in ``k x m``."""

import itertools
from collections.abc import Iterable

import jax.numpy as jnp

from dsbp_optax.core import checks, layout, paths, sharding, state
from dsbp_optax.core.layout import Coordinates
from dsbp_optax.core.plan import Kernel
from dsbp_optax.linalg.types import Array, PyTree, compute_dtype


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
      >>> tx = dsbp_optax.subspace_muon(0.02, rank=4)
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
    states = state.find_states(opt_state, "projection")
    if not states:
        raise ValueError(
            f"project_gradients: got {type(opt_state).__name__}, which holds no state "
            "of scale_by_spectral_projection. Remedy: an optimizer with one, such as "
            "subspace_muon, and gradients first: project_gradients(grads, opt_state)."
        )
    leaves, treedef = paths.flatten(grads)
    for path, (one, basis) in bases_of(states).items():
        if path not in leaves:
            raise ValueError(
                f"the state holds a basis for '{path}', which is not among the "
                f"gradients ({checks.some(leaves)}). Remedy: pass the whole tree of "
                "gradients."
            )
        leaves[path] = _projected(one, leaves[path], basis)
    return treedef.unflatten(leaves.values())


def bases_of(states: list[state.SpectralState]) -> dict[str, tuple[Kernel, Array]]:
    """Path -> kernel and its basis in kernel form."""
    found = {}
    for one in states:
        for path, layer in state.by_path(one).items():
            if layer.basis is not None:
                view = layer.kernel.view
                basis = layout.to_kernel_form(state.wide_basis(layer), view)
                found[path.split("#")[0]] = layer.kernel, basis
    return found


def _projected(one: Kernel, gradient: Array | Coordinates, basis: Array) -> Coordinates:
    """``V^T G`` of one kernel, summed over the axes of its rows."""
    view, got = one.view, "Coordinates"
    if not isinstance(gradient, Coordinates):
        got = f"shape {jnp.shape(gradient)}"
    if got != f"shape {view.shape}":
        raise ValueError(
            f"gradient of '{one.path}': got {got}, expected a whole gradient of shape "
            f"{view.shape}. Remedy: pass the gradients of the parameters that init "
            "saw, each once."
        )
    every = list(range(len(view.shape)))
    used = sorted((*view.batch, *view.rows))
    kept = [a for a in every if a not in view.rows]
    dtype = compute_dtype(jnp.result_type(gradient))

    def product(gradient: Array, basis: Array) -> Array:
        values = jnp.einsum(
            jnp.asarray(gradient).astype(dtype),
            every,
            basis.astype(dtype).reshape(*(view.shape[a] for a in used), one.rank),
            [*used, len(every)],
            [*kept, len(every)],
        )
        return jnp.expand_dims(values, view.rows)

    place = sharding.beside(gradient, view.coordinate_form(one.rank))
    return Coordinates(sharding.in_place(product, place, gradient, basis))


def find(tree: PyTree) -> dict[str, Coordinates]:
    """All coordinates in a tree of gradients, by path."""
    leaves, _ = paths.flatten(tree)
    return {path: x for path, x in leaves.items() if isinstance(x, Coordinates)}


def refuse(given: Iterable[str], who: str) -> None:
    """Raise for coordinates where the whole gradient is needed."""
    some = list(itertools.islice(given, 6))
    if some:
        raise ValueError(
            f"updates: got Coordinates for {checks.some(some)}, but {who} needs the "
            "gradient outside of the subspace too, which they do not hold. Remedy: "
            "subspace_muon or subspace_adamw, or a projection with residual=None, and "
            "add_spectral_sharpness after it; or whole gradients."
        )
