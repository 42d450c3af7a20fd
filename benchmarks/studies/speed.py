"""Speed, reported and not asserted: three fixed figures, and any workload's steps.

(a) `update` alone on large kernels, no refresh, against `optax.adam`;
(b) a whole training step with capture, averaged over a period of 100 steps, against
    plain `optax.sgd`;
(c) a step that refreshes every basis, against the same plain step.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer

import dsbp_optax
from benchmarks import cli
from benchmarks.core import statistics, timing
from benchmarks.core.records import Record
from benchmarks.core.timing import Loop
from benchmarks.core.train import make_init, make_step, train_step
from benchmarks.optimizers import CONTENDERS, Contender, plain_of, projected_adamw
from benchmarks.report import tables
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Workload

KERNELS = ((512, 512),) * 4 + ((1024, 1024),) * 2
BATCH = 128
PERIOD, WINDOW = 100, 5


def update_alone(rounds: int) -> list[Record]:
    """(a): steps that refresh nothing, the states driven past their windows first.

    Without weight decay, since `optax.adam` has none.
    """
    basis = dsbp_optax.Basis(power_iterations=WINDOW)
    never = {"update_every": 10**6, "basis": basis}
    optimizers = {
        "optax.adam": optax.adam(1e-3),
        "projected_adamw": projected_adamw(1e-3, weight_decay=0.0, **never),
        "dsbp_sgd": dsbp_optax.dsbp_sgd(1e-2, **never),
        "dsbp_sgd, k=8": dsbp_optax.dsbp_sgd(1e-2, rank=8, **never),
        "dsbp": dsbp_optax.dsbp(1e-2, **never),
    }
    params, grads = _kernels(0), _kernels(1)
    loops = {}
    for name, tx in optimizers.items():

        def step(opt_state: Any, grads: Any, params: Any, tx: Any = tx) -> Any:
            updates, opt_state = tx.update(grads, opt_state, params)
            return opt_state, updates

        opt_state = jax.jit(tx.init)(params)
        function = jax.jit(step, donate_argnums=0)
        loops[name] = Loop(function, [opt_state], [grads, params])
    seconds = timing.interleave(loops, rounds, warmup=2 * WINDOW)
    return _rows("a: update", "optax.adam", seconds, loops)


def period_average(rounds: int) -> list[Record]:
    """(b): whole steps at p = 100, medians weighted by the share of refresh steps."""
    basis = dsbp_optax.Basis(power_iterations=WINDOW)
    loops = _training_loops(
        {
            "optax.sgd": optax.sgd(0.1),
            "dsbp": dsbp_optax.dsbp(0.01, update_every=PERIOD, power_iterations=WINDOW),
            "dsbp_sgd": dsbp_optax.dsbp_sgd(0.1, update_every=PERIOD, basis=basis),
        }
    )
    seconds = timing.interleave(loops, rounds, warmup=PERIOD // 10)
    steps = PERIOD // 10 + np.arange(rounds)
    strata = (steps % PERIOD < WINDOW).astype(int)
    return _rows("b: mean step", "optax.sgd", seconds, loops, strata)


def refresh_step(rounds: int) -> list[Record]:
    """(c): whole steps that all refresh, p = q = 1."""
    every = {"update_every": 1, "basis": dsbp_optax.Basis(power_iterations=1)}
    loops = _training_loops(
        {
            "optax.sgd": optax.sgd(0.1),
            "dsbp": dsbp_optax.dsbp(0.01, **every),
            "dsbp_sgd": dsbp_optax.dsbp_sgd(0.1, **every),
        }
    )
    seconds = timing.interleave(loops, rounds)
    return _rows("c: refresh", "optax.sgd", seconds, loops)


#: Functions of a number of rounds, and that number.
FIGURES: tuple[tuple[Callable[[int], list[Record]], int], ...] = (
    *((update_alone, 100), (period_average, PERIOD), (refresh_step, 30)),
)


def _kernels(seed: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), len(KERNELS))
    return {
        f"dense_{number}": {"kernel": 0.01 * jax.random.normal(key, shape)}
        for number, (key, shape) in enumerate(zip(keys, KERNELS, strict=True))
    }


def _training_loops(
    optimizers: Mapping[str, optax.GradientTransformation],
) -> dict[str, Loop]:
    workload, loops = WORKLOADS["fashion_mnist_cnn"], {}
    batch = jax.device_put(workload.example(BATCH))
    for name, optimizer in optimizers.items():
        tx = optax.with_extra_args_support(optimizer)
        params = workload.init(0)  # They are donated, so each loop gets its own.
        function = functools.partial(train_step, workload.loss, None, tx)
        step = jax.jit(function, donate_argnums=(0, 1))
        loops[name] = Loop(step, [params, jax.jit(tx.init)(params)], [batch])
    return loops


def _rows(
    figure: str,
    against: str,
    seconds: Mapping[str, np.ndarray],
    loops: Mapping[str, Loop],
    strata: np.ndarray | None = None,
) -> list[Record]:
    kinds = np.zeros(len(seconds[against]), int) if strata is None else strata
    middle = {n: statistics.stratified_median(x, kinds) for n, x in seconds.items()}
    return [
        {
            "figure": figure,
            "contender": name,
            "against": against,
            "rounds": len(values),
            "seconds": middle[name],
            "seconds_against": middle[against],
            "ratio": statistics.ratio_of_medians(
                values, seconds[against], kinds
            )._asdict(),
            "compile_seconds": loops[name].compile_seconds,
            "compile_seconds_against": loops[against].compile_seconds,
        }
        for name, values in seconds.items()
        if name != against
    ]


def in_turns(
    pairs: Mapping[str, tuple[Workload, Contender]],
    against: Mapping[str, str],
    rounds: int = PERIOD,
    after_round: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Whole training steps on one random batch each, the contenders taking turns.

    `pairs` tells what is trained, and how; `against` what a ratio is to, itself where
    it is missing. Rounds are those of a whole period by default.
    """
    loops = {name: _loop(*pair) for name, pair in pairs.items()}
    warmup = max(2 * WINDOW, 1)
    seconds = timing.interleave(loops, rounds, warmup, after_round)
    flags = {
        name: np.asarray([c.refreshes(warmup + n) for n in range(rounds)], int)
        for name, (_, c) in pairs.items()
    }
    rows = []
    for name, values in seconds.items():
        other, mine = against.get(name, name), flags[name]
        fresh, plain = values[mine == 1], values[mine == 0]
        strata = 2 * mine + flags[other]  # Neither, one or both refresh.
        ratio = statistics.ratio_of_medians(values, seconds[other], strata)
        dearest = statistics.ratio_of_groups(fresh, plain) if fresh.size else None
        rows.append(
            {
                "contender": name,
                "against": other,
                "rounds": rounds,
                "seconds": statistics.stratified_median(values, mine),
                "step_seconds": float(np.median(plain)),
                "refresh_seconds": float(np.median(fresh)) if fresh.size else None,
                "dearest": dearest._asdict() if dearest else None,
                "ratio": ratio._asdict(),
                "compile_seconds": loops[name].compile_seconds,
            }
        )
    return rows


def whole_steps(
    workload: Workload,
    contenders: Sequence[Contender],
    baseline: Contender | None = None,
    rounds: int = PERIOD,
    after_round: Callable[[], None] = lambda: None,
) -> list[Record]:
    """`in_turns` on one workload, against a baseline or the plain optimizer of each."""
    against = {c.name: baseline or plain_of(c) for c in contenders}
    pairs = {c.name: (workload, c) for c in (*contenders, *against.values())}
    names = {name: other.name for name, other in against.items()}
    return in_turns(pairs, names, rounds, after_round)


def _loop(workload: Workload, contender: Contender) -> Loop:
    batch = jax.device_put(workload.example(workload.batch_size))
    params = workload.init(0)
    opt_state = make_init(workload, contender)(params, batch)
    numbers = np.float32(1e-4), np.float32(1e6)
    step = make_step(workload, contender)
    return Loop(step, [params, opt_state], [batch, *numbers])


@cli.app.command("speed")
def command(
    workload: Annotated[
        str | None, typer.Argument(help="default: three fixed figures")
    ] = None,
    optimizer: cli.OptimizerNames = None,
    baseline: Annotated[
        str | None, typer.Option(help="default: the optimizer that each replaces")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="steps of each")] = PERIOD,
    json: cli.Save = None,
    quiet: cli.Quiet = False,
) -> None:
    """Time updates and steps, the contenders taking turns.

    Steps that lie in the file of a campaign give `report` its times.
    """
    with cli.bars(quiet) as progress:
        if workload is None:
            advance, rows = cli.bar(progress, "figures", len(FIGURES)), []
            for measure, usual in FIGURES:
                rows += measure(usual)
                advance()
        else:
            chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
            base = cli.lookup(CONTENDERS, baseline, "--baseline") if baseline else None
            contenders = cli.several(CONTENDERS, optimizer, "--optimizer")
            advance = cli.bar(progress, f"steps of {workload}", rounds)
            rows = whole_steps(chosen, contenders, base, rounds, advance)
    cli.save(json, "speed", [{"workload": workload, "rows": rows}])
    cli.show(quiet, (workload or "fixed figures", tables.speed(rows)))
