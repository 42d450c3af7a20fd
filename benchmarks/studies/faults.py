"""Training that is killed, and goes on: every bit must be that of an unbroken run.

A child trains a small network and keeps parameters, state and losses with orbax, beside
them a hash, since orbax reads inverted bits without a word. This process kills it as
often as asked for, and starts it again until it is through. `tests/test_faults.py` puts
the same child through torn files and the loss of one process of two.
"""

import hashlib
import logging
import multiprocessing
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer

import dsbp_optax
from benchmarks import cli
from benchmarks.core.train import make_step
from benchmarks.optimizers import CONTENDERS
from benchmarks.report import tables
from benchmarks.studies.distributed import Layout, Place, join
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import DataError


class Job(NamedTuple):
    """What a child is to do."""

    folder: str  # of the checkpoints
    cache: str  # of compiled programs
    optimizer: str = "dsbp_muon"
    steps: int = 60
    every: int = 4  # steps from one checkpoint to the next
    place: Place = Place()
    timeout: int = 10  # seconds after which a process that is gone is missed


def train(job: Job, said: Connection) -> None:
    """Train from the newest whole checkpoint, or from the start.

    Says ``("start", step)``, then ``("step", number)`` and ``("saved", number)``, at
    last ``("done", hashes)``. Batches are functions of the step, so that they need no
    state of their own.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    jax.config.update("jax_compilation_cache_dir", job.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    join(job.place, job.timeout)
    workload, contender = WORKLOADS["digits_cnn"], CONTENDERS[job.optimizer]
    if contender.ours:  # Windows of refreshes are frequent.
        settings = {**contender.settings, "update_every": 8}
        contender = replace(contender, settings=settings)
    params = workload.init(0)
    state = jax.jit(contender.build(lambda count: 0.0).init)(params)
    held = params, state, np.zeros(job.steps, np.float32)
    layout = Layout()
    held = jax.device_put(held, layout.everywhere)
    data, step = workload.load(None).train, make_step(workload, contender)
    numbers = np.float32(contender.default_rate), np.float32(job.steps)
    with open_folder(job.folder) as manager:
        start, held = restore(manager, held)
        said.send(("start", start))
        for number in range(start, job.steps):
            rng = np.random.default_rng(number)
            batch = data.take(rng.integers(0, len(data), workload.batch_size))
            params, state, loss = step(*held[:2], layout.spread(batch), *numbers)
            held = params, state, held[2].at[number].set(loss)
            said.send(("step", number))
            if (number + 1) % job.every == 0:
                seal = jax.device_put(sealed(held), layout.everywhere)
                manager.save(number + 1, args=ocp.args.StandardSave((held, seal)))
                said.send(("saved", number + 1))
    said.send(("done", digests(held)))


def open_folder(folder: str | Path) -> Any:
    """The checkpoints in a folder, by orbax: the last three."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=3, create=True, enable_async_checkpointing=False
    )
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(
        Path(folder).resolve(), options=options, item_handlers=handler
    )


def restore(manager: Any, held: Any) -> tuple[int, Any]:
    """The newest checkpoint that is whole, and its step; 0 and `held` without one.

    One of another model is an error; torn ones go, with a warning.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), held
    )
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            return step, _read(manager, step, shapes)
        except DataError:
            raise
        except Exception as error:  # Whatever a torn file makes a reader say.
            first = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"checkpoint of step {step} is torn ({first})", stacklevel=2)
            manager.delete(step)
    return 0, held


def _read(manager: Any, step: int, shapes: Any) -> Any:
    import orbax.checkpoint as ocp

    found = manager.item_metadata(step)
    tree = getattr(found, "tree", found)
    if not jax.tree.leaves(tree):
        raise OSError("it lists no arrays")
    place = jax.tree.leaves(shapes)[0].sharding
    seal = jax.ShapeDtypeStruct((32,), np.uint8, sharding=place)
    try:
        dsbp_optax.check_checkpoint(tree, (shapes, seal))
    except ValueError as error:
        raise DataError(f"checkpoint of step {step}: {error}") from error
    args = ocp.args.StandardRestore((shapes, seal))
    held, found = manager.restore(step, args=args)
    if not np.array_equal(found, sealed(held)):
        raise OSError("its bits have changed")
    return held


def digests(arrays: Any) -> dict[str, str]:
    """Path -> hash of every bit of an array."""
    return {
        jax.tree_util.keystr(keys): hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
        for keys, x in jax.tree_util.tree_leaves_with_path(arrays)
    }


def sealed(arrays: Any) -> np.ndarray:
    """One hash of every bit, which betrays what a disk changes later."""
    whole = "".join(digests(arrays).values()).encode()
    return np.frombuffer(hashlib.sha256(whole).digest(), np.uint8)


class Child:
    """A process that trains."""

    def __init__(self, job: Job):
        context = multiprocessing.get_context("spawn")
        self._said, there = context.Pipe(duplex=False)
        self.process = context.Process(target=train, args=(job, there), daemon=True)
        self.process.start()
        there.close()

    def said(self) -> Iterator[tuple[str, Any]]:
        """What it says, until it ends."""
        try:
            while True:
                yield self._said.recv()
        except (EOFError, OSError):  # At the end of it, or of half a word.
            self.process.join()

    def finish(self) -> tuple[int, dict[str, str]]:
        """The step that it started from and the hashes at its end; nobody kills it."""
        told = dict(self.said())
        if self.process.exitcode:
            raise RuntimeError(f"a child that nobody killed ended after {told}")
        return told["start"], told["done"]

    def kill_at(self, number: int, wait: float = 0.0) -> str | None:
        """Kill it so long after a step; what it said last, None if it ended."""
        last = None
        for kind, value in self.said():
            last = kind
            if kind == "step" and value >= number:
                time.sleep(wait)
                self.process.kill()
        return None if last == "done" else last


def different(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Paths of the arrays whose bits differ."""
    return sorted(key for key in expected if found[key] != expected[key])


@cli.app.command("faults")
def command(
    optimizer: cli.OptimizerNames = None,
    kills: Annotated[int, typer.Option(min=1, help="of each optimizer")] = 25,
    steps: Annotated[int, typer.Option(min=20)] = 120,
    every: Annotated[int, typer.Option(min=1, help="steps to a checkpoint")] = 4,
    seed: Annotated[int, typer.Option(help="of the moments of the kills")] = 0,
    json: cli.Save = None,
) -> None:
    """Kill training at random moments: it must go on as if nothing had been.

    Default optimizers: dsbp_muon, dsbp_adamw.
    """
    rows, rng = [], random.Random(seed)
    names = optimizer or ["dsbp_muon", "dsbp_adamw"]
    cli.several(CONTENDERS, names, "--optimizer")
    with cli.bars() as progress, tempfile.TemporaryDirectory() as place:
        for name in names:
            advance = cli.bar(progress, name, kills)
            job = Job(f"{place}/{name}", f"{place}/cache", name, steps, every)
            _, expected = Child(job).finish()
            row: dict[str, Any] = {"optimizer": name, "places": {}, "jobs": 0}
            gaps: set[str] = set()
            while (made := sum(row["places"].values())) < kills:
                row["jobs"] += 1
                mine = job._replace(folder=f"{place}/{name}{row['jobs']}")
                few = min(kills - made, steps // 8)
                for moment in sorted(rng.sample(range(steps), few)):
                    last = Child(mine).kill_at(moment, rng.uniform(0, 0.05))
                    if last is not None:
                        where = f"after {last}"
                        row["places"][where] = row["places"].get(where, 0) + 1
                        advance()
                _, found = Child(mine).finish()
                gaps |= {*different(found, expected)}
            rows.append({**row, "different": sorted(gaps)})
    passed = not any(row["different"] for row in rows)
    sizes = {"workload": "digits_cnn", "steps": steps, "every": every, "seed": seed}
    record = {**sizes, "kills": rows, "passed": passed}
    cli.save(json, "faults", [record])
    cli.show((f"jobs of {steps} steps", tables.faults(record)))
    if not passed:
        raise typer.Exit(1)
