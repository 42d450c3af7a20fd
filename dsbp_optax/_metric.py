"""The activation metric: directions of steepest descent in the change of outputs.

    S = I - V diag(1 - f) V^T,   f = ((rest + g) / (lambda + g))^a
    update = unit(S direction(S M)),   g = damping tr C / d

With exponent 1/2 and a whole basis this is steepest descent under ``|A dW|``, the
change of a layer's output on its own inputs, in the norm that `direction` descends in:
a step along what the activations share is shortened, since there it changes most. A
scaling before an orthogonalisation is mostly undone by it; the one behind shortens.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
import optax

from dsbp_optax import (
    _basis,
    _checks,
    _coordinates,
    _eigenbasis,
    _filter,
    _layout,
    _plan,
    _probe,
    _share,
    _spectral,
    _subspace,
)
from dsbp_optax._eigenbasis import Refresh
from dsbp_optax._gate import gated
from dsbp_optax._layout import AxesRule, MatrixView, PerPath
from dsbp_optax._orthogonal import Direction
from dsbp_optax._plan import Choices
from dsbp_optax._refresh import (
    RefreshStep,
    Step,
    begin_step,
    end_step,
    make_refresh,
    to_updates,
)
from dsbp_optax._schedule import Every, Rank, RankFraction
from dsbp_optax._spectral import ActivationMetricState
from dsbp_optax._types import Array, PyTree, Scalar, Side, Solver

#: Where the metric acts: before the direction is taken, behind it, or both.
Where: TypeAlias = Literal["both", "before", "after"]

#: Directions of a basis that serves as a metric alone.
SHARE = RankFraction(1 / 8, most=32)
#: The same for rules that lean on it more.
LARGE_SHARE = RankFraction(3 / 16, most=32)

_NO_STATISTICS = (
    "update: got no statistics=, expected those that an adapter's value_and_grad "
    "returns; the metric is that of the gradients' own directions, which is worth "
    "less. Remedy: tx.update(grads, state, params, statistics=statistics), or "
    "statistics={} where this is meant."
)


class Rule(NamedTuple):
    """Everything that the transformation is told; see `scale_by_activation_metric`.

    `directions` gives what stands in the place of a basis ``(*batch, d, k)`` of a path:
    controls of an experiment put random directions there.
    """

    inner: optax.GradientTransformationExtraArgs
    direction: Direction
    exponent: optax.ScalarOrSchedule
    damping: Scalar
    where: Where
    choices: Choices
    refresh: Refresh
    refresh_step: RefreshStep
    basis_dtype: Any
    statistics_in_state: bool
    directions: Callable[[str, Array], Array] | None = None


def scale_by_activation_metric(
    direction: Direction | None = None,
    exponent: optax.ScalarOrSchedule = 0.5,
    *,
    inner: optax.GradientTransformation | None = None,
    damping: Scalar = 0.2,
    where: Where = "both",
    rank: PerPath[Rank] = SHARE,
    side: PerPath[Side] = "input",
    update_every: Every = 20,
    power_iterations: Scalar = 2,
    solver: Solver | None = None,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    share: Sequence[Sequence[str]] = (),
    basis_dtype: Any = "bfloat16",
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Take the direction of each kernel's update in the metric of its activations.

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
      inner: a ``scale_by_*`` transformation of all parameters, on a flat dict by path;
        None is the identity.
      damping: in units of the mean eigenvalue.
      where: "both" sides of the direction; "before" or "after" it alone.
      rank: k, as in `scale_by_spectral_projection`.
      side: "input", or "output" for the metric of a layer's pre-activations.
      update_every: p, steps between refreshes, as there.
      power_iterations: q, power iterations a refresh, as there.
      solver: as there.
      decay: share of the past kept in the statistic.
      axes: per-path `Axes` where the heuristics misread a kernel.
      share: groups of kernels with one input, which keep one basis, see an
        adapter's ``find_shared_inputs``.
      basis_dtype: dtype that bases are stored in; None for that of the computation.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      A transformation whose ``update`` takes ``statistics=``. Kernels without one use
      the basis of what comes in, the gradient's own or its momentum's; an ``update``
      that is traced without any warns, one with ``statistics={}`` does not.

    Raises:
      ValueError, TypeError: for numbers out of range, naming them; for a direction that
        gives another shape, naming the parameter.

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
    refresh = Refresh(
        *(update_every, power_iterations, solver or _basis.power_iteration),
        decay,
    )
    choices = Choices(rank, side, axes, "always", _share.check_share(share))
    rule = make_rule(
        *(inner, direction, exponent, damping, where, choices, refresh),
        *(basis_dtype, statistics_in_state),
    )
    return gated(activation_metric(rule))


def make_rule(
    inner: optax.GradientTransformation | None,
    direction: Direction | None,
    exponent: optax.ScalarOrSchedule,
    damping: Scalar,
    where: Where,
    choices: Choices,
    refresh: Refresh,
    basis_dtype: Any,
    statistics_in_state: bool,
) -> Rule:
    """The rule, checked."""
    if where not in get_args(Where):
        raise ValueError(f"where: got {where!r}, expected one of {get_args(Where)}.")
    if direction is not None and not callable(direction):
        raise TypeError(
            f"direction: got {direction!r}, expected a function (matrix, fan in, fan "
            "out) -> matrix, such as dsbp_optax.orthogonalize(), or None."
        )
    refresh = _eigenbasis.check_refresh(refresh)
    return Rule(
        inner=_probe.as_transformation("inner", inner),
        direction=direction or (lambda matrix, fan_in, fan_out: matrix),
        exponent=_checks.check_number("exponent", exponent, 0.0),
        damping=_checks.check_number("damping", damping, 0.0),
        where=where,
        choices=_plan.check_choices(choices),
        refresh=refresh,
        refresh_step=make_refresh(refresh),
        basis_dtype=_checks.check_dtype("basis_dtype", basis_dtype),
        statistics_in_state=statistics_in_state,
    )


def activation_metric(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """The transformation that `rule` describes, for updates that are finite."""

    def init(params: PyTree) -> ActivationMetricState:
        leaves, _ = _layout.flatten_with_paths(params)
        if not leaves:
            nothing = _spectral.empty_fields()
            return ActivationMetricState(**nothing, inner=jnp.zeros([]))
        _, fields = _spectral.init_fields(
            *(params, rule.choices, rule.refresh, rule.statistics_in_state),
            optax.identity(),
        )
        fields = _spectral.store_bases(fields, rule.basis_dtype)
        return ActivationMetricState(**fields, inner=rule.inner.init(leaves))

    def update(
        updates: PyTree,
        state: ActivationMetricState,
        params: PyTree | None = None,
        *,
        statistics: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ActivationMetricState]:
        _coordinates.refuse(_coordinates.find(updates), "scale_by_activation_metric")
        if statistics is None and state.basis and not state.statistics:
            warnings.warn(_NO_STATISTICS, stacklevel=2)
        step = begin_step(rule.choices, rule.refresh_step, state, updates, statistics)
        kernels = _plan.kernels(updates, rule.choices, step.views)
        exponent = rule.exponent
        if callable(exponent):
            exponent = exponent(state.step)
        scale = {
            path: functools.partial(_scaled, rule, step, path, exponent)
            for path in step.views
        }
        changes = dict(step.gradients)
        if rule.where != "after":
            for path, view in step.views.items():
                scaled = scale[path](_layout.to_matrices(changes[path], view))
                changes[path] = _layout.from_matrices(scaled, view)
        leaves = None if params is None else _layout.flatten_with_paths(params)[0]
        changes, inner = rule.inner.update(changes, state.inner, leaves, **extra)
        for path, view in kernels.items():
            found = _layout.to_matrices(changes[path], view)
            found = _directed(rule, path, found, view)
            if rule.where != "before" and path in scale:
                found = keep_norm(found, scale[path](found))
            changes[path] = _layout.from_matrices(found, view)
        fields = end_step(state, step, rule.refresh)
        fields = _spectral.store_bases(fields, rule.basis_dtype)
        return to_updates(step, changes), ActivationMetricState(**fields, inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def metric_factors(
    eigenvalues: Array, trace: Array, size: int, exponent: Scalar, damping: Scalar
) -> Array:
    """``f = min(1, (rest + g) / (lambda + g))^a``: ``(*batch, k)``, 1 without a trace.

    Args:
      eigenvalues: ``(*batch, k)`` of the second moment, a sample.
      trace: ``(*batch, 1)``, its trace.
      size: ``d``.
      exponent: a.
      damping: g in units of ``tr C / d``.
    """
    mean = trace / size
    outside = size - eigenvalues.shape[-1]
    rest = mean  # A whole basis has nothing outside: the scale is that of the mean.
    if outside > 0:
        rest = jnp.minimum(_filter.remaining_mean(eigenvalues, trace, size), mean)
    shift = damping * mean
    strong = eigenvalues + shift
    ratio = (rest + shift) / jnp.where(strong > 0, strong, 1)
    if outside > 0:
        ratio = jnp.minimum(ratio, 1)
    return jnp.where((trace > 0) & (strong > 0), ratio, 1) ** exponent


def apply_metric(
    basis: Array, factors: Array, matrix: Array, flipped: bool = False
) -> Array:
    """``S M = M - V (1 - f) V^T M``, shaped as `matrix`.

    Args:
      basis: ``(*batch, d, k)`` orthonormal columns.
      factors: ``f (*batch, k)``.
      matrix: ``(*batch, d, m)``, flipped ``(*batch, m, d)``.
      flipped: as in `dsbp_optax._subspace.project`.
    """
    less = factors - 1
    less = less[..., None, :] if flipped else less[..., :, None]
    inside = less * _subspace.project(basis, matrix, flipped)
    return matrix + _subspace.lift(basis, inside, flipped)


def keep_norm(like: Array, matrix: Array) -> Array:
    """`matrix` with the Frobenius norm of `like`; zero stays zero."""
    wanted, got = _subspace.squared_norm(like), _subspace.squared_norm(matrix)
    return matrix * jnp.sqrt(wanted / jnp.where(got > 0, got, 1))


def _scaled(
    rule: Rule, step: Step, path: str, exponent: Scalar, matrix: Array
) -> Array:
    """``S M`` in the dtype of the linear algebra."""
    view, spectrum = step.views[path], step.layers[path].spectrum
    eigenvalues, trace = (
        _layout.from_kernel_form(x, view)[..., 0, :]
        for x in (spectrum.eigenvalues, spectrum.trace)
    )
    factors = metric_factors(eigenvalues, trace, view.size, exponent, rule.damping)
    basis = step.bases[path]
    matrix = matrix.astype(basis.dtype)
    if rule.directions is not None:
        basis = rule.directions(path, basis)
    return apply_metric(basis, factors.astype(matrix.dtype), matrix, view.flipped)


def _directed(rule: Rule, path: str, matrix: Array, view: MatrixView) -> Array:
    """The direction of a matrix, or an error if it has another shape."""
    found = rule.direction(matrix, *_plan.fans(path, view, rule.choices))
    if jnp.shape(found) != jnp.shape(matrix):
        raise ValueError(
            f"direction of '{path}': got shape {jnp.shape(found)}, expected "
            f"{jnp.shape(matrix)}. Remedy: a function (matrix, fan in, fan out) -> "
            "matrix that keeps the shape, such as dsbp_optax.orthogonalize()."
        )
    return found.astype(matrix.dtype)
