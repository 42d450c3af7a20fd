"""One training run: a jitted step with donated state, every step timed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

import dsbp_optax
from benchmarks import timing
from benchmarks.data import Split, batches
from benchmarks.optimizers import Contender
from benchmarks.workloads import Batch, Params, Workload

_EVALUATION_BATCH = 1000

Step = Callable[[Params, Any, Batch], tuple[Params, Any, jax.Array]]


@dataclass
class Program:
    """One contender, compiled for one workload and batch size.

    Attributes:
      contender: what it is.
      learning_rate: at its start.
      init: fresh parameters of a seed and a first batch -> optimizer state.
      step: the compiled step.
      compile_seconds: of the step.
      state_bytes: size of the optimizer state.
    """

    contender: Contender
    learning_rate: float
    init: Callable[[Params, Batch], Any]
    step: Step
    compile_seconds: float
    state_bytes: int


@dataclass
class Run:
    """What one seed gave.

    Attributes:
      seed: of the parameters and of the order of the data.
      train_loss: mean over each epoch.
      test_accuracy: after each epoch.
      step_seconds: of every step.
      refreshing: for every step, whether it refreshed a basis.
    """

    seed: int
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    refreshing: list[bool] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether some loss was not finite."""
        return not bool(np.isfinite(self.train_loss).all())


def make_step(
    loss: Callable[[Params, Batch], jax.Array],
    tx: optax.GradientTransformationExtraArgs,
) -> Any:
    """The jitted step ``(params, opt_state, batch) -> (params, opt_state, loss)``.

    The same for every contender: statistics exist only where `tx` asks for them, and
    only SAM uses `grad_fn`.

    Args:
      loss: ``(params, batch) -> loss``.
      tx: any optimizer that tolerates extra arguments.
    """
    value_and_grad = dsbp_optax.linen.value_and_grad(loss)

    def step(params: Params, opt_state: Any, batch: Batch) -> Any:
        value, grads, statistics = value_and_grad(params, batch, opt_state=opt_state)
        extra = {"statistics": statistics} if statistics else {}
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            grad_fn=jax.grad(lambda params, _: loss(params, batch)),
            **extra,
        )
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def make_init(
    workload: Workload,
    contender: Contender,
    tx: optax.GradientTransformationExtraArgs,
) -> Callable[[Params, Batch], Any]:
    """``(params, first batch) -> optimizer state``, jitted.

    A warm start is made of single iterations, so that only one is compiled.
    """
    init = jax.jit(tx.init)
    if not contender.warm_start:
        return lambda params, batch: init(params)

    @jax.jit
    def iterate(params: Params, batch: Batch, opt_state: Any) -> Any:
        return dsbp_optax.linen.warm_start(
            workload.loss, params, batch, opt_state=opt_state, power_iterations=2
        )

    def warm(params: Params, batch: Batch) -> Any:
        opt_state = init(params)
        for _ in range(contender.window - 1):
            opt_state = iterate(params, batch, opt_state)
        return opt_state

    return warm


def build(
    workload: Workload,
    contender: Contender,
    learning_rate: float,
    steps: int,
    batch: Batch,
    warmup: int = 2,
) -> Program:
    """Compile everything and run it a few times, so that training is timed warm.

    Args:
      workload: what to train.
      contender: the optimizer.
      learning_rate: at the start of the schedule.
      steps: length of the schedule.
      batch: any batch of the size to come.
      warmup: untimed steps.
    """
    tx = contender.build(workload.schedule(learning_rate, steps))
    init = make_init(workload, contender, tx)
    params = workload.init(0)
    opt_state = init(params, batch)
    state_bytes = dsbp_optax.diagnostics.state_bytes(opt_state)
    step, seconds = timing.compiled(
        make_step(workload.loss, tx), params, opt_state, batch
    )
    for _ in range(warmup):
        params, opt_state, _ = jax.block_until_ready(step(params, opt_state, batch))
    return Program(contender, learning_rate, init, step, seconds, state_bytes)


def train(
    workload: Workload,
    program: Program,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    after_epoch: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Train from one seed and test after each epoch.

    Args:
      workload: what to train.
      program: the contender, built for the same batch size.
      split: the data.
      epochs: how long.
      batch_size: samples a step.
      seed: of the parameters and of the order of the data.
      after_epoch: told about each epoch.
    """
    run, rng = Run(seed), np.random.default_rng(seed)
    params, opt_state = workload.init(seed), None
    for _ in range(epochs):
        losses = []
        for host_batch in batches(split, batch_size, rng):
            batch = jax.device_put(host_batch)
            if opt_state is None:
                opt_state = program.init(params, batch)
            jax.block_until_ready((params, opt_state, batch))
            run.refreshing.append(program.contender.refreshes(len(run.refreshing)))
            (params, opt_state, loss), seconds = timing.timed(
                lambda p=params, s=opt_state, b=batch: program.step(p, s, b)
            )
            run.step_seconds.append(seconds)
            losses.append(float(loss))
        run.train_loss.append(float(np.mean(losses)))
        run.test_accuracy.append(accuracy(workload, params, split))
        after_epoch(run)
    return run


def accuracy(workload: Workload, params: Params, split: Split) -> float:
    """Share of the test set that is classified rightly."""
    right = 0
    for start in range(0, len(split.test_labels), _EVALUATION_BATCH):
        chosen = slice(start, start + _EVALUATION_BATCH)
        batch = split.test_images[chosen], split.test_labels[chosen]
        right += int(workload.correct(params, batch))
    return right / len(split.test_labels)
