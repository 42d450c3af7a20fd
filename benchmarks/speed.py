"""Three figures of speed, reported and not asserted.

(a) `update` alone on large kernels, no refresh, against `optax.adam`;
(b) a whole training step with capture, averaged over a period of 100 steps, against
    plain `optax.sgd`;
(c) a step that refreshes every basis, against the same plain step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks import timing
from benchmarks.train import make_step
from benchmarks.workloads import WORKLOADS, Workload

KERNELS = ((512, 512),) * 4 + ((1024, 1024),) * 2
BATCH = 128
PERIOD, WINDOW = 100, 5

Row = dict[str, Any]
Optimizers = Mapping[str, optax.GradientTransformation]


class Loop:
    """A jitted step and what it carries from call to call.

    Args:
      function: ``(*carry, *constants) -> (*carry, anything)``, donating its carry.
      carry: arrays that one call hands to the next.
      constants: arrays that are the same at every call.
    """

    def __init__(self, function: Any, carry: Sequence[Any], constants: Sequence[Any]):
        self.carry, self.constants = tuple(carry), tuple(constants)
        self.program, self.compile_seconds = timing.compiled(
            function, *self.carry, *self.constants
        )

    def __call__(self) -> Any:
        """One more step."""
        *carry, rest = self.program(*self.carry, *self.constants)
        self.carry = tuple(carry)
        return self.carry, rest


def update_alone(rounds: int) -> list[Row]:
    """(a): steps that refresh nothing, the states driven past their windows first.

    Without weight decay, since `optax.adam` has none.
    """
    never = {"update_every": 10**6, "power_iterations": WINDOW}
    optimizers = {
        "optax.adam": optax.adam(1e-3),
        "dsbp_adamw": dsbp_optax.dsbp_adamw(1e-3, weight_decay=0.0, **never),
        "dsbp_sgd": dsbp_optax.dsbp_sgd(1e-2, **never),
        "dsbp_sgd, k=8": dsbp_optax.dsbp_sgd(1e-2, rank=8, **never),
        "dsbp": dsbp_optax.dsbp(1e-2, **never),
    }
    params, grads = _kernels(0), _kernels(1)
    loops = {}
    for name, tx in optimizers.items():

        def step(opt_state: Any, grads: Any, params: Any, tx: Any = tx) -> Any:
            updates, opt_state = tx.update(grads, opt_state, params)
            return opt_state, updates

        opt_state = jax.jit(tx.init)(params)
        function = jax.jit(step, donate_argnums=0)
        loops[name] = Loop(function, [opt_state], [grads, params])
    seconds = timing.interleave(loops, rounds, warmup=2 * WINDOW)
    return _rows("a: update", "optax.adam", seconds, loops)


def period_average(rounds: int) -> list[Row]:
    """(b): whole steps at p = 100, medians weighted by the share of refresh steps.

    Args:
      rounds: a multiple of the period.
    """
    optimizers = {
        "optax.sgd": optax.sgd(0.1),
        "dsbp": dsbp_optax.dsbp(0.01, update_every=PERIOD, power_iterations=WINDOW),
        "dsbp_sgd": dsbp_optax.dsbp_sgd(
            0.1, update_every=PERIOD, power_iterations=WINDOW
        ),
    }
    loops = _training_loops(optimizers)
    seconds = timing.interleave(loops, rounds, warmup=PERIOD // 10)
    steps = PERIOD // 10 + np.arange(rounds)
    strata = (steps % PERIOD < WINDOW).astype(int)
    return _rows("b: mean step", "optax.sgd", seconds, loops, strata)


def refresh_step(rounds: int) -> list[Row]:
    """(c): whole steps that all refresh, p = q = 1."""
    every = {"update_every": 1, "power_iterations": 1}
    optimizers = {
        "optax.sgd": optax.sgd(0.1),
        "dsbp": dsbp_optax.dsbp(0.01, **every),
        "dsbp_sgd": dsbp_optax.dsbp_sgd(0.1, **every),
    }
    loops = _training_loops(optimizers)
    seconds = timing.interleave(loops, rounds)
    return _rows("c: refresh", "optax.sgd", seconds, loops)


#: Figure -> function of a number of rounds, and that number.
FIGURES: dict[str, tuple[Callable[[int], list[Row]], int]] = {
    "a": (update_alone, 100),
    "b": (period_average, PERIOD),
    "c": (refresh_step, 30),
}


def _kernels(seed: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), len(KERNELS))
    return {
        f"dense_{number}": {"kernel": 0.01 * jax.random.normal(key, shape)}
        for number, (key, shape) in enumerate(zip(keys, KERNELS, strict=True))
    }


def _training_loops(optimizers: Optimizers) -> dict[str, Loop]:
    workload = WORKLOADS["fashion_mnist_cnn"]
    batch = _random_batch(workload)
    loops = {}
    for name, optimizer in optimizers.items():
        tx = optax.with_extra_args_support(optimizer)
        params = workload.init(0)
        opt_state = jax.jit(tx.init)(params)
        step = make_step(workload.loss, tx)
        # Parameters are donated, so each loop gets its own.
        loops[name] = Loop(step, [params, opt_state], [batch])
    return loops


def _random_batch(workload: Workload) -> tuple[jax.Array, jax.Array]:
    images, labels = jax.random.split(jax.random.key(0))
    return (
        jax.random.uniform(images, (BATCH, *workload.image_shape)),
        jax.random.randint(labels, (BATCH,), 0, 10, jnp.int32),
    )


def _rows(
    figure: str,
    against: str,
    seconds: Mapping[str, np.ndarray],
    loops: Mapping[str, Loop],
    strata: np.ndarray | None = None,
) -> list[Row]:
    if strata is None:
        strata = np.zeros(len(seconds[against]), int)
    return [
        {
            "figure": figure,
            "contender": name,
            "against": against,
            "rounds": len(values),
            "seconds": timing.stratified_median(values, strata),
            "seconds_against": timing.stratified_median(seconds[against], strata),
            "seconds_by_stratum": _medians(values, strata),
            "ratio": timing.ratio_of_medians(
                values, seconds[against], strata
            )._asdict(),
            "compile_seconds": loops[name].compile_seconds,
            "compile_seconds_against": loops[against].compile_seconds,
        }
        for name, values in seconds.items()
        if name != against
    ]


def _medians(values: np.ndarray, strata: np.ndarray) -> list[float]:
    return [float(np.median(values[strata == s])) for s in np.unique(strata)]
