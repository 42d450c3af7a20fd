"""What `accelerator` compiles and runs: steps of GPTs and of ResNet-18, training."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks import optimizers, peers
from benchmarks.core import hlo, sweep, timing, train
from benchmarks.tasks import gpt, vision
from benchmarks.tasks.base import DataError, cosine
from dsbp_optax.diagnostics import state_bytes

HALF = jnp.bfloat16
#: Rules of this package whose steps are timed -> the optimizer whose place they take.
PLAIN = {"dsbp_muon": "muon", "dsbp_adamw": "adamw", "subspace_adamw": "adamw"}

#: Steps from refresh to refresh of a metric.
PERIOD = 20

#: Name of a figure -> its value.
Figures = dict[str, Any]

# -------------------------------------------------------------------------- models


class Size(NamedTuple):
    """A GPT and its batch."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    batch: int


class Block(nn.Module):
    """Stock attention and a GELU layer in bfloat16; parameters are float32."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """``(n, t, d)`` to the same."""
        told: Any = {"use_bias": False, "dtype": HALF}
        attention = nn.MultiHeadDotProductAttention(self.heads, **told)
        x = x + attention(nn.LayerNorm(**told)(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * x.shape[-1], **told)(nn.LayerNorm(**told)(x)))
        return x + nn.Dense(x.shape[-1], **told)(h), None


class Gpt(nn.Module):
    """A decoder whose blocks follow one another, or are one in a scan."""

    size: Size
    scan: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens ``(n, t)`` to logits ``(n, t, vocabulary)``."""
        size, places = self.size, jnp.arange(tokens.shape[1])
        x = nn.Embed(size.vocabulary, size.width, HALF, name="embed")(tokens)
        x = x + nn.Embed(size.context, size.width, HALF, name="embed_place")(places)
        mask = nn.make_causal_mask(tokens)
        if self.scan:
            every = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            told: Any = {**every, "in_axes": nn.broadcast, "length": size.layers}
            x, _ = nn.scan(Block, **told)(size.heads, name="blocks")(x, mask)
        else:
            for number in range(size.layers):
                x, _ = Block(size.heads, name=f"block{number}")(x, mask)
        x = nn.LayerNorm(use_bias=False, dtype=HALF)(x)
        head = nn.Dense(size.vocabulary, use_bias=False, dtype=HALF, name="head_embed")
        return head(x).astype(jnp.float32)


def dimensions(params: Any) -> Any:
    """For Muon: which axes of a kernel are inputs and outputs; None for the rest."""
    ways = {"query": ((-3,), (-2, -1)), "out": ((-3, -2), (-1,))}
    ways |= dict.fromkeys(("key", "value"), ways["query"])

    def of(keys: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        *_, layer, name = (key.key for key in keys)
        if name != "kernel" or "embed" in layer:
            return None
        sides = ways.get(layer, ((-2,), (-1,)))
        axes = (tuple(leaf.ndim + i for i in side) for side in sides)
        return optax.contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(of, params)


def optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    """A contender whose steps are timed, at a constant rate."""
    axes = {"muon_weight_dimension_numbers": dimensions}
    plain = {
        "muon": functools.partial(optax.contrib.muon, **axes),
        "adamw": optax.adamw,
    }
    make = plain.get(name) or getattr(dsbp_optax, name)
    return optax.with_extra_args_support(make(0.02 if "muon" in name else 1e-3))


# ------------------------------------------------------------------------ programs

_HITS = list[str]()


def listen(event: str, **others: Any) -> None:
    """For `jax.monitoring`: note what comes from the cache of compiled programs."""
    _HITS.extend([event] * (event == "/jax/compilation_cache/cache_hits"))


class Started:
    """A compiled step, what the compiler says of it, and what it carries on.

    `function` is ``(params, state, *constants) -> (params, state, anything)``.
    """

    def __init__(self, function: Any, params: Any, state: Any, *constants: Any):
        self.carry, self.constants = (params, state), constants
        begun, hits = time.perf_counter(), len(_HITS)
        step = jax.jit(function, donate_argnums=(0, 1))
        lowered = step.lower(*self.carry, *constants)
        traced = time.perf_counter()
        self.program = lowered.compile()
        compiled, cached = time.perf_counter(), len(_HITS) > hits
        memory, counted = self.program.memory_analysis(), timing.counts(self.program)
        names = "argument", "output", "temp", "alias"
        sizes = [getattr(memory, f"{x}_size_in_bytes", None) for x in names]
        *parts, aliased = sizes
        kernels = hlo.launches(self.program.as_text())
        self.figures: Figures = {
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "trace_s": traced - begun,
            "compile_s": None if cached else compiled - traced,
            "launches": kernels.usual,
            "launches_of_refresh": kernels.most,
            "loops_of_unknown_length": kernels.unknown_loops,
            "state_bytes": state_bytes(state),
            "temporary_bytes": parts[-1],
            "aliased_bytes": aliased,
            # Aliased results lie in the place of arguments.
            "total_bytes": None if None in sizes else sum(parts) - aliased,
            "accessed_bytes": counted.get("bytes accessed"),
            "flops": counted.get("flops"),
        }

    def __call__(self, steps: int = 1) -> Any:
        """So many more steps."""
        for _ in range(steps):
            *self.carry, rest = self.program(*self.carry, *self.constants)
        return self.carry, rest

    def refreshes(self) -> bool:
        """Whether the next step takes statistics into its bases."""
        flags = optax.tree_utils.tree_get_all_with_path(self.carry[1], "collect")
        return any(np.any(flag) for _, flag in flags if flag is not None)


def _gradient(model: nn.Module, name: str) -> Callable[..., Any]:
    """``(params, state, tokens) -> loss, gradients, keywords of the update``."""

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return _loss(model, params, (tokens[:, :-1], tokens[:, 1:]))

    def plain(params: Any, state: Any, tokens: jax.Array) -> Any:
        return *jax.value_and_grad(loss)(params, tokens), {}

    def ours(params: Any, state: Any, tokens: jax.Array) -> Any:
        short, make = name.startswith("subspace"), dsbp_optax.linen
        collect = (make.subspace_value_and_grad if short else make.value_and_grad)(loss)
        value, grads, found = collect(params, tokens, opt_state=state)
        return value, grads, {"statistics": found}

    return ours if name in PLAIN else plain


def _loss(model: nn.Module, params: Any, batch: Any) -> jax.Array:
    logits = model.apply({"params": params}, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@functools.cache
def gpt_step(size: Size, scan: bool, name: str, alone: bool = False) -> Started:
    """A whole training step; or the update alone, where gradients are noise."""
    rng, shape = np.random.default_rng(0), (size.batch, size.context + 1)
    tokens = jnp.asarray(rng.integers(0, size.vocabulary, shape), jnp.int32)
    model, tx = Gpt(size, scan), optimizer(name)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])["params"]
    state, gradient = jax.jit(tx.init)(params), _gradient(model, name)

    def update(params: Any, state: Any, found: Any) -> Any:
        loss, grads, extra = found
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        return update(params, state, gradient(params, state, tokens))

    if not alone:
        return Started(step, params, state, tokens)
    shapes = jax.eval_shape(gradient, params, state, tokens)
    noise = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype), shapes
    )
    return Started(update, params, state, noise)


@functools.cache
def resnet_step(tiny: bool, name: str) -> Started:
    """A training step of ResNet-18 on one batch."""
    contender, model = optimizers.CONTENDERS[name], resnet18(tiny)
    tx, batch = contender.build(1e-3), vision.images(32, 3)(8 if tiny else 128)
    loss = functools.partial(_loss, model)
    params = jax.jit(model.init)(jax.random.key(0), batch[0])["params"]
    step = functools.partial(train.train_step, loss, None, tx)
    return Started(step, params, jax.jit(tx.init)(params), jax.device_put(batch))


def resnet18(tiny: bool) -> vision.ResNet:
    """With GroupNorm, in bfloat16."""
    widths, blocks = ((8,), 1) if tiny else ((64, 128, 256, 512), 2)
    return vision.ResNet(widths, blocks, dtype=HALF)


# -------------------------------------------------------------------- measurements


def in_turns(steps: Mapping[str, Started], period: int, rounds: int) -> list[Figures]:
    """Milliseconds of two contenders' steps, the plain one first.

    The mean is that of whole periods, in which nobody waits for a single step. Of the
    steps that are waited for, those that refresh are told apart.
    """
    whole = {k: functools.partial(v, period) for k, v in steps.items()}
    seconds = timing.interleave(whole, rounds, 1)
    single: dict[str, dict[bool, list[float]]] = {name: {} for name in steps}
    for _, (name, step) in itertools.product(range(2 * PERIOD), steps.items()):
        kind = step.refreshes()
        single[name].setdefault(kind, []).append(1e3 * timing.timed(step)[1])
    plain, found = next(iter(seconds.values())), []
    for name, kinds in single.items():
        middle = {kind: statistics.median(ms) for kind, ms in kinds.items()}
        figures = {
            "contender": name,
            "mean_step_ms": 1e3 * np.median(seconds[name]) / period,
            "other_step_ms": middle[False],
            "spread": [*np.percentile(seconds[name] / plain, (0, 100))],
        }
        if True in middle:
            figures["refresh_step_ms"] = middle[True]
            figures["refresh_over_other"] = middle[True] / middle[False]
        found.append(figures)
    return found


def copy_bandwidth(mib: int) -> float:
    """Bytes a second, read and written, of a copy that adds 1 to each number."""
    add = Started(lambda x, state: (x + 1, state, ()), jnp.zeros(mib * 2**18), ())
    seconds = timing.interleave({"copy": functools.partial(add, 10)}, 5)["copy"]
    return float(20 * mib * 2**20 / np.median(seconds))


def update_bytes(step: Started, bandwidth: float, ms: float) -> Figures:
    """Bytes a parameter that an update moves, and those that it cannot avoid.

    The compiler counts the body of a loop once, and every branch; what a copy moves in
    the time of the update is an upper bound.
    """
    size, (params, state) = step.figures["parameters"], step.carry
    (_, grads, _), *_ = step.constants
    once, twice = state_bytes(grads), state_bytes((params, state))
    least = (once + 2 * twice) / size
    accessed = (step.figures["accessed_bytes"] or np.nan) / size
    moved = ms / 1e3 * bandwidth / size
    return {
        "copy_bytes_a_second": bandwidth,
        "unavoidable_bytes_a_parameter": least,
        "compiler_bytes_a_parameter": accessed,
        "copied_bytes_a_parameter": moved,
        "compiler_over_unavoidable": accessed / least,
        "copied_over_unavoidable": moved / least,
    }


def alone(size: Size, scan: bool, name: str) -> Figures:
    """Figures of a step and the peak of training, for a process of its own.

    A peak never falls, and what one program learns of the hardware the next one's
    compilation would be spared.
    """
    _ = jax.block_until_ready(jnp.ones((512, 512)) @ jnp.ones((512, 512)))
    step = gpt_step(size, scan, name)
    jax.block_until_ready(step(PERIOD + 2))
    told = jax.devices()[0].memory_stats() or {}
    return {**step.figures, "peak_bytes": told.get("peak_bytes_in_use")}


# ------------------------------------------------------------------------ training


@functools.cache
def text(folder: Path | None, tiny: bool) -> tuple[str, tuple[sweep.Part, ...]]:
    """Where bytes come from, and their three parts: of 20 pieces two are held out.

    All ``*.txt`` below the folder, one after the other; or a random chain.
    """
    files = sorted(folder.rglob("*.txt")) if folder and not tiny else []
    told = f"{len(files)} text files" if files else "generated"
    whole = np.frombuffer(b"\n".join(x.read_bytes() for x in files), np.uint8)
    if not files:
        rng, chain = np.random.default_rng(0), []
        table = rng.integers(0, 64, (64, 4), np.uint8)
        column = rng.integers(0, 64, 4096, np.uint8)
        for _ in range(32 if tiny else 4096):
            column = table[column, rng.integers(0, 4, column.size)]
            chain.append(column)
        whole = np.stack(chain, 1).reshape(-1)
    piece = min(2**16, len(whole) // 40)
    pieces = whole[: len(whole) // piece * piece].reshape(-1, piece)
    turn = np.arange(len(pieces)) % 20
    parts = (pieces[x].reshape(-1) for x in (turn > 1, turn == 0, turn == 1))
    return told, tuple(sweep.Part(jnp.asarray(x), (), np.int32(len(x))) for x in parts)


@functools.cache
def pictures(folder: Path | None, tiny: bool) -> tuple[str, Any]:
    """Where images come from, and their three parts, bytes on the device."""
    try:
        found = vision.load_cifar10(None if tiny else folder)[:3]
        parts = [(x.inputs.raw, x.targets) for x in found]
        return "CIFAR-10", jax.device_put(parts)
    except DataError:
        rng, parts = np.random.default_rng(0), []
    means = rng.integers(64, 192, (10, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    for count in (64, 32, 32) if tiny else (45_000, 5_000, 10_000):
        labels = rng.integers(0, 10, count, np.int32)
        noise = rng.integers(-60, 60, (count, 32, 32, 3), np.int16)
        parts.append(((means[labels] + noise).astype(np.uint8), labels))
    return "generated", jax.device_put(parts)


@functools.cache
def _gpt_program(task: sweep.Task, name: str, data: Any) -> sweep.Program:
    return sweep.build(task, peers.CONTENDERS[name], 1, text(*data)[1], True)


def train_gpt(
    size: Size, folder: Path | None, tiny: bool, name: str, rate: float, seed: int
) -> Figures:
    """One run on bytes of text."""
    contender, sizes = peers.CONTENDERS[name], (*size[:3], size.context)
    small: Any = {"chunk": 2, "windows": 8} if tiny else {}
    model = gpt.Gpt(256, *sizes, dtype=HALF)
    task = sweep.Task(model, size.batch, size.context, 1.0, **small)
    program = _gpt_program(task, contender.program or name, (folder, tiny))
    told, data = text(folder, tiny)
    run = sweep.Run(rate, contender.aux_rates[0], 0.0, seed, contender.variant)
    row = sweep.train(program, [run], 4 if tiny else 1500, data, True)[0]
    return {**row, "data": told}


@functools.cache
def _resnet_program(tiny: bool, name: str, batch: int) -> tuple[Any, Any, Any]:
    """Initial parameters and state, an epoch, and the accuracy, jitted."""
    contender, model = optimizers.CONTENDERS[name], resnet18(tiny)
    loss = functools.partial(_loss, model)

    def pixels(raw: jax.Array) -> jax.Array:
        return vision.Pixels(raw, vision.CIFAR10_MEAN, vision.CIFAR10_STD).normalized()

    def start(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, 32, 32, 3)))["params"]
        return params, contender.build(lambda count: 0.0).init(params)

    def epoch(carry: Any, part: Any, key: Any, rate: Any, steps: Any) -> Any:
        tx = contender.build(lambda count: cosine(count, rate, steps))
        images, labels = part

        def step(carry: Any, drawn: Any) -> Any:
            rows, key = drawn
            keys = jax.random.split(key, 2)
            flips = jax.random.bernoulli(keys[0], shape=(batch,))
            corners = jax.random.randint(keys[1], (2, batch), 0, 9)
            inputs = vision.crop_and_flip(pixels(images[rows]), flips, corners, 4)
            found = train.train_step(loss, None, tx, *carry, (inputs, labels[rows]))
            return found[:2], found[2]

        order, keys = jax.random.split(key)
        count = len(labels) // batch
        order = jax.random.permutation(order, len(labels))[: count * batch]
        drawn = order.reshape(count, batch), jax.random.split(keys, count)
        return jax.lax.scan(step, carry, drawn)

    def accuracy(params: Any, part: Any) -> jax.Array:
        def right(some: Any) -> jax.Array:
            logits = model.apply({"params": params}, pixels(some[0]))
            return jnp.mean(logits.argmax(-1) == some[1])

        size = min(500, len(part[1]))
        cut = (x.reshape(-1, size, *x.shape[1:]) for x in part)
        return jax.lax.map(right, tuple(cut)).mean()

    return jax.jit(start), jax.jit(epoch, donate_argnums=0), jax.jit(accuracy)


def train_resnet(
    folder: Path | None, tiny: bool, name: str, rate: float, seed: int
) -> Figures:
    """One run with crops and flips; `seconds` have compilation, the first time."""
    (told, (training, *judges)), begun = pictures(folder, tiny), time.perf_counter()
    batch, epochs = (16, 1) if tiny else (128, 15)
    start, epoch, accuracy = _resnet_program(tiny, name, batch)
    keys = jax.random.split(jax.random.key(seed), epochs + 1)
    carry, steps, curve = start(keys[0]), epochs * (len(training[1]) // batch), []
    for key in keys[1:]:
        carry, losses = epoch(carry, training, key, rate, float(steps))
        curve.append(float(losses.mean()))
    found = [float(accuracy(carry[0], part)) for part in judges]
    return {
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "batch_size": batch,
        "train_loss": curve[-1],
        "curve": curve,
        "validation_accuracy": found[0],
        "test_accuracy": found[1],
        "diverged": not np.isfinite(curve).all(),
        "state_bytes": state_bytes(carry[1]),
        "seconds": time.perf_counter() - begun,
        "data": told,
    }
