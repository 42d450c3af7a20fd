"""One training run: a step compiled once for every rate and length, each step timed."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks import kernels, timing
from benchmarks.data import Data, Samples
from benchmarks.optimizers import Contender
from benchmarks.workloads import Params, Workload

EVALUATIONS = 12

Loss = Callable[[Params, Any], jax.Array]
#: (parameters, optimizer state) -> figures by name
Observe = Callable[[Params, Any], Mapping[str, float]]


@dataclass
class Program:
    """One contender, compiled for one workload.

    Attributes:
      workload: what it trains.
      contender: what it is.
      init: fresh parameters and a first batch -> optimizer state.
      step: ``(params, opt_state, batch, rate, steps) -> (params, opt_state, loss)``.
      figures: ``compile_seconds``, ``state_bytes``, ``projected_state_bytes``,
        ``temporary_bytes`` and ``flops`` of the step.
    """

    workload: Workload
    contender: Contender
    init: Callable[[Params, Any], Any]
    step: Callable[..., Any]
    figures: dict[str, Any]


@dataclass
class Run:
    """What one seed gave.

    Attributes:
      curve: ``step``, ``train_loss`` (mean since the last evaluation) and ``value``
        (the metric) of each evaluation.
      step_seconds: of every step.
      refreshing: for every step, whether it refreshed a basis.
      diverged: whether some loss was not finite; the run then ends.
      params: the trained parameters, as they are evaluated.
      opt_state: the optimizer's state at the end.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    refreshing: list[bool] = field(default_factory=list)
    diverged: bool = False
    params: Params = None
    opt_state: Any = None


def train_step(
    loss: Loss,
    clip: float | None,
    tx: optax.GradientTransformationExtraArgs,
    params: Params,
    opt_state: Any,
    batch: Any,
    coordinates: bool = False,
) -> tuple[Params, Any, jax.Array]:
    """One step, the same for every contender.

    Statistics exist only where `tx` asks for them; only SAM uses `grad_fn` and only
    Sophia `obj_fn`. The gradients of SAM's second point are clipped alike.

    Args:
      loss: ``(params, batch) -> loss``.
      clip: largest norm of all gradients, in coordinates where they are; None for any.
      tx: the optimizer.
      params: parameters.
      opt_state: its state.
      batch: one batch.
      coordinates: whether gradients are taken in coordinates.
    """
    clipped = _clipper(clip)
    make = dsbp_optax.linen
    collect = make.subspace_value_and_grad if coordinates else make.value_and_grad
    value, grads, statistics = collect(loss)(params, batch, opt_state=opt_state)
    extra = {"statistics": statistics} if statistics else {}
    updates, opt_state = tx.update(
        clipped(grads),
        opt_state,
        params,
        grad_fn=lambda params, _: clipped(jax.grad(loss)(params, batch)),
        obj_fn=lambda params: loss(params, batch),
        **extra,
    )
    return optax.apply_updates(params, updates), opt_state, value


def make_step(workload: Workload, contender: Contender) -> Any:
    """The jitted step of a `Program`; rate and length are arguments, not constants.

    So are settings of the contender that are passed as a dict behind them.
    """

    def step(
        params: Params,
        opt_state: Any,
        batch: Any,
        rate: Any,
        steps: Any,
        settings: Mapping[str, Any] | None = None,
    ) -> Any:
        told = {**contender.settings, **(settings or {})}
        tx = replace(contender, settings=told).build(
            lambda count: workload.schedule(count, rate, steps)
        )
        return train_step(
            *(workload.loss, workload.clip, tx, params, opt_state, batch),
            contender.coordinates,
        )

    return jax.jit(step, donate_argnums=(0, 1))


def make_init(workload: Workload, contender: Contender) -> Callable[[Params, Any], Any]:
    """``(params, first batch) -> optimizer state``, jitted.

    A warm start is made of single iterations, so that only one is compiled.
    """
    init = jax.jit(contender.build(lambda count: jnp.zeros(())).init)
    if not contender.warm_start:
        return lambda params, batch: init(params)

    @jax.jit
    def iterate(params: Params, batch: Any, opt_state: Any) -> Any:
        return dsbp_optax.linen.warm_start(
            workload.loss, params, batch, opt_state=opt_state, power_iterations=2
        )

    def warm(params: Params, batch: Any) -> Any:
        opt_state = init(params)
        for _ in range(contender.window - 1):
            opt_state = iterate(params, batch, opt_state)
        return opt_state

    return warm


def build(workload: Workload, contender: Contender, warmup: int = 2) -> Program:
    """Compile everything and run it a few times, so that training is timed warm."""
    batch = jax.device_put(workload.example(workload.batch_size))
    init = make_init(workload, contender)
    params = workload.init(0)
    opt_state = init(params, batch)
    figures: dict[str, Any] = {
        "state_bytes": dsbp_optax.diagnostics.state_bytes(opt_state),
        "projected_state_bytes": kernels.kernel_bytes(opt_state, params),
    }
    numbers = np.float32(0), np.float32(1)
    step, seconds = timing.compiled(
        make_step(workload, contender), params, opt_state, batch, *numbers
    )
    figures |= {"compile_seconds": seconds, **timing.cost(step)}
    for _ in range(warmup):
        params, opt_state, _ = jax.block_until_ready(
            step(params, opt_state, batch, *numbers)
        )
    return Program(workload, contender, init, step, figures)


def train(
    program: Program,
    data: Data,
    judge: Samples,
    *,
    rate: float,
    steps: int,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
    observe: Observe = lambda params, opt_state: {},
) -> Run:
    """Train from one seed; evaluate `EVALUATIONS` times, the last time at the end.

    Args:
      program: workload and contender, compiled.
      data: its training part is used, and pretrained parameters if there are any.
      judge: the samples of the evaluations.
      rate: the largest learning rate of the schedule.
      steps: how long.
      seed: of fresh parameters and of the order of the data.
      after_step: called after each step.
      observe: figures of the parameters (as evaluated) and the state, for the curve.
    """
    workload, run = program.workload, Run()
    batches = workload.sampler(
        data.train, workload.batch_size, np.random.default_rng(seed)
    )
    params, opt_state = workload.init(seed, data.pretrained), None
    numbers = np.float32(rate), np.float32(steps)
    stops, losses = set(evaluation_steps(steps)), []
    for number in range(1, steps + 1):
        batch = jax.device_put(next(batches))
        if opt_state is None:
            opt_state = program.init(params, batch)
        jax.block_until_ready((params, opt_state, batch))
        run.refreshing.append(program.contender.refreshes(number - 1))
        call = functools.partial(program.step, params, opt_state, batch, *numbers)
        (params, opt_state, loss), seconds = timing.timed(call)
        run.step_seconds.append(seconds)
        losses.append(float(loss))
        after_step()
        if number in stops:
            run.diverged = not np.isfinite(losses).all()
            count = None if number == steps else workload.curve_samples
            count = None if count is None else min(count, len(judge))
            point = {"step": number, "train_loss": float(np.mean(losses))}
            judged = dsbp_optax.evaluation_params(opt_state, params)
            value = workload.measure(judged, judge, count)
            run.curve.append({**point, "value": value, **observe(judged, opt_state)})
            losses = []
            if run.diverged:
                break
    run.params = dsbp_optax.evaluation_params(opt_state, params)
    run.opt_state = opt_state
    return run


def evaluation_steps(steps: int) -> list[int]:
    """At most `EVALUATIONS` step numbers, evenly spaced, the last step included."""
    numbers = np.linspace(0, steps, EVALUATIONS + 1)[1:]
    return sorted({max(1, round(number)) for number in numbers})


def _clipper(norm: float | None) -> Callable[[Any], Any]:
    if norm is None:
        return lambda grads: grads
    tx = optax.clip_by_global_norm(norm)
    return lambda grads: tx.update(grads, tx.init(grads))[0]
