"""Many runs of one contender at once: seeds and settings as a vectorised axis.

One compiled program holds the runs of a group; learning rates, weight decay, seeds and
the length of the runs are its arguments. Initial parameters and batches depend on the
seed alone, so that the runs of two contenders are paired by seed.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks.core import kernels
from benchmarks.core.train import evaluation_steps
from benchmarks.peers import Contender
from benchmarks.tasks.base import cosine
from dsbp_optax.core import gate

#: Samples that an evaluation takes at once.
_AT_ONCE = 128
#: Integers of a state that depend on the number of steps alone.
_COUNTERS = ("step", "count", "collect")

Params = Any


class Part(NamedTuple):
    """A part of a data set, on the device."""

    inputs: Any  # tokens ``(n,)`` or images ``(n, ...)``, uint8, padded at the end
    targets: Any  # labels ``(n,)``; none for text, whose targets are the next tokens
    length: Any  # how many of them count, int32


class Run(NamedTuple):
    """What tells one run from the others of its contender."""

    rate: float  # largest learning rate of kernels
    aux_rate: float  # that of all other parameters
    decay: float  # decoupled weight decay of kernels
    seed: int  # of the initial parameters and of the batches
    variant: int = 0  # of the contender, where one program serves several


@dataclass(frozen=True)
class Task:
    """What is trained, but for its length and its data."""

    model: nn.Module  # inputs to logits
    batch: int  # samples a step
    context: int = 0  # tokens a sample; 0 for images
    clip: float | None = None  # largest norm of the whole gradient; None for any
    windows: int = 1024  # samples that judge
    # steps between which the host may look; all lengths are multiples of it
    chunk: int = 50
    # whether runs follow one another inside the program, for layers that are slow with
    # a kernel a run
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
    """A contender and a task, compiled for a number of runs."""

    task: Task  # what is trained
    runs: int  # how many at once
    init: Callable[..., Any]  # seeds, training part -> parameters
    start: Callable[..., Any]  # parameters -> optimizer states
    # parameters, states, runs, part, first step, steps -> one chunk later, and the
    # losses ``(runs, chunk)``
    advance: Callable[..., Any]
    # parameters, part -> loss and share of errors, ``(runs, 2)``
    judge: Callable[..., Any]
    # ``compile_seconds``, ``state_bytes`` and ``kernel_state_bytes`` of a run
    figures: dict[str, Any]


def step_of(task: Task, contender: Contender) -> Callable[..., Any]:
    """One step of one run; `step` and `steps` are common to all of a group.

    Gradients that are not finite are zero for the optimizer; the loss tells of them.
    """
    clip = optax.identity()
    if task.clip is not None:
        clip = optax.clip_by_global_norm(task.clip)
    value_and_grad = GRADIENTS[contender.statistics](task.loss)

    def one(
        params: Params, opt_state: Any, run: Run, part: Part, step: Any, steps: Any
    ) -> Any:
        batch = task.draw(jax.random.fold_in(_keys(run.seed)[1], step), part)
        rates = (cosine(step, rate, steps) for rate in (run.rate, run.aux_rate))
        tx = optax.with_extra_args_support(
            contender.build(*rates, run.decay, run.variant)
        )
        loss, grads, extra = value_and_grad(params, batch, opt_state)
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(norm), g, 0), grads)
        grads, _ = clip.update(grads, clip.init(grads))
        with _no_gate():
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
        loss = jnp.where(jnp.isfinite(norm), loss, jnp.nan)
        return optax.apply_updates(params, updates), opt_state, loss

    return one


@contextlib.contextmanager
def _no_gate() -> Iterator[None]:
    """The package's test for finite gradients, answered: `step_of` has made it."""
    token = gate.TESTED.set(True)
    try:
        yield
    finally:
        gate.TESTED.reset(token)


def group_of(
    task: Task, contender: Contender, params: Params, in_turn: bool = False
) -> tuple[Any, Any]:
    """``start`` and ``advance`` of a group, not yet compiled; `params` of one run.

    Counters stay out of the vectorised axis: branches that depend on them are taken or
    not, as in a single run, where a vectorised condition would compute both. Runs that
    follow one another need no such care.
    """
    start, step = contender.build(1.0, 1.0, 0.0, 0).init, step_of(task, contender)
    axes = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: None if _is_counter(keys, leaf) else 0,
        jax.eval_shape(start, params),
    )

    def common(opt_state: Any) -> Any:
        return jax.tree.map(
            lambda axis, leaf: leaf if axis == 0 or leaf is None else leaf.max(0),
            axes,
            opt_state,
            is_leaf=lambda axis: axis is None,
        )

    def chunk(
        step: Callable[..., Any], params: Any, opt_state: Any, runs: Run, *rest: Any
    ) -> Any:
        part, first, steps = rest

        def body(carry: Any, number: jax.Array) -> Any:
            *carry, loss = step(*carry, runs, part, number, steps)
            return tuple(carry), loss

        numbers = first + jnp.arange(task.chunk)
        carry, losses = jax.lax.scan(body, (params, opt_state), numbers)
        return *carry, losses

    def one_by_one(params: Any, opt_state: Any, runs: Run, *rest: Any) -> Any:
        each = params, opt_state, runs
        return jax.lax.map(lambda x: chunk(step, *x, *rest), each)

    def together(params: Any, opt_state: Any, *rest: Any) -> Any:
        every = jax.vmap(step, (0, axes, 0, None, None, None))

        def joint(*args: Any) -> Any:
            params, opt_state, losses = every(*args)
            return params, common(opt_state), losses

        params, opt_state, losses = chunk(joint, params, opt_state, *rest)
        return params, opt_state, losses.T

    if in_turn:
        return lambda params: jax.lax.map(start, params), one_by_one
    return jax.vmap(start, 0, axes), together


def build(
    task: Task,
    contender: Contender,
    runs: int,
    data: Sequence[Part],
    in_turn: bool | None = None,
) -> Program:
    """Compile a contender for a number of runs; `data` tells shapes alone."""
    begun = time.perf_counter()
    if in_turn is None:
        in_turn = task.mapped or jax.default_backend() == "cpu"
    init, judge = jitted(task)
    seeds, numbers = np.zeros(runs, np.int32), np.zeros(runs, np.float32)
    params = init(seeds, data[0])
    single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    start, advance = group_of(task, contender, single, in_turn)
    start = jax.jit(start).lower(params).compile()
    opt_state, ends = start(params), (np.int32(0), np.float32(1))
    group = Run(numbers, numbers, numbers, seeds, seeds)
    advance = jax.jit(advance, donate_argnums=(0, 1))
    advance = advance.lower(params, opt_state, group, data[0], *ends).compile()
    state = jax.eval_shape(contender.build(1.0, 1.0, 0.0, 0).init, single)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    figures = {
        "compile_seconds": round(time.perf_counter() - begun, 1),
        "state_bytes": dsbp_optax.diagnostics.state_bytes(state),
        "kernel_state_bytes": kernels.kernel_bytes(state, single),
    }
    return Program(task, runs, init, start, advance, judge, figures)


@functools.cache
def jitted(task: Task) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Initial parameters and the evaluation, the same for all contenders."""

    def init(seed: Any, part: Part) -> Params:
        return task.init(_keys(seed)[0], part)

    judge = jax.vmap(task.judge, (0, None))
    if task.mapped:

        def judge(params: Params, part: Part) -> jax.Array:
            return jax.lax.map(lambda params: task.judge(params, part), params)

    return jax.jit(jax.vmap(init, (0, None))), jax.jit(judge)


def train(
    program: Program, runs: Sequence[Run], steps: int, data: Sequence[Part], test: bool
) -> list[dict[str, Any]]:
    """Train a group; the figures of each run."""
    task, seconds = program.task, 0.0
    if steps % task.chunk or not 0 < len(runs) <= program.runs:
        raise ValueError(
            f"got {steps} steps and {len(runs)} runs, expected a multiple of "
            f"{task.chunk} and at most {program.runs}."
        )
    padded = [*runs, *[runs[-1]] * (program.runs - len(runs))]
    *settings, seeds, variants = (np.asarray(x) for x in zip(*padded, strict=True))
    settings = (x.astype(np.float32) for x in settings)
    group = Run(*settings, seeds.astype(np.int32), variants.astype(np.int32))
    params = program.init(group.seed, data[0])
    carry = jax.block_until_ready((params, program.start(params)))
    curve, losses, stops = [], [], evaluation_steps(steps, task.chunk)
    for first in range(0, steps, task.chunk):
        begun, ends = time.perf_counter(), (np.int32(first), np.float32(steps))
        *carry, loss = program.advance(*carry, group, data[0], *ends)
        losses.append(np.asarray(loss))
        seconds += time.perf_counter() - begun
        if first + task.chunk in stops:
            found = np.asarray(program.judge(carry[0], data[1]))
            curve.append((first + task.chunk, found[:, 0]))
    tested = np.asarray(program.judge(carry[0], data[2])) if test else found * np.nan
    losses = np.concatenate(losses, axis=1)
    lost = ~np.isfinite(losses).all(1)
    found, tested = (np.where(lost[:, None], np.nan, x) for x in (found, tested))
    rows = []
    for i, run in enumerate(runs):
        rows.append(
            {
                **run._asdict(),
                "steps": steps,
                "first_loss": float(losses[i, 0]),
                "train_loss": float(losses[i, -task.chunk :].mean()),
                "curve": [{"step": n, "loss": float(x[i])} for n, x in curve],
                "validation_loss": float(found[i, 0]),
                "validation_error": float(found[i, 1]),
                "test_loss": float(tested[i, 0]),
                "test_error": float(tested[i, 1]),
                "diverged": bool(lost[i]),
                "seconds": round(seconds / program.runs, 3),
                "runs_at_once": program.runs,
                **program.figures,
            }
        )
    return rows


def _is_counter(keys: Any, leaf: Any) -> bool:
    named = kernels.path_of(keys).rpartition("/")[2] in _COUNTERS
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
