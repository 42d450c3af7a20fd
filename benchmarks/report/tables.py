"""Tables of every kind of record, as data frames of text."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from benchmarks.core.records import Record
from benchmarks.core.statistics import Interval, mean_interval, spread
from benchmarks.optimizers import CONTENDERS
from benchmarks.peers import CONTENDERS as PEERS
from benchmarks.report import entries as compare
from benchmarks.report.entries import Entry
from benchmarks.tasks.base import Workload

KIB, MIB = 2**10, 2**20
#: Ends of the names of the scoreboard's controls.
CONTROLS = ("none", "random", "random_true", "gradient")

# -------------------------------------------------------------------------- pieces


def table(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """Rows of text; a dash where one has nothing."""
    return pd.DataFrame(rows).fillna("-")


def markdown(found: pd.DataFrame) -> str:
    """Columns of numbers to the right, others to the left."""
    sides = ["right" if _numeric(found[name]) else "left" for name in found]
    return found.to_markdown(index=False, colalign=sides, disable_numparse=True)


def _numeric(column: pd.Series) -> bool:
    known = [cell for cell in column if cell not in ("", "-", "inf", "nan")]
    return bool(known) and all(cell[0] in "0123456789+-" for cell in known)


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(factor * value, form)


def signed(gap: Interval | None, digits: int) -> str:
    """A difference and its interval."""
    if gap is None:
        return "-"
    value, low, high = (f"{x:+.{digits}f}" for x in gap)
    return f"{value} [{low}, {high}]"


def ratio(found: Mapping[str, float] | None, digits: int = 2) -> str:
    """A ratio and its interval."""
    if found is None:
        return "-"
    value, low, high = (f"{found[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def mean(entry: Entry) -> str:
    """Mean, and standard deviation where there are several seeds."""
    wide = spread(list(entry.finals.values()))
    show = entry.metric.show
    return show(entry.mean) + (f" ± {show(wide)}" if wide is not None else "")


def runs(entry: Entry) -> str:
    """How many, and how many were lost."""
    return f"{len(entry.records)}" + f", {entry.diverged} bad" * (entry.diverged > 0)


def against(entry: Entry, other: Entry | None) -> str:
    """The difference to another contender."""
    if entry is other:
        return "-"
    return signed(compare.difference(entry, other), entry.metric.digits)


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation of shares."""
    wide = spread(values)
    tail = "" if wide is None else f" ± {100 * wide:.{digits}f}"
    return f"{100 * np.mean(values):.{digits}f}{tail}"


# ------------------------------------------------------------------------ campaign


def _head(entry: Entry, title: str = "optimizer") -> dict[str, str]:
    """What every table of final runs begins with."""
    return {
        title: entry.name,
        "rate": f"{entry.records[0]['learning_rate']:g}",
        entry.metric.label: mean(entry),
        "runs": runs(entry),
    }


def _of(entry: Entry, key: str, form: str, factor: float = 1.0) -> str:
    """The median of a figure over the seeds."""
    return number(entry.median(key), form, factor)


def campaign(found: Sequence[Entry]) -> pd.DataFrame:
    """After as many steps for all, and in as much time; memory and times.

    Ratios are to the best peer. Its time is the equal time; the target, its mean less
    a tolerance, must hold at two evaluations on end.
    """
    metric, peer = found[0].metric, compare.best_peer(found)
    rows = []
    for one in found:
        kernels, times = one.median("kernel_state_bytes"), one.milliseconds
        row = {
            **_head(one),
            f"against {peer.name if peer else 'none'} (95 %)": against(one, peer),
            "train loss": _of(one, "train_loss", ".4f"),
            "kernels KiB": number(kernels, ",.1f", 1 / KIB),
        }
        if peer and np.isfinite(peer.mean):
            goal = compare.target(metric, peer)
            value = compare.value_after(one, peer.curves()[0][-1] * peer.step_seconds)
            needed, base = (compare.seconds_to(e, goal) for e in (one, peer))
            whole = peer.median("kernel_state_bytes")
            row |= {
                "of peer's": number(kernels and whole and kernels / whole, ".3f"),
                "in equal time": "-" if value is None else metric.show(value),
                "time to target": number(needed and base and needed / base, ".2f"),
            }
        row |= {f"{key} ms": number(times[key], ".2f") for key in ("mean", "refresh")}
        row["temp MiB"] = _of(one, "temporary_bytes", ",.1f", 1 / MIB)
        row["compile s"] = _of(one, "compile_seconds", ".1f")
        rows.append(row)
    return table(rows)


def controls(found: Sequence[Entry]) -> pd.DataFrame:
    """The rule first, then the rule without one of its parts, against it."""
    return table(
        [
            {
                **_head(one, "rule"),
                "against the rule (95 %)": against(one, found[0]),
                "kernels KiB": _of(one, "kernel_state_bytes", ",.1f", 1 / KIB),
            }
            for one in found
        ]
    )


def finetuning(found: Sequence[Entry]) -> pd.DataFrame:
    """The metric against LoRA and training everything; what is trained and kept."""
    named = {entry.name: entry for entry in found}
    peers = {x: x.removesuffix("_whole") for x in ("lora", "adamw", "muon_whole")}
    return table(
        [
            {
                **_head(one),
                **{
                    f"against {short} (95 %)": against(one, named.get(name))
                    for name, short in peers.items()
                },
                "against its `_random`": against(one, named.get(f"{one.name}_random")),
                "trained numbers": _of(one, "trained_numbers", ",.0f"),
                "state KiB": _of(one, "state_bytes", ",.1f", 1 / KIB),
                "temp MiB": _of(one, "temporary_bytes", ",.1f", 1 / MIB),
                "GFLOP": _of(one, "flops", ".2f", 1e-9),
                "step ms": number(one.milliseconds["step"], ".0f"),
                "time of lora's (95 %)": ratio(
                    one.speed["ratio"] if one.speed and one.name != "lora" else None, 3
                ),
            }
            for one in found
        ]
    )


def fewshot(found: Sequence[Entry]) -> pd.DataFrame:
    """Learners of few-shot episodes, against the first of them."""
    rows = []
    for one in found:
        interval = mean_interval(list(one.finals.values()))
        shown = one.metric.show(one.mean)
        if interval is not None:
            low, high = map(one.metric.show, interval[1:])
            shown = f"{shown} [{low}, {high}]"
        row = {
            "learner": one.name,
            "rate": f"{one.records[0]['learning_rate']:g}",
            "inner": f"{one.records[0]['inner_rate']:g}",
            f"{one.metric.label} (95 %)": shown,
            "runs": runs(one),
            f"against {found[0].name} (95 %)": against(one, found[0]),
            "state KiB": _of(one, "state_bytes", ",.1f", 1 / KIB),
        }
        rows.append(row)
    return table(rows)


# ---------------------------------------------------------------------- scoreboard


def finals_of(rows: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Contender -> seed -> its final run, of those that have one."""
    found: dict[str, dict[int, Record]] = {}
    for row in rows:
        if row["phase"] == "final":
            found.setdefault(row["optimizer"], {})[row["seed"]] = row
    return {name: found[name] for name in PEERS if name in found}


def gap_of(
    mine: Mapping[int, Record], other: Mapping[int, Record] | None, key: str
) -> Interval | None:
    """The difference of two contenders, paired by seed; NaN where one diverged."""
    if other is None or mine is other:
        return None
    pairs = [(mine[seed][key], other[seed][key]) for seed in mine if seed in other]
    return mean_interval([np.nan if None in (a, b) else a - b for a, b in pairs])


def share_of(
    mine: Mapping[int, Record], other: Mapping[int, Record] | None
) -> float | None:
    """State of the kernels as a share of another's."""
    if not other:
        return None
    one, two = (next(iter(x.values()))["kernel_state_bytes"] for x in (mine, other))
    return float(one / two)


def scoreboard(rows: Sequence[Record], judge: str) -> pd.DataFrame:
    """Contenders, the best first, against Muon, the one they replace and controls.

    A star marks a setting at an edge of what was tried.
    """
    finals, key = finals_of(rows), f"test_{judge}"
    values = {n: [r[key] for r in f.values()] for n, f in finals.items()}
    means = {n: float(np.mean(np.asarray(v, float))) for n, v in values.items()}
    found = []
    for name in sorted(means, key=lambda n: (np.isnan(means[n]), means[n])):
        mine, plain = finals[name], PEERS[name].plain
        tried = [row for row in rows if row["optimizer"] == name]
        one = next(iter(mine.values()))
        others = {"to Muon": "muon", "to Muon in 6 bits": "muon_6bit"}
        others |= {"to the plain one": plain}
        others |= {f"to `_{control}`": f"{name}_{control}" for control in CONTROLS}
        gaps = {k: gap_of(mine, finals.get(n), key) for k, n in others.items()}
        settings = (_setting(one, x, tried) for x in ("rate", "aux_rate", "decay"))
        row = {
            "contender": name,
            f"test {judge}": f"{means[name]:.4f}",
            **{k: signed(gap, 4) for k, gap in gaps.items()},
            "state": number(share_of(mine, finals.get(plain)), ".1f", 100),
            "steps to Muon's end": _steps_to(mine, finals.get("muon")),
            "rate, auxiliary, decay": ", ".join(settings),
            "runs": f"{len(mine)} of {len(tried)}",
        }
        found.append(row)
    shown = table(found).rename(columns={"state": "state, % of plain"})
    return shown.loc[:, (shown != "-").any()]


def _setting(row: Record, field: str, rows: Sequence[Record]) -> str:
    tried = {other[field] for other in rows}
    edge = len(tried) > 1 and row[field] in (min(tried), max(tried))
    return f"{row[field]:g}{'*' if edge and row[field] else ''}"


def _steps_to(mine: Mapping[int, Record], muon: Mapping[int, Record] | None) -> str:
    """Steps to Muon's last validation loss, between evaluations by a straight line."""
    if not muon:
        return "-"
    ends = [row["validation_loss"] for row in muon.values()]
    goal = np.mean(np.asarray(ends, float))
    losses = [[p["loss"] for p in row["curve"]] for row in mine.values()]
    curve = np.asarray(losses, float).mean(0)
    steps = [p["step"] for p in next(iter(mine.values()))["curve"]]
    below = np.flatnonzero(curve <= goal)
    if not below.size:
        return "-"
    if (at := below[0]) == 0:
        return f"{steps[0]}"
    share = (curve[at - 1] - goal) / (curve[at - 1] - curve[at])
    return f"{steps[at - 1] + share * (steps[at] - steps[at - 1]):.0f}"


# -------------------------------------------------------------------------- minima


def label(record: Record) -> str:
    """The contender, and the radius where it has one."""
    radius = record["hyperparameters"].get("rho")
    return record["optimizer"] + ("" if radius is None else f" {radius:g}")


def latest_looks(found: Sequence[Record]) -> list[Record]:
    """The last record of each run, in the order of contenders; radii were tuned from
    seed 100 upwards, and those runs are left out.
    """
    last = {(label(r), r["learning_rate"], r["seed"]): r for r in found}
    order = list(CONTENDERS)
    rows = [row for row in last.values() if row["seed"] < 100]
    rows.sort(key=lambda r: (order.index(r["optimizer"]), label(r), r["seed"]))
    return rows


def grouped(found: Sequence[Record]) -> dict[tuple[str, float], list[Record]]:
    """Records of the same contender, radius and rate."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in found:
        groups.setdefault((label(record), record["learning_rate"]), []).append(record)
    return groups


def first_entries(workload: Workload, found: Sequence[Record]) -> dict[str, Entry]:
    """The first group of each contender: one rate and one radius."""
    firsts: dict[str, Entry] = {}
    for some in grouped(found).values():
        name = some[0]["optimizer"]
        firsts.setdefault(name, Entry(name, workload.metric, some))
    return firsts


def mean_curve(found: Sequence[Record], key: str) -> np.ndarray | None:
    """Mean over runs of a figure that was observed along training, or None."""
    rows = [[point.get(key) for point in run["curve"]] for run in found]
    if not rows or any(value is None for row in rows for value in row):
        return None
    return np.asarray(rows, float).mean(0)


def mean_of(found: Sequence[Record], key: str, place: int = 0) -> float | None:
    """Of a figure, or of one of a list of figures, over the runs that have it."""
    values = [run[key] for run in found if key in run]
    if not values:
        return None
    return float(np.mean([x[place] if isinstance(x, list) else x for x in values]))


def minima(workload: Workload, found: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """Accuracy beside curvature and distance; attacks and corruptions; the bound."""
    firsts, rows, robust, bounds = first_entries(workload, found), [], [], []
    for (name, rate), some in grouped(found).items():
        head = {"optimizer": name, "rate": f"{rate:g}"}
        one = Entry(some[0]["optimizer"], workload.metric, some)
        rows.append({**_head(one), **head, **_flatness(one, firsts)})
        robust += _robust(head, some)
        seen = [run for run in some if "bound" in run]
        if seen:
            shown = {
                "bound, %": percent([run["bound"] for run in seen]),
                "training error": percent([run["bound_risk"] for run in seen]),
                "its bound": percent([run["bound_risk_upper"] for run in seen]),
                "KL, nats": f"{np.mean([run['bound_kl'] for run in seen]):,.0f}",
            }
            bounds.append({**head, **shown})
    whole = table(rows)
    shown = {
        "accuracy, curvature, distance": whole.loc[:, (whole != "-").any()],
        "attacks and corruptions, accuracy in %": table(robust),
        "PAC-Bayes bound": table(bounds),
    }
    return {title: one for title, one in shown.items() if len(one)}


def _flatness(one: Entry, firsts: Mapping[str, Entry]) -> dict[str, str]:
    """Differences to SGD and SAM, curvature, and the distance from the start."""
    keys, some = "hessian_eigenvalues", one.records
    peers = {peer: firsts.get(peer) for peer in ("sgd", "sam")}
    top, wide = (
        mean_of(some, keys),
        spread([run[keys][0] for run in some if keys in run]),
    )
    tops = {name: mean_of(e.records, keys) for name, e in peers.items() if e}
    kl = mean_curve([run for run in some if not run["diverged"]], "kl")
    inside = mean_curve(some, "moved_inside")
    gaps = {
        f"against {name} (95 %)": "-"
        if peer and peer.records is some
        else signed(compare.difference(one, peer), 2)
        for name, peer in peers.items()
    }
    shares = {
        f"of {name}'s": number(top and tops.get(name) and top / tops[name], ".2f")
        for name in peers
    }
    return {
        **gaps,
        "lambda max": number(top, ".2f") + ("" if wide is None else f" ± {wide:.2f}"),
        **shares,
        "lambda 10": number(mean_of(some, keys, -1), ".2f"),
        "trace": number(mean_of(some, "hessian_trace"), ".4g"),
        "m-sharpness": number(mean_of(some, "m_sharpness"), ".4g"),
        "KL, half": "-" if kl is None else f"{kl[len(kl) // 2 - 1]:,.0f}",
        "KL, end": "-" if kl is None else f"{kl[-1]:,.0f}",
        "way inside bases": "-" if inside is None else f"{inside[-1]:.2f}",
    }


def _robust(head: Mapping[str, str], some: Sequence[Record]) -> list[dict[str, str]]:
    hit = [run for run in some if "attacks" in run]
    bent = [run["corruptions"] for run in some if "corruptions" in run]
    row = {}
    for name in hit[0]["attacks"] if hit else ():
        for place, radius in enumerate(hit[0]["attack_radii"]):
            values = [run["attacks"][name][place] for run in hit]
            row[f"{name} {255 * radius:.0f}/255"] = percent(values)
    if bent:
        frame = pd.DataFrame(bent)
        worst = frame.mean().idxmin()
        row["corrupted"] = percent(list(frame.mean(axis=1)))
        row["worst"] = f"{percent(list(frame[worst]))} ({worst})"
    return [{**head, "runs": f"{len(hit or bent)}", **row}] if row else []


# -------------------------------------------------------------------------- others


def speed(rows: Sequence[Record]) -> pd.DataFrame:
    """Steps in turns, or fixed figures; ratios have 95 % bootstrap intervals."""
    return table(
        [
            {
                **({"figure": row["figure"]} if "figure" in row else {}),
                "contender": row["contender"],
                "mean ms": number(row["seconds"], ".2f", 1e3),
                "refresh ms": number(row.get("refresh_seconds"), ".2f", 1e3),
                "refresh to other": ratio(row.get("dearest")),
                "against": row["against"],
                "ratio (95 %)": ratio(row["ratio"], 3),
                "compile s": f"{row['compile_seconds']:.1f}",
            }
            for row in rows
        ]
    )


def ablation_cells(cells: Sequence[Record]) -> pd.DataFrame:
    """One row a cell; means over the runs that ended."""
    rows = []
    for cell in cells:
        ended = [value for value in cell["accuracy"] if value is not None]
        losses = [value for value in cell["train_loss"] if value is not None]
        loss = float(np.mean(losses)) if losses else None
        names = ("outside", "filter", "side", "sharpness", "rank", "period", "rate")
        row = {key: f"{cell[key]}" for key in names}
        row["test accuracy, %"] = percent(ended, 2) if ended else "-"
        row["train loss"] = number(loss, ".4f" if loss and loss < 1e3 else ".0e")
        rows.append({**row, "lost": f"{cell['accuracy'].count(None)}"})
    return table(rows)


def effects(found: Mapping[str, Mapping[str, Interval]]) -> pd.DataFrame:
    """Of factors, in decades, as factors; column -> effect -> interval."""
    rows = [
        {
            "effect": name,
            **{
                column: ratio(Interval(*(10**x for x in some[name]))._asdict())
                for column, some in found.items()
            },
        }
        for name in next(iter(found.values()))
    ]
    return table(rows)


def stability(rows: Sequence[Record]) -> pd.DataFrame:
    """One row a rate: training loss against the plain optimizer's."""

    def loss(values: Sequence[float | None]) -> str:
        return f"{np.mean([np.inf if x is None else x for x in values]):.4f}"

    return table(
        [
            {
                "optimizer": row["contender"],
                "against": row["against"],
                "rate": f"{row['learning_rate']:g}",
                "loss": loss(row["losses"]),
                "loss against": loss(row["losses_against"]),
                "ratio (95 %)": ratio(row["ratio"]),
                "not finite": f"{row['diverged']} and {row['diverged_against']}",
                "skipped": f"{row['skipped']}",
            }
            for row in rows
        ]
    )


def transport(rows: Sequence[Record]) -> pd.DataFrame:
    """One row a rule of moments."""
    return table(
        [
            {
                "moments": row["rule"],
                "mean loss": f"{row['mean']:.3f}",
                "against the oracle": f"{row['ratio_to_oracle']:.3f}",
                "range": f"{min(row['ratios']):.3f} to {max(row['ratios']):.3f}",
            }
            for row in rows
        ]
    )


def communication(found: Record) -> pd.DataFrame:
    """What a step sends; refreshes apart, by the period's share of them."""
    share = found["refresh_share"] * found["refresh"]
    shapes = {f"not expected: {shape}": np.prod(shape) for shape in found["unknown"]}
    counts = {
        "coordinates of projected kernels": found["coordinates"],
        "in the place of": found["full"],
        "other parameters, whole": sum(found["others"].values()),
        "scalars": found["scalars"],
        "sketches, in a step that refreshes": found["refresh"],
        "the same, a step's share": round(share),
        **shapes,
    }
    return table([{"what": k, "numbers": f"{n:,}"} for k, n in counts.items()])


def constrained(rows: Sequence[Record]) -> pd.DataFrame:
    """One row an optimizer, size and way; the first is jax alone."""
    return table(
        [
            {
                "optimizer": row["optimizer"],
                "size": row["size"] or "-",
                "trained from": row["way"] or "-",
                "cap MiB": number(row["cap_mib"], ".0f"),
                "step ms": number(row["step_ms"], ".1f"),
                "state MiB": number(row.get("state_bytes"), ".2f", 1 / MIB),
                "artifact KiB": number(row.get("artifact_bytes"), ",.0f", 1 / KIB),
                "resident MiB": number(row.get("rss_mib"), ",.0f"),
                "compiling MiB": number(row["compiling_rss_mib"], ",.0f"),
            }
            for row in rows
        ]
    )


def cost(rows: Sequence[Record]) -> pd.DataFrame:
    """Figures by optimizer and library, each with its ratio to the plain one."""
    libraries = dict.fromkeys(row["library"] for row in rows)
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        whole = row["figure"] in ("program_bytes", "instructions")
        form = ".7g" if row["figure"].startswith("loss") else ",.0f" if whole else ".4g"
        shown = number(row["value"], form)
        shown += "" if row["ratio"] is None else f" ({row['ratio']:.3f})"
        column = row["contender"] + f", {row['library']}" * (len(libraries) > 1)
        found.setdefault(row["figure"], {"figure": row["figure"]})[column] = shown
    return table(list(found.values()))


def coordinates(found: Record) -> dict[str, pd.DataFrame]:
    """Gradients in coordinates against whole ones."""
    memory = [
        {
            "model": model,
            "program": row["program"],
            "gradients": row["way"],
            "GFLOP": number(row["flops"], ",.1f", 1e-9),
            "temp MiB": number(row["temporary_bytes"], ",.1f", 1 / MIB),
            "in place MiB": number(row["aliased_bytes"], ",.1f", 1 / MIB),
        }
        for model, rows in found["figures"].items()
        for row in rows
    ]
    clocks = [
        {
            "clock": clock,
            "step, to AdamW's (95 %)": ratio(found["times"][clock]),
            "step that refreshes": ratio(found["times"][f"refresh_{clock}"]),
            "mean of a period": number(found["times"][f"period_{clock}"], ".2f"),
        }
        for clock in ("wall", "cpu")  # The older record has both.
        if clock in found["times"]
    ]
    gaps = [
        {
            "dtype": dtype,
            "run": way,
            **{f"to step {step}": f"{value:.1e}" for step, value in gap.items()},
        }
        for dtype, one in found["losses"].items()
        for way, gap in one["gaps"].items()
    ]
    titles = (
        "compiled programs",
        "steps in turns",
        "gaps of losses to whole gradients",
    )
    return dict(zip(titles, map(table, (memory, clocks, gaps)), strict=True))


def faults(found: Record) -> pd.DataFrame:
    """What befell training, and whether every bit was that of an unbroken run."""
    rows = []
    for row in found["kills"]:
        places = ", ".join(f"{n} {k}" for k, n in sorted(row["places"].items()))
        told = f"{sum(row['places'].values())} kills of {row['optimizer']}", places
        rows.append((*told, row["different"]))
    for row in found.get("torn", ()):
        told = f"newest checkpoint {row['how']}", f"step {row['used']} used"
        rows.append((*told, row["different"]))
    for row in found.get("pair", ()):
        told = f"process {row['victim']} of two killed", f"resumed at {row['resumed']}"
        rows.append((*told, row["different"]))
    if full := found.get("full_disk"):
        told = "disk full", f"{full['refused']} refused, step {full['used']} used"
        rows.append((*told, full["different"]))
    return table(
        [
            {"fault": a, "where": b, "bits": "DIFFER" if c else "identical"}
            for a, b, c in rows
        ]
    )
