"""Fair clocks: warm, blocked, interleaved; what the compiler says of a program."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` returns, once it is computed, and the seconds it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
    """`function`, jitted, compiled for `args`, and the seconds that took in all."""
    start = time.perf_counter()
    program = function.lower(*args).compile()
    return program, time.perf_counter() - start


def counts(program: Any) -> Mapping[str, float]:
    """What the compiler counts, every branch as if taken; empty where it does not."""
    found = program.cost_analysis()
    if isinstance(found, list):
        found = found[0] if found else None
    return found or {}


def cost(program: Any) -> dict[str, float | None]:
    """``temporary_bytes``, and ``flops`` with every branch counted as if taken."""
    return {
        "temporary_bytes": getattr(
            program.memory_analysis(), "temp_size_in_bytes", None
        ),
        "flops": counts(program).get("flops"),
    }


class Loop:
    """A jitted step and what it carries from call to call.

    `function` is ``(*carry, *constants) -> (*carry, anything)`` and donates its carry.
    """

    def __init__(self, function: Any, carry: Sequence[Any], constants: Sequence[Any]):
        self.carry, self.constants = tuple(carry), tuple(constants)
        self.program, self.compile_seconds = compiled(
            function, *self.carry, *self.constants
        )

    def __call__(self) -> Any:
        """One more step."""
        *carry, rest = self.program(*self.carry, *self.constants)
        self.carry = tuple(carry)
        return self.carry, rest


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 3,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Seconds of each call, in rounds A B C, A B C, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            _, elapsed = timed(call)
            if number >= warmup:
                seconds[name].append(elapsed)
        if number >= warmup:
            after_round()
    return {name: np.asarray(values) for name, values in seconds.items()}
