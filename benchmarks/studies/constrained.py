"""Training on one core with little memory: the smallest cap for each optimizer.

Each attempt is a child of `core.device` on one core. Programs are compiled beforehand,
by an attempt without a cap, and read from jax's cache: what is looked for is the memory
of training, not that of the compiler, which is several times as much.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jax import export

import dsbp_optax
from benchmarks import cli
from benchmarks.core import device, records
from benchmarks.core.device import MIB, Order, Report
from benchmarks.core.records import Record
from benchmarks.core.train import make_init, make_step
from benchmarks.report import tables
from benchmarks.tasks.base import DataError

#: A cap is at most so many bytes too large, and never above the second number.
_STEP, _MOST = 4 * MIB, 16 * 1024 * MIB

#: Name -> what `device.parts` makes a contender of.
ENTRANTS: Mapping[str, Record] = {
    name: {"optimizer": optimizer, "coordinates": coordinates, "settings": settings}
    for name, optimizer, coordinates, settings in (
        *((n, n, False, {}) for n in ("adamw", "sgd", "muon")),
        *((n, n, False, {}) for n in ("projected_muon", "projected_adamw")),
        (
            "projected_muon in coordinates, rank 32",
            "projected_muon",
            True,
            {"rank": 32},
        ),
        ("projected_adamw in coordinates", "projected_adamw", True, {}),
    )
}
#: The small GPT, and one in which the state of the optimizer is not hidden behind
#: activations.
SIZES: Mapping[str, dict[str, int]] = {
    "small": {"width": 128, "layers": 4, "context": 64, "batch_size": 24},
    "wide": {"width": 512, "layers": 2, "context": 64, "batch_size": 4},
}
#: How a child trains, and what that asks of the device.
WAYS = {
    "code": "Python, Flax, Optax, this package and the model's code",
    "exported": "Python, jax and the artifact of `jax.export`",
}


def _shapes(tree: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def export_step(task: Record, folder: Path) -> Record:
    """Write the step as an artifact, and beside it the state that it begins with."""
    workload, contender = device.parts(task)
    batch, params = device.read_batch(workload, folder, 0), workload.init(0)
    opt_state = make_init(workload, contender)(params, batch)
    leaves, structure = jax.tree.flatten((params, opt_state))
    inputs, form = jax.tree.flatten(batch)
    step = make_step(workload, contender)

    def flat(*arrays: Any) -> tuple[Any, ...]:
        *held, rate, steps = arrays
        state = structure.unflatten(held[: len(leaves)])
        *state, loss = step(*state, form.unflatten(held[len(leaves) :]), rate, steps)
        return *jax.tree.leaves(tuple(state)), loss

    numbers = [jax.ShapeDtypeStruct((), np.float32)] * 2
    made = export.export(jax.jit(flat))(*_shapes(leaves), *_shapes(inputs), *numbers)
    written = (folder / "step.bin").write_bytes(made.serialize())
    device.write_arrays(folder / "state.bin", leaves)
    held = dsbp_optax.diagnostics.state_bytes(opt_state)
    return {"artifact_bytes": written, "state_bytes": held}


def smallest_cap(order: Order, cache: Path) -> Record:
    """What an order needs: the cap, and what was seen under it and without one."""
    compiling, free = device.attempt(order, cache), device.attempt(order, cache)
    found: Record = {"compiling_rss_mib": compiling.rss_mib if compiling else None}
    found |= {"cap_mib": None, "step_ms": None, "losses": None}
    if free is None or not free.trained:
        return found
    seen: dict[int, Report] = {}

    def works(cap: int) -> bool:
        report = device.attempt(order._replace(cap=cap), cache)
        if report is not None and report.trained:
            seen[cap] = report
        return cap in seen

    cap = device.smallest(works, int(free.data_mib * MIB), _STEP, _MOST)
    if cap is None:
        return found
    under = seen[cap]._asdict()
    return {**found, **{k: under[k] for k in ("rss_mib", "step_ms", "losses")}} | {
        "cap_mib": cap / MIB
    }


def measure(head: Record, data_dir: Path | None, folder: Path, steps: int) -> Record:
    """One row: an optimizer, a size and a way."""
    sizes, name = SIZES[head["size"]], head["optimizer"]
    task = {**ENTRANTS[name], "sizes": sizes}
    workload, contender = device.parts(task)
    if not (folder / f"batch{steps - 1}.bin").exists():
        train, rng = workload.load(data_dir).train, np.random.default_rng(0)
        batches = workload.sampler(train, workload.batch_size, rng)
        for number in range(steps):
            arrays = jax.tree.leaves(next(batches))
            device.write_arrays(folder / f"batch{number}.bin", arrays)
    # Smaller in proportion where the model is wider.
    rate = contender.default_rate * SIZES["small"]["width"] / sizes["width"]
    order = Order(head["way"], str(folder), task, steps, rate)
    written = export_step(task, folder)
    found = smallest_cap(order, folder / "cache")
    return {**head, "learning_rate": rate, **written, **found}


def baseline() -> Record:
    """What jax needs for a trivial jitted function."""
    with tempfile.TemporaryDirectory() as place:
        order = Order("nothing", place, {}, 2, 0.0)
        head = {"optimizer": "jax alone", "size": None, "way": None}
        return {**head, **smallest_cap(order, Path(place) / "cache")}


@cli.app.command("constrained")
def command(
    size: Annotated[
        list[str] | None, typer.Option(help="small, wide; repeat it; default: both")
    ] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option("--optimizer", help="repeat it; default: all")
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="code, exported; default: both")
    ] = None,
    data_dir: cli.DataDir = None,
    steps: Annotated[int, typer.Option(min=2, help="of each attempt")] = 20,
    json: cli.Save = None,
) -> None:
    """The smallest cap of memory, on one core, under which each optimizer trains.

    Rows that the file of --json has are not made again.
    """
    given = (SIZES, size, "--size"), (ENTRANTS, optimizer, "--optimizer")
    for table, names, words in (*given, (WAYS, way, "--way")):
        cli.several(table, names, words)
    heads = [
        {"optimizer": name, "size": one, "way": how}
        for one in size or SIZES
        for name in optimizer or ENTRANTS
        for how in way or WAYS
    ]
    rows = records.read(json) if json else []

    def keep(row: Record) -> None:
        rows.append({**row, "steps": steps})
        if json:
            records.append(json, "constrained", rows[-1:])

    with cli.bars() as progress, tempfile.TemporaryDirectory() as place:
        if any(row["steps"] != steps for row in rows):
            raise DataError(f"{json}: made with other --steps. Remedy: another --json.")
        advance = cli.bar(progress, "optimizers", len(heads))
        if not rows:
            keep(baseline())
        for head in heads:
            if not any(head.items() <= row.items() for row in rows):
                folder = Path(place) / head["size"]
                folder.mkdir(exist_ok=True)
                keep(measure(head, data_dir, folder, steps))
            advance()
    cli.show(("smallest caps", tables.constrained(rows)))
