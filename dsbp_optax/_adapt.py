"""Which layers a step refreshes, and what a refreshed layer decides for itself.

Applies the rules of `_schedule` to layers in kernel form: the groups that take turns,
and each layer's interval and rank after a window.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from dsbp_optax import _eigenbasis, _layout, _schedule, _subspace
from dsbp_optax._eigenbasis import Layer, Refresh, Schedule
from dsbp_optax._layout import MatrixView
from dsbp_optax._schedule import AutoInterval, AutoRank
from dsbp_optax._types import Array


class Rules(NamedTuple):
    """What the refresh of one step is told.

    Attributes:
      refresh: settings.
      views: path -> view.
      ranks: path -> rule, of the layers whose rank is adaptive.
      owners: path of each kernel -> path of its layer.
    """

    refresh: Refresh
    views: Mapping[str, MatrixView]
    ranks: Mapping[str, AutoRank]
    owners: Mapping[str, str]


class Now(NamedTuple):
    """Where a group of layers stands on this step.

    Attributes:
      step: int32 ``()``.
      length: steps of a window.
      last: whether a window ends with this step.
    """

    step: Array
    length: Any
    last: Array


class Group(NamedTuple):
    """Layers that are refreshed on the same steps.

    Attributes:
      paths: of the layers.
      turn: whether they are refreshed on this step.
      now: where they stand.
    """

    paths: frozenset[str]
    turn: Array
    now: Now


def check_schedules(rules: Rules, layers: Mapping[str, Layer]) -> None:
    """A restored state must have been decided by the same rules."""
    refresh, none = rules.refresh, Schedule()
    for path, layer in layers.items():
        auto = isinstance(refresh.every, AutoInterval)
        expected = {
            "collect": auto,
            "interval": auto,
            "rank": path in rules.ranks,
        }
        schedule = layer.schedule or none
        got = {name: getattr(schedule, name) is not None for name in expected}
        if got != expected:
            raise ValueError(
                f"the state's schedule of '{path}': got {_kept(got)}, expected "
                f"{_kept(expected)}. Remedy: restore a state of the same update_every "
                "and rank, build the optimizer with those of the state, or init again."
            )


def _kept(fields: Mapping[str, bool]) -> str:
    return ", ".join(name for name, kept in fields.items() if kept) or "none"


def plan_groups(
    rules: Rules,
    layers: Mapping[str, Layer],
    waiting: Collection[str],
    statistics: Mapping[str, Any],
    step: Array,
) -> list[Group]:
    """The groups of a step, none of them empty.

    A layer with an adaptive interval is a group of its own. Others are with those
    of the same kind: all iterations on the first step of a window (whole matrices),
    or one on each.

    Args:
      rules: of the refresh.
      layers: all of them.
      waiting: those that cannot be refreshed in this step.
      statistics: path -> statistic.
      step: int32.
    """
    refresh = rules.refresh
    members: dict[tuple[bool, str], set[str]] = {}
    for path in layers.keys() - waiting:
        spread = not _eigenbasis.is_instant(statistics.get(path))
        alone = path if isinstance(refresh.every, AutoInterval) else ""
        members.setdefault((spread, alone), set()).add(path)
    groups = []
    every, window = _period(refresh), _eigenbasis.to_int(refresh.iterations)
    for (spread, alone), paths in sorted(members.items()):
        length = window if spread else 1
        if alone:
            start = jnp.max(layers[alone].schedule.start)
            turn = _schedule.auto_turn(step, start, length)
        else:
            turn = _schedule.fixed_turn(step, every, length)
        now = Now(step, length, turn.last)
        groups.append(Group(frozenset(paths), turn.now, now))
    return groups


def _period(refresh: Refresh) -> Any:
    """p, or the shortest that an adaptive interval may become."""
    if isinstance(refresh.every, AutoInterval):
        return refresh.every.shortest
    return _eigenbasis.to_int(refresh.every)


def keep_observed(
    rules: Rules, path: str, old: Layer, new: Layer, rotation: Array, now: Now
) -> tuple[Layer, Array]:
    """A refresh by the gradient, undone where one by a statistic is within its window.

    Statistics may be passed on some steps only; what they told is not to be replaced.

    Args:
      rules: of the refresh.
      path: of the layer.
      old: before the refresh, kernel form.
      new: after it.
      rotation: ``V_new^T V_old (*batch, k, k)``.
      now: of the layer's group.

    Returns:
      The layer and the rotation; the identity where nothing changes.
    """
    past = old.spectrum
    kept = (past.activations > 0) & _in_window(rules, past.refreshed, now)
    still = _layout.from_kernel_form(kept, rules.views[path])
    same = jnp.eye(rotation.shape[-1], dtype=rotation.dtype)
    return _eigenbasis.where(kept, old, new), jnp.where(still, same, rotation)


def _in_window(rules: Rules, refreshed: Array, now: Now) -> Array:
    """Whether a refresh was accepted so lately that it is of the same window."""
    window = _eigenbasis.to_int(rules.refresh.iterations)
    lately: Array = (refreshed >= 0) & (refreshed > now.step - window)
    return lately


def adapt(
    rules: Rules, path: str, old: Layer, new: Layer, rotation: Array, now: Now
) -> tuple[Layer, Array]:
    """What follows from the refresh of one layer: bookkeeping and decisions.

    Args:
      rules: of the refresh.
      path: of the layer.
      old: before the refresh, kernel form.
      new: after it.
      rotation: ``V_new^T V_old (*batch, k, k)``.
      now: of the layer's group.

    Returns:
      The layer, and the rotation between the coordinates that are in use.
    """
    accepted = new.spectrum.iterations > old.spectrum.iterations
    refreshed = jnp.where(accepted, now.step, old.spectrum.refreshed)
    new = new._replace(spectrum=new.spectrum._replace(refreshed=refreshed))
    if new.schedule is None:
        return new, rotation
    # Refreshes that were refused, or that saw nothing, tell nothing.
    told = _in_window(rules, refreshed, now)
    schedule, interval = new.schedule, rules.refresh.every
    if isinstance(interval, AutoInterval):
        window = _eigenbasis.to_int(rules.refresh.iterations)
        drift, jitter = _drifts(new, rotation, rules.views[path], now)
        warm = (schedule.start > 0) & (jnp.max(new.spectrum.iterations) > window)
        decided = _set_interval(interval, schedule, drift, jitter, told, warm)
        decided = _set_start(decided, now)
        decided = decided._replace(reference=new.basis.astype(jnp.bfloat16))
        schedule = _eigenbasis.where(now.last, decided, schedule)
    if path in rules.ranks:
        chosen = _choose_rank(rules.ranks[path], new, now.last & jnp.any(told))
        before, after = (
            mask(rank, rotation.shape[-1]) for rank in (schedule.rank, chosen)
        )
        schedule = schedule._replace(rank=chosen)
        rotation = rotation * after[:, None] * before
    return new._replace(schedule=schedule), rotation


def mask(rank: Any, size: int) -> Array:
    """1 for the directions in use, 0 for the rest: ``(size,)``."""
    return jnp.arange(size) < jnp.max(rank)


def basis_in_use(layer: Layer) -> Array:
    """The basis in kernel form, zero in the directions beyond the rank."""
    if layer.schedule is None or layer.schedule.rank is None:
        return layer.basis
    return layer.basis * mask(layer.schedule.rank, layer.basis.shape[-1])


def _drifts(
    layer: Layer, rotation: Array, view: MatrixView, now: Now
) -> tuple[Array, Array]:
    """Drift since the last window, and jitter of this step; of each matrix.

    Args:
      layer: after the refresh.
      rotation: of this step.
      view: of the kernel.
      now: of the layer's group.

    Returns:
      Two arrays of kernel form.
    """
    rank, reference = layer.schedule.rank, layer.schedule.reference
    used = rotation.shape[-1] if rank is None else jnp.max(rank)
    before, after = (
        _layout.from_kernel_form(x.astype(layer.basis.dtype), view)
        for x in (reference, layer.basis)
    )
    drift = _schedule.drift(_subspace.rotation(after, before), used)
    jitter = jnp.where(now.length > 1, _schedule.drift(rotation, used), 0)
    each = (x[..., None, None] for x in (drift, jitter))
    drift, jitter = (_layout.to_kernel_form(x, view) for x in each)
    return drift, jitter


def _set_interval(
    rule: AutoInterval,
    schedule: Schedule,
    drift: Array,
    jitter: Array,
    told: Array,
    warm: Array,
) -> Schedule:
    """The schedule after a window; the matrix of a stack that moved most decides.

    Args:
      rule: of the interval.
      schedule: before.
      drift: of each matrix, as `jitter`, kernel form.
      jitter: of the last step.
      told: whether the window refreshed each matrix.
      warm: whether the basis was not cold before; else nothing is decided.
    """
    most, noise, move = (
        jnp.max(jnp.where(told, x, 0))
        for x in (drift, jitter, _schedule.move(drift, jitter))
    )
    known = jnp.any(told)
    chosen = _schedule.next_interval(rule, schedule.interval, move)
    return schedule._replace(
        interval=jnp.where(known & warm, chosen, schedule.interval),
        drift=jnp.where(known, most, schedule.drift),
        jitter=jnp.where(known, noise, schedule.jitter),
    )


def _set_start(schedule: Schedule, now: Now) -> Schedule:
    """The next window's start."""
    start = schedule.start + schedule.interval
    return schedule._replace(start=jnp.maximum(start, now.step + 1))


def _choose_rank(rule: AutoRank, layer: Layer, decides: Array) -> Array:
    rank, spectrum = layer.schedule.rank, layer.spectrum
    chosen = _schedule.next_rank(
        rule, jnp.max(rank), spectrum.eigenvalues, spectrum.trace
    )
    kept: Array = jnp.where(decides, chosen, rank)
    return kept


def note_collects(
    rules: Rules, layers: Mapping[str, Layer], groups: list[Group], step: Array
) -> dict[str, Layer]:
    """`layers`, told whether the next step's statistics of each will be used."""
    noted = dict(layers)
    if not isinstance(rules.refresh.every, AutoInterval):
        return noted
    for path in (path for group in groups for path in group.paths):
        schedule = layers[path].schedule
        turn = _schedule.auto_turn(step + 1, schedule.start, 1)
        flag = jnp.broadcast_to(turn.now, schedule.collect.shape).astype(jnp.int32)
        noted[path] = layers[path]._replace(schedule=schedule._replace(collect=flag))
    return noted


def any_collects(refresh: Refresh, layers: Mapping[str, Layer], step: Array) -> Array:
    """Whether any layer uses the statistics of `step`; int32."""
    schedules = [layer.schedule for layer in layers.values() if layer.schedule]
    flags = [jnp.max(s.collect) for s in schedules if s.collect is not None]
    if flags:
        return jnp.max(jnp.stack(flags))
    window = _eigenbasis.to_int(refresh.iterations)
    turn = _schedule.fixed_turn(step, _period(refresh), window)
    return turn.now.astype(jnp.int32)
