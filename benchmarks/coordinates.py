"""Training with gradients in coordinates against training with whole gradients.

Time, arithmetic and memory of whole steps (gradient, update, new parameters) against
those of `optax.adamw`; and the losses of the same rule on either kind of gradient.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks import timing
from benchmarks.distributed import largest_gap
from benchmarks.speed import Loop
from benchmarks.workloads import Workload

#: Steps from refresh to refresh, and how many of them refresh.
PERIOD, WINDOW = 100, 5
#: Runs of `compare_losses`.
RUNS = 5
#: Steps up to which gaps are told.
SHOWN = (1, 2, 5, 10, 20, 50, 100)

Loss = Callable[[Any, Any], jax.Array]
Row = dict[str, Any]


class Mlp(nn.Module):
    """Dense layers of one width, each followed by a ReLU.

    Attributes:
      width: of every layer.
      layers: how many.
    """

    width: int = 2048
    layers: int = 6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, width)`` to the same."""
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width)(x))
        return x

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Mean square of what comes out, against targets."""
        inputs, targets = batch
        return jnp.mean((self.apply({"params": params}, inputs) - targets) ** 2)


def rule(rank: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of coordinates, in float32: both ways are compared to rounding."""
    return dsbp_optax.subspace_adamw(
        1e-3,
        rank=rank,
        clip=None,
        update_every=PERIOD,
        basis=dsbp_optax.Basis(power_iterations=WINDOW, dtype=jnp.float32),
        moment_dtype=None,
    )


def gradients(loss: Loss, rank: int) -> dict[str, tuple[Any, Any]]:
    """Way -> an optimizer, and ``(params, opt_state, batch) -> loss, grads, extra``.

    "adamw" is what there is without this package.
    """

    def plain(params: Any, opt_state: Any, batch: Any) -> Any:
        del opt_state
        return *jax.value_and_grad(loss)(params, batch), {}

    def coordinates(params: Any, opt_state: Any, batch: Any) -> Any:
        collect = dsbp_optax.linen.subspace_value_and_grad(loss)
        value, grads, seen = collect(params, batch, opt_state=opt_state)
        return value, grads, {"statistics": seen}

    return {
        "adamw": (optax.adamw(1e-3), plain),
        "coordinates": (rule(rank), coordinates),
    }


def make_step(tx: Any, differentiate: Any) -> Any:
    """The jitted whole step; parameters and optimizer state are donated."""

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads, extra = differentiate(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def compiler_figures(loss: Loss, params: Any, batch: Any, rank: int) -> list[Row]:
    """What the compiler says of gradients and of whole steps; nothing is run.

    Args:
      loss: ``(params, batch) -> loss``.
      params: parameters, or their shapes.
      batch: a batch, or its shapes.
      rank: of every basis.

    Returns:
      A row for each way and program: ``flops``, every branch counted as if taken;
      ``temporary_bytes`` beyond arguments and results; ``aliased_bytes`` of results
      that lie in the place of arguments; ``parameter_bytes``.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    rows = []
    for way, (tx, differentiate) in gradients(loss, rank).items():
        opt_state = jax.eval_shape(tx.init, params)
        functions = {
            "gradient": jax.jit(differentiate),
            "step": make_step(tx, differentiate),
        }
        for name, function in functions.items():
            program = function.lower(params, opt_state, batch).compile()
            memory = program.memory_analysis()
            aliased = getattr(memory, "alias_size_in_bytes", None)
            row = {"way": way, "program": name, **timing.cost(program)}
            rows.append({**row, "aliased_bytes": aliased, "parameter_bytes": size})
    return rows


def figures(
    model: Mlp, samples: int, workload: Workload, rank: int
) -> dict[str, list[Row]]:
    """`compiler_figures` of the dense layers and of a workload, by name."""
    like = jax.ShapeDtypeStruct((samples, model.width), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), like)["params"]
    shapes = jax.eval_shape(lambda: workload.init(0))
    batch = workload.example(workload.batch_size)
    return {
        "dense layers": compiler_figures(model.loss, params, (like, like), rank),
        workload.name: compiler_figures(workload.loss, shapes, batch, rank),
    }


def turns(rounds: int) -> int:
    """How often `time_steps` reports for so many rounds."""
    return WINDOW - 1 + rounds


def time_steps(
    model: Mlp,
    samples: int,
    rank: int,
    rounds: int,
    after_round: Callable[[], None] = lambda: None,
) -> Row:
    """Whole steps of both ways, taking turns; those that refresh apart.

    The first step of a run, which refreshes, is not timed.

    Args:
      model: what is trained, on random numbers.
      samples: n, size of the batch.
      rank: of every basis.
      rounds: steps of each that refresh nothing.
      after_round: called after each round, those that refresh included.

    Returns:
      ``seconds`` and ``cpu_seconds``: way -> of every step; ``wall``, ``cpu``,
      ``refresh_wall``, ``refresh_cpu``: ratios to AdamW, 95 % bootstrap intervals;
      ``period_wall``, ``period_cpu``: of a mean step of a period.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    batch = tuple(jax.random.normal(k, (samples, model.width)) for k in keys[:2])
    loops, cpu = {}, {}
    for way, (tx, differentiate) in gradients(model.loss, rank).items():
        params = jax.jit(model.init)(keys[2], batch[0])["params"]
        carry = [params, jax.jit(tx.init)(params)]
        cpu[way] = list[float]()
        loop = Loop(make_step(tx, differentiate), carry, [batch])
        loops[way] = _on_cpu(loop, cpu[way])
    wall = timing.interleave(loops, turns(rounds), 1, after_round)
    clocks = {"wall": wall, "cpu": {w: np.asarray(s[1:]) for w, s in cpu.items()}}
    found: Row = {"seconds": clocks["wall"], "cpu_seconds": clocks["cpu"]}
    found = {key: {w: s.tolist() for w, s in v.items()} for key, v in found.items()}
    for clock, seconds in clocks.items():
        found |= _ratios(clock, seconds["coordinates"], seconds["adamw"])
    return found


def _on_cpu(call: Callable[[], Any], seconds: list[float]) -> Callable[[], Any]:
    """The same call; notes the time that processors spent on it, of all threads."""

    def noted() -> Any:
        start = time.process_time()
        result = jax.block_until_ready(call())
        seconds.append(time.process_time() - start)
        return result

    return noted


def _ratios(clock: str, mine: np.ndarray, theirs: np.ndarray) -> Row:
    first = WINDOW - 1
    steady = timing.ratio_of_medians(mine[first:], theirs[first:])
    refresh = timing.ratio_of_groups(mine[:first], theirs)
    share = WINDOW / PERIOD
    mean = (1 - share) * np.median(mine[first:]) + share * np.median(mine[:first])
    return {
        clock: steady._asdict(),
        f"refresh_{clock}": refresh._asdict(),
        f"period_{clock}": float(mean / np.median(theirs)),
    }


def compare_losses(
    workload: Workload,
    data_dir: Path | None,
    rank: int,
    steps: int,
    after_step: Callable[[], None] = lambda: None,
) -> Row:
    """One rule on coordinates, and on whole gradients that are projected afterwards.

    In float32 a third run shows what rounding alone grows to: whole gradients, every
    parameter larger by one unit in its last place.

    Args:
      workload: what to train.
      data_dir: folder of its files.
      rank: of every basis.
      steps: of each run.
      after_step: called after each step of each run.

    Returns:
      By dtype: ``losses``, way -> of every step; ``gaps``, way -> largest relative
      difference from the whole gradients' up to each of the `SHOWN` steps.
    """
    data, found = workload.load(data_dir), {}
    for dtype in (jnp.float64, jnp.float32):
        with _enable_x64(dtype == jnp.float64):
            losses = {
                way: _train(workload, data, rank, steps, dtype, way, after_step)
                for way in ("whole", "coordinates", "nudged")
                if way != "nudged" or dtype == jnp.float32
            }
        gaps = {
            way: _gaps(curve, losses["whole"])
            for way, curve in losses.items()
            if way != "whole"
        }
        found[jnp.dtype(dtype).name] = {"losses": losses, "gaps": gaps}
    return found


def _train(
    workload: Workload,
    data: Any,
    rank: int,
    steps: int,
    dtype: Any,
    way: str,
    after_step: Callable[[], None],
) -> list[float]:
    tx = rule(rank)
    whole = dsbp_optax.linen.value_and_grad(workload.loss)
    short = dsbp_optax.linen.subspace_value_and_grad(workload.loss)

    def differentiate(params: Any, opt_state: Any, batch: Any) -> Any:
        collect = short if way == "coordinates" else whole
        value, grads, seen = collect(params, batch, opt_state=opt_state)
        if way != "coordinates":
            grads = dsbp_optax.project_gradients(grads, opt_state)
        return value, grads, {"statistics": seen}

    step, losses = make_step(tx, differentiate), []
    params = jax.tree.map(lambda x: x.astype(dtype), workload.init(0))
    if way == "nudged":
        params = jax.tree.map(lambda x: jnp.nextafter(x, jnp.inf), params)
    rng = np.random.default_rng(0)
    batches = workload.sampler(data.train, workload.batch_size, rng)
    opt_state = jax.jit(tx.init)(params)
    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state, next(batches))
        losses.append(float(loss))
        after_step()
    return losses


def _gaps(found: list[float], expected: list[float]) -> Mapping[int, float]:
    ends = [end for end in SHOWN if end < len(found)]
    return {n: largest_gap(found[:n], expected[:n]) for n in (*ends, len(found))}


def _enable_x64(on: bool) -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64

    return enable_x64(on)
