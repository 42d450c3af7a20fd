"""All records, read once, by what they tell of."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.core import records, statistics
from benchmarks.core.records import Record
from benchmarks.core.statistics import Interval
from benchmarks.optimizers import CONTENDERS
from benchmarks.report import tables
from benchmarks.report.entries import Entry, campaign_entries, entries
from benchmarks.studies import finetune
from benchmarks.studies.ablation import FACTORS, PERIOD, RANK
from benchmarks.studies.scoreboard import BOARDS
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import ACCURACY

#: The paper's data sets, and the workload of each.
DATA_SETS = {
    "CIFAR-10": "cifar10_resnet",
    "Fashion-MNIST": "fashion_mnist_cnn",
    "PneumoniaMNIST": "pneumonia_cnn",
    "Tiny ImageNet": "tiny_imagenet_resnet",
}


class Found:
    """Everything that the page shows, read once."""

    def __init__(self, root: Path):
        self.root, self.every = root, records.read_all(root)
        minima = [one for one in self.every if one["study"] == "minima"]
        self.minima = {
            name: tables.latest_looks(some)
            for name in WORKLOADS
            if (some := [one for one in minima if one["workload"] == name])
        }
        self.campaign, self.full = (
            {
                name: some
                for name, workload in WORKLOADS.items()
                if (some := campaign_entries(workload, folder))
            }
            for folder in (root, root / "full")  # with --quick, and without it
        )
        self.finetuned = {
            name: some
            for name, task in finetune.TASKS.items()
            if (some := task.entries(root))
        }
        finals = records.read(root / "fewshot.jsonl", phase="final")
        self.fewshot = {
            shots: entries(
                ACCURACY,
                [x for x in finals if x["workload"] == f"omniglot_{shots}_shot"],
            )
            for shots in (1, 5)
        }
        self.boards = {n: board.rows(root) for n, board in BOARDS.items()}
        self.boards = {name: rows for name, rows in self.boards.items() if rows}

    def of(self, study: str) -> list[Record]:
        """Records of a study."""
        return [one for one in self.every if one["study"] == study]

    @property
    def pictures(self) -> dict[str, dict[str, Entry]]:
        """Final runs on the paper's data sets, by workload and contender."""
        found = {}
        for name in DATA_SETS.values():
            some = tables.first_entries(WORKLOADS[name], self.minima.get(name, ()))
            some |= {entry.name: entry for entry in self.campaign.get(name, ())}
            found[name] = {key: some[key] for key in CONTENDERS if key in some}
        return found

    @property
    def effects(self) -> dict[str, dict[str, dict[str, Interval]]]:
        """Figure -> workload -> effect, in decades, of whole grids.

        A run that was lost guesses.
        """
        found: dict[str, dict[str, dict[str, Interval]]] = {}
        cells = pd.DataFrame(self.of("ablation"))
        if cells.empty:
            return found
        grid = (cells["rank"] == RANK) & (cells["period"] == PERIOD)
        runs = cells[grid].explode(["accuracy", "train_loss"])
        whole = math.prod(map(len, FACTORS.values()))
        runs["seed"] = runs.groupby(level=0).cumcount()
        error = 1 - runs["accuracy"].astype(float).fillna(0.1)
        loss = runs["train_loss"].astype(float).fillna(np.log(10))
        runs["test error"] = np.log10(error.clip(lower=1e-3))
        runs["training loss"] = np.log10(loss.clip(lower=1e-4))
        for key in ("test error", "training loss"):
            found[key] = {
                name: statistics.effects(mine, FACTORS, key)
                for name, mine in runs.groupby("workload", sort=False)
                if len(mine.groupby([*FACTORS])) == whole
            }
        return {key: some for key, some in found.items() if some}
