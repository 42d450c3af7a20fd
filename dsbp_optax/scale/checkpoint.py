"""Whether a checkpoint fits what it is restored into: by path, before it is read."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from dsbp_optax.core import checks, paths, plan
from dsbp_optax.core.layout import Shape
from dsbp_optax.linalg.types import PyTree


class Entry(NamedTuple):
    """What is known of an array without reading it; the dtype may be unknown."""

    shape: Shape
    dtype: str | None


class Listing(NamedTuple):
    """The contents of a tree.

    Attributes:
      arrays: path -> array.
      versions: path of a spectral state -> version of its form.
      plans: (path of a spectral state, path of a kernel) -> what was decided of it.
    """

    arrays: dict[str, Entry]
    versions: dict[str, str]
    plans: dict[tuple[str, str], str]


def check_checkpoint(saved: PyTree, expected: PyTree) -> None:
    """Raise an error that says by path where a checkpoint does not fit.

    Another model, another optimizer, another rank, another version of the state: the
    message says which, and what to do.

    Args:
      saved: shapes and dtypes in the checkpoint, such as orbax's
        ``checkpointer.metadata(path).item_metadata.tree``. Containers may be of other
        kinds than those of `expected`: a dict in the place of a named tuple.
      expected: the tree to restore into, or its shapes.

    Returns:
      Nothing.

    Raises:
      ValueError: for the first difference.

    Cost: none; shapes only.

    Example:
      >>> import jax, jax.numpy as jnp, dsbp_optax
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = dsbp_optax.dsbp_muon(0.02)
      >>> saved = jax.eval_shape(tx.init, params)  # or a checkpoint's metadata
      >>> dsbp_optax.check_checkpoint(saved, tx.init(params))
    """
    got, want = _listed(saved), _listed(expected)
    _check_versions(got, want)
    _check_plans(got, want)
    _check_paths(got.arrays, want.arrays)
    for path, array in want.arrays.items():
        _check_array(path, got.arrays[path], array)


def _listed(tree: PyTree) -> Listing:
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, Mapping) and not x
    )
    listing = Listing({}, {}, {})
    for keys, leaf in leaves:
        names = [paths.path_string([key]) for key in keys]
        if not isinstance(leaf, Mapping):
            path, dtype = paths.path_string(keys), getattr(leaf, "dtype", None)
            shape = tuple(getattr(leaf, "shape", None) or ())
            listing.arrays[path] = Entry(shape, None if dtype is None else str(dtype))
        elif "form" in names[-3:-2]:
            listing.versions["/".join(names[:-3])] = names[-2]
        elif "plan" in names[-4:-3]:
            *state, _, path, text, owner = names
            told = f"{plan.in_words(path, text)}, basis of {owner}"
            listing.plans["/".join(state), path] = told
    return listing


def _check_versions(got: Listing, want: Listing) -> None:
    for path, version in want.versions.items():
        known = got.versions.get(path, "none")
        ours = tuple(f"{path}/{x}/".removeprefix("/") for x in ("basis", "inner"))
        if known != version and any(p.startswith(ours) for p in got.arrays):
            raise ValueError(
                f"checkpoint: the optimizer state '{path}' is of version {known}, "
                f"expected {version}. Remedy: go on with the dsbp_optax that wrote it, "
                "or restore the parameters alone and init the optimizer again."
            )


def _check_plans(got: Listing, want: Listing) -> None:
    """The same was decided of each kernel; other kernels are for `_check_paths`."""
    if got.plans.keys() != want.plans.keys():
        return
    for place in sorted(want.plans):
        if got.plans[place] != want.plans[place]:
            raise ValueError(
                f"checkpoint: kernel '{place[1]}' of the state '{place[0]}': got "
                f"{got.plans[place]}, expected {want.plans[place]}. Remedy: restore "
                "with an optimizer of the rank, side and axes that wrote it, or init "
                "again; dsbp_optax.diagnostics.explain(tx, params) shows what is "
                "decided."
            )


def _check_paths(got: Mapping[str, Entry], want: Mapping[str, Entry]) -> None:
    missing = [path for path in want if path not in got]
    strange = [path for path in got if path not in want]
    if not missing and not strange:
        return
    parts = []
    if missing:
        near = checks.did_you_mean(missing[0], strange)
        parts.append(f"it has no {checks.some(missing)}.{near}")
    if strange:
        parts.append(f"it has {checks.some(strange)}, for which there is no place.")
    raise ValueError(
        f"checkpoint: of another model or optimizer: {' '.join(parts)} Remedy: build "
        "the model and the optimizer that wrote it."
    )


def _check_array(path: str, got: Entry, want: Entry) -> None:
    if got.shape != want.shape:
        raise ValueError(
            f"checkpoint: '{path}': got shape {got.shape}, expected {want.shape}. "
            "Remedy: build the model and the optimizer that wrote it."
        )
    if None not in (got.dtype, want.dtype) and got.dtype != want.dtype:
        raise ValueError(
            f"checkpoint: '{path}': got dtype {got.dtype}, expected {want.dtype}. "
            "Remedy: restore in the dtype it has, then convert; a restore that casts "
            "does so silently."
        )
