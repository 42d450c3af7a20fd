"""Tables for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from benchmarks import communication, compare
from benchmarks.cells import columns as _columns
from benchmarks.cells import difference as _difference
from benchmarks.cells import interval as _interval
from benchmarks.cells import number as _number
from benchmarks.cells import spread as _spread
from benchmarks.cells import table as _table
from benchmarks.compare import Entry
from benchmarks.data.packages import ELSEWHERE, PACKAGES, Packaged
from benchmarks.effects import Effect
from benchmarks.optimizers import CONTENDERS
from benchmarks.workloads import WORKLOADS


def make_progress(console: Console, quiet: bool) -> Progress:
    """A live bar: what runs now, how far, how long, how long still."""
    return _progress(console, quiet, MofNCompleteColumn(), TimeElapsedColumn())


def make_download_progress(console: Console, quiet: bool) -> Progress:
    """A live bar of bytes."""
    return _progress(console, quiet, DownloadColumn(), TransferSpeedColumn())


def _progress(console: Console, quiet: bool, *columns: ProgressColumn) -> Progress:
    """A bar between what it is of and the time that remains."""
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=quiet,
    )


def list_data(console: Console, data_dir: Path) -> None:
    """Data sets: what each is, where from, and whether it is there."""
    console.print(f"data sets; * is in {data_dir}", style="bold", soft_wrap=True)
    for name, source in PACKAGES.items():
        packed = isinstance(source, Packaged)
        origin = source.archive.registry if packed else "a system package"
        mark = "*" if (data_dir / name).is_dir() else " "
        console.print(f"{mark} {name:15} {source.summary} ({origin})", soft_wrap=True)
    console.print("in no package registry", style="bold")
    for name, words in ELSEWHERE.items():
        console.print(f"  {name:15} {words}", soft_wrap=True)


def results_table(title: str, found: Sequence[Entry]) -> Table:
    """After as many steps for all: the metric, and what it is against the best peer."""
    metric, peer = found[0].metric, compare.best_peer(found)
    against = f"against {peer.name} (95 %)" if peer else "against"
    table = _table(f"{title}: equal steps")
    _columns(table, "rate", metric.label, "runs", against, "train loss")
    for entry in found:
        table.add_row(
            entry.name,
            f"{entry.records[0]['learning_rate']:g}",
            _spread(entry),
            f"{len(entry.records)}" + f", {entry.diverged} bad" * (entry.diverged > 0),
            _difference(entry, peer),
            _number(entry.median("train_loss"), ".4f"),
        )
    return table


def controls_table(title: str, found: Sequence[Entry]) -> Table:
    """The rule first, then the rule without one of its parts, against it."""
    table = _table(f"{title} and its controls", "rule")
    against = "against the rule (95 %)"
    _columns(table, "rate", found[0].metric.label, "runs", against, "kernels KiB")
    for entry in found:
        table.add_row(
            entry.name,
            f"{entry.records[0]['learning_rate']:g}",
            _spread(entry),
            f"{len(entry.records)}",
            "" if entry is found[0] else _difference(entry, found[0]),
            _number(entry.median("projected_state_bytes"), ",.1f", 1 / 2**10),
        )
    return table


def fewshot_table(title: str, found: Sequence[Entry]) -> Table:
    """Learners of few-shot episodes, against the first of them."""
    table = _table(title, "learner")
    label = f"{found[0].metric.label}, 95 %"
    _columns(table, "rate", "inner", label, "runs", f"against {found[0].name}")
    _columns(table, "state KiB")
    for entry in found:
        first = entry.records[0]
        table.add_row(
            entry.name,
            f"{first['learning_rate']:g}",
            f"{first['inner_rate']:g}",
            _mean_and_reach(entry),
            f"{len(entry.records)}" + f", {entry.diverged} bad" * (entry.diverged > 0),
            _difference(entry, found[0]),
            _number(entry.median("state_bytes"), ",.1f", 1 / 2**10),
        )
    return table


def effects_table(
    title: str, found: Mapping[str, tuple[Sequence[Effect], Sequence[Effect]]]
) -> Table:
    """One row an effect; of each workload, on test error and training loss."""
    table = _table(title, "effect")
    for workload in found:
        _columns(table, f"{workload}: error times", f"{workload}: loss times")
    columns = [effects for pair in found.values() for effects in pair]
    for row in zip(*columns, strict=True):
        table.add_row(row[0].name, *map(_factor, row))
    return table


def _factor(effect: Effect) -> str:
    """Of an effect in decades."""
    value, low, high = (10**x for x in (effect.value, effect.low, effect.high))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def ablation_table(title: str, cells: Sequence[Mapping[str, Any]]) -> Table:
    """One row a cell of `benchmarks.ablation`; means over the runs that ended."""
    table = _table(title, "outside")
    for heading in ("filter", "side", "sharpness"):
        table.add_column(heading)
    _columns(table, "rank", "period", "rate", "test accuracy, %", "train loss", "lost")
    for cell in cells:
        ended = [100 * value for value in cell["accuracy"] if value is not None]
        losses = [value for value in cell["train_loss"] if value is not None]
        spread = f" ± {np.std(ended, ddof=1):.2f}" if len(ended) > 1 else ""
        table.add_row(
            *(cell[key] for key in ("outside", "filter", "side", "sharpness")),
            *(f"{cell[key]:g}" for key in ("rank", "period", "rate")),
            f"{np.mean(ended):.2f}{spread}" if ended else "-",
            f"{np.mean(losses):.4f}" if losses else "-",
            f"{cell['accuracy'].count(None)}",
        )
    return table


def constrained_table(title: str, record: Mapping[str, Any]) -> Table:
    """One row an optimizer, size and way of `benchmarks.constrained`."""
    base = record["baseline"]["cap_mib"]
    table = _table(title)
    for heading in ("size", "trained from"):
        table.add_column(heading)
    _columns(
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
            _number(row["step_ms"], ".1f"),
            _number(row["state_bytes"], ",.2f", 1 / 2**20),
            _number(row["artifact_bytes"], ",.0f", 1 / 2**10),
            _number(row.get("rss_mib"), ",.0f"),
            _number(row["compiling_rss_mib"], ",.0f"),
        )
    return table


#: What the child that trains nothing has no figures for.
_UNCOUNTED = ("size", "way", "state_bytes", "artifact_bytes")


def faults_tables(title: str, found: Mapping[str, Any]) -> list[Table]:
    """Where training was killed, what else befell it, and what came of it."""
    kills = _table(f"{title}: kills")
    _columns(kills, "kills", "where", "half a save left", "jobs", "against unbroken")
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
    others = _table(f"{title}: other faults", "fault")
    _columns(others, "what followed", "against unbroken")
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


def communication_table(title: str, found: Mapping[str, Any]) -> Table:
    """What a step sends; refreshes apart, by the period's share of them."""
    table = _table(f"{title}: numbers sent in a step", "what")
    _columns(table, "numbers")
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
    memory = _table("Compiled programs", "model")
    for heading in ("program", "gradients"):
        memory.add_column(heading)
    _columns(memory, "GFLOP", "temp MiB", "in place MiB")
    for model, rows in figures.items():
        for row in sorted(rows, key=lambda row: row["program"]):
            memory.add_row(
                *(model, row["program"], row["way"]),
                _number(row["flops"], ",.1f", 1e-9),
                _number(row["temporary_bytes"], ",.1f", 1 / 2**20),
                _number(row["aliased_bytes"], ",.1f", 1 / 2**20),
            )
    clocks = _table("Steps in turns, against optax.adamw (95 %)", "clock")
    _columns(clocks, "step", "step that refreshes", "mean of a period")
    for clock in ("wall", "cpu"):
        row = (_interval(times[clock]), _interval(times[f"refresh_{clock}"]))
        clocks.add_row(clock, *row, f"{times[f'period_{clock}']:.2f}")
    gaps = _table(f"{workload}: losses, against projecting whole gradients", "dtype")
    gaps.add_column("run")
    curves = [(d, w, g) for d, f in losses.items() for w, g in f["gaps"].items()]
    _columns(gaps, *(f"to step {step}" for step in curves[0][2]))
    for dtype, way, gap in curves:
        gaps.add_row(dtype, way, *(f"{value:.1e}" for value in gap.values()))
    return [memory, clocks, gaps]


def cost_table(title: str, found: Sequence[Entry]) -> Table:
    """Memory and times; the ratio is of the kernels' state, to the best peer's."""
    peer = compare.best_peer(found)
    table = _table(f"{title}: cost")
    source = "the runs themselves" if found[0].speed is None else "`speed`, in turns"
    table.caption = f"Times: from {source}"
    _columns(
        table,
        *("state KiB", "kernels KiB", "ratio", "temp MiB"),
        *("step ms", "refresh ms", "mean ms", "compile s"),
    )
    for entry in found:
        times, mine = entry.milliseconds, entry.median("projected_state_bytes")
        theirs = peer.median("projected_state_bytes") if peer else None
        table.add_row(
            entry.name,
            _number(entry.median("state_bytes"), ",.1f", 1 / 2**10),
            _number(mine, ",.1f", 1 / 2**10),
            _number(mine / theirs if mine is not None and theirs else None, ".3f"),
            _number(entry.median("temporary_bytes"), ",.1f", 1 / 2**20),
            *(_number(times[key], ".2f") for key in ("step", "refresh", "mean")),
            _number(entry.median("compile_seconds"), ".1f"),
        )
    return table


def time_table(title: str, found: Sequence[Entry]) -> Table | None:
    """In as much time for all, and the time to the target; None without a peer."""
    metric, peer = found[0].metric, compare.best_peer(found)
    if peer is None or not np.isfinite(peer.mean):
        return None
    goal = compare.target(metric, peer)
    seconds = peer.curves()[0][-1] * peer.step_seconds
    table = _table(f"{title}: equal time")
    table.caption = (
        f"In the {seconds:.1f} s of {peer.name}, the best peer; the target "
        f"{metric.show(goal)} must hold at two evaluations on end"
    )
    _columns(table, metric.label, "steps to target", "s to target", "ratio")
    base = compare.seconds_to(peer, goal)
    for entry in found:
        steps, needed = compare.steps_to(entry, goal), compare.seconds_to(entry, goal)
        value = compare.value_after(entry, seconds)
        table.add_row(
            entry.name,
            "-" if value is None else metric.show(value),
            "-" if steps is None else str(steps),
            _number(needed, ".1f"),
            _number(needed / base if needed and base else None, ".2f"),
        )
    return table


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a comparison of `benchmarks.speed`."""
    table = _table(
        "Speed: times are medians, ratios have a 95 % bootstrap interval", "figure"
    )
    for heading in ("contender", "against"):
        table.add_column(heading, no_wrap=True)
    _columns(table, "ms", "vs ms", "ratio", "95 % interval")
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["figure"],
            row["contender"],
            row["against"],
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['seconds_against']:.2f}",
            f"{ratio['value']:.2f}",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}",
        )
    return table


def transport_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a rule of `benchmarks.transport`."""
    table = _table("Mean loss over the second half of a stream that turns", "moments")
    _columns(table, "mean loss", "against the oracle", "range over seeds")
    for row in rows:
        low, high = min(row["ratios"]), max(row["ratios"])
        table.add_row(
            row["rule"],
            f"{row['mean']:.3f}",
            f"{row['ratio_to_oracle']:.3f}",
            f"{low:.3f}-{high:.3f}",
        )
    return table


def stability_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a rate of `benchmarks.stability`."""
    table = _table("Stability: final training loss against the plain optimizer's")
    _columns(table, "against", "rate", "loss", "loss against", "ratio", "95 % interval")
    _columns(table, "not finite", "against", "skipped")
    for row in rows:
        ratio = row["ratio"] or {}
        table.add_row(
            row["contender"],
            row["against"],
            f"{row['learning_rate']:g}",
            *(_mean_loss(row[key]) for key in ("losses", "losses_against")),
            _number(ratio.get("value"), ".2f"),
            f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "-",
            *(str(row[key]) for key in ("diverged", "diverged_against", "skipped")),
        )
    return table


def steps_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a contender of `speed.whole_steps`."""
    table = _table(title)
    _columns(
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
            _number(row["refresh_seconds"], ".2f", 1e3),
            _interval(row["dearest"]),
            row["against"],
            f"{ratio['value']:.3f}",
            f"{ratio['low']:.3f}-{ratio['high']:.3f}",
            f"{row['compile_seconds']:.1f}",
        )
    return table


def list_names(console: Console) -> None:
    """Workloads and optimizers, one line each."""
    for heading, table in (("workloads", WORKLOADS), ("optimizers", CONTENDERS)):
        console.print(heading, style="bold")
        for name, entry in table.items():
            console.print(f"  {name:21} {entry.summary}", soft_wrap=True)


def written(console: Console, paths: Sequence[Path]) -> None:
    """Say which files were written."""
    for path in paths:
        console.print(f"wrote {path}", style="dim", soft_wrap=True)


def _mean_and_reach(entry: Entry) -> str:
    """Mean over seeds, and its 95 % t interval where there are several."""
    found = compare.mean_interval(list(entry.finals.values()))
    if found is None:
        return entry.metric.show(entry.mean)
    mean, low, high = map(entry.metric.show, found)
    return f"{mean} [{low}, {high}]"


def _mean_loss(losses: Sequence[float | None]) -> str:
    """Records have null for what is not finite."""
    return f"{np.mean([np.inf if loss is None else loss for loss in losses]):.4f}"
