"""Many runs of one contender at once: seeds and settings as a vectorised axis.

One compiled program holds the runs of a group; learning rates, weight decay, seeds and
the length of the runs are its arguments. Initial parameters and batches depend on the
seed alone, so that the runs of two contenders are paired by seed.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks import kernels
from benchmarks.peers import Contender
from benchmarks.workloads import cosine

#: Evaluations along a run, the last one at its end.
EVALUATIONS = 12
#: Samples that an evaluation takes at once.
_AT_ONCE = 128
#: Integers of a state that count steps; the same for all runs of a group.
_COUNTERS = ("step", "count")
#: Others that are functions of these; the same for all runs as well.
_SHARED = (*_COUNTERS, "collect")

Params = Any


class Part(NamedTuple):
    """A part of a data set, on the device.

    Attributes:
      inputs: tokens ``(n,)`` or images ``(n, ...)``, uint8, padded at the end.
      targets: labels ``(n,)``; none for text, whose targets are the next tokens.
      length: how many of them count, int32.
    """

    inputs: Any
    targets: Any
    length: Any


class Run(NamedTuple):
    """What tells one run from the others of its contender.

    Attributes:
      rate: largest learning rate of kernels.
      aux_rate: that of all other parameters.
      decay: decoupled weight decay of kernels.
      seed: of the initial parameters and of the batches.
    """

    rate: float
    aux_rate: float
    decay: float
    seed: int


@dataclass(frozen=True)
class Task:
    """What is trained, but for its length and its data.

    Attributes:
      model: inputs to logits.
      batch: samples a step.
      context: tokens a sample; 0 for images.
      clip: largest norm of the whole gradient; None for any.
      windows: samples that judge.
      chunk: steps between which the host may look; all lengths are multiples of it.
      mapped: whether runs follow one another inside the program, for layers that are
        slow with a kernel a run.
    """

    model: nn.Module
    batch: int
    context: int = 0
    clip: float | None = None
    windows: int = 1024
    chunk: int = 50
    mapped: bool = False

    def init(self, key: jax.Array, part: Part) -> Params:
        """Fresh parameters."""
        inputs, _ = self.at(part, jnp.zeros(1, jnp.int32))
        return self.model.init(key, inputs)["params"]

    def at(self, part: Part, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The samples that begin at, or are, some places."""
        if not self.context:
            return part.inputs[places].astype(jnp.float32) / 255, part.targets[places]
        tokens = part.inputs[places[:, None] + jnp.arange(self.context + 1)]
        tokens = tokens.astype(jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]

    def draw(self, key: jax.Array, part: Part) -> tuple[jax.Array, jax.Array]:
        """A batch, drawn with replacement."""
        last = part.length - self.context
        return self.at(part, jax.random.randint(key, (self.batch,), 0, last))

    def loss(self, params: Params, batch: Any) -> jax.Array:
        """Mean cross entropy of a batch."""
        inputs, targets = batch
        logits = self.model.apply({"params": params}, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(losses)

    def judge(self, params: Params, part: Part) -> jax.Array:
        """Loss and share of errors on `windows` samples, evenly spaced over a part."""
        size = min(self.windows, _AT_ONCE)
        share = jnp.arange(self.windows // size * size) / self.windows
        places = (share * (part.length - self.context - 1)).astype(jnp.int32)

        def some(places: jax.Array) -> jax.Array:
            inputs, targets = self.at(part, places)
            logits = self.model.apply({"params": params}, inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return jnp.stack([losses.mean(), (logits.argmax(-1) != targets).mean()])

        return jax.lax.map(some, places.reshape(-1, size)).mean(0)


@dataclass(frozen=True)
class Program:
    """A contender and a task, compiled for a number of runs.

    Attributes:
      task: what is trained.
      runs: how many at once.
      start: seeds, training part -> parameters, optimizer states.
      advance: parameters, states, runs, part, first step, steps -> one chunk later,
        and the losses ``(runs, chunk)``.
      judge: parameters, part -> loss and share of errors, ``(runs, 2)``.
      figures: ``compile_seconds``, ``state_bytes`` and ``kernel_state_bytes`` of a run.
    """

    task: Task
    runs: int
    start: Callable[..., Any]
    advance: Callable[..., Any]
    judge: Callable[..., Any]
    figures: dict[str, Any]


def step_of(task: Task, contender: Contender) -> Callable[..., Any]:
    """One step of one run; `step` and `steps` are common to all of a group."""
    clip = optax.identity() if task.clip is None else optax.clip_by_global_norm(task.clip)

    def one(
        params: Params, opt_state: Any, run: Run, part: Part, step: Any, steps: Any
    ) -> Any:
        opt_state = with_counters(opt_state, step)
        batch = task.draw(jax.random.fold_in(_keys(run.seed)[1], step), part)
        rates = (cosine(step, rate, steps) for rate in (run.rate, run.aux_rate))
        tx = optax.with_extra_args_support(contender.build(*rates, run.decay))
        value_and_grad = GRADIENTS[contender.statistics](task.loss)
        loss, grads, extra = value_and_grad(params, batch, opt_state)
        grads, _ = clip.update(grads, clip.init(grads))
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        opt_state = with_counters(opt_state, step + 1)
        return optax.apply_updates(params, updates), opt_state, loss

    return one


def chunk_of(task: Task, contender: Contender) -> Callable[..., Any]:
    """As many steps of one run as a chunk has."""
    step = step_of(task, contender)

    def one(
        params: Params, opt_state: Any, run: Run, part: Part, first: Any, steps: Any
    ) -> Any:
        def body(carry: Any, number: jax.Array) -> Any:
            *carry, loss = step(*carry, run, part, number, steps)
            return tuple(carry), loss

        numbers = first + jnp.arange(task.chunk)
        carry, losses = jax.lax.scan(body, (params, opt_state), numbers)
        return *carry, losses

    return one


def start_of(task: Task, contender: Contender) -> Callable[..., Any]:
    """Fresh parameters and optimizer state of one run."""

    def one(seed: Any, part: Part) -> Any:
        params = task.init(_keys(seed)[0], part)
        return params, contender.build(1.0, 1.0, 0.0).init(params)

    return one


def group_of(task: Task, contender: Contender, part: Part) -> tuple[Any, Any]:
    """``start`` and ``advance`` of a group, not yet compiled.

    Counters stay out of the vectorised axis: branches that depend on them are taken or
    not, as in a single run, where a vectorised condition would compute both.
    """
    start, advance = start_of(task, contender), chunk_of(task, contender)
    if task.mapped:

        def one_by_one(params: Any, opt_state: Any, runs: Run, *rest: Any) -> Any:
            each = params, opt_state, runs
            return jax.lax.map(lambda x: advance(*x, *rest), each)

        return jax.vmap(start, (0, None)), one_by_one
    _, opt_state = jax.eval_shape(start, 0, part)
    axes = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: None if _is_counter(keys, leaf, _SHARED) else 0, opt_state
    )
    return (
        jax.vmap(start, (0, None), (0, axes)),
        jax.vmap(advance, (0, axes, 0, None, None, None), (0, axes, 0)),
    )


def build(task: Task, contender: Contender, runs: int, data: Sequence[Part]) -> Program:
    """Compile a contender for a number of runs; `data` tells shapes alone."""
    begun = time.perf_counter()
    start, advance = group_of(task, contender, data[0])
    seeds = jnp.zeros(runs, jnp.int32)
    numbers = jnp.zeros(runs, jnp.float32)
    start = jax.jit(start).lower(seeds, data[0]).compile()
    shapes = jax.eval_shape(start_of(task, contender), 0, data[0])
    one = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    carry = start(seeds, data[0])
    group = Run(numbers, numbers, numbers, seeds)
    advance = jax.jit(advance, donate_argnums=(0, 1))
    ends = np.int32(0), np.float32(1)
    advance = advance.lower(*carry, group, data[0], *ends).compile()
    figures = {
        "compile_seconds": round(time.perf_counter() - begun, 1),
        "state_bytes": dsbp_optax.diagnostics.state_bytes(one[1]),
        "kernel_state_bytes": kernels.kernel_bytes(one[1], one[0]),
    }
    return Program(task, runs, start, advance, _judge(task), figures)


@functools.cache
def _judge(task: Task) -> Callable[..., Any]:
    return jax.jit(jax.vmap(task.judge, (0, None)))


def train(
    program: Program, runs: Sequence[Run], steps: int, data: Sequence[Part], test: bool
) -> list[dict[str, Any]]:
    """Train a group; the figures of each run.

    Args:
      program: of `build`.
      runs: at most as many as it was compiled for.
      steps: length of each, a multiple of the chunk.
      data: training, validation and test part.
      test: whether the test part may be looked at.
    """
    task, begun = program.task, time.perf_counter()
    if steps % task.chunk or not 0 < len(runs) <= program.runs:
        raise ValueError(f"got {steps} steps and {len(runs)} runs, expected multiples "
                         f"of {task.chunk} and at most {program.runs}")
    padded = [*runs, *[runs[-1]] * (program.runs - len(runs))]
    *settings, seeds = (np.asarray(field) for field in zip(*padded, strict=True))
    group = Run(*(x.astype(np.float32) for x in settings), seeds.astype(np.int32))
    carry = program.start(group.seed, data[0])
    curve, losses, stops = [], [], evaluation_steps(steps, task.chunk)
    for first in range(0, steps, task.chunk):
        ends = np.int32(first), np.float32(steps)
        *carry, loss = program.advance(*carry, group, data[0], *ends)
        losses.append(loss)
        if first + task.chunk in stops:
            found = np.asarray(program.judge(carry[0], data[1]))
            curve.append((first + task.chunk, found[:, 0]))
    tested = np.asarray(program.judge(carry[0], data[2])) if test else None
    losses = np.concatenate([np.asarray(loss) for loss in losses], axis=1)
    seconds = (time.perf_counter() - begun) / program.runs
    rows = []
    for i, run in enumerate(runs):
        rows.append({
            **run._asdict(),
            "steps": steps,
            "first_loss": float(losses[i, 0]),
            "train_loss": float(losses[i, -task.chunk :].mean()),
            "curve": [{"step": n, "loss": float(x[i])} for n, x in curve],
            "validation_loss": float(found[i, 0]),
            "validation_error": float(found[i, 1]),
            "test_loss": None if tested is None else float(tested[i, 0]),
            "test_error": None if tested is None else float(tested[i, 1]),
            "seconds": round(seconds, 3),
            "runs_at_once": program.runs,
            **program.figures,
        })
    return rows


def evaluation_steps(steps: int, chunk: int) -> list[int]:
    """At most `EVALUATIONS` multiples of a chunk, about evenly spaced, the last too."""
    numbers = np.linspace(0, steps // chunk, EVALUATIONS + 1)[1:]
    return sorted({chunk * max(1, round(number)) for number in numbers})


def with_counters(opt_state: Any, step: Any) -> Any:
    """The state with its counters of steps set to `step`.

    They equal it anyway while no step is skipped; this one is common to all runs.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: (
            jnp.asarray(step, leaf.dtype) if _is_counter(keys, leaf, _COUNTERS) else leaf
        ),
        opt_state,
    )


def _is_counter(keys: Any, leaf: Any, names: Sequence[str]) -> bool:
    named = kernels.path_of(keys).rpartition("/")[2] in names
    return named and leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)


def _keys(seed: Any) -> jax.Array:
    """Keys of the initial parameters and of the batches."""
    return jax.random.split(jax.random.key(seed))


def _plain(loss: Callable[..., Any]) -> Callable[..., Any]:
    def value_and_grad(params: Params, batch: Any, opt_state: Any) -> Any:
        del opt_state
        return *jax.value_and_grad(loss)(params, batch), {}

    return value_and_grad


def _package(loss: Callable[..., Any]) -> Callable[..., Any]:
    collect = dsbp_optax.linen.value_and_grad(loss)

    def value_and_grad(params: Params, batch: Any, opt_state: Any) -> Any:
        value, grads, found = collect(params, batch, opt_state=opt_state)
        return value, grads, {"statistics": found}

    return value_and_grad


def _second_moments(loss: Callable[..., Any]) -> Callable[..., Any]:
    def watched(params: Params, batch: Any) -> Any:
        found: dict[str, jax.Array] = {}

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, nn.Dense):
                x = jax.lax.stop_gradient(args[0]).reshape(-1, args[0].shape[-1])
                found["/".join((*context.module.path, "kernel"))] = x.T @ x / len(x)
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            return loss(params, batch), found

    def value_and_grad(params: Params, batch: Any, opt_state: Any) -> Any:
        del opt_state
        differentiate = jax.value_and_grad(watched, has_aux=True)
        (value, found), grads = differentiate(params, batch)
        return value, grads, {"second_moments": found}

    return value_and_grad


#: What a contender asks for beside gradients -> loss -> ``(params, batch, state) ->
#: (loss, gradients, keywords of its update)``.
GRADIENTS = {"none": _plain, "package": _package, "inputs": _second_moments}
