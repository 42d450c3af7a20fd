"""Whether a checkpoint fits what it is restored into: by path, before it is read."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from dsbp_optax import _checks, _layout
from dsbp_optax._layout import Shape
from dsbp_optax._types import PyTree

_VERSION, _BASIS = "version", "basis"


class Entry(NamedTuple):
    """What is known of an array without reading it; the dtype may be unknown."""

    shape: Shape
    dtype: str | None


class Listing(NamedTuple):
    """The contents of a tree.

    Attributes:
      arrays: path -> array.
      versions: path of a spectral state -> version of its form.
      bases: paths of bases.
    """

    arrays: dict[str, Entry]
    versions: dict[str, str]
    bases: set[str]


def check_checkpoint(saved: PyTree, expected: PyTree) -> None:
    """Raise, by path, where a checkpoint does not fit what is to be restored.

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
    _check_projected(got, want)
    _check_paths(got.arrays, want.arrays)
    for path in sorted(want.arrays, key=lambda path: path not in want.bases):
        _check_array(path, got.arrays[path], want.arrays[path], path in want.bases)


def _listed(tree: PyTree) -> Listing:
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, Mapping) and not x
    )
    listing = Listing({}, {}, set())
    for keys, leaf in leaves:
        names = [_layout.path_string([key]) for key in keys]
        if not isinstance(leaf, Mapping):
            path, dtype = _layout.path_string(keys), getattr(leaf, "dtype", None)
            shape = tuple(getattr(leaf, "shape", None) or ())
            listing.arrays[path] = Entry(shape, None if dtype is None else str(dtype))
            if _BASIS in names:
                listing.bases.add(path)
        elif _VERSION in names[-2:-1]:
            listing.versions["/".join(names[:-2])] = names[-1]
    return listing


def _check_versions(got: Listing, want: Listing) -> None:
    for path, version in want.versions.items():
        known = got.versions.get(path, "none")
        prefix = f"{path}/{_BASIS}/".removeprefix("/")
        if known != version and any(p.startswith(prefix) for p in got.arrays):
            raise ValueError(
                f"checkpoint: the optimizer state '{path}' is of version {known}, "
                f"expected {version}. Remedy: go on with the dsbp_optax that wrote it, "
                "or restore the parameters alone and init the optimizer again."
            )


def _check_projected(got: Listing, want: Listing) -> None:
    """The same kernels are projected, if it is the same model in other respects."""
    for path in sorted(want.bases ^ got.bases):
        kernel = path.rpartition(f"{_BASIS}/")[2]
        known = all(
            any(other.endswith(kernel) for other in listing.arrays)
            for listing in (got, want)
        )
        if got.bases and want.bases and known:
            space = "projected" if path in got.bases else "in full space"
            raise ValueError(
                f"checkpoint: '{path}': the state keeps '{kernel}' {space}, this "
                "optimizer would not: at another rank the other may take less memory. "
                f"Remedy: give that path the rank it had, rank={{'{kernel}': ..., ...}}"
                "; dsbp_optax.diagnostics.explain(tx, params) shows what is decided."
            )


def _check_paths(got: Mapping[str, Entry], want: Mapping[str, Entry]) -> None:
    missing = [path for path in want if path not in got]
    strange = [path for path in got if path not in want]
    if not missing and not strange:
        return
    parts = []
    if missing:
        near = _checks.did_you_mean(missing[0], strange)
        parts.append(f"it has no {_checks.some(missing)}.{near}")
    if strange:
        parts.append(f"it has {_checks.some(strange)}, for which there is no place.")
    raise ValueError(
        f"checkpoint: of another model or optimizer: {' '.join(parts)} Remedy: build "
        "the model and the optimizer that wrote it."
    )


def _check_array(path: str, got: Entry, want: Entry, basis: bool) -> None:
    if basis and got.shape[:-1] == want.shape[:-1] and got.shape != want.shape:
        raise ValueError(
            f"checkpoint: the basis '{path}' has rank {got.shape[-1]}, expected "
            f"{want.shape[-1]}. Remedy: restore with an optimizer of rank "
            f"{got.shape[-1]}, or init again."
        )
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
