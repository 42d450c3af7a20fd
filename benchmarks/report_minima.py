"""Tables of minima: accuracy beside curvature, distance, and robustness."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.table import Table

from benchmarks import cells, minima
from benchmarks.compare import Entry
from benchmarks.experiment import Record
from benchmarks.workloads import WORKLOADS, Workload

#: What others are held against.
PLAIN, PEER = "sgd", "sam"

Groups = Mapping[tuple[str, float], Sequence[Record]]


def tables(title: str, found: Sequence[Record]) -> Iterator[Table]:
    """One table a look that some run has had; rows are contenders, means over seeds.

    Args:
      title: before the title of each.
      found: records of `benchmarks.minima`, of one workload.
    """
    if not found:
        return
    groups = minima.grouped(found)
    workload = WORKLOADS[found[0]["workload"]]
    yield accuracy_table(f"{title}accuracy", workload, groups)
    makers = {
        "hessian_eigenvalues": curvature_table,
        "attacks": attacks_table,
        "corruptions": corruptions_table,
        "bound": bound_table,
    }
    for key, make in makers.items():
        if any(key in record for record in found):
            yield make(f"{title}{key.replace('_', ' ')}", groups)
    yield divergence_table(f"{title}KL term along training", groups)


def accuracy_table(title: str, workload: Workload, groups: Groups) -> Table:
    """The metric, and paired differences to SGD and to SAM."""
    entries = {
        key: Entry(key[0], workload.metric, runs) for key, runs in groups.items()
    }
    plain, peer = (_best(entries, name) for name in (PLAIN, PEER))
    table = cells.table(title)
    cells.columns(table, "rate", workload.metric.label, "runs", "validation")
    cells.columns(table, f"against {PLAIN} (95 %)", f"against {PEER} (95 %)")
    for (name, rate), entry in entries.items():
        seen = [run["validation_value"] for run in entry.records if not run["diverged"]]
        source, *_ = entry.records[0]["learning_rate_source"].split(",")
        table.add_row(
            name,
            f"{rate:g}" + f" ({source})" * (source in ("given", "default")),
            cells.spread(entry),
            f"{len(entry.records)}" + f", {entry.diverged} bad" * (entry.diverged > 0),
            workload.metric.show(float(np.mean(seen))) if seen else "-",
            *(cells.difference(entry, other) for other in (plain, peer)),
        )
    return table


def curvature_table(title: str, groups: Groups) -> Table:
    """Eigenvalues of the Hessian of the training loss, trace, m-sharpness."""
    table = cells.table(title)
    cells.columns(table, "rate", "runs", "lambda max", f"of {PLAIN}'s", f"of {PEER}'s")
    cells.columns(table, "lambda 10", "trace", "m-sharpness")
    tops = {key: _mean_largest(runs) for key, runs in groups.items()}
    bases = [_first(tops, name) for name in (PLAIN, PEER)]
    for (name, rate), runs in groups.items():
        seen = [run for run in runs if "hessian_eigenvalues" in run]
        if not seen:
            continue
        values = [_largest(run) for run in seen]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        top = float(np.mean(values))
        table.add_row(
            name,
            f"{rate:g}",
            f"{len(seen)}",
            f"{top:.2f}{spread}",
            *("-" if base is None else f"{top / base:.2f}" for base in bases),
            f"{np.mean([run['hessian_eigenvalues'][-1] for run in seen]):.2f}",
            f"{np.mean([run['hessian_trace'] for run in seen]):.4g}",
            f"{np.mean([run['m_sharpness'] for run in seen]):.4g}",
        )
    return table


def attacks_table(title: str, groups: Groups) -> Table:
    """Accuracy under each attack and radius, percent."""
    runs = [run for some in groups.values() for run in some if "attacks" in run]
    radii, names = runs[0]["attack_radii"], list(runs[0]["attacks"])
    table = cells.table(title)
    heads = [f"{name} {255 * radius:.0f}/255" for name in names for radius in radii]
    cells.columns(table, "rate", "runs", "clean", *heads)
    for (name, rate), some in groups.items():
        seen = [run for run in some if "attacks" in run]
        if seen:
            clean = [run[run["metric"]] for run in seen]
            hit = [[x for n in names for x in run["attacks"][n]] for run in seen]
            shown = (_percent(column) for column in (clean, *zip(*hit, strict=True)))
            table.add_row(name, f"{rate:g}", f"{len(seen)}", *shown)
    return table


def corruptions_table(title: str, groups: Groups) -> Table:
    """Accuracy under corruptions: their mean, and the worst of them, percent."""
    table = cells.table(title)
    cells.columns(table, "rate", "runs", "mean of all", "worst", "which")
    for (name, rate), some in groups.items():
        seen = [run["corruptions"] for run in some if "corruptions" in run]
        if seen:
            means = {key: np.mean([run[key] for run in seen]) for key in seen[0]}
            worst = min(means, key=lambda key: means[key])
            whole = _percent([float(np.mean(list(run.values()))) for run in seen])
            least = _percent([run[worst] for run in seen])
            table.add_row(name, f"{rate:g}", f"{len(seen)}", whole, least, worst)
    return table


def bound_table(title: str, groups: Groups) -> Table:
    """The PAC-Bayes bound on the error of the noisy network, percent."""
    table = cells.table(title)
    cells.columns(table, "rate", "runs", "bound", "training error", "its bound")
    cells.columns(table, "KL, nats", "test error, no noise")
    for (name, rate), some in groups.items():
        seen = [run for run in some if "bound" in run]
        if seen:
            keys = ("bound", "bound_risk", "bound_risk_upper")
            shown = [_percent([run[key] for run in seen]) for key in keys]
            kl = f"{np.mean([run['bound_kl'] for run in seen]):,.0f}"
            test = _percent([1 - run[run["metric"]] for run in seen])
            table.add_row(name, f"{rate:g}", f"{len(seen)}", *shown, kl, test)
    return table


def divergence_table(title: str, groups: Groups) -> Table:
    """The KL term at a twelfth, a half and the end of training; its part in bases."""
    table = cells.table(title)
    cells.columns(table, "rate", "first", "half", "end", "with bases", "inside")
    cells.columns(table, "of the way inside")
    for (name, rate), some in groups.items():
        whole = minima.mean_curve([run for run in some if not run["diverged"]], "kl")
        if whole is None:
            continue
        row = [f"{whole[place]:,.0f}" for place in (0, len(whole) // 2 - 1, -1)]
        for key, form in (("kl_bases", ",.0f"), ("kl_inside", ",.0f")):
            curve = minima.mean_curve(some, key)
            row.append("-" if curve is None else format(curve[-1], form))
        inside = minima.mean_curve(some, "moved_inside")
        row.append("-" if inside is None else f"{inside[-1]:.2f}")
        table.add_row(name, f"{rate:g}", *row)
    return table


def _largest(run: Record) -> float:
    return float(run["hessian_eigenvalues"][0])


def _mean_largest(runs: Sequence[Record]) -> float | None:
    values = [_largest(run) for run in runs if "hessian_eigenvalues" in run]
    return float(np.mean(values)) if values else None


def _first(tops: Mapping[tuple[str, float], float | None], name: str) -> float | None:
    """Of the first group of that contender that has the figure."""
    known = (top for (label, _), top in tops.items() if label.split()[0] == name)
    return next((top for top in known if top is not None), None)


def _best(entries: Mapping[tuple[str, float], Entry], name: str) -> Entry | None:
    known = (entry for (label, _), entry in entries.items() if label.split()[0] == name)
    return next(known, None)


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"
