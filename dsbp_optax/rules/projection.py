"""The projection of gradients onto each layer's eigenbasis, as one transformation.

P = f(Lambda) V^T G                      coordinates, (k, m), filtered
u = inner(P)                             any scale_by_*, its state in (k, m)
update = direction(V u + what the residual rule makes of G - V V^T G)
         + beta lambda_1 / tr(C) e_1 e_1^T W
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dsbp_optax.core import checks, plan
from dsbp_optax.core.paths import PerPath
from dsbp_optax.core.plan import Basis
from dsbp_optax.core.rank import Rank
from dsbp_optax.core.transform import Rule, Seen, transformation
from dsbp_optax.linalg import precision, subspace
from dsbp_optax.linalg.subspace import lift, squared_norm
from dsbp_optax.linalg.types import (
    Array,
    Direction,
    PyTree,
    Scalar,
    compute_dtype,
    is_zero,
)
from dsbp_optax.rules import inner as inner_
from dsbp_optax.rules import transport as transport_
from dsbp_optax.rules.filters import Filter, remaining_mean
from dsbp_optax.rules.metric import directed
from dsbp_optax.rules.residual import (
    DROPPED,
    Contribution,
    Factor,
    Outside,
    Residual,
    as_residual,
    pass_through,
)
from dsbp_optax.rules.sharpness import sharpness_term


def scale_by_spectral_projection(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: PerPath[Rank] = 16,
    update_every: Scalar = 100,
    spectral_filter: Filter | None = None,
    residual: Factor | Residual | None = None,
    direction: Direction | None = None,
    fallback: optax.GradientTransformation | None = None,
    sharpness: optax.ScalarOrSchedule = 0.0,
    project: Literal["auto", "always"] = "auto",
    project_cold: bool = False,
    transport: transport_.Additions = None,
    moment_dtype: Any = None,
    basis: Basis | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` in the top eigenspace of each layer's activations.

        V = top-k eigenvectors of C = A^T A / n
        update = direction(V inner(f V^T G) + residual rule of (G - V V^T G))

    Kernels without a basis, where projection saves no memory, go to the same `inner`
    in full space; what is no kernel (biases, embeddings) too, or to `fallback`.
    Gradients in, ascent direction out: put the learning rate after it.

    Args:
      inner: a ``scale_by_*`` transformation, run on the ``(k, m)`` coordinates of each
        matrix by itself; None for the identity.
      rank: k; an integer or a `RankFraction`; a mapping from glob pattern to one of
        these; or a callable ``(path, shape) -> one of these or None`` (None: do not
        project).
      update_every: p, steps between refreshes of the bases.
      spectral_filter: factors of the coordinates as a function of the spectrum, see
        `whiten`; None leaves them.
      residual: rule for what lies outside the subspace, see `normalize_residual` and
        `residual_momentum`; None drops it.
      direction: what becomes of a kernel's update as a matrix, see `orthogonalize`;
        None leaves it. Applies to kernels in full space as well.
      fallback: transformation for parameters that are no kernels (biases, scales,
        embeddings, paths of rank None); None: the same as for kernels. It may use
        parameters; like `inner` it gives an ascent direction.
      sharpness: beta, weight of ``lambda_1 / tr(C) e_1 e_1^T W``; a number or a
        schedule. Acts where the basis comes from activations.
      project: "auto" projects a kernel only where the inner state then takes less
        memory, basis included; "always" wherever there is a rank.
      project_cold: whether to project before the first window of q iterations is
        complete; otherwise gradients pass through unprojected until then.
      transport: additions to the table of how moments follow the basis,
        ``{("StateType", "field"): "first" | "second" | "invariant" | "reset"}``;
        "reset" starts all moments of a layer anew at each refresh.
      moment_dtype: dtype that moments in coordinates are stored in, None for that
        of the inner optimizer; bfloat16 is rounded stochastically; float16, whose
        range is too short, is refused.
      basis: how bases are kept, see `Basis`; by default 5 power iterations and the
        dtype of the computation.

    Returns:
      A transformation whose ``update`` takes ``statistics=``, a flat mapping from
      parameter path to `Sketch`, `Activations` or `Covariance`. Kernels without
      one use the basis of their own gradient. Without a residual, gradients may be
      `Coordinates`, see `project_gradients`.

    Raises:
      ValueError, TypeError: at construction, ``init`` or trace time, naming the
        argument and the parameter.

    Cost: ``d k`` numbers for a basis; ``4 d k m`` FLOPs a step; a refresh adds
    ``O(d k^2)`` and, without statistics, ``4 d k m``.

    Reference: Dynamic Spectral Backpropagation, arXiv 2505.23369.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_optax
      >>> tx = optax.chain(
      ...     dsbp_optax.scale_by_spectral_projection(optax.scale_by_adam(), rank=4),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
      >>> state = tx.init(params)
      >>> dsbp_optax.by_path(state)["dense/kernel"].basis.shape
      (64, 4)
      >>> updates, state = tx.update(params, state, params)
    """
    inner = inner_.as_transformation(inner)
    others = inner
    if fallback is not None:
        others = inner_.as_transformation(fallback, "fallback")
    if project not in ("auto", "always"):
        raise ValueError(f"project: got {project!r}, expected 'auto' or 'always'.")
    rule = projection_rule(
        inner,
        spectral_filter,
        as_residual(residual),
        direction,
        checks.check_number("sharpness", sharpness, 0.0, schedule=True),
        project_cold,
        transport_.make_table(transport),
        checks.check_dtype("moment_dtype", moment_dtype),
    )
    asked = plan.choices(rank, update_every, basis, 5, None, project)

    def check(rest: Mapping[str, Any]) -> None:
        inner_.check_inner(inner)
        if fallback is not None:
            inner_.check_fallback(others, rest)

    return transformation("projection", rule, others, asked, check)


def projection_rule(
    inner: optax.GradientTransformationExtraArgs,
    spectral_filter: Filter | None,
    residual: Residual,
    direction: Direction | None,
    sharpness: optax.ScalarOrSchedule,
    project_cold: bool,
    table: transport_.Table,
    moment_dtype: Any,
) -> Rule:
    """The projection of one matrix; arguments as in `scale_by_spectral_projection`."""

    def init(zeros: Array, rank: int) -> PyTree:
        if not rank:
            return inner.init(zeros), ()
        held = inner.init(jnp.zeros((rank, zeros.shape[1]), zeros.dtype))
        transport_.map_moments(lambda m, *_: _check_width(m, moment_dtype), held, table)
        return _stored(held, table, moment_dtype, None), residual.init(zeros)

    def update(g: Array, seen: Seen, held: PyTree) -> tuple[Array, PyTree]:
        moments, kept = held
        v = seen.basis
        if v is None:
            u, moments = inner.update(g, moments, None, **seen.extra)
            whole = u if direction is None else directed(direction, u, seen.fans)
            return whole, (moments, kept)
        given = seen.coordinates is not None
        p = seen.coordinates if given else subspace.project(v, g)
        u, moments = inner.update(
            filtered(p, seen, len(g)),
            _widened(moments, table, p.dtype),
            None,
            **seen.extra,
        )
        moments = _stored(moments, table, moment_dtype, seen)
        if given:
            inside = u if direction is None else directed(direction, u, seen.fans)
            whole = lift(v, inside)  # The polar factor of V u is V times that of u.
        else:
            outside = Outside(u, p, squared_norm(g), g, v)
            added, kept = residual.update(outside, kept)
            whole = combined(outside, added, seen)
            if direction is not None:
                whole = directed(direction, whole, seen.fans)
        if not is_zero(sharpness):
            whole = whole + sharpness_term(sharpness, seen)
        return whole, (moments, kept)

    def filtered(p: Array, seen: Seen, size: int) -> Array:
        if spectral_filter is None:
            return p
        rest = remaining_mean(seen.eigenvalues, seen.trace, size)
        factors = spectral_filter(seen.eigenvalues, rest)
        return jnp.where(seen.trace > 0, factors, 1)[:, None].astype(p.dtype) * p

    def combined(outside: Outside, added: Contribution, seen: Seen) -> Array:
        """``V u + s (G - V P)`` and what a rule adds; a cold layer passes G."""
        inside, factor = outside.update, added.factor
        if factor is not None:
            inside = inside - factor * outside.coordinates
        if residual.stateless and not project_cold:
            warm = seen.iterations >= seen.window
            cold = pass_through(outside.update, outside.coordinates, outside.energy)
            factor = jnp.where(warm, 0 if factor is None else factor, cold)
            inside = jnp.where(warm, inside, 0)
        whole = lift(outside.basis, inside)
        if factor is not None:
            whole = whole + factor * outside.matrix
        return whole if added.addition is None else whole + added.addition

    def rotate(held: PyTree, rotation: Array) -> PyTree:
        moments, kept = held
        wide = _widened(moments, table, rotation.dtype)
        return transport_.rotate(wide, rotation, table), kept

    return Rule(
        init,
        update,
        rotate,
        whole=None if residual is DROPPED else "a residual rule",
        kernel=not is_zero(sharpness),
    )


def _widened(state: PyTree, table: transport_.Table, dtype: Any) -> PyTree:
    """Moments in the dtype of the linear algebra."""
    return transport_.map_moments(lambda m, *_: m.astype(dtype), state, table)


def _stored(
    state: PyTree, table: transport_.Table, dtype: Any, seen: Seen | None
) -> PyTree:
    """Moments in the dtype that they are stored in; a key for each array and step."""
    if dtype is None:
        return state

    def one(moment: Array, kind: str, field: str) -> Array:
        del kind
        if seen is None:
            return moment.astype(dtype)
        key = jax.random.fold_in(jax.random.key(0), seen.step)
        key = jax.random.fold_in(key, seen.seed)
        return precision.store(moment, dtype, jax.random.fold_in(key, plan.seed(field)))

    return transport_.map_moments(one, state, table)


def _check_width(moment: Array, dtype: Any) -> Array:
    """A moment that `inner` rounds by itself would be rounded twice."""
    if dtype is not None and compute_dtype(moment.dtype) != moment.dtype:
        raise ValueError(
            f"moment_dtype: got {dtype!r} beside an inner transformation that keeps "
            f"moments in {moment.dtype}, rounded to nearest, where small steps are "
            "lost. Remedy: leave the dtype of the inner one out (mu_dtype=None)."
        )
    return moment
