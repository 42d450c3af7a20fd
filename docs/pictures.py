"""The pictures of the site and of the README: `python docs/pictures.py`.

The first six are drawn from records of the benchmarks. The others are drawings, with
data that are made up here.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
FOLDER = HERE / "_static" / "pictures"
RECORDS = HERE.parent / "benchmarks" / "results"
BOARD = "gpt_d128_b24"

OURS, PEER, CONTROL, INK, PALE = "#b3202f", "#30638e", "#8a6d3b", "#333333", "#dfe6ec"
#: Contender -> label; Muon is told which axes of stacks are which.
MEMORY: Mapping[str, str] = {
    "adamw": "AdamW",
    "dsbp_adamw": "dsbp_adamw",
    "muon_kernels": "Muon",
    "dsbp_muon": "dsbp_muon",
    "sgd": "SGD, momentum",
    "dsbp_sgd": "dsbp_sgd",
}
OWN = {name for name in MEMORY if name.startswith("dsbp")}
PARTS = ("parameters", "gradients", "optimizer state", "temporaries of the update")
#: Contender -> label, colour, line.
LINES: Mapping[str, tuple[str, str, str]] = {
    "adamw": ("AdamW", PEER, "-"),
    "dsbp_adamw_random": ("dsbp_adamw, random directions (control)", CONTROL, "--"),
    "dsbp_adamw": ("dsbp_adamw", OURS, "-"),
    "muon": ("Muon", PEER, ":"),
    "dsbp_muon": ("dsbp_muon", OURS, ":"),
}
#: Plain optimizer -> contenders of a panel: label, colour, line.
RATES: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "Muon": {
        "muon": ("Muon", PEER, "-"),
        "dsbp_muon_random": ("dsbp_muon, random directions", CONTROL, "--"),
        "dsbp_muon": ("dsbp_muon", OURS, "-"),
    },
    "AdamW": {
        "adamw": ("AdamW", PEER, "-"),
        "dsbp_adamw_random": ("dsbp_adamw, random directions", CONTROL, "--"),
        "dsbp_adamw": ("dsbp_adamw", OURS, "-"),
    },
}
#: Board, contender, label, colour; one panel for `BOARD`, one for the others.
EARLY = (
    (BOARD, "dsbp_muon", "dsbp_muon", OURS),
    (BOARD, "dsbp_muon_gradient", "dsbp_muon, its momentum's directions", INK),
    (BOARD, "dsbp_muon_random", "dsbp_muon, random directions", CONTROL),
    (BOARD, "muon_6bit", "Muon, its momentum in six bits", PEER),
    ("sotu_d128_b24", "dsbp_muon", "State of the Union", OURS),
    ("gpt_d128_b96", "dsbp_muon", "four times the batch", PEER),
)
#: Width -> boards in the order of their tokens a step, colour, place beside the other.
SIZES: Mapping[int, tuple[tuple[str, ...], str, float]] = {
    64: (("gpt_d64_b8", "gpt_d64_b24"), PEER, 0.96),
    128: ((BOARD, "gpt_d128_b96"), OURS, 1.04),
}
#: Fine-tuned on one text after another -> title.
TUNED: Mapping[str, str] = {
    "sotu_gpt": "Shakespeare, then State of the Union",
    "sotu_to_shakespeare": "State of the Union, then Shakespeare",
}
#: Those that train all weights there -> label, colour.
WHOLE: Mapping[str, tuple[str, str]] = {
    "adamw": ("AdamW", PEER),
    "dsbp_adamw_whole_random": ("dsbp_adamw,\nrandom directions", CONTROL),
    "dsbp_adamw_whole": ("dsbp_adamw", OURS),
    "muon_whole": ("Muon", PEER),
    "dsbp_muon_whole_random": ("dsbp_muon,\nrandom directions", CONTROL),
    "dsbp_muon_whole": ("dsbp_muon", OURS),
}


def gpt() -> Figure:
    """Loss against steps with intervals, and the state of the kernels, from records."""
    from benchmarks.core import records
    from benchmarks.core.statistics import mean_interval

    rows = records.read(RECORDS / "scoreboard" / f"{BOARD}.jsonl", phase="final")
    figure, (left, right) = _figure(10, 4.2, columns=2, widths=(1.55, 1))
    sizes, labels = [], []
    for name, (label, color, line) in LINES.items():
        runs = [row for row in rows if row["optimizer"] == name]
        steps = [point["step"] for point in runs[0]["curve"]]
        losses = np.array([[point["loss"] for point in r["curve"]] for r in runs])
        bands = np.array([mean_interval(column) for column in losses.T]).T
        width = 3.0 if name == "adamw" else 1.7  # The control lies upon it.
        look = {"color": color, "linestyle": line, "linewidth": width}
        left.plot(steps, bands[0], label=label, **look)
        left.fill_between(steps, bands[1], bands[2], color=color, alpha=0.2, lw=0)
        sizes.append(runs[0]["kernel_state_bytes"] / 2**20)
        labels.append(label.replace(" (control)", "").replace(", ", ",\n"))
    left.set(xlabel="step", ylabel="validation loss, nats", ylim=(None, 2.65))
    left.set_title("Small GPT, 16 seeds: mean and 95 % interval", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    colors = [color for _, color, _ in LINES.values()]
    places = np.arange(len(sizes))[::-1]
    right.barh(places, sizes, color=colors, height=0.6)
    for place, size in zip(places, sizes, strict=True):
        right.text(size + 0.1, place, f"{size:.1f} MiB", va="center", fontsize=9)
    right.set_yticks(places, labels, fontsize=9)
    right.set(xlim=(0, max(sizes) * 1.25), xlabel="MiB")
    right.set_title("Optimizer state of its kernels", fontsize=11)
    return figure


def rates() -> Figure:
    """Loss against the rate, a band over the rates of the rest, from records."""
    from benchmarks.core import records

    rows = records.read(RECORDS / "scoreboard" / f"{BOARD}.jsonl", decay=0.0)
    figure, both = _figure(10, 3.9, columns=len(RATES))
    for axes, (title, contenders) in zip(both, RATES.items(), strict=True):
        for name, (label, color, line) in contenders.items():
            losses: dict[float, list[float]] = {}
            for row in rows:
                if row["optimizer"] == name and row["phase"] in ("rates", "further"):
                    loss = row["validation_loss"]
                    losses.setdefault(row["rate"], []).append(loss)
            tried = sorted(losses)
            low, high = ([of(losses[rate]) for rate in tried] for of in (min, max))
            axes.plot(tried, low, line, marker="o", ms=4, color=color, label=label)
            axes.fill_between(tried, low, high, color=color, alpha=0.15, lw=0)
        axes.set(xscale="log", ylim=(1.6, 2.5), xlabel="learning rate of the kernels")
        every = sorted({row["rate"] for row in rows if row["optimizer"] in contenders})
        axes.set_xticks(every, [f"{rate:g}" for rate in every])
        axes.minorticks_off()
        axes.set_title(title, fontsize=11)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    both[0].set_ylabel("validation loss, nats")
    return figure


def early() -> Figure:
    """Difference to Muon's loss against steps, with intervals, from records."""
    from benchmarks.core.statistics import mean_interval

    figure, both = _figure(10, 3.8, columns=2)
    panels = ([row for row in EARLY if (row[0] == BOARD) == first] for first in (1, 0))
    for axes, lines in zip(both, panels, strict=True):
        for board, name, label, color in lines:
            steps, gaps = _gaps(board, name)
            mean, low, high = np.array([mean_interval(x) for x in gaps.T]).T
            axes.plot(steps, mean, marker="o", ms=3, color=color, label=label)
            axes.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="step", ylim=(-0.1, 0.045))
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    both[0].set_ylabel("validation loss less Muon's, nats")
    both[0].set_title("Tiny Shakespeare, with controls", fontsize=11)
    both[1].set_title("dsbp_muon on other workloads", fontsize=11)
    return figure


def tokens() -> Figure:
    """Difference of dsbp_muon to Muon's loss against tokens a step, from records."""
    from benchmarks.core.statistics import mean_interval
    from benchmarks.studies.scoreboard import BOARDS

    tasks = {b: BOARDS[b].task for boards, *_ in SIZES.values() for b in boards}
    counts = {board: task.batch * task.context for board, task in tasks.items()}
    gaps = {board: _gaps(board, "dsbp_muon") for board in counts}
    ticks = sorted({*counts.values()})
    figure, both = _figure(10, 3.6, columns=2)
    for axes, step in zip(both, (100, 600), strict=True):
        for width, (boards, color, shift) in SIZES.items():
            places = [shift * counts[board] for board in boards]
            some = ((gaps[board][0].index(step), gaps[board][1]) for board in boards)
            found = [mean_interval(losses[:, at]) for at, losses in some]
            mean, low, high = np.array(found).T
            look = {"color": color, "marker": "o", "ms": 4, "capsize": 3, "lw": 1.7}
            bars = mean - low, high - mean
            axes.errorbar(places, mean, bars, label=f"width {width}", **look)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens a step")
        axes.set_xticks(ticks, [f"{tick:,}".replace(",", " ") for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"After {step} of 600 steps", fontsize=11)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    both[0].set_ylabel("validation loss less Muon's, nats")
    return figure


def _gaps(board: str, name: str) -> tuple[list[int], np.ndarray]:
    """Steps, and validation losses less Muon's there, one row for each seed of both."""
    from benchmarks.core import records

    rows = records.read(RECORDS / "scoreboard" / f"{board}.jsonl", phase="final")
    losses: dict[str, dict[int, list[float]]] = {name: {}, "muon": {}}
    for row in rows:
        if row["optimizer"] in losses:
            curve = [point["loss"] for point in row["curve"]]
            losses[row["optimizer"]][row["seed"]] = curve
    steps = [point["step"] for point in rows[0]["curve"]]
    pairs = [(losses[name][s], losses["muon"][s]) for s in losses["muon"]]
    return steps, np.array([np.subtract(*pair) for pair in pairs])


def fine_tuning() -> Figure:
    """Final loss of fine-tuned GPTs with intervals, from records."""
    from benchmarks.core import records
    from benchmarks.core.statistics import mean_interval

    figure, both = _figure(10, 3.6, columns=len(TUNED))
    for axes, (task, title) in zip(both, TUNED.items(), strict=True):
        rows = records.read(RECORDS / "finetune" / f"{task}.jsonl", phase="final")
        for place, (name, (_, color)) in enumerate(reversed(WHOLE.items())):
            runs = [row for row in rows if row["optimizer"] == name]
            value, low, high = mean_interval([row["test_loss"] for row in runs])
            axes.plot([low, high], [place] * 2, color=color, linewidth=2)
            axes.plot(value, place, "o", color=color, markersize=6)
            size = runs[0]["kernel_state_bytes"] / 2**20
            axes.text(high + 0.003, place, f"{size:.1f} MiB", va="center", fontsize=9)
        left, right = axes.get_xlim()
        axes.set(xlim=(left, right + 0.2 * (right - left)), xlabel="test loss, nats")
        axes.set_title(title, fontsize=11)
    both[0].set_yticks(range(len(WHOLE)), [x for x, _ in reversed(WHOLE.values())])
    both[-1].set_yticks(range(len(WHOLE)), [])
    return figure


def memory() -> Figure:
    """Bytes a parameter during an update, stacked; temporaries are from a record."""
    import jax
    import jax.numpy as jnp

    from benchmarks.core import records
    from benchmarks.studies.cost_worker import make_optimizer
    from dsbp_optax.diagnostics import state_bytes

    record = [  # The last that has them.
        one
        for one in records.read(RECORDS / "cost.jsonl")
        if any(row["figure"].startswith("temporary") for row in one["rows"])
    ][-1]
    temporary = {
        (r["figure"], r["contender"]): r["value"]
        for r in record["rows"]
        if r["library"] == "here" or r["contender"] not in OWN
    }
    wide = record["wide"]
    shapes = [(wide, wide)] * 4 + [(wide, 4 * wide), (4 * wide, wide)]
    figure, both = _figure(10, 3.7, columns=2)
    for axes, lead, layout, title in (
        (both[0], (), "unrolled", "Layers written out"),
        (both[1], (8,), "stacks of 8", "Layers scanned, in stacks of 8"),
    ):
        arrays = [jax.ShapeDtypeStruct((*lead, *s), jnp.float32) for s in shapes]
        params = {f"dense_{i}": {"kernel": x} for i, x in enumerate(arrays)}
        count = sum(x.size for x in arrays)
        for place, name in enumerate(reversed(MEMORY)):
            state = jax.eval_shape(make_optimizer(name).init, params)
            parts = (4, 4, state_bytes(state) / count)
            parts += (temporary[f"temporary bytes a parameter, {layout}", name],)
            ends = np.cumsum(parts)
            colors = ("#b9c6d2", "#8fa5b8", OURS, "#e8cf9a")
            for size, end, color, part in zip(parts, ends, colors, PARTS, strict=True):
                label = part if place == 0 else None
                axes.barh(place, size, left=end - size, color=color, label=label)
            axes.text(ends[-1] + 0.4, place, f"{ends[-1]:.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(MEMORY)), [*reversed(MEMORY.values())])
        axes.set(xlim=(0, 46), xlabel="bytes a parameter")
        axes.set_title(title, fontsize=11)
    handles = both[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def basis() -> Figure:
    """A cloud of activations with its leading directions, and a spectrum."""
    figure, (left, right) = _figure(9, 3.6, columns=2)
    turn = np.array([[0.86, -0.5], [0.5, 0.86]])
    points = np.random.default_rng(0).normal(size=(400, 2)) * [2.0, 0.55] @ turn.T
    left.scatter(*points.T, s=6, color=PEER, alpha=0.45, linewidths=0)
    for column, length, name, at in (
        (0, 4.2, "$v_1$", (0.25, -0.75)),
        (1, 1.5, "$v_2$", (-0.75, 0.1)),
    ):
        tip = turn[:, column] * length
        _arrow(left, (0, 0), tip, OURS if column == 0 else INK)
        left.text(*(tip + at), name, color=OURS if column == 0 else INK, fontsize=13)
    left.set(aspect="equal", xlim=(-6, 6), ylim=(-4, 4), xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    left.set_title("The inputs of a layer, one point a sample", fontsize=11)
    values = 30 * np.exp(-np.arange(24) / 2.2) + 0.35
    colors = [OURS] * 6 + [PEER] * 18
    right.bar(np.arange(1, 25), values, color=colors)
    right.text(4.4, 22, "kept: V and their\neigenvalues, k = 6", color=OURS)
    right.text(11, 3.2, "the rest: only their mean", color=PEER)
    right.set(xlabel="direction", ylabel="eigenvalue of $A^T A / n$")
    right.set_title("A few directions hold most of the energy", fontsize=11)
    return figure


def metric() -> Figure:
    """What the metric does with a step, and by how much along each direction."""
    figure, (left, right) = _figure(9, 3.6, columns=2)
    step, turn = np.array([2.6, 1.6]), np.deg2rad(20)
    strong = np.array([np.cos(turn), np.sin(turn)])
    along = strong @ step * strong
    shortened = step - 0.7 * along
    shortened *= np.linalg.norm(step) / np.linalg.norm(shortened)
    left.add_patch(Ellipse((0, 0), 6.4, 1.7, angle=20, color=PALE))
    _arrow(left, (0, 0), 3.2 * strong, PEER, style="--")
    left.text(*(3.2 * strong + [0.1, -0.42]), "strong direction $v_1$", color=PEER)
    _arrow(left, (0, 0), step, INK)
    left.text(*(step + 0.1), "update D", color=INK)
    _arrow(left, (0, 0), shortened, OURS)
    left.text(*(shortened + np.array([-1.3, 0.2])), "S D, its norm kept", color=OURS)
    left.set(aspect="equal", xlim=(-3.6, 5.4), ylim=(-1.6, 3.8), xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    left.set_title("S turns the update away from $v_1$", fontsize=11)
    values = 30 * np.exp(-np.arange(12) / 2.2) + 0.35
    rest, mean = 0.5, 3.2
    factors = np.minimum(1, (rest + 0.2 * mean) / (values + 0.2 * mean)) ** 0.5
    factors[6:] = 1
    right.bar(np.arange(1, 13), factors, color=[OURS] * 6 + [PEER] * 6)
    right.set(xlabel="direction", ylabel="factor $f$", ylim=(0, 1.1))
    right.set_title("The stronger a direction, the shorter the step", fontsize=11)
    return figure


def refresh() -> Figure:
    """The steps of two periods: which of them collect, which only use the basis."""
    figure, (axes,) = _figure(9, 2.0)
    period, window = 20, 2
    for start in range(2 * period):
        collects = start % period < window
        color = OURS if collects else PALE
        axes.add_patch(Rectangle((start + 0.08, 0), 0.84, 1, color=color))
    for begin in (0, period):
        axes.annotate(
            "q = 2 steps collect a sketch\nand improve V",
            *((begin + 1, 1.05), (begin + 2.6, 2.05)),
            arrowprops={"arrowstyle": "-", "color": OURS},
            color=OURS,
            va="center",
            fontsize=9,
        )
        ends = (begin + 0.05, -0.35), (begin + period - 0.05, -0.35)
        axes.annotate("", *ends, arrowprops={"arrowstyle": "<->", "color": INK})
        axes.text(begin + period / 2, -0.9, "p = 20 steps", ha="center", color=INK)
    axes.text(11, 0.35, "the other steps use V as it is", ha="center", color=INK)
    axes.set(xlim=(-0.5, 40.5), ylim=(-1.2, 2.7))
    axes.set_axis_off()
    return figure


def residual() -> Figure:
    """A gradient as its part in the basis and the rest."""
    figure, (axes,) = _figure(9, 2.9)
    _block(axes, 0, 0, 2.2, 2.4, PALE, "G\nd × m")
    axes.text(2.75, 1.2, "=", fontsize=20, ha="center", va="center")
    _block(axes, 3.3, 0, 0.7, 2.4, "#f3d3d6", "V\nd × k")
    _block(axes, 4.2, 1.7, 2.2, 0.7, "#f3d3d6", "$V^T G$   k × m")
    axes.text(6.95, 1.2, "+", fontsize=20, ha="center", va="center")
    _block(axes, 7.5, 0, 2.2, 2.4, "#d6e3ee", "G $-$ V $V^T$G\nthe residual")
    axes.text(3.3, -0.45, "inside the basis: k × m coordinates", color=OURS)
    axes.text(7.5, -0.45, "outside: dropped, or kept in few bits", color=PEER)
    axes.set(xlim=(-0.2, 12.2), ylim=(-0.7, 2.6), aspect="equal")
    axes.set_axis_off()
    return figure


def coordinates() -> Figure:
    """What a layer keeps and returns, with a whole gradient and with coordinates."""
    figure, (axes,) = _figure(9, 3.4)
    rows = (
        (2.6, "whole gradient", 2.0, "A\nn × d", 1.7, "G\nd × m", PALE),
        (0, "coordinates", 0.55, "AV\nn × k", 0.45, "$V^T$G\nk × m", "#f3d3d6"),
    )
    for y, name, width, kept, height, made, color in rows:
        axes.text(-0.2, y + 0.95, name, ha="right", va="center", fontsize=11)
        _block(axes, 0.2, y, width, 1.9, color, kept if width > 1 else "")
        if width < 1:
            axes.text(0.95, y + 0.95, kept, va="center")
        axes.text(0.2, y - 0.35, "kept for the backward pass", fontsize=9)
        _arrow(axes, (3.6, y + 0.95), (5.0, y + 0.95), INK)
        _block(axes, 5.4, y + 0.95 - height / 2, 2.2, height, color, "")
        axes.text(7.9, y + 0.95, made, va="center")
        axes.text(5.4, y - 0.35, "returned", fontsize=9)
    axes.set(xlim=(-2.6, 10), ylim=(-0.6, 4.7), aspect="equal")
    axes.set_axis_off()
    return figure


def flow() -> Figure:
    """Who hands what to whom in one step of training."""
    figure, (axes,) = _figure(9.6, 3.6)
    boxes = {
        "batch": (0, 2.6, 1.9, 0.9, PALE, "parameters,\nbatch"),
        "state": (0, 0.4, 1.9, 0.9, PALE, "optimizer state\nV, λ, moments"),
        "vg": (3.0, 1.5, 2.1, 0.9, "#f3d3d6", "value_and_grad\nof the adapter"),
        "refresh": (6.9, 0.4, 1.9, 0.9, "#d6e3ee", "refresh\nV and λ"),
        "rule": (6.9, 2.6, 1.9, 0.9, "#d6e3ee", "S, Adam or\nMuon, S"),
        "updates": (10.4, 2.6, 1.4, 0.9, PALE, "updates"),
    }
    axes.add_patch(Rectangle((6.4, 0.0), 2.9, 3.9, fill=False, edgecolor=PEER))
    axes.text(7.85, 4.05, "tx.update", ha="center", color=PEER)
    for box in boxes.values():
        _block(axes, *box)
    for start, end, text, at in (
        ((1.95, 2.95), (2.95, 2.1), "", (0, 0)),
        ((1.95, 0.95), (2.95, 1.7), "V", (2.3, 1.42)),
        ((5.15, 2.1), (6.85, 2.95), "gradient G", (5.0, 2.75)),
        ((5.15, 1.75), (6.85, 0.95), "statistics\nY = Aᵀ(A V)", (5.0, 0.72)),
        ((7.85, 1.35), (7.85, 2.55), "V, λ", (7.95, 1.85)),
        ((8.85, 3.05), (10.35, 3.05), "", (0, 0)),
    ):
        _arrow(axes, start, end, INK)
        axes.text(*at, text, fontsize=9)
    back = [(7.85, 0.35), (7.85, -0.45), (0.95, -0.45), (0.95, 0.35)]
    axes.plot(*zip(*back[:3], strict=True), color=INK, linewidth=1.8)
    _arrow(axes, back[2], back[3], INK)
    axes.text(3.2, -0.35, "new V, λ and moments", fontsize=9)
    axes.set(xlim=(-0.1, 11.9), ylim=(-0.6, 4.4))
    axes.set_axis_off()
    return figure


PICTURES: Mapping[str, Callable[[], Figure]] = {
    f.__name__: f
    for f in (
        gpt,
        early,
        tokens,
        rates,
        fine_tuning,
        memory,
        basis,
        metric,
        refresh,
        residual,
        coordinates,
        flow,
    )
}


def write(folder: Path) -> list[Path]:
    """All pictures, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    style = {"svg.hashsalt": "dsbp", "font.size": 10, "savefig.facecolor": "white"}
    found = []
    with matplotlib.rc_context(style):
        for name, draw in PICTURES.items():
            found.append(folder / f"{name}.svg")
            draw().savefig(found[-1], metadata={"Date": None})
    return found


def _figure(
    width: float, height: float, columns: int = 1, widths: tuple[float, ...] = ()
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    given = {"width_ratios": widths} if widths else {}
    axes = figure.subplots(1, columns, squeeze=False, **given)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _arrow(axes: Any, start: Any, end: Any, color: str, style: str = "-") -> None:
    shape = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    line = {"color": color, "linestyle": style, "linewidth": 1.8}
    axes.add_patch(FancyArrowPatch(tuple(start), tuple(end), **shape, **line))


def _block(
    axes: Any, x: float, y: float, w: float, h: float, color: str, text: str
) -> None:
    axes.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor=INK, lw=0.8))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    write(FOLDER)
