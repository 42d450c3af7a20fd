"""Tables of what a step sends, needs and survives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import cells, communication

#: What the child that trains nothing has no figures for.
_UNCOUNTED = ("size", "way", "state_bytes", "artifact_bytes")


def communication_table(title: str, found: Mapping[str, Any]) -> Table:
    """What a step sends; refreshes apart, by the period's share of them."""
    table = cells.table(f"{title}: numbers sent in a step", "what")
    cells.columns(table, "numbers")
    share = f"coordinates of projected kernels, {found['share']:.4f} of their gradients"
    table.add_row(share, f"{found['coordinates']:,}")
    for name, count in found["others"].items():
        table.add_row(name, f"{count:,}")
    table.add_row("scalars", f"{found['scalars']:,}")
    share = communication.WINDOW / communication.PERIOD
    table.add_row("sketches, in a step that refreshes", f"{found['refresh']:,}")
    table.add_row("the same, a step's share", f"{share * found['refresh']:,.0f}")
    for shape in found["unknown"]:
        table.add_row(f"not expected: {shape}", f"{int(np.prod(shape)):,}")
    return table


def coordinates_tables(
    workload: str,
    figures: Mapping[str, Sequence[Mapping[str, Any]]],
    times: Mapping[str, Any],
    losses: Mapping[str, Any],
) -> list[Table]:
    """What `benchmarks.coordinates` found, against whole gradients."""
    memory = cells.table("Compiled programs", "model")
    for heading in ("program", "gradients"):
        memory.add_column(heading)
    cells.columns(memory, "GFLOP", "temp MiB", "in place MiB")
    for model, rows in figures.items():
        for row in sorted(rows, key=lambda row: row["program"]):
            memory.add_row(
                *(model, row["program"], row["way"]),
                cells.number(row["flops"], ",.1f", 1e-9),
                cells.number(row["temporary_bytes"], ",.1f", 1 / 2**20),
                cells.number(row["aliased_bytes"], ",.1f", 1 / 2**20),
            )
    clocks = cells.table("Steps in turns, against optax.adamw (95 %)", "clock")
    cells.columns(clocks, "step", "step that refreshes", "mean of a period")
    for clock in ("wall", "cpu"):
        row = (cells.interval(times[clock]), cells.interval(times[f"refresh_{clock}"]))
        clocks.add_row(clock, *row, f"{times[f'period_{clock}']:.2f}")
    gaps = cells.table(
        f"{workload}: losses, against projecting whole gradients", "dtype"
    )
    gaps.add_column("run")
    curves = [(d, w, g) for d, f in losses.items() for w, g in f["gaps"].items()]
    cells.columns(gaps, *(f"to step {step}" for step in curves[0][2]))
    for dtype, way, gap in curves:
        gaps.add_row(dtype, way, *(f"{value:.1e}" for value in gap.values()))
    return [memory, clocks, gaps]


def constrained_table(title: str, record: Mapping[str, Any]) -> Table:
    """One row an optimizer, size and way of `benchmarks.constrained`."""
    base = record["baseline"]["cap_mib"]
    table = cells.table(title)
    for heading in ("size", "trained from"):
        table.add_column(heading)
    cells.columns(
        table,
        *("cap MiB", "less jax alone", "step ms", "state MiB", "artifact KiB"),
        *("resident MiB", "compiling, resident MiB"),
    )
    alone = {
        **dict.fromkeys(_UNCOUNTED),
        **record["baseline"],
        "optimizer": "jax alone",
    }
    for row in (alone, *record["rows"]):
        cap = row["cap_mib"]
        table.add_row(
            *(row["optimizer"], row["size"] or "-", row["way"] or "-"),
            "does not train" if cap is None else f"{cap:.0f}",
            "-" if cap is None else f"{cap - base:.0f}",
            cells.number(row["step_ms"], ".1f"),
            cells.number(row["state_bytes"], ",.2f", 1 / 2**20),
            cells.number(row["artifact_bytes"], ",.0f", 1 / 2**10),
            cells.number(row.get("rss_mib"), ",.0f"),
            cells.number(row["compiling_rss_mib"], ",.0f"),
        )
    return table


def step_cost_table(record: Mapping[str, Any]) -> Table:
    """What `benchmarks.cost` found; each library beside the other."""
    libraries = list(record["libraries"])
    found = {(r["figure"], r["contender"], r["library"]): r for r in record["rows"]}
    table = cells.table("What a step costs, and the ratio to the plain one", "figure")
    table.add_column("optimizer")
    cells.columns(table, *(f"{x}{end}" for x in libraries for end in ("", ", ratio")))
    for figure, name in dict.fromkeys(key[:2] for key in found):
        rows = [found.get((figure, name, library), {}) for library in libraries]
        form = ",.0f" if figure in ("program_bytes", "instructions") else ".4g"
        form = ".7g" if figure.startswith("loss") else form
        numbers = [(cells.number(r.get("value"), form), r.get("ratio")) for r in rows]
        shown = ((value, cells.number(ratio, ".3f")) for value, ratio in numbers)
        table.add_row(figure, name, *(cell for pair in shown for cell in pair))
    return table


def faults_tables(title: str, found: Mapping[str, Any]) -> list[Table]:
    """Where training was killed, what else befell it, and what came of it."""
    kills = cells.table(f"{title}: kills")
    cells.columns(
        kills, "kills", "where", "half a save left", "jobs", "against unbroken"
    )
    for row in found["kills"]:
        places = ", ".join(f"{n} {k}" for k, n in sorted(row["places"].items()))
        kills.add_row(
            row["optimizer"],
            f"{sum(row['places'].values())}",
            places,
            f"{row['unfinished']}",
            f"{row['jobs']}",
            _outcome(row["different"]),
        )
    others = cells.table(f"{title}: other faults", "fault")
    cells.columns(others, "what followed", "against unbroken")
    for row in found["torn"]:
        name = f"checkpoint of step {row['newest']} {row['how']}"
        others.add_row(name, f"step {row['used']} used", _outcome(row["different"]))
    full = found["full_disk"]
    followed = f"{full['refused']} not written, step {full['used']} used"
    others.add_row("full disk", followed, _outcome(full["different"]))
    for row in found["pair"]:
        followed = (
            f"the other ended after {row['seconds']:.1f} s (limit {row['timeout']} s "
            f"to miss it), resumed at {row['resumed']}"
        )
        name = f"process {row['victim']} of two killed"
        others.add_row(name, followed, _outcome(row["different"]))
    return [kills, others]


def _outcome(different: Sequence[str]) -> str:
    return f"{len(different)} DIFFER" if different else "identical"
