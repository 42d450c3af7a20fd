"""Training with gradients in coordinates against training with whole gradients.

Time, arithmetic and memory of whole steps (gradient, update, new parameters) against
those of `optax.adamw`; and the losses of the same rule on either kind of gradient.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

import dsbp_optax
from benchmarks import cli
from benchmarks.core import statistics, timing
from benchmarks.core.records import Record
from benchmarks.report import tables
from benchmarks.studies.distributed import largest_gap
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Workload

#: Steps from refresh to refresh, and how many of them refresh.
PERIOD, WINDOW = 100, 5
#: Steps up to which gaps of losses are told.
SHOWN = (1, 2, 5, 10, 20, 50, 100)

Loss = Callable[[Any, Any], jax.Array]


class Mlp(nn.Module):
    """Dense layers of one width, each followed by a ReLU."""

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


def compiler_figures(loss: Loss, params: Any, batch: Any, rank: int) -> list[Record]:
    """What the compiler says of gradients and of whole steps; nothing is run.

    ``aliased_bytes`` are of results that lie in the place of arguments.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    rows = []
    for way, (tx, differentiate) in gradients(loss, rank).items():
        opt_state, step = jax.eval_shape(tx.init, params), make_step(tx, differentiate)
        functions = {"gradient": jax.jit(differentiate), "step": step}
        for name, function in functions.items():
            program = function.lower(params, opt_state, batch).compile()
            memory = program.memory_analysis()
            aliased = getattr(memory, "alias_size_in_bytes", None)
            row = {"way": way, "program": name, **timing.cost(program)}
            rows.append({**row, "aliased_bytes": aliased, "parameter_bytes": size})
    return rows


def figures(
    model: Mlp, samples: int, workload: Workload, rank: int
) -> dict[str, list[Record]]:
    """`compiler_figures` of the dense layers and of a workload, by name."""
    like = jax.ShapeDtypeStruct((samples, model.width), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), like)["params"]
    shapes = jax.eval_shape(lambda: workload.init(0))
    batch = workload.example(workload.batch_size)
    return {
        "dense layers": compiler_figures(model.loss, params, (like, like), rank),
        workload.name: compiler_figures(workload.loss, shapes, batch, rank),
    }


def time_steps(
    model: Mlp,
    samples: int,
    rank: int,
    rounds: int,
    after_round: Callable[[], None] = lambda: None,
) -> Record:
    """Whole steps of both ways, taking turns; those that refresh apart.

    The first step of a run, which refreshes, is not timed. ``wall``, ``cpu``,
    ``refresh_wall`` and ``refresh_cpu`` are ratios to AdamW; ``period_wall`` and
    ``period_cpu`` those of a mean step of a period.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    batch = tuple(jax.random.normal(k, (samples, model.width)) for k in keys[:2])
    loops, cpu = {}, {}
    for way, (tx, differentiate) in gradients(model.loss, rank).items():
        params = jax.jit(model.init)(keys[2], batch[0])["params"]
        carry = [params, jax.jit(tx.init)(params)]
        cpu[way] = list[float]()
        loop = timing.Loop(make_step(tx, differentiate), carry, [batch])
        loops[way] = _on_cpu(loop, cpu[way])
    first, share = WINDOW - 1, WINDOW / PERIOD
    wall = timing.interleave(loops, first + rounds, 1, after_round)
    clocks = {"wall": wall, "cpu": {w: np.asarray(s[1:]) for w, s in cpu.items()}}
    found: Record = {"seconds": clocks["wall"], "cpu_seconds": clocks["cpu"]}
    for clock, seconds in clocks.items():
        mine, theirs = seconds["coordinates"], seconds["adamw"]
        steady = statistics.ratio_of_medians(mine[first:], theirs[first:])
        refresh = statistics.ratio_of_groups(mine[:first], theirs)
        mean = (1 - share) * np.median(mine[first:]) + share * np.median(mine[:first])
        found |= {clock: steady._asdict(), f"refresh_{clock}": refresh._asdict()}
        found[f"period_{clock}"] = float(mean / np.median(theirs))
    return found


def _on_cpu(call: Callable[[], Any], seconds: list[float]) -> Callable[[], Any]:
    """The same call; notes the time that processors spent on it, of all threads."""

    def noted() -> Any:
        start = time.process_time()
        result = jax.block_until_ready(call())
        seconds.append(time.process_time() - start)
        return result

    return noted


def compare_losses(
    workload: Workload,
    data_dir: Path | None,
    rank: int,
    steps: int,
    after_run: Callable[[], None] = lambda: None,
) -> Record:
    """One rule on coordinates, and on whole gradients that are projected afterwards.

    In float32 a third run shows what rounding alone grows to: whole gradients, every
    parameter larger by one unit in its last place. ``gaps`` are the largest relative
    differences from the whole gradients' losses up to each of the `SHOWN` steps.
    """
    data, found = workload.load(data_dir), {}
    for dtype in (jnp.float64, jnp.float32):
        losses = {}
        with _enable_x64(dtype == jnp.float64):
            for way in ("whole", "coordinates", "nudged")[: 2 + (dtype == jnp.float32)]:
                losses[way] = _train(workload, data, rank, steps, dtype, way)
                after_run()
        gaps = {
            way: _gaps(curve, losses["whole"])
            for way, curve in losses.items()
            if way != "whole"
        }
        found[jnp.dtype(dtype).name] = {"losses": losses, "gaps": gaps}
    return found


def _train(
    workload: Workload, data: Any, rank: int, steps: int, dtype: Any, way: str
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
    return losses


def _enable_x64(on: bool) -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64

    return enable_x64(on)


def _gaps(found: list[float], expected: list[float]) -> dict[int, float]:
    ends = [end for end in SHOWN if end < len(found)]
    return {n: largest_gap(found[:n], expected[:n]) for n in (*ends, len(found))}


@cli.app.command("coordinates")
def command(
    workload: cli.WorkloadName = "shakespeare_gpt",
    data_dir: cli.DataDir = None,
    rank: Annotated[int, typer.Option(min=1, help="of every basis")] = 16,
    width: Annotated[int, typer.Option(min=1, help="of the timed layers")] = 2048,
    layers: Annotated[int, typer.Option(min=1, help="that are timed")] = 6,
    samples: Annotated[int, typer.Option(min=1, help="of their batch")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="timed, none refreshes")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="whose losses are compared")] = 100,
    json: cli.Save = None,
    quiet: cli.Quiet = False,
) -> None:
    """Gradients in coordinates against whole ones: time, memory, losses.

    Times mean most on one core: `taskset -c 0 python -m benchmarks coordinates`.
    """
    chosen, model = cli.lookup(WORKLOADS, workload, "WORKLOAD"), Mlp(width, layers)
    with cli.bars(quiet) as progress:
        clock = cli.bar(progress, "steps in turns", WINDOW - 1 + rounds)
        found = {
            "figures": figures(model, samples, chosen, rank),
            "losses": compare_losses(chosen, data_dir, rank, steps),
            "times": time_steps(model, samples, rank, rounds, clock),
        }
    sizes = {"rank": rank, "width": width, "layers": layers, "samples": samples}
    cli.save(json, "coordinates", [{"workload": workload, **sizes, **found}])
    cli.show(quiet, *tables.coordinates(found).items())
