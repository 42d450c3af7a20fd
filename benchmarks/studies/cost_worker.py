"""What one process measures of a training step: the script that `cost` runs.

It imports nothing of `benchmarks`, so that it measures whatever version of the library
PYTHONPATH names, and XLA has its default flags in it.
"""

import functools
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax

#: Contender -> figure -> what was measured; what every worker prints.
Found = dict[str, dict[str, float | None]]

#: Contender -> its constant rate.
RATES: Mapping[str, float] = {
    **dict.fromkeys(("dsbp", "dsbp_sgd", "sgd"), 0.1),
    **dict.fromkeys(("dsbp_adamw", "adamw", "subspace_adamw"), 3e-3),
    **dict.fromkeys(("dsbp_muon", "muon", "muon_kernels", "subspace_muon"), 0.02),
}
RECIPES = tuple(name for name in RATES if name.startswith(("dsbp", "subspace")))
#: End of the name of a recipe that is called as a plain optimizer, without statistics.
ALONE = "_alone"
#: The steps that are timed, and those whose losses are kept.
_TIMED, _KEPT, _MIB = range(25, 85), (1, 10, 50, 100, 200), 2**20


class Block(nn.Module):
    """Attention and a GELU layer of stock Linen modules."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(n, t, d)`` to the same."""
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
        h = nn.Dense(4 * width)(nn.LayerNorm()(x))
        return x + nn.Dense(width)(nn.gelu(h))


class Gpt(nn.Module):
    """An unrolled decoder with learned positions and a head of its own."""

    width: int
    blocks: int
    vocabulary: int = 65

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens ``(n, t)`` to logits ``(n, t, vocabulary)``."""
        places = jnp.arange(tokens.shape[1])
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(tokens.shape[1], self.width)(places)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.blocks):
            x = Block()(x, mask)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm()(x))


class Task:
    """The GPT under one optimizer: its gradient, its update, its step."""

    def __init__(self, name: str, width: int, blocks: int, batch: int = 12):
        self.model, self.ours = Gpt(width, blocks), name in RECIPES
        self.tx = make_optimizer(name)
        rng = np.random.default_rng(0)
        self.tokens = jnp.asarray(rng.integers(0, 65, (batch, 65)), jnp.int32)
        differentiate = dsbp_optax.linen if self.ours else jax
        self.gradient = differentiate.value_and_grad(self.loss)

    def init(self) -> Any:
        """Parameters."""
        seen = self.tokens[:, :-1]
        return jax.jit(self.model.init)(jax.random.key(0), seen)["params"]

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Of the next token."""
        logits = self.model.apply({"params": params}, tokens[:, :-1])
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return cross_entropy(logits, tokens[:, 1:]).mean()

    def differentiate(self, params: Any, state: Any, tokens: jax.Array) -> Any:
        """``loss, grads, extra arguments of the update``."""
        if not self.ours:
            return *self.gradient(params, tokens), {}
        loss, grads, statistics = self.gradient(params, tokens, opt_state=state)
        return loss, grads, {"statistics": statistics}

    def step(self, params: Any, state: Any, tokens: jax.Array) -> Any:
        """``params, state, loss``."""
        loss, grads, extra = self.differentiate(params, state, tokens)
        updates, state = self.tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    def start(self) -> tuple[Any, list[Any], dict[str, float | None]]:
        """The compiled step, ``[params, state]``, and the seconds of compilation."""
        params = self.init()
        held = [params, self.tx.init(params)]
        program, seconds = _compile(self.step, (0, 1), *held, self.tokens)
        return program, held, seconds


def make_optimizer(name: str) -> optax.GradientTransformation:
    """A contender at a constant rate, nothing else changed."""
    others = {
        "sgd": functools.partial(optax.sgd, momentum=0.9),
        "adamw": optax.adamw,
        "muon": optax.contrib.muon,
        "muon_kernels": functools.partial(
            optax.contrib.muon, muon_weight_dimension_numbers=_dimensions
        ),
    }
    name = name.removesuffix(ALONE)
    return (others.get(name) or getattr(dsbp_optax, name))(RATES[name])


def _dimensions(params: Any) -> Any:
    """What each axis of a kernel is; None for all other parameters."""
    heads = dict.fromkeys(("query", "key", "value"), ((0,), (1, 2)))
    heads["out"] = (0, 1), (2,)

    def of(keys: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        *_, layer, name = (key.key for key in keys)
        axes = heads.get(layer, (leaf.ndim - 2, leaf.ndim - 1))
        numbers = optax.contrib.MuonDimensionNumbers(*axes)
        return numbers if name == "kernel" else None

    return jax.tree_util.tree_map_with_path(of, params)


def _compile(function: Any, donated: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
    """A program, and the seconds that it took, also on the processor's clock."""
    start, cpu = time.perf_counter(), time.process_time()
    lowered = jax.jit(function, donate_argnums=donated).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    end, cpu = time.perf_counter(), time.process_time() - cpu
    seconds = {"trace_s": traced - start, "compile_s": end - traced}
    return program, {**seconds, "both_s": end - start, "both_cpu_s": cpu}


def _memory(key: str) -> float:
    """MiB that Linux says of this process; elsewhere its peak of resident pages.

    Not `ru_maxrss` on Linux: a child begins with its parent's.
    """
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{key}:")) / 1024


def train(
    name: str, width: int, blocks: int, steps: int = 25, text: bool = True
) -> Found:
    """Compile the step and take it: seconds, peak memory, size of the program."""
    task = Task(name, width, blocks)
    program, held, found = task.start()
    losses, data = [], [_memory("VmData")]
    for _ in range(steps):
        *held, loss = program(*held, task.tokens)
        losses.append(float(loss))
        data.append(_memory("VmData"))
    found |= {"peak_mib": _memory("VmHWM")}
    if not text:  # Under a cap.
        fell = losses[-1] < losses[0] < float("inf")
        return {name: {**found, "data_mib": max(data), "fell": float(fell)}}
    lines = program.as_text()
    count = sum(" = " in line for line in lines.splitlines())
    return {name: {**found, "program_bytes": len(lines), "instructions": count}}


def update(name: str, width: int, blocks: int) -> Found:
    """Compile `tx.update` alone, statistics as arguments shaped like the adapter's."""
    task = Task(name, width, blocks)
    params = jax.eval_shape(task.init)
    state = jax.eval_shape(task.tx.init, params)
    _, grads, extra = jax.eval_shape(task.differentiate, params, state, task.tokens)

    def call(grads: Any, state: Any, params: Any, extra: Any) -> Any:
        return task.tx.update(grads, state, params, **extra)

    _, found = _compile(call, (), grads, state, params, extra)
    kept = ("both_s", "both_cpu_s")
    return {name: {f"update_{k}, {blocks} blocks": found[k] for k in kept}}


def temporaries(name: str, wide: int, stack: int) -> Found:
    """Temporary bytes a parameter of an update in place; stacks of kernels, or two."""
    shapes = {**dict.fromkeys("qkvo", (wide, wide))}
    shapes |= {"up": (wide, 4 * wide), "down": (4 * wide, wide)}
    block = {layer: {"kernel": shape} for layer, shape in shapes.items()}
    block |= {f"norm{i}": {"scale": (wide,), "bias": (wide,)} for i in range(2)}
    lead, number = ((stack,), 1) if stack else ((), 2)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32),
        {f"block{i}": block for i in range(number)},
        is_leaf=lambda node: isinstance(node, tuple),
    )
    tx = optax.with_extra_args_support(make_optimizer(name))
    state = jax.eval_shape(tx.init, params)

    def call(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params, statistics={})
        return optax.apply_updates(params, updates), state

    program, _ = _compile(call, (1, 2), params, state, params)
    used = program.memory_analysis().temp_size_in_bytes
    layout = f"stacks of {stack}" if stack else "unrolled"
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {name: {f"temporary bytes a parameter, {layout}": used / total}}


def turns(names: Sequence[str], width: int, blocks: int) -> Found:
    """Steps in turns in one process: those that refresh, the others, the mean."""
    tasks = {name: Task(name, width, blocks) for name in names}
    started = {name: task.start()[:2] for name, task in tasks.items()}
    taken: dict[str, dict[bool, list[float]]] = {n: {} for n in names}
    for number, name in itertools.product(range(_TIMED.stop), names):
        program, held = started[name]
        flags = optax.tree_utils.tree_get_all_with_path(held[1], "collect")
        refreshes = any(np.any(flag) for _, flag in flags if flag is not None)
        start = time.perf_counter()
        *held[:], _ = jax.block_until_ready(program(*held, tasks[name].tokens))
        if number in _TIMED:
            elapsed = 1e3 * (time.perf_counter() - start)
            taken[name].setdefault(refreshes, []).append(elapsed)
    found: Found = {}
    for name, kinds in taken.items():
        middle = {kind: statistics.median(ms) for kind, ms in kinds.items()}
        mean = sum(len(ms) * middle[kind] for kind, ms in kinds.items()) / len(_TIMED)
        found[name] = {"mean_step_ms": mean, "other_step_ms": middle.get(False)}
        found[name]["refresh_step_ms"] = middle.get(True)
    return found


def losses(names: Sequence[str] = RECIPES, width: int = 32, blocks: int = 1) -> Found:
    """Losses of every recipe on random tokens in a fixed order, to compare versions.

    There is too much of them to be learnt by heart, lest losses end as noise.
    """
    rng = np.random.default_rng(1)
    batches = jnp.asarray(rng.integers(0, 65, (64, 4, 65)) % 33, jnp.int32)
    found: Found = {}
    for name in names:
        task = Task(name, width, blocks, batch=4)
        program, held, _ = task.start()
        curve = []
        for number in range(_KEPT[-1]):
            *held, loss = program(*held, batches[number % 64])
            curve.append(float(loss))
        found[name] = {f"loss_{step}": curve[step - 1] for step in _KEPT}
    return found


if __name__ == "__main__":
    _, chosen, settings = sys.argv
    workers = {f.__name__: f for f in (train, update, temporaries, turns, losses)}
    answer = workers[chosen](**json.loads(settings))
    place = str(Path(dsbp_optax.__file__).resolve().parent.parent)
    print(json.dumps({"library": place, "found": answer}))
