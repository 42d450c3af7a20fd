"""The activation metric: directions of steepest descent in the change of outputs.

    S = I - V diag(1 - f) V^T,   f = ((rest + g) / (lambda + g))^a
    update = |D| / |S D| S D,   D = direction(S M),   g = damping tr C / d

With exponent 1/2 and a whole basis this is steepest descent under ``|A dW|``, the
change of a layer's output on its own inputs, in the norm that `direction` descends in:
a step along what the activations share is shortened, since there it changes most. A
scaling before an orthogonalisation is mostly undone by it; the one behind shortens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast, get_args

import jax.numpy as jnp
import optax

from dsbp_optax.core import checks, plan
from dsbp_optax.core.paths import PerPath
from dsbp_optax.core.plan import Basis, Choices
from dsbp_optax.core.rank import Rank, RankFraction
from dsbp_optax.core.transform import Rule, Seen, of_matrix, transformation, value_at
from dsbp_optax.linalg.subspace import lift, project, squared_norm
from dsbp_optax.linalg.types import Array, Direction, PyTree, Scalar
from dsbp_optax.rules import inner as inner_
from dsbp_optax.rules.filters import remaining_mean

#: Where the metric acts: before the direction is taken, behind it, or both.
Where: TypeAlias = Literal["both", "before", "after"]
#: (seed of a matrix, its basis (d, k)) -> what stands in its place, in an experiment
Directions: TypeAlias = Callable[[Array, Array], Array]

#: Directions of a basis that serves as a metric alone.
SHARE = RankFraction(1 / 8, most=32)
#: The same for rules that lean on it more.
LARGE_SHARE = RankFraction(3 / 16, most=32)
#: Steps between refreshes of a metric.
EVERY = 20


def scale_by_activation_metric(
    direction: Direction | None = None,
    exponent: optax.ScalarOrSchedule = 0.5,
    *,
    inner: optax.GradientTransformation | None = None,
    damping: Scalar = 0.2,
    where: Where = "both",
    rank: PerPath[Rank] = SHARE,
    update_every: Scalar = EVERY,
    basis: Basis | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale the update of each kernel by the metric of its layer's activations.

        S = I - V diag(1 - f) V^T,   f = min(1, (rest + g) / (lambda + g))^exponent
        update = |D| / |S D| S D,   D = direction(inner(S M)),   g = damping tr C / d

    V and lambda are the top eigenpairs of the layer's activations, rest is the mean of
    the other eigenvalues. What stands between the two factors works on ``S^-1 W`` in
    the place of W. Put it behind a momentum or round one, before the learning rate. The
    direction leaves parameters that are no kernels; before the first statistics S is
    the identity.

    Args:
      direction: ``(matrix, fan in, fan out) -> matrix``, such as `orthogonalize` gives;
        None is the identity.
      exponent: a, a number or a schedule; 0 turns the metric off.
      inner: a ``scale_by_*`` transformation, run on each matrix of a kernel and on the
        flat dict of the other parameters; None is the identity.
      damping: in units of the mean eigenvalue.
      where: "both" sides of the direction; "before" or "after" it alone.
      rank: k, as in `scale_by_spectral_projection`.
      update_every: p, steps between refreshes, as there.
      basis: how bases are kept, see `Basis`; by default 2 power iterations and
        bfloat16.

    Returns:
      A transformation whose ``update`` takes ``statistics=``. Kernels without one use
      the basis of what comes in, the gradient's own or its momentum's; an ``update``
      that is traced without any warns, one with ``statistics={}`` does not.

    Raises:
      ValueError, TypeError: for numbers out of range, naming them; for a direction that
        gives another shape.

    Cost: ``2 d k`` bytes of state a kernel; ``8 d k m`` FLOPs a step.

    Reference: the two-sided form is this package's own; one-sided whitening by
    activations is FOOF (arXiv 2201.12250), before an orthogonalisation Newton-Muon
    (arXiv 2604.01472).

    Example:
      >>> import optax, dsbp_optax
      >>> tx = optax.chain(
      ...     dsbp_optax.scale_by_quantized_momentum(0.95, bits=6),
      ...     dsbp_optax.scale_by_activation_metric(dsbp_optax.orthogonalize()),
      ...     optax.scale_by_learning_rate(0.02),
      ... )
    """
    rest = inner_.as_transformation(inner)
    inner_.check_inner(rest)
    between = None if inner is None else of_matrix(rest)
    rule = metric_rule(direction, exponent, damping, where, between=between)
    return transformation(
        "metric", rule, rest, metric_choices(rank, update_every, basis)
    )


def metric_choices(rank: Any, update_every: Any, basis: Basis | None) -> Choices:
    """How the bases of a metric are kept: for every kernel, coarsely, often."""
    return plan.choices(rank, update_every, basis, 2, "bfloat16", "always")


def metric_rule(
    direction: Direction | None = None,
    exponent: optax.ScalarOrSchedule = 0.5,
    damping: Scalar = 0.2,
    where: Where = "both",
    *,
    before: Rule | None = None,
    between: Rule | None = None,
    directions: Directions | None = None,
) -> Rule:
    """``|D| / |S D| S D`` of one matrix, ``D = direction(between(S before(G)))``.

    Args:
      direction: as in `scale_by_activation_metric`, like all up to `where`.
      exponent: a.
      damping: g.
      where: before, after or both.
      before: moments of the gradient itself.
      between: moments of the scaled gradient.
      directions: in an experiment, what stands in the place of a basis.
    """
    if where not in get_args(Where):
        raise ValueError(f"where: got {where!r}, expected one of {get_args(Where)}.")
    if direction is not None and not callable(direction):
        raise TypeError(
            f"direction: got {direction!r}, expected a function (matrix, fan in, fan "
            "out) -> matrix, such as dsbp_optax.orthogonalize(), or None."
        )
    checks.check_number("exponent", exponent, 0.0, schedule=True)
    checks.check_number("damping", damping, 0.0)

    def init(zeros: Array, rank: int) -> PyTree:
        return tuple(
            () if r is None else r.init(zeros, rank) for r in (before, between)
        )

    def metric(size: int, seen: Seen) -> Callable[[Array], Array]:
        if seen.basis is None:
            return lambda matrix: matrix
        a = value_at(exponent, seen.step)
        f = metric_factors(seen.eigenvalues, seen.trace, size, a, damping)
        v = directions(seen.seed, seen.basis) if directions else seen.basis
        return lambda matrix: apply_metric(v, f.astype(matrix.dtype), matrix)

    def update(g: Array, seen: Seen, held: PyTree) -> tuple[Array, PyTree]:
        outer, inner = held
        scaled = metric(len(g), seen)

        if before is not None:
            g, outer = before.update(g, seen, outer)
        if where != "after":
            g = scaled(g)
        if between is not None:
            g, inner = between.update(g, seen, inner)
        if direction is not None:
            g = directed(direction, g, seen.fans)
        if where != "before":
            g = keep_norm(g, scaled(g))
        return g, (outer, inner)

    def incoming(g: Array, held: PyTree) -> Array:
        return cast(Rule, before).update(g, cast(Any, None), held[0])[0]

    whole = "scale_by_activation_metric"
    return Rule(init, update, incoming=incoming if before else None, whole=whole)


def metric_factors(
    eigenvalues: Array, trace: Array, size: int, exponent: Scalar, damping: Scalar
) -> Array:
    """``f = min(1, (rest + g) / (lambda + g))^a``: ``(k,)``, 1 without a trace.

    Args:
      eigenvalues: ``(k,)`` of the second moment, a sample.
      trace: ``()``, its trace.
      size: ``d``.
      exponent: a.
      damping: g in units of ``tr C / d``.
    """
    mean = trace / size
    outside = size - eigenvalues.shape[-1]
    rest = mean  # A whole basis has nothing outside: the scale is that of the mean.
    if outside > 0:
        rest = jnp.minimum(remaining_mean(eigenvalues, trace, size), mean)
    shift = damping * mean
    strong = eigenvalues + shift
    ratio = (rest + shift) / jnp.where(strong > 0, strong, 1)
    if outside > 0:
        ratio = jnp.minimum(ratio, 1)
    return jnp.where((trace > 0) & (strong > 0), ratio, 1) ** exponent


def apply_metric(basis: Array, factors: Array, matrix: Array) -> Array:
    """``S M = M - V (1 - f) V^T M``.

    Args:
      basis: ``(d, k)`` orthonormal columns.
      factors: ``f (k,)``.
      matrix: ``(d, m)``.
    """
    return matrix + lift(basis, (factors - 1)[:, None] * project(basis, matrix))


def keep_norm(like: Array, matrix: Array) -> Array:
    """`matrix` with the Frobenius norm of `like`; zero stays zero."""
    wanted, got = squared_norm(like), squared_norm(matrix)
    return matrix * jnp.sqrt(wanted / jnp.where(got > 0, got, 1))


def directed(direction: Direction, matrix: Array, fans: tuple[int, int]) -> Array:
    """The direction of a matrix, or an error if it has another shape."""
    found = direction(matrix, *fans)
    if jnp.shape(found) != jnp.shape(matrix):
        raise ValueError(
            f"direction of a {fans[0]} x {fans[1]} kernel: got shape "
            f"{jnp.shape(found)}, expected {jnp.shape(matrix)}. Remedy: a function "
            "(matrix, fan in, fan out) -> matrix that keeps the shape, such as "
            "dsbp_optax.orthogonalize()."
        )
    return found.astype(matrix.dtype)
