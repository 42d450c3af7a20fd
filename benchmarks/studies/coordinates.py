"""Training with gradients in coordinates against training with whole gradients.

Time, arithmetic and memory of whole steps (gradient, update, new parameters) against
those of `optax.adamw`; and the losses of the same rule on either kind of gradient.
"""

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
from benchmarks.studies.speed import PERIOD, WINDOW
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Workload

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


def optimizer(way: str, rank: int) -> optax.GradientTransformationExtraArgs:
    """``adamw``, what there is without this package, or the rule of coordinates.

    In float32: both kinds of gradients are compared to rounding.
    """
    if way == "adamw":
        return optax.with_extra_args_support(optax.adamw(1e-3))
    return dsbp_optax.subspace_adamw(
        1e-3,
        rank=rank,
        clip=None,
        update_every=PERIOD,
        basis=dsbp_optax.Basis(power_iterations=WINDOW, dtype=jnp.float32),
        moment_dtype=None,
    )


def gradient(way: str, loss: Loss) -> Callable[..., Any]:
    """``(params, opt_state, batch) -> loss, gradient, statistics``.

    ``whole`` projects a gradient that was computed whole.
    """

    def differentiate(params: Any, opt_state: Any, batch: Any) -> Any:
        if way == "adamw":
            return *jax.value_and_grad(loss)(params, batch), {}
        adapter = dsbp_optax.linen
        if way == "coordinates":
            collect = adapter.subspace_value_and_grad(loss)
            return collect(params, batch, opt_state=opt_state)
        collect = adapter.value_and_grad(loss)
        value, grads, seen = collect(params, batch, opt_state=opt_state)
        return value, dsbp_optax.project_gradients(grads, opt_state), seen

    return differentiate


def make_step(way: str, loss: Loss, rank: int) -> Any:
    """The jitted whole step; parameters and optimizer state are donated."""
    tx, differentiate = optimizer(way, rank), gradient(way, loss)

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        value, grads, seen = differentiate(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=seen)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def compiler_figures(loss: Loss, params: Any, batch: Any, rank: int) -> list[Record]:
    """What the compiler says of gradients and of whole steps; nothing is run.

    ``aliased_bytes`` are of results that lie in the place of arguments.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    rows = []
    for way in ("adamw", "coordinates"):
        opt_state = jax.eval_shape(optimizer(way, rank).init, params)
        programs = {"gradient": jax.jit(gradient(way, loss))}
        programs["step"] = make_step(way, loss, rank)
        for name, function in programs.items():
            program = function.lower(params, opt_state, batch).compile()
            memory = program.memory_analysis()
            aliased = getattr(memory, "alias_size_in_bytes", None)
            row = {"way": way, "program": name, **timing.cost(program)}
            rows.append({**row, "aliased_bytes": aliased, "parameter_bytes": size})
    return rows


def time_steps(
    model: Mlp,
    samples: int,
    rank: int,
    rounds: int,
    after_round: Callable[[], None] = lambda: None,
) -> Record:
    """Whole steps of both ways, taking turns; those that refresh apart.

    The first step of a run, which refreshes, is not timed. ``wall`` and
    ``refresh_wall`` are ratios to AdamW; ``period_wall`` that of a mean step of a
    period.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    batch = tuple(jax.random.normal(k, (samples, model.width)) for k in keys[:2])
    loops = {}
    for way in ("adamw", "coordinates"):
        params = jax.jit(model.init)(keys[2], batch[0])["params"]
        carry = [params, jax.jit(optimizer(way, rank).init)(params)]
        loops[way] = timing.Loop(make_step(way, model.loss, rank), carry, [batch])
    first, share = WINDOW - 1, WINDOW / PERIOD
    seconds = timing.interleave(loops, first + rounds, 1, after_round)
    mine, theirs = seconds["coordinates"], seconds["adamw"]
    mean = (1 - share) * np.median(mine[first:]) + share * np.median(mine[:first])
    steady = statistics.ratio_of_medians(mine[first:], theirs[first:])
    return {
        "seconds": seconds,
        "wall": steady._asdict(),
        "refresh_wall": statistics.ratio_of_groups(mine[:first], theirs)._asdict(),
        "period_wall": float(mean / np.median(theirs)),
    }


def compare_losses(
    workload: Workload, data_dir: Path | None, rank: int, steps: int
) -> Record:
    """One rule on coordinates, and on whole gradients that are projected afterwards.

    ``gaps`` are the largest relative differences from the whole gradients' losses up to
    each of the `SHOWN` steps.
    """
    data, found = workload.load(data_dir), {}
    for dtype in (jnp.float64, jnp.float32):
        with _enable_x64(dtype == jnp.float64):
            losses = {
                way: _train(workload, data, rank, steps, dtype, way)
                for way in ("whole", "coordinates")
            }
        ends = *(end for end in SHOWN if end < steps), steps
        pair = losses["coordinates"], losses["whole"]
        gaps = {n: largest_gap(*(curve[:n] for curve in pair)) for n in ends}
        told = {"losses": losses, "gaps": {"coordinates": gaps}}
        found[jnp.dtype(dtype).name] = told
    return found


def _train(
    workload: Workload, data: Any, rank: int, steps: int, dtype: Any, way: str
) -> list[float]:
    step, losses = make_step(way, workload.loss, rank), []
    params = jax.tree.map(lambda x: x.astype(dtype), workload.init(0))
    rng = np.random.default_rng(0)
    batches = workload.sampler(data.train, workload.batch_size, rng)
    opt_state = jax.jit(optimizer(way, rank).init)(params)
    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state, next(batches))
        losses.append(float(loss))
    return losses


def _enable_x64(on: bool) -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64

    return enable_x64(on)


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
) -> None:
    """Gradients in coordinates against whole ones: time, memory, losses.

    Times mean most on one core: `taskset -c 0 python -m benchmarks coordinates`.
    """
    chosen, model = cli.lookup(WORKLOADS, workload, "WORKLOAD"), Mlp(width, layers)
    like = jax.ShapeDtypeStruct((samples, width), jnp.float32)
    dense = jax.eval_shape(model.init, jax.random.key(0), like)["params"]
    shapes = jax.eval_shape(lambda: chosen.init(0))
    batch = chosen.example(chosen.batch_size)
    with cli.bars() as progress:
        clock = cli.bar(progress, "steps in turns", WINDOW - 1 + rounds)
        found = {
            "figures": {
                "dense layers": compiler_figures(model.loss, dense, (like, like), rank),
                workload: compiler_figures(chosen.loss, shapes, batch, rank),
            },
            "losses": compare_losses(chosen, data_dir, rank, steps),
            "times": time_steps(model, samples, rank, rounds, clock),
        }
    sizes = {"rank": rank, "width": width, "layers": layers, "samples": samples}
    cli.save(json, "coordinates", [{"workload": workload, **sizes, **found}])
    cli.show(*tables.coordinates(found).items())
