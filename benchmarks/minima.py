"""What kind of minimum an optimizer finds: train, then look closely; resumable.

A look is a function of a trained run: curvature, attacks, corruptions, a bound. Each
run leaves one record; one that has all looks asked for is not made again.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import flatness, guarantee, records, robustness, tune
from benchmarks.compare import Entry
from benchmarks.data import Data
from benchmarks.experiment import Order, Record, carry_out_run
from benchmarks.optimizers import Contender
from benchmarks.train import Program, build
from benchmarks.workloads import Params, Workload

#: Below the folder of all records.
FOLDER = "minima"
RESULTS = Path(__file__).parent / "results" / FOLDER
#: Runs from this seed upwards are for choosing radii, by their validation samples.
TUNING_SEED = tune.SEED


class Found(NamedTuple):
    """A trained network, as the looks see it.

    Attributes:
      workload: that it was trained on.
      data: of the workload.
      params: as they are evaluated.
      start: the parameters at initialisation.
    """

    workload: Workload
    data: Data
    params: Params
    start: Params


Look = Callable[[Found], Mapping[str, Any]]

LOOKS: dict[str, Look] = {
    "curvature": lambda one: flatness.measure(one.workload, one.params, one.data),
    "attacks": lambda one: {
        "attacks": robustness.attacked(one.workload, one.params, one.data.test),
        "attack_radii": list(robustness.RADII),
    },
    "corruptions": lambda one: {
        "corruptions": robustness.corrupted(one.workload, one.params, one.data.test)
    },
    "bound": lambda one: guarantee.bound(
        one.workload, one.params, one.start, one.data.train
    ),
}


@dataclass(frozen=True)
class Plan:
    """Runs of one contender on one workload.

    Attributes:
      workload: what to train.
      contender: with what.
      order: rate and length of the runs; the seed is replaced.
      seeds: of parameters and data order.
      looks: names in `LOOKS`.
    """

    workload: Workload
    contender: Contender
    order: Order
    seeds: Sequence[int]
    looks: Sequence[str]

    def orders(self) -> list[Order]:
        """One a seed."""
        return [dataclasses.replace(self.order, seed=seed) for seed in self.seeds]

    def path(self, out: Path, order: Order) -> Path:
        """``<out>/<workload>/<optimizer>-<rate>[-rho<radius>]-<seed>.json``."""
        radius = self.contender.settings.get("rho")
        words = [self.contender.name, f"{order.rate:g}"]
        words += [] if radius is None else [f"rho{radius:g}"]
        name = f"{'-'.join([*words, str(order.seed)])}.json"
        return out / self.workload.name / name

    def lacks(self, out: Path, order: Order) -> bool:
        """Whether a run has not been made, or not looked at as asked for."""
        path = self.path(out, order)
        if not path.exists():
            return True
        record = records.read(path)
        return not record["diverged"] and not set(self.looks) <= set(record["looks"])


def with_radius(contender: Contender, radius: float | None) -> Contender:
    """The contender with another radius of its ascent; None leaves it as it is."""
    if radius is None or "rho" not in contender.settings:
        return contender
    settings = {**contender.settings, "rho": radius}
    return dataclasses.replace(contender, settings=settings)


def carry_out(
    plans: Sequence[Plan],
    out: Path,
    data: Data,
    deadline: float = float("inf"),
    after_run: Callable[[], None] = lambda: None,
) -> bool:
    """Make the runs that are lacking.

    Args:
      plans: contender after contender, of one workload.
      out: folder of the records.
      data: of the workload.
      deadline: on the clock of `time.monotonic`; no run starts after it.
      after_run: called after each.

    Returns:
      Whether all are made.
    """
    for plan in plans:
        program: Program | None = None
        for order in plan.orders():
            if plan.lacks(out, order):
                if time.monotonic() > deadline:
                    return False
                program = program or build(plan.workload, plan.contender)
                record = look(program, data, order, plan.looks)
                records.write(plan.path(out, order), record)
            after_run()
    return True


def look(program: Program, data: Data, order: Order, looks: Sequence[str]) -> Record:
    """Train once, the KL term along the way, and look at what was found."""
    workload = program.workload
    start = jax.device_get(workload.init(order.seed, data.pretrained))
    record, run = carry_out_run(
        *(program, data, order),
        observe=lambda params, state: guarantee.divergence(params, start, state),
    )
    record["looks"] = [] if run.diverged else list(looks)
    found = Found(workload, data, run.params, start)
    for name in record["looks"]:
        record |= LOOKS[name](found)
    return record


def made(plans: Sequence[Plan], out: Path) -> list[Record]:
    """Records of the runs that were made."""
    paths = [plan.path(out, order) for plan in plans for order in plan.orders()]
    return [records.read(path) for path in paths if path.exists()]


def label(record: Record) -> str:
    """The contender, and the radius where it has one."""
    radius = record["hyperparameters"].get("rho")
    rest = "" if radius is None else f" {radius:g}"
    return f"{record['optimizer']}{rest}"


def grouped(found: Sequence[Record]) -> dict[tuple[str, float], list[Record]]:
    """Records of the same contender, radius and rate."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in found:
        groups.setdefault((label(record), record["learning_rate"]), []).append(record)
    return groups


def entries(workload: Workload, found: Sequence[Record]) -> dict[str, Entry]:
    """The first group of each contender: one rate and one radius."""
    firsts: dict[str, Entry] = {}
    for runs in grouped(found).values():
        name = runs[0]["optimizer"]
        firsts.setdefault(name, Entry(name, workload.metric, runs))
    return firsts


def mean_curve(runs: Sequence[Record], key: str) -> np.ndarray | None:
    """Mean over runs of a figure that was observed along training, or None."""
    rows = [[point.get(key) for point in run["curve"]] for run in runs]
    if not rows or any(value is None for row in rows for value in row):
        return None
    return np.asarray(rows, float).mean(0)
