"""One training run and its record: a step compiled once for every rate and length."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks.core import kernels, timing
from benchmarks.core.records import Record, provenance
from benchmarks.core.statistics import stratified_median
from benchmarks.optimizers import Contender
from benchmarks.tasks.base import Data, DataError, Params, Samples, Workload

EVALUATIONS = 12

Loss = Callable[[Params, Any], jax.Array]
#: (parameters, optimizer state) -> figures by name
Observe = Callable[[Params, Any], Mapping[str, float]]


@dataclass
class Program:
    """One contender, compiled for one workload."""

    workload: Workload
    contender: Contender
    init: Callable[[Params, Any], Any]  # fresh parameters, first batch -> state
    # (params, opt_state, batch, rate, steps) -> (params, opt_state, loss)
    step: Callable[..., Any]
    figures: dict[str, Any]  # of the compiled step and the state


@dataclass
class Run:
    """What one seed gave."""

    # ``step``, ``train_loss`` (mean since the last one) and ``value`` of evaluations
    curve: list[dict[str, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    refreshing: list[bool] = field(default_factory=list)  # of every step
    diverged: bool = False  # whether some loss was not finite; the run then ends
    params: Params = None  # as they are evaluated
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

    Statistics exist only where `tx` asks for them; only SAM uses `grad_fn`. The
    gradients of its second point are clipped alike.
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
        **extra,
    )
    return optax.apply_updates(params, updates), opt_state, value


def _clipper(norm: float | None) -> Callable[[Any], Any]:
    if norm is None:
        return lambda grads: grads
    tx = optax.clip_by_global_norm(norm)
    return lambda grads: tx.update(grads, tx.init(grads))[0]


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
        "kernel_state_bytes": kernels.kernel_bytes(opt_state, params),
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

    The seed is that of fresh parameters and of the order of the data. `observe` gives
    further figures for the curve, of the parameters as they are evaluated.
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
            judged = dsbp_optax.evaluation_params(opt_state, params)
            value = workload.measure(judged, judge, count)
            point = {"step": number, "train_loss": float(np.mean(losses))}
            run.curve.append({**point, "value": value, **observe(judged, opt_state)})
            losses = []
            if run.diverged:
                break
    run.params = dsbp_optax.evaluation_params(opt_state, params)
    run.opt_state = opt_state
    return run


def evaluation_steps(steps: int, chunk: int = 1) -> list[int]:
    """At most `EVALUATIONS` multiples of a chunk, about evenly spaced, the last too."""
    numbers = np.linspace(0, steps // chunk, EVALUATIONS + 1)[1:]
    return sorted({chunk * max(1, round(number)) for number in numbers})


@dataclass(frozen=True)
class Order:
    """One run as it is asked for."""

    phase: str  # "tune" or "final": judged on validation or on test samples
    rate: float
    seed: int  # of parameters and data order
    steps: int
    quick: bool = False  # whether lengths are those of ``--quick``
    round: int = 0  # of the tuning, from 1; 0 for final runs
    source: str = "tuned"  # where the learning rate comes from

    @property
    def key(self) -> tuple[str, int, float, int]:
        """What tells it from the other runs of its contender."""
        return self.phase, self.round, self.rate, self.seed


def key_of(record: Record) -> tuple[str, int, float, int]:
    """`Order.key` of a record."""
    return tuple(record[k] for k in ("phase", "round", "learning_rate", "seed"))


def carry_out(
    program: Program,
    data: Data,
    order: Order,
    after_step: Callable[[], None] = lambda: None,
    observe: Observe = lambda params, opt_state: {},
) -> tuple[Record, Run]:
    """Train once: the record, and the run."""
    workload, contender = program.workload, program.contender
    if len(data.train) < workload.batch_size:
        raise DataError(
            f"training set: got {len(data.train)} samples, expected at least one batch "
            f"of {workload.batch_size}. Remedy: more data, or a larger --limit."
        )
    final, metric, start = order.phase == "final", workload.metric, time.perf_counter()
    run = train(
        program,
        data,
        data.test if final else data.validation,
        rate=order.rate,
        steps=order.steps,
        seed=order.seed,
        after_step=after_step,
        observe=observe,
    )
    value = None if run.diverged else run.curve[-1]["value"]
    judged = {metric.test if final else metric.validation: value}
    if final:
        judged[metric.validation] = workload.measure(run.params, data.validation, None)
    record = {
        "workload": workload.name,
        "optimizer": contender.name,
        "phase": order.phase,
        "round": order.round,
        "learning_rate": order.rate,
        "learning_rate_source": order.source,
        "seed": order.seed,
        "steps": order.steps,
        "quick": order.quick,
        "batch_size": workload.batch_size,
        "schedule": workload.schedule.__doc__,
        "clip": workload.clip,
        "hyperparameters": contender.hyperparameters(),
        "metric": metric.name,
        **judged,
        "train_loss": run.curve[-1]["train_loss"],
        "diverged": run.diverged,
        "curve": run.curve,
        **_times(run),
        **program.figures,
        "seconds": time.perf_counter() - start,
        "train_samples": len(data.train),
        **provenance(),
    }
    return record, run


def _times(run: Run) -> dict[str, float | None]:
    """Medians in milliseconds; the mean step weighs refresh steps by their share."""
    seconds, refreshing = np.asarray(run.step_seconds), np.asarray(run.refreshing)
    kinds = {"step_ms": seconds[~refreshing], "refresh_step_ms": seconds[refreshing]}
    middle = {
        k: float(1e3 * np.median(x)) if x.size else None for k, x in kinds.items()
    }
    return {**middle, "mean_step_ms": 1e3 * stratified_median(seconds, refreshing)}
