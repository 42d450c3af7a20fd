"""Projection onto a basis and what follows, on plain ``(*batch, ...)`` arrays."""

import jax
import jax.numpy as jnp

from dsbp_optax._types import Array

_HIGHEST = jax.lax.Precision.HIGHEST


def project(basis: Array, matrix: Array, flipped: bool = False) -> Array:
    """Coordinates ``V^T G`` of each matrix.

    Args:
      basis: ``(*batch, d, k)`` orthonormal columns.
      matrix: ``(*batch, d, m)``, flipped ``(*batch, m, d)``.
      flipped: whether the matrices are held transposed, as their kernel has them.

    Returns:
      ``(*batch, k, m)``, flipped ``(*batch, m, k)``.
    """
    axes = "...dk,...md->...mk" if flipped else "...dk,...dm->...km"
    return jnp.einsum(axes, basis, matrix)


def lift(basis: Array, coordinates: Array, flipped: bool = False) -> Array:
    """``V u``, the inverse of `project` on the subspace; same shapes."""
    axes = "...dk,...mk->...md" if flipped else "...dk,...km->...dm"
    return jnp.einsum(axes, basis, coordinates)


def squared_norm(matrix: Array) -> Array:
    """``|M|_F^2`` of each matrix: ``(*batch, d, m) -> (*batch, 1, 1)``."""
    return jnp.sum(matrix * matrix, axis=(-2, -1), keepdims=True)


def captured_energy(coordinates: Array, matrix: Array) -> Array:
    """Share ``|V^T G|^2 / |G|^2`` of a gradient inside the subspace, in [0, 1].

    ``(*batch, k, m), (*batch, d, m) -> (*batch, 1, 1)``; 0 for a zero gradient.
    """
    whole = squared_norm(matrix)
    safe = jnp.where(whole > 0, whole, 1)
    return jnp.minimum(jnp.where(whole > 0, squared_norm(coordinates) / safe, 0), 1)


def rotation(new_basis: Array, old_basis: Array) -> Array:
    """``R = V_new^T V_old (*batch, k, k)``, which carries coordinates over."""
    return jnp.einsum("...dk,...dj->...kj", new_basis, old_basis, precision=_HIGHEST)


def principal_angles(left: Array, right: Array) -> Array:
    """Principal angles in radians between two subspaces, ascending.

    Args:
      left: ``(*batch, d, k)`` orthonormal columns.
      right: ``(*batch, d, k)`` orthonormal columns.

    Returns:
      ``(*batch, k)``, from the singular values of the projection and, where the
      cosine loses its digits, of the complement.
    """
    cross = rotation(left, right)
    cosine = jnp.linalg.svd(cross, compute_uv=False)
    sine = jnp.linalg.svd(right - lift(left, cross), compute_uv=False)[..., ::-1]
    return jnp.arctan2(jnp.clip(sine, 0, 1), jnp.clip(cosine, 0, 1))


def rotate_first_moment(rotation: Array, moment: Array, flipped: bool = False) -> Array:
    """``m <- R m`` for coordinates ``(*batch, k, m)``, flipped ``(*batch, m, k)``."""
    axes = "...kj,...mj->...mk" if flipped else "...kj,...jm->...km"
    carried = jnp.einsum(axes, rotation, moment, precision=_HIGHEST)
    return carried.astype(moment.dtype)


def rotate_second_moment(
    rotation: Array, moment: Array, flipped: bool = False
) -> Array:
    """``v <- (R * R) v + (1 - sum_j R_ij^2) mean(v)``: non-negative, mass kept.

    The first term is exact for uncorrelated coordinates. The second stands for what a
    new direction has from outside the old basis: the mean of its column, so that a
    basis that has turned away altogether keeps the scale of its steps. A row of `R`
    that is zero is a direction not in use, and stays zero.
    """
    squares = rotation * rotation
    turned = rotate_first_moment(squares, moment, flipped)
    inside = jnp.sum(squares, axis=-1)
    outside = jnp.where(inside > 0, jnp.maximum(1 - inside, 0), 0)
    outside = outside[..., None, :] if flipped else outside[..., :, None]
    mean = jnp.mean(moment, axis=-1 if flipped else -2, keepdims=True)
    return (turned + outside * mean).astype(moment.dtype)


def project_leading(basis: Array, matrix: Array, flipped: bool = False) -> Array:
    """``e_1^T W`` for the leading direction alone, as a sum and not a product.

    Args:
      basis: ``(*batch, d, k)``, leading direction first.
      matrix: ``(*batch, d, m)``, flipped ``(*batch, m, d)``.
      flipped: as in `project`.

    Returns:
      ``(*batch, 1, m)``, flipped ``(*batch, m, 1)``.
    """
    if flipped:
        return jnp.sum(matrix * basis[..., None, :, 0], axis=-1, keepdims=True)
    return jnp.sum(matrix * basis[..., :1], axis=-2, keepdims=True)


def add_leading(coordinates: Array, row: Array, flipped: bool = False) -> Array:
    """`coordinates` plus `row` along the leading direction.

    Args:
      coordinates: ``(*batch, k, m)``, flipped ``(*batch, m, k)``.
      row: ``(*batch, 1, m)``, flipped ``(*batch, m, 1)``.
      flipped: as in `project`.
    """
    if flipped:
        return coordinates.at[..., :, :1].add(row)
    return coordinates.at[..., :1, :].add(row)
