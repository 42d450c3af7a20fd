"""A small GPT trained on Tiny Shakespeare, kept as a file for what comes after it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from benchmarks import data, records
from benchmarks.experiment import Record
from benchmarks.optimizers import CONTENDERS
from benchmarks.train import build, train
from benchmarks.workloads import WORKLOADS, Params, Workload

WORKLOAD, OPTIMIZER, RATE = WORKLOADS["shakespeare_gpt"], "muon", 0.03


def pretrain(
    data_dir: Path | None,
    workload: Workload = WORKLOAD,
    after_step: Callable[[], None] = lambda: None,
) -> Params:
    """Weights after one full run from seed 0."""
    texts = workload.load(data_dir)
    run = train(
        build(workload, CONTENDERS[OPTIMIZER]),
        *(texts, texts.test),
        rate=RATE,
        steps=workload.steps,
        seed=0,
        after_step=after_step,
    )
    return run.params


def describe(
    path: Path, data_dir: Path | None, to: Workload, workload: Workload = WORKLOAD
) -> Record:
    """What the weights in a file are worth on test samples, here and there.

    Args:
      path: of the weights.
      data_dir: folder of the data files.
      to: what they are adapted to; its `load` gives their new text.
      workload: what they were trained on.
    """
    params = read(path, workload)
    pairs = {"pretraining": workload, "before_adaptation": to}
    return {
        "workload": workload.name,
        "optimizer": OPTIMIZER,
        "learning_rate": RATE,
        "steps": workload.steps,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **{
            key: task.measure(params, task.load(data_dir).test, None)
            for key, task in pairs.items()
        },
        **records.environment(),
    }


def write(path: Path, params: Params) -> None:
    """Save weights as an .npz archive, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **traverse_util.flatten_dict(jax.device_get(params), sep="/"))
    part.replace(path)


def read(path: Path, workload: Workload = WORKLOAD) -> Params:
    """Weights that `write` saved.

    Raises:
      DataError: when the file is missing, damaged or of another model.
    """
    shapes = jax.eval_shape(lambda: workload.init(0))
    if not path.is_file():
        raise data.DataError(
            f"{path}: got no such file, expected pretrained weights. Remedy: "
            "`python -m benchmarks finetune` writes it before its first run."
        )
    names = list(traverse_util.flatten_dict(shapes, sep="/"))
    return traverse_util.unflatten_dict(data.read_npz(path, names), sep="/")


def load_sotu(data_dir: Path | None, weights: Path) -> data.Data:
    """State of the Union text, and the weights of a GPT that has not seen it.

    Raises:
      DataError: when a file is missing or damaged.
    """
    text = data.load_sotu(WORKLOAD.model.context)(data_dir)
    return text._replace(pretrained=read(weights))
