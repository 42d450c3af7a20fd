"""Time of whole training steps, the contenders taking turns.

Steps that refresh a basis are told apart from the others, and the mean weighs them by
their share of a period.
"""

from collections.abc import Callable, Mapping
from typing import Annotated

import jax
import numpy as np
import typer

from benchmarks import cli
from benchmarks.core import statistics, timing
from benchmarks.core.records import Record
from benchmarks.core.timing import Loop
from benchmarks.core.train import make_init, make_step
from benchmarks.optimizers import CONTENDERS, Contender, plain_of
from benchmarks.report import tables
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Workload

#: Steps from refresh to refresh, and how many of them refresh.
PERIOD, WINDOW = 100, 5


def in_turns(
    pairs: Mapping[str, tuple[Workload, Contender]],
    against: Mapping[str, str],
    rounds: int = PERIOD,
    after_round: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Steps of each, in turns.

    `pairs` tells what is trained, and how; `against` what a ratio is to, itself where
    it is missing. Rounds are those of a whole period by default.
    """
    loops = {name: _loop(*pair) for name, pair in pairs.items()}
    warmup = 2 * WINDOW
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


def _loop(workload: Workload, contender: Contender) -> Loop:
    batch = jax.device_put(workload.example(workload.batch_size))
    params = workload.init(0)
    opt_state = make_init(workload, contender)(params, batch)
    numbers = np.float32(1e-4), np.float32(1e6)
    step = make_step(workload, contender)
    return Loop(step, [params, opt_state], [batch, *numbers])


@cli.app.command("speed")
def command(
    workload: cli.WorkloadName = "shakespeare_gpt",
    optimizer: cli.OptimizerNames = None,
    baseline: Annotated[
        str | None, typer.Option(help="default: the optimizer that each replaces")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="steps of each")] = PERIOD,
    json: cli.Save = None,
) -> None:
    """Time steps, the contenders taking turns.

    Steps that lie in the file of a campaign give `results` its times.
    """
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    base = cli.lookup(CONTENDERS, baseline, "--baseline") if baseline else None
    contenders = cli.several(CONTENDERS, optimizer, "--optimizer")
    against = {one.name: base or plain_of(one) for one in contenders}
    pairs = {one.name: (chosen, one) for one in (*contenders, *against.values())}
    with cli.bars() as progress:
        advance = cli.bar(progress, f"steps of {workload}", rounds)
        names = {name: other.name for name, other in against.items()}
        rows = in_turns(pairs, names, rounds, advance)
    cli.save(json, "speed", [{"workload": workload, "rows": rows}])
    cli.show((workload, tables.speed(rows)))
