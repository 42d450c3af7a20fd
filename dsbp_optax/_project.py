"""The projection of gradients onto each layer's eigenbasis, as one transformation.

P = f(Lambda) V^T G                      coordinates, (k, m), filtered
u = inner(P)                             any scale_by_*, its state in (k, m)
update = direction(V u + what the residual rule makes of G - V V^T G)
         + beta lambda_1 / tr(C) e_1 e_1^T W
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from dsbp_optax import (
    _basis,
    _checks,
    _eigenbasis,
    _plan,
    _probe,
    _residual,
    _share,
    _transport,
    _update,
)
from dsbp_optax._eigenbasis import Refresh
from dsbp_optax._filter import Filter
from dsbp_optax._layout import AxesRule, PerPath
from dsbp_optax._orthogonal import Direction
from dsbp_optax._plan import Choices, When
from dsbp_optax._residual import Factor, Residual
from dsbp_optax._rule import Rule
from dsbp_optax._schedule import Every, Rank
from dsbp_optax._types import Scalar, Side, Solver


def scale_by_spectral_projection(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: PerPath[Rank] = 16,
    side: PerPath[Side] = "input",
    update_every: Every = 100,
    power_iterations: Scalar = 5,
    solver: Solver | None = None,
    spectral_filter: Filter | None = None,
    residual: Factor | Residual | None = None,
    direction: Direction | None = None,
    fallback: optax.GradientTransformation | None = None,
    sharpness: optax.ScalarOrSchedule = 0.0,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    share: Sequence[Sequence[str]] = (),
    project: When = "auto",
    project_cold: bool = False,
    transport: _transport.Additions = None,
    moment_dtype: Any = None,
    basis_dtype: Any = None,
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` in the top eigenspace of each layer's activations.

        V = top-k eigenvectors of C = A^T A / n
        update = direction(V inner(f V^T G) + residual rule of (G - V V^T G))

    Parameters without a basis (biases, embeddings, kernels where projection saves
    no memory) go to the same `inner` in full space, or to `fallback`. Gradients in,
    ascent direction out: put the learning rate after it.

    Args:
      inner: a ``scale_by_*`` transformation whose state then has ``(k, m)``
        coordinates; None for the identity.
      rank: k; an integer, or "auto" or an `AutoRank`, which follow the spectrum; a
        mapping from glob pattern to one of these; or a callable ``(path, shape) ->
        one of these or None`` (None: do not project).
      side: "input" (``V`` on the axes that face the layer's input) or "output".
      update_every: p, steps between refreshes of the basis; "auto" or an
        `AutoInterval` let each layer find its own, for a branch a layer in the steps
        that refresh and half a basis more of memory.
      power_iterations: q, power iterations a refresh. A sketch gives one a step,
        on the first q of every p steps; matrices give all q at once.
      solver: ``(operator, basis, iterations) -> Eigenpairs``; None for
        `power_iteration`.
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
      decay: gamma in [0, 1), share of the past kept in the statistic.
      axes: which axes of a kernel are inputs, outputs, stacked: a mapping from
        glob pattern to `Axes`, or a callable ``(path, shape) -> Axes | None``.
      share: groups of kernels with one and the same input, which keep one basis:
        tuples of paths, as an adapter's ``find_shared_inputs`` returns them, or of
        patterns such as ``("*/query/kernel", "*/key/kernel", "*/value/kernel")``,
        which group the paths whose parts under each ``*`` are equal.
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
      basis_dtype: dtype that bases are stored in, None for that of the computation;
        likewise.
      statistics_in_state: reserve a place for `put_statistics`, for wrappers that
        drop keywords.

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
      >>> state[0].basis["dense/kernel"].shape
      (64, 1, 4)
      >>> updates, state = tx.update(params, state, params)
    """
    solver = solver or _basis.power_iteration
    refresh = Refresh(update_every, power_iterations, solver, decay)
    groups = _share.check_share(share)
    rule = Rule(
        inner=_probe.as_transformation("inner", inner),
        fallback=fallback and _probe.as_transformation("fallback", fallback),
        choices=_plan.check_choices(Choices(rank, side, axes, project, groups)),
        refresh=_eigenbasis.check_refresh(refresh),
        spectral_filter=spectral_filter,
        residual=_residual.as_residual(residual),
        direction=direction,
        sharpness=_checks.check_number("sharpness", sharpness, 0.0),
        project_cold=project_cold,
        transport=_transport.make_table(transport),
        moment_dtype=_checks.check_dtype("moment_dtype", moment_dtype),
        basis_dtype=_checks.check_dtype("basis_dtype", basis_dtype),
        statistics_in_state=statistics_in_state,
    )
    return _update.transformation(rule)
