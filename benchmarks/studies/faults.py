"""Training that is killed, and goes on: every bit must be that of an unbroken run.

A child trains a small network and keeps parameters, state and losses with orbax; this
process kills it with SIGKILL, as often as asked for, and starts it again until it is
through. `tests/test_faults.py` puts the same child through torn files and the loss of
one process of two.
"""

import dataclasses
import hashlib
import json as json_module
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dsbp_optax
from benchmarks import cli
from benchmarks.core.records import ROOT, Record
from benchmarks.core.train import make_step
from benchmarks.optimizers import CONTENDERS
from benchmarks.report import tables
from benchmarks.studies import distributed
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import DataError


class Job(NamedTuple):
    """What a child is to do."""

    folder: str  # of the checkpoints
    optimizer: str = "dsbp_muon"
    steps: int = 60
    every: int = 4  # steps from one checkpoint to the next
    place: tuple[str, int, int, int] = ("", 1, 0, 1)  # see `distributed.Place`
    timeout: int = 10  # seconds after which a process that is gone is missed


def train(job: Job) -> Record:
    """Train from the newest whole checkpoint, or from the start; digests and losses.

    Batches are functions of the step, so that they need no state of their own.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    distributed.join(distributed.Place(*job.place), job.timeout)
    workload, contender = WORKLOADS["digits_cnn"], CONTENDERS[job.optimizer]
    if contender.ours:  # Windows of refreshes are frequent.
        settings = {**contender.settings, "update_every": 8}
        contender = dataclasses.replace(contender, settings=settings)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((), ("data",)))
    params = workload.init(0)
    state = jax.jit(contender.build(lambda count: 0.0).init)(params)
    held = jax.device_put((params, state, np.zeros(job.steps, np.float32)), whole)
    data, step = workload.load(None).train, make_step(workload, contender)
    rows = workload.batch_size // jax.process_count()
    mine = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))
    with open_folder(Path(job.folder)) as manager:
        start, held = restore(manager, held)
        print(f"start {start}", flush=True)
        for number in range(start, job.steps):
            rng = np.random.default_rng(number)
            batch = data.take(rng.integers(0, len(data), workload.batch_size))
            batch = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(split, x[mine]), batch
            )
            rate = np.float32(contender.default_rate), np.float32(job.steps)
            params, state, loss = step(*held[:2], batch, *rate)
            held = params, state, held[2].at[number].set(loss)
            print(f"step {number}", flush=True)
            if (number + 1) % job.every == 0:
                seal = jax.device_put(sealed(held), whole)
                manager.save(number + 1, args=ocp.args.StandardSave((held, seal)))
                print(f"saved {number + 1}", flush=True)
    return {"started": start, **digests(held)}


def open_folder(folder: Path) -> Any:
    """The checkpoints in a folder, by orbax: the last three."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=3, create=True, enable_async_checkpointing=False
    )
    handler = ocp.StandardCheckpointHandler()
    told = {"options": options, "item_handlers": handler}
    return ocp.CheckpointManager(folder.resolve(), **told)


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
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"checkpoint of step {step} is torn ({said})", stacklevel=2)
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
        jax.tree_util.keystr(keys): hashlib.sha256(
            np.asarray(leaf).tobytes()
        ).hexdigest()
        for keys, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def sealed(arrays: Any) -> np.ndarray:
    """One hash of every bit, which betrays what a disk changes later."""
    whole = "".join(digests(arrays).values()).encode()
    return np.frombuffer(hashlib.sha256(whole).digest(), np.uint8)


def start(job: Job, cache: Path) -> "subprocess.Popen[str]":
    """A child that trains; it says what it does line by line, at last its result."""
    code = "import sys, json; from benchmarks.studies import faults as f; "
    code += "print(json.dumps(f.train(f.Job(*json.loads(sys.argv[1])))), flush=True)"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", code, json_module.dumps(job)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def finish(child: "subprocess.Popen[str]") -> Record:
    """What a child came to that nobody kills."""
    said, _ = child.communicate(timeout=900)
    if child.returncode:
        raise RuntimeError(f"a child that nobody killed failed: {said[-2000:]}")
    found: Record = json_module.loads(said.strip().splitlines()[-1])
    return {**found, "said": said}


def kill_at(child: "subprocess.Popen[str]", line: str, wait: float = 0.0) -> str | None:
    """Kill a child so long after a line of its, what it said last; None if it ended.

    An empty line stands for any.
    """
    assert child.stdout is not None
    with child.stdout as lines:
        for said in lines:
            if said.startswith(("step", "saved")) and said.strip().endswith(line):
                time.sleep(wait)
                child.kill()
                rest = [x for x in lines if x.startswith(("step", "saved", "{"))]
                child.wait()
                return [said, *rest][-1].split()[0]
    child.wait()
    return None


def different(found: Record, expected: Record) -> list[str]:
    """Paths of the arrays whose bits differ."""
    names = {key for key in expected if key not in ("started", "said")}
    return sorted(key for key in names if found[key] != expected[key])


@cli.app.command("faults")
def command(
    optimizer: cli.OptimizerNames = None,
    kills: Annotated[int, typer.Option(min=1, help="of each optimizer")] = 25,
    steps: Annotated[int, typer.Option(min=20)] = 120,
    every: Annotated[int, typer.Option(min=1, help="steps to a checkpoint")] = 4,
    seed: Annotated[int, typer.Option(help="of the moments of the kills")] = 0,
    json: cli.Save = None,
    quiet: cli.Quiet = False,
) -> None:
    """Kill training at random moments: it must go on as if nothing had been.

    Default optimizers: dsbp_muon, dsbp_adamw.
    """
    rows, rng = [], random.Random(seed)
    names = optimizer or ["dsbp_muon", "dsbp_adamw"]
    cli.several(CONTENDERS, names, "--optimizer")
    with cli.bars(quiet) as progress, tempfile.TemporaryDirectory() as place:
        for name in names:
            advance, cache = cli.bar(progress, name, kills), Path(place) / "cache"
            job = Job(f"{place}/{name}", name, steps, every)
            expected = finish(start(job, cache))
            places: Counter[str] = Counter()
            gaps: set[str] = set()
            jobs, reached = 0, steps
            while sum(places.values()) < kills:
                if reached >= steps:  # The next job.
                    folder, reached, jobs = f"{place}/{name}{jobs}", 0, jobs + 1
                child = start(job._replace(folder=folder), cache)
                reached += rng.randrange(1, 4 * every)
                last = kill_at(child, f" {reached}", rng.uniform(0, 0.05))
                if last is not None:
                    saves = last == "step" and (reached + 1) % every == 0
                    places["in or before a save" if saves else f"after {last}"] += 1
                    advance()
                if reached >= steps or sum(places.values()) == kills:
                    found = finish(start(job._replace(folder=folder), cache))
                    gaps |= {*different(found, expected)}
            row = {"optimizer": name, "places": dict(places), "jobs": jobs}
            rows.append({**row, "different": sorted(gaps)})
    passed = not any(row["different"] for row in rows)
    sizes = {"workload": "digits_cnn", "steps": steps, "every": every, "seed": seed}
    record = {**sizes, "kills": rows, "passed": passed}
    cli.save(json, "faults", [record])
    cli.show(quiet, (f"jobs of {steps} steps", tables.faults(record)))
    if not passed:
        raise typer.Exit(1)
