"""The eigenbasis of each layer as a pytree, and how a step refreshes it.

Knows paths, statistics and time; knows no optimizer. Both transformations of this
package (`scale_by_spectral_projection`, `add_spectral_sharpness`) are built on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_optax import _basis, _checks, _layout, _schedule, _subspace
from dsbp_optax._known import KnownPaths
from dsbp_optax._layout import MatrixView
from dsbp_optax._schedule import AutoRank, Every
from dsbp_optax._statistics import (
    Activations,
    Covariance,
    Gradient,
    Sketch,
    blend,
)
from dsbp_optax._types import Array, Eigenpairs, Operator, Scalar, Solver

#: The share of lambda_1 under which lambda_k counts as zero, in units of eps.
_RANK_TOLERANCE = 32.0


class Spectrum(NamedTuple):
    """What is known of one layer's eigenbasis; kernel form, one value a matrix.

    Attributes:
      eigenvalues: descending, per sample; trailing axis of length rank. With
        sketches, the Ritz values of the basis they were taken with.
      trace: trace of the second moment, per sample.
      weight: bias correction of the exponential decay; 0 before any observation.
      residual: ``|C V - V Lambda| / lambda_1`` at the last refresh.
      energy: share of the gradient's energy inside the basis at the last refresh.
      iterations: int32, power iterations done so far; 0 means never refreshed.
      failures: int32, refreshes that were refused (rank-deficient, zero or
        non-finite statistics); the last good basis was kept.
      activations: int32, 1 if the last refresh used activations, 0 if gradients.
      refreshed: int32, the step of the last refresh that was accepted, -1 before.
    """

    eigenvalues: Array
    trace: Array
    weight: Array
    residual: Array
    energy: Array
    iterations: Array
    failures: Array
    activations: Array
    refreshed: Array


class Schedule(NamedTuple):
    """What a layer decides for itself; kernel form, one decision for a whole stack.

    A field is None where nothing is to be decided; a layer without any has no schedule.

    Attributes:
      collect: int32, 1 if the next step's statistics of this layer will be used, else
        0; where each has an interval of its own.
      start: int32, first step of the current window, or of the next one.
      interval: int32, steps from one window's start to the next one's.
      drift: of the basis in the last window that refreshed it, see `AutoInterval`;
        the greatest of a stack.
      jitter: of its last step, likewise.
      reference: the basis after the last window, in bfloat16: `drift` is good to 4e-3.
      rank: int32, basis vectors in use, see `AutoRank`; the most that any matrix of a
        stack needs.
    """

    collect: Any = None
    start: Any = None
    interval: Any = None
    drift: Any = None
    jitter: Any = None
    reference: Any = None
    rank: Any = None


class Refresh(NamedTuple):
    """How and when a basis is refreshed.

    Attributes:
      every: p, steps between refreshes; may be traced, or decided by each layer.
      iterations: q, power iterations of a refresh; may be traced. A sketch gives
        one a step, over q consecutive steps.
      solver: the eigensolver.
      decay: gamma in [0, 1), share of the past in the statistic; may be traced.
    """

    every: Every
    iterations: Scalar
    solver: Solver
    decay: Scalar


class Layer(NamedTuple):
    """One layer's arrays: kernel form in the state, matrices inside a refresh.

    `schedule` is a `Schedule`, or None where nothing is to be decided.
    """

    basis: Array
    spectrum: Spectrum
    schedule: Any = None


def check_refresh(refresh: Refresh) -> Refresh:
    """The settings, "auto" as the rule it stands for; early errors."""
    interval = _schedule.auto_interval(refresh.every)
    if interval is None:
        _checks.check_integer("update_every", refresh.every, 1)
    _checks.check_integer("power_iterations", refresh.iterations, 1)
    _checks.check_number("decay", refresh.decay, 0.0, 1.0)
    if not callable(refresh.solver):
        raise TypeError(
            f"solver: got {refresh.solver!r}, expected a function (operator, basis, "
            "iterations) -> Eigenpairs, such as dsbp_optax.power_iteration."
        )
    return refresh._replace(every=interval or refresh.every)


def init_layer(
    path: str,
    view: MatrixView,
    rank: int,
    dtype: Any,
    refresh: Refresh,
    rule: AutoRank | None,
) -> Layer:
    """A cold layer: an orthonormal basis that follows from the path alone.

    Args:
      path: of the kernel.
      view: of the kernel.
      rank: number of basis vectors.
      dtype: of the linear algebra.
      refresh: settings.
      rule: of an adaptive rank, or None.
    """
    key = jax.random.key(zlib.crc32(path.encode()))
    noise = jax.random.normal(key, (*view.batch_shape, view.size, rank), dtype)
    basis = _layout.to_kernel_form(_basis.orthonormalize(noise), view)

    def filled(value: Any, kind: Any, width: int = 1) -> Array:
        return jnp.full(_layout.kernel_form_shape(view, False, width), value, kind)

    spectrum = Spectrum(
        eigenvalues=filled(0, dtype, rank),
        trace=filled(0, dtype),
        weight=filled(0, dtype),
        residual=filled(0, dtype),
        energy=filled(0, dtype),
        iterations=filled(0, jnp.int32),
        failures=filled(0, jnp.int32),
        activations=filled(0, jnp.int32),
        refreshed=filled(-1, jnp.int32),
    )
    return Layer(basis, spectrum, _init_schedule(basis, filled, refresh, rule))


def _init_schedule(
    basis: Array, filled: Any, refresh: Refresh, rule: AutoRank | None
) -> Schedule | None:
    schedule, interval = Schedule(), _schedule.auto_interval(refresh.every)
    if interval is not None:
        schedule = schedule._replace(
            collect=filled(1, jnp.int32),
            start=filled(0, jnp.int32),
            interval=filled(interval.shortest, jnp.int32),
            drift=filled(0, basis.dtype),
            jitter=filled(0, basis.dtype),
            reference=basis.astype(jnp.bfloat16),
        )
    if rule is not None:
        schedule = schedule._replace(rank=filled(basis.shape[-1], jnp.int32))
    return schedule if jax.tree.leaves(schedule) else None


def is_instant(statistic: Any) -> bool:
    """Whether one observation allows all q iterations at once."""
    return isinstance(statistic, Activations | Covariance)


def refresh_layer(
    layer: Layer, statistic: Any, gradient: Array, view: MatrixView, refresh: Refresh
) -> tuple[Layer, Array]:
    """One refresh of one layer.

    Args:
      layer: in kernel form.
      statistic: a statistic of the layer, or None to use the gradient's own basis.
      gradient: ``(*batch, d, m)``, flipped ``(*batch, m, d)``.
      view: of the kernel.
      refresh: settings.

    Returns:
      The layer in kernel form, and the rotation ``V_new^T V_old (*batch, k, k)``.
    """
    bare = layer._replace(schedule=None)
    deficient = layer.schedule is not None and layer.schedule.rank is not None
    matrices = jax.tree.map(lambda x: _layout.from_kernel_form(x, view), bare)
    observed = Gradient(gradient, view.flipped)
    if statistic is None:
        statistic, refresh = observed, refresh._replace(iterations=1)
    else:
        statistic = _as_matrices(statistic, view)

    def one(layer: Layer, statistic: Any, gradient: Gradient) -> tuple[Layer, Array]:
        return _refresh_matrix(layer, statistic, gradient, refresh, deficient)

    for _ in view.batch:
        one = jax.vmap(one)
    new, rotation = one(matrices, statistic, observed)
    new = jax.tree.map(lambda x: _layout.to_kernel_form(x, view), new)
    return new._replace(schedule=layer.schedule), rotation


def _refresh_matrix(
    layer: Layer,
    statistic: Any,
    gradient: Gradient,
    refresh: Refresh,
    deficient: bool,
) -> tuple[Layer, Array]:
    """The same for one matrix: basis ``(d, k)``, no stacking axes."""
    basis, past = layer.basis, layer.spectrum
    operator = statistic.operator(basis)
    weight = refresh.decay * past.weight[0, 0]
    total = weight + (1 - jnp.asarray(refresh.decay, basis.dtype))
    share = weight / total
    if not is_zero(refresh.decay):
        operator = blend(operator, basis, past.eigenvalues[0], past.trace[0, 0], share)
    pairs = refresh.solver(operator, basis, to_int(refresh.iterations))
    done = to_int(refresh.iterations) if operator.exact else 1
    coordinates = _subspace.project(pairs.basis, gradient.values, gradient.flipped)
    energy = _subspace.captured_energy(coordinates, gradient.values)
    observed = not isinstance(statistic, Gradient)
    fresh = Spectrum(
        eigenvalues=pairs.eigenvalues[None],
        trace=jnp.reshape(operator.trace, (1, 1)),
        weight=jnp.reshape(total, (1, 1)),
        residual=jnp.reshape(pairs.residual, (1, 1)),
        energy=energy,
        iterations=past.iterations + done,
        failures=past.failures,
        activations=jnp.full_like(past.activations, observed),
        refreshed=past.refreshed,
    )
    good = usable(operator, pairs, deficient)
    kept = past._replace(failures=past.failures + 1)
    nothing = operator.count == 0
    kept = where(nothing, past, kept)
    new = where(good, Layer(pairs.basis, fresh), Layer(basis, kept))
    return new, _subspace.rotation(new.basis, basis)


def usable(operator: Operator, pairs: Eigenpairs, deficient: bool = False) -> Array:
    """Whether a refresh may replace the last good basis.

    Refused: nothing observed, non-finite numbers, a second moment whose rank is
    below that of the basis (unless `deficient`: an adaptive rank leaves out what
    explains nothing), a zero one, and a basis that is not orthonormal.
    """
    eps = jnp.finfo(pairs.basis.dtype).eps
    rank = pairs.basis.shape[1]
    gram = _subspace.rotation(pairs.basis, pairs.basis)
    orthonormal = jnp.max(jnp.abs(gram - jnp.eye(rank))) < jnp.sqrt(eps)
    leading, last = pairs.eigenvalues[0], pairs.eigenvalues[-1]
    full_rank = leading > 0
    if not deficient:
        full_rank &= last > _RANK_TOLERANCE * eps * leading
    finite = jnp.isfinite(leading) & jnp.isfinite(operator.trace)
    finite &= jnp.isfinite(pairs.residual)
    return (operator.count > 0) & finite & full_rank & orthonormal


def check_mapping(statistics: Any, known: KnownPaths, suffixes: list[str]) -> None:
    """Statistics are a flat mapping from known paths, or an error that says where."""
    if not isinstance(statistics, Mapping):
        raise TypeError(
            f"statistics: got {type(statistics).__name__}, expected a flat mapping "
            "from parameter path to Sketch, Activations or Covariance, such as "
            "{'Dense_0/kernel': dsbp_optax.Activations(x)}."
        )
    for key in statistics:
        path = str(key)
        for suffix in suffixes:
            path = path.removesuffix(suffix)
        if not isinstance(key, str) or not known.may_have(path):
            raise ValueError(
                f"statistics: unknown path {key!r}, expected one of "
                f"{_checks.some(known.all)}.{_checks.did_you_mean(path, known.all)}"
            )


def check_statistic(path: str, given: Any, view: MatrixView, rank: int) -> Any:
    """`given` as a statistic whose arrays fit the kernel; bare arrays are activations.

    Args:
      path: of the kernel, for the message.
      given: what the user passed.
      view: of the kernel.
      rank: of its basis.
    """
    whole = isinstance(given, Sketch | Activations | Covariance)
    if not whole and not (hasattr(given, "shape") and hasattr(given, "dtype")):
        raise TypeError(
            f"statistics['{path}']: got {type(given).__name__}, expected Sketch, "
            "Activations, Covariance, or an activation matrix (n, d)."
        )
    statistic = given if whole else Activations(given)
    for field, allowed in _shapes(statistic, view, rank).items():
        _check_array(
            f"statistics['{path}'].{field}", getattr(statistic, field), allowed
        )
    return statistic


def _shapes(statistic: Any, view: MatrixView, rank: int) -> dict[str, list[Any]]:
    """The shapes that each field of a statistic may have; None stands for any n."""
    form, batch, d = _layout.kernel_form_shape, view.batch_shape, view.size
    match statistic:
        case Sketch():
            one = form(view, False, 1)
            return {
                "product": [form(view, True, rank)],
                "count": [one],
                "trace": [one],
            }
        case Covariance():
            return {"matrix": [(*batch, d, d)], "count": [(), batch]}
    return {"values": [(*batch, None, d)]}


def _check_array(where: str, array: Any, allowed: list[tuple[int | None, ...]]) -> None:
    kind = getattr(array, "dtype", None) or np.result_type(type(array))
    if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
        raise TypeError(f"{where}: got dtype {kind}, expected a real number's.")
    got = np.shape(array)
    for shape in allowed:
        pairs = zip(shape, got, strict=False)
        if len(got) == len(shape) and all(a is None or a == b for a, b in pairs):
            return
    wanted = " or ".join(str(shape).replace("None", "n") for shape in allowed)
    raise ValueError(
        f"{where}: got shape {got}, expected {wanted}. Remedy: pass the activations of "
        "the side that is projected, with the kernel's axes of that side flattened; if "
        "the kernel's axes were misread, pass axes={...: dsbp_optax.Axes(...)} to the "
        "optimizer."
    )


def _as_matrices(statistic: Any, view: MatrixView) -> Any:
    """Canonical ``(*batch, ...)`` arrays: sketches come in kernel form."""
    if isinstance(statistic, Sketch):
        product, count, trace = (
            _layout.from_kernel_form(x, view)
            for x in (statistic.product, statistic.count, statistic.trace)
        )
        return Sketch(product, count[..., 0, 0], trace[..., 0, 0])
    if isinstance(statistic, Covariance):
        shape = view.batch_shape
        count = jnp.broadcast_to(jnp.asarray(statistic.count), shape)
        return Covariance(statistic.matrix, count)
    return statistic


def where(condition: Array, new: Any, old: Any) -> Any:
    """`new` where the condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def is_zero(value: Any) -> bool:
    """Whether Python knows that `value` is zero."""
    return isinstance(value, int | float) and value == 0


def to_int(value: Any) -> Any:
    """Traced hyperparameters may arrive as floats."""
    return value if isinstance(value, int) else jnp.asarray(value).astype(jnp.int32)
