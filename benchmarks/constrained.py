"""Training on one core with little memory: the smallest cap for each optimizer.

Each attempt is a child of `benchmarks.device` on one core. Programs are compiled
beforehand, by an attempt without a cap, and read from jax's cache: what is looked for
is the memory of training, not that of the compiler, which is several times as much.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

import dsbp_optax
from benchmarks import data, device, models, records
from benchmarks.device import MIB, Order, Report
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.train import make_init, make_step
from benchmarks.workloads import WORKLOADS, Workload, tokens

Row = dict[str, Any]

#: A cap is at most so many bytes too large, and never above the second number.
_STEP, _MOST = 4 * MIB, 16 * 1024 * MIB


def _in_coordinates(of: str, name: str, **changes: Any) -> Contender:
    base = CONTENDERS[of]
    settings = {**base.settings, **changes, "residual": None}
    return dataclasses.replace(
        base, name=name, settings=settings, coordinates=True, warm_start=True
    )


#: Of the comparison, by name.
ENTRANTS: Mapping[str, Contender] = {
    one.name: one
    for one in (
        *(CONTENDERS[name] for name in ("adamw", "sgd", "muon")),
        *(CONTENDERS[name] for name in ("projected_muon", "projected_adamw")),
        _in_coordinates(
            "projected_muon", "projected_muon in coordinates, rank 32", rank=32
        ),
        _in_coordinates("projected_adamw", "projected_adamw in coordinates"),
    )
}


def sized(width: int, layers: int, context: int, batch_size: int) -> Workload:
    """The small GPT in another size."""
    return dataclasses.replace(
        WORKLOADS["shakespeare_gpt"],
        model=models.Gpt(width=width, layers=layers, context=context),
        example=tokens(context),
        load=data.load_shakespeare(context),
        batch_size=batch_size,
    )


#: The small GPT, and one in which the state of the optimizer is not hidden behind
#: activations.
SIZES: Mapping[str, dict[str, int]] = {
    "small": {"width": 128, "layers": 4, "context": 64, "batch_size": 24},
    "wide": {"width": 512, "layers": 2, "context": 64, "batch_size": 4},
}


#: How a child trains, and what that asks of the device.
WAYS: Mapping[str, str] = {
    "code": "Python, Flax, Optax, this package and the model's code",
    "exported": "Python, jax and the artifact of `jax.export`",
}
CAP = "RLIMIT_DATA of a child: its private writable memory"


def _parts(task: Mapping[str, Any]) -> tuple[Workload, Contender]:
    return sized(**task["sizes"]), ENTRANTS[task["optimizer"]]


def _shapes(tree: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def write_batches(
    workload: Workload, data_dir: Path | None, folder: Path, steps: int
) -> None:
    """Put the batches of a run where children find them."""
    train, rng = workload.load(data_dir).train, np.random.default_rng(0)
    batches = workload.sampler(train, workload.batch_size, rng)
    for number in range(steps):
        arrays = jax.tree.leaves(next(batches))
        device.write_arrays(folder / f"batch{number}.bin", arrays)


def _read_batch(workload: Workload, folder: Path, number: int) -> Any:
    example = workload.example(workload.batch_size)
    leaves = device.read_arrays(folder / f"batch{number}.bin", _shapes(example))
    return jax.tree.unflatten(jax.tree.structure(example), leaves)


def stepper(order: Order) -> Callable[[int], Any]:
    """``number of the batch -> loss``, one step after the other; for a child."""
    workload, contender = _parts(order.task)
    folder, numbers = Path(order.folder), (order.rate, order.steps)
    params = workload.init(0)
    first = _read_batch(workload, folder, 0)
    held = [params, make_init(workload, contender)(params, first)]
    program = make_step(workload, contender)

    def step(number: int) -> Any:
        batch = _read_batch(workload, folder, number)
        *held[:], loss = program(*held, batch, *map(np.float32, numbers))
        return loss

    return step


def export_step(task: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Write the training step as an artifact, and beside it the state it begins with.

    Returns:
      ``artifact_bytes``, and ``state_bytes`` of the optimizer.
    """
    workload, contender = _parts(task)
    batch = _read_batch(workload, folder, 0)
    params = workload.init(0)
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


def smallest_cap(order: Order, cache: Path) -> dict[str, Any]:
    """What an order needs: the cap, and what was seen under it and without one.

    Returns:
      ``cap_mib`` (None where it does not train at all), ``step_ms`` under it,
      ``losses``, and of the run that compiled ``compiling_rss_mib``.
    """
    compiling, free = device.attempt(order, cache), device.attempt(order, cache)
    figures: dict[str, Any] = {
        "compiling_rss_mib": compiling.rss_mib if compiling else None
    }
    if free is None or not free.trained:
        return {**figures, "cap_mib": None, "step_ms": None, "losses": None}
    seen: dict[int, Report] = {}

    def works(cap: int) -> bool:
        found = device.attempt(order._replace(cap=cap), cache)
        if found is None or not found.trained:
            return False
        seen[cap] = found
        return True

    cap = device.smallest(works, int(free.data_mib * MIB), _STEP, _MOST)
    if cap is None:
        return {**figures, "cap_mib": None, "step_ms": None, "losses": free.losses}
    under = {"step_ms": seen[cap].step_ms, "losses": seen[cap].losses}
    return {**figures, "cap_mib": cap / MIB, "rss_mib": seen[cap].rss_mib, **under}


def measure(
    size: str,
    names: Sequence[str],
    ways: Sequence[str],
    data_dir: Path | None,
    steps: int,
    known: Sequence[Row] = (),
) -> Iterator[Row]:
    """One row an optimizer and way of running it; those that are known are left out.

    Args:
      size: a key of `SIZES`.
      names: keys of `ENTRANTS`.
      ways: "code", "exported" or both.
      data_dir: folder of the data files.
      steps: of each attempt.
      known: rows that were made before.
    """
    made = {(row["optimizer"], row["size"], row["way"]) for row in known}
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place), Path(place) / "cache"
        write_batches(sized(**SIZES[size]), data_dir, folder, steps)
        for name in names:
            wanted = [way for way in ways if (name, size, way) not in made]
            if not wanted:
                continue
            task = {"optimizer": name, "sizes": SIZES[size]}
            written = export_step(task, folder)
            rate = _rate(name, size)
            for way in wanted:
                order = Order(way, place, task, steps, rate)
                head = {"optimizer": name, "size": size, "way": way}
                found = smallest_cap(order, cache)
                yield {**head, "learning_rate": rate, **written, **found}


def _rate(name: str, size: str) -> float:
    """That of the small GPT, smaller in proportion where the model is wider."""
    rate = ENTRANTS[name].default_rate
    return rate * SIZES["small"]["width"] / SIZES[size]["width"]


def baseline() -> dict[str, Any]:
    """What jax needs for a trivial jitted function."""
    with tempfile.TemporaryDirectory() as place:
        order = Order("nothing", place, {}, 2, 0.0)
        return smallest_cap(order, Path(place) / "cache")


def resume(path: Path | None, steps: int) -> dict[str, Any]:
    """``baseline`` and ``rows`` of a record that is to be continued, or of a new one.

    Raises:
      DataError: when it was made with another number of steps.
    """
    if path is None or not path.exists():
        return {"baseline": baseline(), "rows": []}
    held = records.read(path)
    if held.get("steps") != steps:
        raise data.DataError(
            f"{path}: got steps = {held.get('steps')}, expected {steps}. Remedy: "
            "another --json, or the same --steps."
        )
    return {key: held[key] for key in ("baseline", "rows")}
