"""Projection onto a basis and changes of it, for one ``d x m`` matrix."""

import jax
import jax.numpy as jnp

from dsbp_optax.linalg.types import Array

_HIGHEST = jax.lax.Precision.HIGHEST


def project(basis: Array, matrix: Array) -> Array:
    """Coordinates ``V^T G``: ``(*b, d, k), (*b, d, m) -> (*b, k, m)``."""
    return jnp.einsum("...dk,...dm->...km", basis, matrix, precision=_HIGHEST)


def lift(basis: Array, coordinates: Array) -> Array:
    """``V u (*b, d, m)``, the inverse of `project` on the subspace."""
    return jnp.einsum("...dk,...km->...dm", basis, coordinates, precision=_HIGHEST)


def squared_norm(matrix: Array) -> Array:
    """``|M|_F^2`` of one array, ``()``."""
    return jnp.sum((matrix * matrix.conj()).real)


def captured_energy(coordinates: Array, matrix: Array) -> Array:
    """Share ``|V^T G|^2 / |G|^2`` of a gradient inside the subspace, in [0, 1].

    0 for a zero gradient.
    """
    whole = squared_norm(matrix)
    safe = jnp.where(whole > 0, whole, 1)
    return jnp.minimum(jnp.where(whole > 0, squared_norm(coordinates) / safe, 0), 1)


def rotation(new_basis: Array, old_basis: Array) -> Array:
    """``R = V_new^T V_old (*b, k, k)``, which carries coordinates over."""
    return jnp.einsum("...dk,...dj->...kj", new_basis, old_basis, precision=_HIGHEST)


def principal_angles(left: Array, right: Array) -> Array:
    """Principal angles in radians between two subspaces, ascending.

    Args:
      left: ``(*b, d, k)`` orthonormal columns.
      right: ``(*b, d, k)`` orthonormal columns.

    Returns:
      ``(*b, k)``, from the singular values of the projection and, where the cosine
      loses its digits, of the complement.
    """
    cross = rotation(left, right)
    cosine = jnp.linalg.svd(cross, compute_uv=False)
    sine = jnp.linalg.svd(right - lift(left, cross), compute_uv=False)[..., ::-1]
    return jnp.arctan2(jnp.clip(sine, 0, 1), jnp.clip(cosine, 0, 1))


def rotate_first_moment(rotation: Array, moment: Array) -> Array:
    """``m <- R m`` for coordinates ``(k, m)``."""
    return jnp.matmul(rotation, moment, precision=_HIGHEST).astype(moment.dtype)


def rotate_second_moment(rotation: Array, moment: Array) -> Array:
    """``v <- (R * R) v + (1 - sum_j R_ij^2) mean(v)``: non-negative, mass kept.

    The first term is exact for uncorrelated coordinates. The second stands for what a
    new direction has from outside the old basis: the mean of its column, so that a
    basis that has turned away altogether keeps the scale of its steps.
    """
    squares = rotation * rotation
    turned = rotate_first_moment(squares, moment)
    outside = jnp.maximum(1 - jnp.sum(squares, axis=-1, keepdims=True), 0)
    mean = jnp.mean(moment, axis=-2, keepdims=True)
    return (turned + outside * mean).astype(moment.dtype)
