"""The paper's spectral sharpness term as a transformation of its own.

    update <- update + beta lambda_1 / tr(C) e_1 e_1^T W

the gradient of ``beta/2 lambda_1 / tr(C) |e_1^T W|^2``.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from dsbp_optax import _basis, _eigenbasis, _layout, _plan, _spectral
from dsbp_optax._eigenbasis import Refresh
from dsbp_optax._layout import AxesRule, PerPath
from dsbp_optax._plan import Choices
from dsbp_optax._refresh import make_refresh
from dsbp_optax._spectral import SpectralSharpnessState
from dsbp_optax._types import PyTree, Scalar, Side, Solver


def add_spectral_sharpness(
    sharpness: optax.ScalarOrSchedule = 0.1,
    *,
    rank: PerPath[int] = 4,
    side: PerPath[Side] = "input",
    update_every: Scalar = 100,
    power_iterations: Scalar = 5,
    solver: Solver | None = None,
    centered: bool = False,
    decay: Scalar = 0.0,
    axes: AxesRule | None = None,
    statistics_in_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Add the gradient of ``sharpness/2 lambda_1 / tr(C) |e_1^T W|^2``.

    Keeps a small eigenbasis of its own, so it chains with any optimizer. The paper
    writes the update ``-beta lambda_1 e_1 e_1^T``: it does not conform to ``W``
    (``d x d`` against ``d x m``), is no gradient of anything, and grows with the
    batch. This is the conformable reading: applied to ``W``, divided by the trace so
    that it lies in [0, beta], and scaled by the learning rate that follows.

    Args:
      sharpness: beta, a number or a schedule.
      rank: basis vectors used to find ``e_1``; only the first enters the term.
      side: "input" or "output" (the paper's).
      update_every: p, steps between refreshes.
      power_iterations: q, power iterations a refresh.
      solver: as in `scale_by_spectral_projection`.
      centered: use the covariance about the mean.
      decay: share of the past kept in the statistic.
      axes: as in `scale_by_spectral_projection`.
      statistics_in_state: reserve a place for `put_statistics`.

    Returns:
      A transformation whose ``update`` needs ``params`` and takes ``statistics=``.
      Kernels without statistics get no term: it speaks of activations.

    Raises:
      ValueError, TypeError: as `scale_by_spectral_projection`.

    Cost: ``d rank`` numbers a kernel; ``4 d m`` FLOPs a step.

    Reference: Dynamic Spectral Backpropagation, arXiv 2505.23369.

    Example:
      >>> import optax, dsbp_optax
      >>> tx = optax.chain(
      ...     dsbp_optax.add_spectral_sharpness(0.1), optax.sgd(0.1, momentum=0.9)
      ... )
    """
    _plan.check_number("sharpness", sharpness, 0.0)
    choices = _plan.check_choices(Choices(rank, side, axes, "always"))
    solver = solver or _basis.power_iteration
    refresh = Refresh(update_every, power_iterations, solver, centered, decay)
    _eigenbasis.check_refresh(refresh)

    refresh_step = make_refresh(refresh)

    def init(params: PyTree) -> SpectralSharpnessState:
        step, skipped, collect = _spectral.counters(refresh)
        if not _layout.flatten_with_paths(params)[0]:
            none = jnp.zeros([])
            return SpectralSharpnessState(step, skipped, collect, none, none, none)
        layers = _spectral.init_layers(
            params, _plan.plan(params, choices, optax.identity())
        )
        return SpectralSharpnessState(
            step=step,
            skipped=skipped,
            collect=collect,
            basis={path: layer.basis for path, layer in layers.items()},
            spectrum={path: layer.spectrum for path, layer in layers.items()},
            statistics=_spectral.empty_statistics(layers)
            if statistics_in_state
            else {},
        )

    def update(
        updates: PyTree,
        state: SpectralSharpnessState,
        params: PyTree | None = None,
        *,
        statistics: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, SpectralSharpnessState]:
        _spectral.check_extra_args(extra)
        gradients, treedef = _layout.flatten_with_paths(updates)
        if not gradients:
            return updates, state
        views = _plan.views(updates, choices, state.basis)
        known = _plan.known_paths(updates)
        seen = _spectral.gather_statistics(statistics, state, views, known)
        finite = _spectral.all_finite(gradients)
        layers, _ = refresh_step(
            _spectral.split_layers(state),
            [],
            seen,
            _spectral.matrices(gradients, views),
            state.step,
            finite,
            views=views,
            kinds=[],
        )
        bases = {
            p: _layout.from_kernel_form(layers[p].basis, v) for p, v in views.items()
        }
        terms = _spectral.sharpness_terms(
            sharpness, layers, bases, views, params, state.step
        )
        steps = {
            path: jnp.where(finite, g + terms[path], 0).astype(g.dtype)
            if path in terms
            else jnp.where(finite, g, 0).astype(g.dtype)
            for path, g in gradients.items()
        }
        new_state = SpectralSharpnessState(
            **_spectral.advance(state, finite, refresh),
            basis={path: layer.basis for path, layer in layers.items()},
            spectrum={path: layer.spectrum for path, layer in layers.items()},
            statistics=_spectral.cleared(state.statistics),
        )
        return treedef.unflatten(steps[path] for path in gradients), new_state

    return optax.GradientTransformationExtraArgs(init, update)
