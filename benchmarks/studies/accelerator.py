"""What steps cost, and what they are worth, on an accelerator, within minutes.

Needs nothing but jax, flax, optax and numpy. It compiles one program at a time, writes
a record after each measurement and goes on from the records, the most telling
measurement first.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks import optimizers, peers
from benchmarks.core import records
from benchmarks.core.records import ROOT, Record
from benchmarks.studies import accelerator_programs as programs
from benchmarks.studies.accelerator_programs import PERIOD, Figures, Size

SIZES = {
    "gpt98": Size(768, 12, 12, 8192, 512, 32),
    "gpt30": Size(640, 6, 10, 256, 256, 64),
    "gpt10": Size(384, 6, 6, 256, 256, 64),
}
_TINY = Size(32, 1, 2, 256, 8, 4)
#: Pairs that are measured in turns, the plain optimizer first; those of Muon first.
PAIRS = ("muon", "dsbp_muon"), ("adamw", "dsbp_adamw")
_SGD, _SHORT = ("sgd", "dsbp_sgd"), ("adamw", "subspace_adamw")
#: Steps from refresh to refresh of rules without a metric.
LONG = 100
#: What is trained: pairs first, then what tells where a gain comes from.
TEXT = "muon dsbp_muon adamw dsbp_adamw muon_6bit dsbp_muon_none dsbp_muon_random "
TEXT += "dsbp_adamw_none dsbp_adamw_random"
IMAGES = "sgd dsbp_sgd muon dsbp_muon sam"
#: Seeds of runs that choose a rate, and of those behind them.
TUNING, FINAL = 1000, (2000, 2001, 2002)
#: What the paper reports for ResNet-18 on CIFAR-10.
PAPER = 0.963


# --------------------------------------------------------------------------- order


@dataclass(frozen=True)
class Item:
    """One measurement: records that are written at once."""

    name: str  # what --only takes
    part: str  # tells it from the others of its name
    seconds: float  # that it takes on a large accelerator, about
    run: Callable[[], Sequence[Figures]]  # figures of each contender


class Told(argparse.Namespace):
    """What the command line says."""

    minutes: float
    only: list[str] | None
    data_dir: Path | None
    out: Path
    cache: Path | None
    commit: str | None
    dry: bool

    def size(self, name: str) -> Size:
        """Of a GPT; tiny where nothing is to be learnt."""
        return _TINY if self.dry else SIZES[name]

    @property
    def pairs(self) -> Sequence[tuple[str, str]]:
        """All, or the one that compiles soonest."""
        return PAIRS[-1:] if self.dry else PAIRS

    @property
    def path(self) -> Path:
        """Of the records."""
        return self.out / "accelerator.jsonl"

    def rows(self, **wanted: Any) -> list[Record]:
        """Records of this size and kind of device, but for failures."""
        kind = jax.devices()[0].device_kind
        rows = records.read(self.path, dry=self.dry, error=None, **wanted)
        return [row for row in rows if row["machine"]["device"] == kind]


def _pair(
    name: str,
    pair: tuple[str, str],
    start: Callable[[str], programs.Started],
    period: int,
    seconds: tuple[float, float],
    told: Told,
) -> Iterator[Item]:
    """Two programs, one after the other, then their steps in turns."""

    def program(one: str) -> list[Figures]:
        return [{"contender": one, **start(one).figures}]

    def turns() -> list[Figures]:
        rounds = 1 if told.dry else max(2, 100 // period)
        return programs.in_turns({one: start(one) for one in pair}, period, rounds)

    for one in pair:
        yield Item(name, one, seconds[0], functools.partial(program, one))
    yield Item(name, " ".join(pair), seconds[1], turns)


def _cost(gpt: str, scan: bool, told: Told) -> Iterator[Item]:
    """Each program is compiled in a process of its own, then both come from the cache.

    A dry run has processes for the first of its names alone.
    """
    name, size = f"cost_{gpt}{'_scan' * scan}", told.size(gpt)
    start = functools.partial(programs.gpt_step, size, scan)

    def program(one: str) -> list[Figures]:
        if told.dry and name != "cost_gpt98":
            return [{"contender": one, **start(one).figures}]
        command = [sys.executable, "-m", "benchmarks", "accelerator", "--alone"]
        command += [gpt, "scan" if scan else "", one, "--cache", str(told.cache)]
        command += ["--dry"] * told.dry
        kept: Any = {"cwd": ROOT, "capture_output": True, "text": True}
        done = subprocess.run(command, **kept, timeout=600)
        if done.returncode:
            raise RuntimeError(done.stderr[-400:])
        return [{"contender": one, **json.loads(done.stdout.splitlines()[-1])}]

    def turns(pair: tuple[str, str]) -> list[Figures]:
        rounds = 1 if told.dry else 5
        found = programs.in_turns({one: start(one) for one in pair}, PERIOD, rounds)
        parts = [told.rows(name=name, part=one) for one in pair]
        if all(parts):
            plain, ours = (rows[-1] for rows in parts)
            for key in ("total_bytes", "peak_bytes"):
                if plain.get(key) and ours.get(key):
                    saved = (plain[key] - ours[key]) / (
                        plain["state_bytes"] - ours["state_bytes"]
                    )
                    found[1][f"{key}_saved_of_state_saved"] = saved
        return found

    for pair in told.pairs:
        for one in pair:
            yield Item(name, one, 60, functools.partial(program, one))
        yield Item(name, " ".join(pair), 35, functools.partial(turns, pair))


def _coordinates(told: Told) -> Iterator[Item]:
    start = functools.partial(programs.gpt_step, told.size("gpt98"), False)
    period = PERIOD if told.dry else LONG
    yield from _pair("coordinates_gpt98", _SHORT, start, period, (40, 35), told)


def _resnet_speed(told: Told) -> Iterator[Item]:
    start = functools.partial(programs.resnet_step, told.dry)
    for pair, period in ((_SGD, PERIOD if told.dry else LONG), (PAIRS[0], PERIOD)):
        if pair == _SGD or not told.dry:
            yield from _pair("resnet_speed", pair, start, period, (30, 10), told)


def _update(told: Told) -> Iterator[Item]:
    size = told.size("gpt98")

    def measure(pair: tuple[str, str]) -> list[Figures]:
        bandwidth = programs.copy_bandwidth(1 if told.dry else 1024)
        steps = {one: programs.gpt_step(size, False, one, True) for one in pair}
        found = programs.in_turns(steps, PERIOD, 1 if told.dry else 5)
        return [
            {**row, **programs.update_bytes(step, bandwidth, row["mean_step_ms"])}
            for row, step in zip(found, steps.values(), strict=True)
        ]

    for pair in reversed(told.pairs):
        yield Item("update_gpt98", " ".join(pair), 60, functools.partial(measure, pair))


def _training(
    name: str,
    contenders: str,
    rates: Callable[[str], Sequence[float]],
    run: Callable[..., Figures],
    seconds: float,
    told: Told,
) -> Iterator[Item]:
    """Every contender at its middle rate, at the others, then seeds at its best."""
    kind = "loss" if contenders == TEXT else "accuracy"

    def best(one: str) -> float:
        rows = told.rows(name=name, contender=one, seed=TUNING, diverged=False)
        if not rows:
            raise ValueError(f"{one}: no rate was tried with success")
        sign = 1 if kind == "loss" else -1
        rate: float = min(rows, key=lambda row: sign * row[f"validation_{kind}"])[
            "rate"
        ]
        return rate

    def tuned(one: str, rate: float) -> list[Figures]:
        found = run(one, rate, TUNING)
        kept = {k: v for k, v in found.items() if not k.startswith("test_")}
        return [{"contender": one, **kept}]

    def final(one: str, seed: int) -> list[Figures]:
        return [{"contender": one, **run(one, best(one), seed)}]

    names = contenders.split()[: 2 if told.dry else None]
    for place, one in itertools.product((1, 2, 0)[: 1 if told.dry else 3], names):
        rate = rates(one)[place]
        work = functools.partial(tuned, one, rate)
        yield Item(name, f"{one} rate {rate:g}", seconds, work)
    for seed, one in itertools.product(FINAL[: 1 if told.dry else 3], names):
        yield Item(
            name, f"{one} seed {seed}", seconds, functools.partial(final, one, seed)
        )


def _train_gpt(gpt: str, seconds: float, told: Told) -> Iterator[Item]:
    data = told.size(gpt), told.data_dir, told.dry
    run = functools.partial(programs.train_gpt, *data)

    def rates(one: str) -> Sequence[float]:
        return peers.CONTENDERS[one].rates

    yield from _training(f"train_{gpt}", TEXT, rates, run, seconds, told)


def _train_resnet(told: Told) -> Iterator[Item]:
    run = functools.partial(programs.train_resnet, told.data_dir, told.dry)

    def rates(one: str) -> Sequence[float]:
        middle = optimizers.CONTENDERS[one].default_rate
        return middle / 2, middle, 2 * middle

    yield from _training("train_resnet18", IMAGES, rates, run, 90, told)


#: What can be measured, the most telling first.
NAMES: Mapping[str, Callable[[Told], Iterator[Item]]] = {
    "cost_gpt98": functools.partial(_cost, "gpt98", False),
    "update_gpt98": _update,
    "train_gpt10": functools.partial(_train_gpt, "gpt10", 20),
    "cost_gpt98_scan": functools.partial(_cost, "gpt98", True),
    "resnet_speed": _resnet_speed,
    "coordinates_gpt98": _coordinates,
    "cost_gpt30": functools.partial(_cost, "gpt30", False),
    "cost_gpt10": functools.partial(_cost, "gpt10", False),
    "cost_gpt30_scan": functools.partial(_cost, "gpt30", True),
    "cost_gpt10_scan": functools.partial(_cost, "gpt10", True),
    "train_resnet18": _train_resnet,
    "train_gpt30": functools.partial(_train_gpt, "gpt30", 35),
}


def carry_out(told: Told) -> None:
    """Measure what has no record yet, as long as it is expected to end in time."""
    end = time.monotonic() + 60 * told.minutes
    done = {(row["name"], row["part"]) for row in told.rows()}
    spent = guessed = 0.0
    for name in told.only or NAMES:
        if not told.dry:  # The device is free of what the last name left there.
            programs.gpt_step.cache_clear()
            programs.resnet_step.cache_clear()
        for item in NAMES[name](told):
            if (item.name, item.part) in done:
                continue
            pace = min(max(spent / guessed, 0.5), 10) if guessed else 1.0
            if time.monotonic() + pace * item.seconds > end:
                print(f"{item.name}, {item.part}: no time left", flush=True)
                continue
            begun = time.monotonic()
            try:
                found = item.run()
            except Exception as error:
                traceback.print_exc(limit=-4)
                words = f"{type(error).__name__}: {error}"[:500]
                found = [{"contender": item.part, "error": words}]
            elapsed = time.monotonic() - begun
            spent, guessed = spent + elapsed, guessed + item.seconds
            where = records.provenance(told.commit)
            same = {"name": item.name, "part": item.part, "dry": told.dry}
            same |= {"error": None, "measured_s": round(elapsed, 2)}
            rows = [{**same, **figures, **where} for figures in found]
            records.append(told.path, "accelerator", rows)
            print(f"{item.name}, {item.part}: {elapsed:.1f} s", flush=True)


# --------------------------------------------------------------------------- table

_BOTH = ("dsbp_muon", "dsbp_adamw")
#: Measurement, figure -> contender -> what its ratio to the plain optimizer may be.
RATIOS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("cost", "mean_step_ms"): {"dsbp_muon": 1.03, "dsbp_adamw": 1.05},
    ("cost", "compile_s"): dict.fromkeys(_BOTH, 1.6),
}
#: The same for the value itself; where it is negative, what it is to be at least.
VALUES: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("cost", "refresh_over_other"): dict.fromkeys(_BOTH, 1.3),
    ("cost", "peak_bytes_saved_of_state_saved"): {"dsbp_adamw": -0.7},
    ("cost", "total_bytes_saved_of_state_saved"): {"dsbp_adamw": -0.7},
    ("update", "compiler_over_unavoidable"): dict.fromkeys(_BOTH, 1.5),
    ("update", "copied_over_unavoidable"): dict.fromkeys(_BOTH, 1.5),
}
#: What the table tells, in this order.
SHOWN = (
    *("mean_step_ms", "other_step_ms", "refresh_step_ms", "refresh_over_other"),
    *("trace_s", "compile_s", "launches", "launches_of_refresh", "temporary_bytes"),
    *("total_bytes", "peak_bytes", "state_bytes", "total_bytes_saved_of_state_saved"),
    *("peak_bytes_saved_of_state_saved", "unavoidable_bytes_a_parameter"),
    *("compiler_bytes_a_parameter", "compiler_over_unavoidable"),
    *("copied_bytes_a_parameter", "copied_over_unavoidable"),
    *("validation_loss", "test_loss", "validation_accuracy", "test_accuracy"),
    "seconds",
)
HEAD = ("measurement", "figure", "contender", "value", "against", "its value", "ratio")
HEAD += ("spread", "reach", "met")


def lines(rows: Sequence[Record]) -> Iterator[Sequence[str]]:
    """Lines of the table, from the records alone."""
    plain = {**programs.PLAIN, "dsbp_sgd": "sgd", "muon_6bit": "muon", "sam": "sgd"}
    for name in NAMES:
        mine = [row for row in rows if row["name"] == name]
        good = [row for row in mine if not row["error"]]
        spreads = {row["contender"]: row["spread"] for row in good if "spread" in row}
        for figure in SHOWN:
            values: dict[str, list[float]] = {}
            for row in good:
                if row.get(figure) is not None:
                    values.setdefault(row["contender"], []).append(row[figure])
            single = {one: _single(figure, some) for one, some in values.items()}
            for one, value in single.items():
                whole = one.removesuffix("_none").removesuffix("_random")
                other = whole if whole != one else plain.get(one, "")
                base = single.get(other)
                if figure == "test_accuracy":
                    other, base = "the paper", PAPER
                if base is None and not name.startswith("train") and len(single) > 1:
                    continue  # The line of its partner has it.
                spread = spreads.get(one) if figure == "mean_step_ms" else None
                yield _line(name, figure, one, value, other, base, spread)
        failed = {row["part"]: row["error"] for row in mine if row["error"]}
        for part in failed.keys() - {row["part"] for row in good}:
            yield name, f"failed: {failed[part][:60]}", part, *[""] * 7


def _single(figure: str, values: Sequence[float]) -> float:
    """The best of the runs that choose a rate, the mean of the others."""
    if figure.startswith("validation"):
        return (max if figure.endswith("accuracy") else min)(values)
    return statistics.mean(values) if figure.startswith("test") else values[-1]


def _line(
    name: str,
    figure: str,
    one: str,
    value: float,
    other: str,
    base: float | None,
    spread: Sequence[float] | None,
) -> Sequence[str]:
    ratio, kind = value / base if base else None, (name.partition("_")[0], figure)
    reach, judged = RATIOS.get(kind, {}).get(one), ratio
    if kind in VALUES:
        reach, judged = VALUES[kind].get(one), value
    met = ""
    if reach is not None and judged is not None:
        met = "yes" if (judged <= reach if reach > 0 else judged >= -reach) else "no"
    told = "" if reach is None else f"{'<=' if reach > 0 else '>='} {abs(reach):g}"
    apart = "" if spread is None else f"{spread[0]:.3f} to {spread[1]:.3f}"
    shown = [_number(x) for x in (value, base, ratio)]
    return (
        *(name, figure.replace("_", " "), one, shown[0]),
        *(other if base else "", *shown[1:], apart, told, met),
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def table(rows: Sequence[Record]) -> str:
    """Columns of text."""
    cells = [HEAD, *lines(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


# ------------------------------------------------------------------------- command


def main(argv: Sequence[str]) -> None:
    """Of `python -m benchmarks accelerator`."""
    words: Any = {"prog": "python -m benchmarks accelerator", "description": __doc__}
    parser = argparse.ArgumentParser(**words)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="begin nothing that ends later")
    add("--only", nargs="+", choices=NAMES, metavar="NAME", help="see --list")
    add("--data-dir", type=Path, help="of *.txt and CIFAR-10; else they are generated")
    add("--out", type=Path, default=Path("runs"), help="folder of the records")
    add("--cache", type=Path, help="of compiled programs; default: below --out")
    add("--commit", help="where no checkout tells")
    add("--dry", action="store_true", help="tiny sizes")
    add("--list", action="store_true", help="names, the most telling first")
    add("--alone", nargs=3, default=(), help=argparse.SUPPRESS)
    told = parser.parse_args(argv, Told())
    if told.list:
        print(*NAMES, sep="\n")
        return
    told.cache = (told.cache or told.out / "cache").absolute()
    # Several processes share the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_compilation_cache_dir", str(told.cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # Of whole programs alone: what else there is would spare one what another found.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.monitoring.register_event_listener(programs.listen)
    if told.alone:
        gpt, scan, one = told.alone
        print(json.dumps(programs.alone(told.size(gpt), bool(scan), one)))
        return
    carry_out(told)
    print(f"\n{table(records.read(told.path, dry=told.dry))}")
