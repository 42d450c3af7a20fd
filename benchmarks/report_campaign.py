"""Tables of a campaign: results, cost, equal time, controls, steps in turns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import cells, compare
from benchmarks.compare import Entry


def results_table(title: str, found: Sequence[Entry]) -> Table:
    """After as many steps for all: the metric, and what it is against the best peer."""
    metric, peer = found[0].metric, compare.best_peer(found)
    against = f"against {peer.name} (95 %)" if peer else "against"
    table = cells.table(f"{title}: equal steps")
    cells.columns(table, "rate", metric.label, "runs", against, "train loss")
    for entry in found:
        table.add_row(
            entry.name,
            f"{entry.records[0]['learning_rate']:g}",
            cells.spread(entry),
            f"{len(entry.records)}" + f", {entry.diverged} bad" * (entry.diverged > 0),
            cells.difference(entry, peer),
            cells.number(entry.median("train_loss"), ".4f"),
        )
    return table


def controls_table(title: str, found: Sequence[Entry]) -> Table:
    """The rule first, then the rule without one of its parts, against it."""
    table = cells.table(f"{title} and its controls", "rule")
    against = "against the rule (95 %)"
    cells.columns(table, "rate", found[0].metric.label, "runs", against, "kernels KiB")
    for entry in found:
        table.add_row(
            entry.name,
            f"{entry.records[0]['learning_rate']:g}",
            cells.spread(entry),
            f"{len(entry.records)}",
            "" if entry is found[0] else cells.difference(entry, found[0]),
            cells.number(entry.median("projected_state_bytes"), ",.1f", 1 / 2**10),
        )
    return table


def cost_table(title: str, found: Sequence[Entry]) -> Table:
    """Memory and times; the ratio is of the kernels' state, to the best peer's."""
    peer = compare.best_peer(found)
    table = cells.table(f"{title}: cost")
    source = "the runs themselves" if found[0].speed is None else "`speed`, in turns"
    table.caption = f"Times: from {source}"
    cells.columns(
        table,
        *("state KiB", "kernels KiB", "ratio", "temp MiB"),
        *("step ms", "refresh ms", "mean ms", "compile s"),
    )
    for entry in found:
        times, mine = entry.milliseconds, entry.median("projected_state_bytes")
        theirs = peer.median("projected_state_bytes") if peer else None
        table.add_row(
            entry.name,
            cells.number(entry.median("state_bytes"), ",.1f", 1 / 2**10),
            cells.number(mine, ",.1f", 1 / 2**10),
            cells.number(mine / theirs if mine is not None and theirs else None, ".3f"),
            cells.number(entry.median("temporary_bytes"), ",.1f", 1 / 2**20),
            *(cells.number(times[key], ".2f") for key in ("step", "refresh", "mean")),
            cells.number(entry.median("compile_seconds"), ".1f"),
        )
    return table


def time_table(title: str, found: Sequence[Entry]) -> Table | None:
    """In as much time for all, and the time to the target; None without a peer."""
    metric, peer = found[0].metric, compare.best_peer(found)
    if peer is None or not np.isfinite(peer.mean):
        return None
    goal = compare.target(metric, peer)
    seconds = peer.curves()[0][-1] * peer.step_seconds
    table = cells.table(f"{title}: equal time")
    table.caption = (
        f"In the {seconds:.1f} s of {peer.name}, the best peer; the target "
        f"{metric.show(goal)} must hold at two evaluations on end"
    )
    cells.columns(table, metric.label, "steps to target", "s to target", "ratio")
    base = compare.seconds_to(peer, goal)
    for entry in found:
        steps, needed = compare.steps_to(entry, goal), compare.seconds_to(entry, goal)
        value = compare.value_after(entry, seconds)
        table.add_row(
            entry.name,
            "-" if value is None else metric.show(value),
            "-" if steps is None else str(steps),
            cells.number(needed, ".1f"),
            cells.number(needed / base if needed and base else None, ".2f"),
        )
    return table


def steps_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a contender of `speed.whole_steps`."""
    table = cells.table(title)
    cells.columns(
        table,
        *("mean ms", "step ms", "refresh ms", "to step", "against"),
        *("ratio", "95 % interval", "compile s"),
    )
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["contender"],
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['step_seconds']:.2f}",
            cells.number(row["refresh_seconds"], ".2f", 1e3),
            cells.interval(row["dearest"]),
            row["against"],
            f"{ratio['value']:.3f}",
            f"{ratio['low']:.3f}-{ratio['high']:.3f}",
            f"{row['compile_seconds']:.1f}",
        )
    return table
