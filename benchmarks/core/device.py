"""A child that is given one core and a cap of memory: what it is told, what it does.

The cap is RLIMIT_DATA: private writable memory of the process, anonymous mappings
included, whether or not they were ever touched; what is mapped from files, such as
jaxlib itself, is not counted. It needs no privileges and no control group. The child is
this file run as a script, and imports nothing but the standard library before the cap.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

#: Holds the fields of a child's `Order`.
VARIABLE = "DSBP_DEVICE"
MIB = 2**20


class Order(NamedTuple):
    """What a child is to do."""

    # "nothing" (a trivial jitted function), "code" (train from Python code) or
    # "exported" (train from an artifact, without the model's code)
    way: str
    folder: str  # of the artifact, the state and the batches
    task: dict[str, Any]  # see `parts`; "code" alone reads it
    steps: int
    rate: float
    cap: int | None = None  # bytes


class Report(NamedTuple):
    """What a child says at the end."""

    losses: list[float]
    step_ms: float  # median of the steps behind the first, on the processor's clock
    data_mib: float  # private writable memory, the largest between steps
    rss_mib: float  # most of its pages in memory at once, files' among them

    @property
    def trained(self) -> bool:
        """Whether losses are finite and fell."""
        finite = all(abs(loss) < float("inf") for loss in self.losses)
        return finite and self.losses[-1] < self.losses[0]


def cached(folder: Path | str) -> dict[str, str]:
    """Variables with which jax keeps, and takes, every compiled program there."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def attempt(order: Order, cache: Path, seconds: float = 3600.0) -> Report | None:
    """Run a child; None where it failed, as it does when memory is refused to it.

    A child that does not end within the time raises; that says nothing of its memory.
    """
    root = str(Path(__file__).resolve().parents[2])
    told = {VARIABLE: json.dumps(order), "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-P", __file__],
        env={**os.environ, **told, **cached(cache)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        return None
    return Report(*json.loads(done.stdout.splitlines()[-1]))


def smallest(
    works: Callable[[int], bool], guess: int, step: int, most: int
) -> int | None:
    """The smallest number that works, to `step`; None if not even `most` does.

    Strides from the guess double until the answer lies between two numbers; then
    halves. Whatever is larger than a number that works must work too.
    """
    low, high, stride = 0, min(guess, most), step
    if works(high):
        while high > stride and works(high - stride):
            high, stride = high - stride, 2 * stride
        low = max(high - stride, 0)
    else:
        while True:
            if high >= most:
                return None
            low, high, stride = high, min(high + stride, most), 2 * stride
            if works(high):
                break
    while high - low > step:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


# ------------------------------------------------------------ for parent and child


def parts(task: dict[str, Any]) -> tuple[Any, Any]:
    """The small GPT in another size, and a contender with other settings."""
    from dataclasses import replace

    from benchmarks.optimizers import CONTENDERS
    from benchmarks.tasks import gpt

    sizes = dict(task["sizes"])
    batch, model = sizes.pop("batch_size"), gpt.Gpt(**sizes)
    workload = replace(
        gpt.WORKLOADS["shakespeare_gpt"],
        model=model,
        example=gpt.tokens(model.context),
        load=gpt.load_shakespeare(model.context),
        batch_size=batch,
    )
    contender = CONTENDERS[task["optimizer"]]
    if task["coordinates"]:
        settings = {**contender.settings, **task["settings"], "residual": None}
        told = {"settings": settings, "coordinates": True, "warm_start": True}
        contender = replace(contender, **told)
    return workload, contender


def read_arrays(path: Path, shapes: Sequence[Any]) -> list[Any]:
    """Arrays of such shapes and types, one behind the other in a file."""
    import numpy as np

    with path.open("rb") as file:
        return [
            np.fromfile(file, np.uint8, x.size * x.dtype.itemsize)
            .view(x.dtype)
            .reshape(x.shape)
            for x in shapes
        ]


def write_arrays(path: Path, arrays: Sequence[Any]) -> None:
    """What `read_arrays` reads."""
    import numpy as np

    with path.open("wb") as file:
        for array in arrays:
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)


def read_batch(workload: Any, folder: Path, number: int) -> Any:
    """A batch that lies in the folder."""
    import jax

    leaves, form = jax.tree.flatten(workload.example(workload.batch_size))
    return form.unflatten(read_arrays(folder / f"batch{number}.bin", leaves))


# ----------------------------------------------------------------------- the child


def obey() -> None:
    """Be the child."""
    order = Order(*json.loads(os.environ[VARIABLE]))
    if order.cap is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (order.cap, order.cap))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ways = {"nothing": _nothing, "code": _from_code, "exported": _from_artifact}
    step = ways[order.way](order)
    losses, seconds, held = [], [], [_status("VmData")]
    for number in range(order.steps):
        start = time.process_time()
        losses.append(float(step(number)))
        seconds.append(time.process_time() - start)
        held.append(_status("VmData"))
    middle = sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]
    print(json.dumps(Report(losses, 1e3 * middle, max(held), _status("VmHWM"))))


def _status(key: str) -> float:
    """MiB that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{key}:")) / 1024


Step = Callable[[int], Any]


def _nothing(order: Order) -> Step:
    import jax

    twice = jax.jit(lambda x: -2.0 * x)
    return lambda number: twice(float(number))


def _from_code(order: Order) -> Step:
    """Parameters, state and step as `benchmarks.core.train` makes them."""
    import numpy as np

    from benchmarks.core.train import make_init, make_step

    workload, contender = parts(order.task)
    folder, params = Path(order.folder), workload.init(0)
    first = read_batch(workload, folder, 0)
    held = [params, make_init(workload, contender)(params, first)]
    program = make_step(workload, contender)
    numbers = np.float32(order.rate), np.float32(order.steps)

    def step(number: int) -> Any:
        *held[:], loss = program(*held, read_batch(workload, folder, number), *numbers)
        return loss

    return step


def _from_artifact(order: Order) -> Step:
    """The exported step, on what lies beside it; needs jax and numpy alone."""
    import jax
    import numpy as np
    from jax import export

    folder = Path(order.folder)
    exported = export.deserialize(bytearray((folder / "step.bin").read_bytes()))
    count = len(exported.out_avals) - 1  # The state; behind it comes the loss.
    state = read_arrays(folder / "state.bin", exported.in_avals[:count])
    batch = exported.in_avals[count:-2]
    numbers = np.float32(order.rate), np.float32(order.steps)
    call = jax.jit(exported.call, donate_argnums=range(count))
    held = [jax.device_put(leaf) for leaf in state]
    del state

    def step(number: int) -> Any:
        arrays = read_arrays(folder / f"batch{number}.bin", batch)
        *held[:], loss = call(*held, *arrays, *numbers)
        return loss

    return step


if __name__ == "__main__":
    obey()
