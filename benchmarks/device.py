"""A child that is given one core and a cap of memory: what it is told, what it does.

The cap is RLIMIT_DATA: private writable memory of the process, anonymous mappings
included, whether or not they were ever touched; what is mapped from files, such as
jaxlib itself, is not counted. It needs no privileges and no control group. This module
imports nothing but the standard library before the cap stands.
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
_CHILD = "from benchmarks import device; device.obey()"
_STATUS = Path("/proc/self/status")


class Order(NamedTuple):
    """What a child is to do.

    Attributes:
      way: "nothing" (a trivial jitted function), "code" (train from Python code) or
        "exported" (train from an artifact, without the model's code).
      folder: of the artifact, the state and the batches.
      task: what `benchmarks.constrained` makes a program of; "code" alone reads it.
      steps: to take.
      rate: learning rate.
      cap: bytes; None for none.
    """

    way: str
    folder: str
    task: dict[str, Any]
    steps: int
    rate: float
    cap: int | None = None


class Report(NamedTuple):
    """What a child says at the end.

    Attributes:
      losses: of every step.
      step_ms: median of the steps behind the first, on the processor's clock.
      data_mib: private writable memory, the largest of what was seen between steps.
      rss_mib: most of its pages that were in memory at once, files' among them.
    """

    losses: list[float]
    step_ms: float
    data_mib: float
    rss_mib: float

    @property
    def trained(self) -> bool:
        """Whether losses are finite and fell."""
        finite = all(abs(loss) < float("inf") for loss in self.losses)
        return finite and self.losses[-1] < self.losses[0]


def attempt(order: Order, cache: Path, seconds: float = 3600.0) -> Report | None:
    """Run a child; None where it failed, as it does when memory is refused to it.

    Args:
      order: for it.
      cache: folder of compiled programs: what lies there is not compiled again.
      seconds: after which it is ended.

    Raises:
      DataError: when it was; that says nothing of its memory.
    """
    environment = {
        **os.environ,
        VARIABLE: json.dumps(order),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", _CHILD]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        from benchmarks.data import DataError  # Not in the child before its cap.

        raise DataError(
            f"a child that trains from {order.way}: got no end after {seconds:.0f} s, "
            "expected one. Remedy: fewer --steps, or a machine with less to do."
        ) from error
    if done.returncode:
        return None
    return Report(*json.loads(done.stdout.splitlines()[-1]))


def smallest(
    works: Callable[[int], bool], guess: int, step: int, most: int
) -> int | None:
    """The smallest number that works, to `step`; None if not even `most` does.

    Strides from the guess double until the answer lies between two numbers; then
    halves. Whatever is larger than a number that works must work too.

    Args:
      works: whether a number does.
      guess: where to begin.
      step: the answer is at most this much too large.
      most: where to give up.
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


# ------------------------------------------------------------------------- the child


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
    lines = _STATUS.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


Step = Callable[[int], Any]


def _nothing(order: Order) -> Step:
    import jax

    twice = jax.jit(lambda x: -2.0 * x)
    return lambda number: twice(float(number))


def _from_code(order: Order) -> Step:
    """Parameters, state and step as `benchmarks.train` makes them."""
    from benchmarks import constrained

    return constrained.stepper(order)


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
