"""Do a rank and an interval that adapt pay? Against the best fixed cell of a grid.

Every cell tries the same learning rates on validation samples, for a third of the
length. The best fixed cell and the adaptive ones are then trained from fresh seeds.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import dsbp_optax
from benchmarks import cli
from benchmarks.core import records, statistics, tune
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Order, build, carry_out, key_of
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Data, Workload

RANKS, INTERVALS = (8, 16, 32), (20, 100, 400)
#: What adapts has the bounds of the grid.
AUTO_RANK = dsbp_optax.AutoRank(most=RANKS[-1], least=4)
AUTO_INTERVAL = dsbp_optax.AutoInterval(shortest=20, longest=400)
#: Rates tried around a rule's default, in half decades.
SHIFTS = (-1, 0, 1)


def cells(rule: Contender) -> Iterator[Contender]:
    """The fixed cells, then rank, interval and both adaptive."""
    free: list[tuple[Any, Any]] = [*itertools.product(RANKS, INTERVALS)]
    free += [(AUTO_RANK, INTERVALS[0]), (RANKS[-1], AUTO_INTERVAL)]
    free += [(AUTO_RANK, AUTO_INTERVAL)]
    for rank, every in free:
        words = (x if isinstance(x, int) else "auto" for x in (rank, every))
        settings = {**rule.settings, "rank": rank, "update_every": every}
        yield replace(
            rule,
            name="{}, rank {}, every {}".format(rule.name, *words),
            settings=settings,
        )


def adaptive(name: str) -> bool:
    """Whether a cell is no fixed one."""
    return "auto" in name


def observe(params: Any, opt_state: Any) -> Mapping[str, float]:
    """Means over kernels: power iterations done, and the rank in use."""
    del params
    layers = [x for x in dsbp_optax.by_path(opt_state).values() if x.basis is not None]
    ranks = [
        layer.kernel.rank if layer.spectrum.rank is None else layer.spectrum.rank
        for layer in layers
    ]
    done = [np.mean(layer.spectrum.iterations) for layer in layers]
    return {
        "iterations": float(np.mean(done)),
        "rank": float(np.mean([np.mean(rank) for rank in ranks])),
    }


def carry(
    workload: Workload, data: Data, file: Path, cell: Contender, wanted: Sequence[Order]
) -> None:
    """The runs that have no record yet."""
    program, metric = None, workload.metric
    for order in wanted:
        made = {key_of(one) for one in records.read(file, optimizer=cell.name)}
        if order.key in made:
            continue
        begun = time.monotonic()
        program = program or build(workload, cell)
        record, _ = carry_out(program, data, order, observe=observe)
        records.append(file, "adaptive", [record])
        shown = record.get(metric.test if order.phase == "final" else metric.validation)
        cli.console.print(
            f"{cell.name}: {order.phase} {order.rate:g} seed {order.seed}: {shown} in "
            f"{time.monotonic() - begun:.0f} s"
        )


@cli.app.command("adaptive")
def command(
    workload: cli.WorkloadName = "shakespeare_gpt",
    of: Annotated[str, typer.Option(help="the rule; see `list`")] = "dsbp_adamw",
    data_dir: cli.DataDir = None,
    out: cli.Out = RESULTS,
    seeds: cli.Seeds = 5,
    quick: cli.Quick = False,
) -> None:
    """Adaptive ranks and intervals against the best fixed ones; can be continued."""
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    rule = cli.lookup(CONTENDERS, of, "--of")
    file = out / "adaptive" / f"{workload}.jsonl"
    data, metric = chosen.load(data_dir), chosen.metric
    steps = chosen.quick_steps if quick else chosen.steps
    rates = [tune.shifted(rule.default_rate, shift) for shift in SHIFTS]
    best: dict[str, tuple[float, float]] = {}
    for cell in cells(rule):
        tried = [
            Order("tune", rate, tune.SEED, steps // 3, quick, 1, "tried")
            for rate in rates
        ]
        carry(chosen, data, file, cell, tried)
        known = records.read(file, optimizer=cell.name, phase="tune")
        best[cell.name] = max(
            (metric.score(one[metric.validation]), one["learning_rate"])
            for one in known
        )
    fixed = max((x for x in best if not adaptive(x)), key=best.__getitem__)
    finals: dict[str, list[Record]] = {}
    for cell in cells(rule):
        if adaptive(cell.name) or cell.name == fixed:
            rate = best[cell.name][1]
            told = [Order("final", rate, seed, steps, quick) for seed in range(seeds)]
            carry(chosen, data, file, cell, told)
            finals[cell.name] = records.read(file, optimizer=cell.name, phase="final")
    for name, found in finals.items():
        mine, base = ([x[metric.test] for x in some] for some in (found, finals[fixed]))
        paired = (
            statistics.mean_interval(np.subtract(mine, base)) if name != fixed else "-"
        )
        last = [x["curve"][-1] for x in found]
        done, rank = (np.mean([x[k] for x in last]) for k in ("iterations", "rank"))
        cli.console.print(
            f"{name}: {np.mean(mine):.4f} at {found[0]['learning_rate']:g}, "
            f"to the best fixed {paired}, {done:.0f} iterations, rank {rank:.1f}"
        )
