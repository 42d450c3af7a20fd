"""Speed, reported and not asserted: three fixed figures, and any workload's steps.

(a) `update` alone on large kernels, no refresh, against `optax.adam`;
(b) a whole training step with capture, averaged over a period of 100 steps, against
    plain `optax.sgd`;
(c) a step that refreshes every basis, against the same plain step.

`whole_steps` times the training steps of any contenders on any workload.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import dsbp_optax
from benchmarks import timing
from benchmarks.optimizers import Contender, plain_of, projected_adamw
from benchmarks.train import make_init, make_step, train_step
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
    basis = dsbp_optax.Basis(power_iterations=WINDOW)
    never = {"update_every": 10**6, "basis": basis}
    optimizers = {
        "optax.adam": optax.adam(1e-3),
        "projected_adamw": projected_adamw(1e-3, weight_decay=0.0, **never),
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
            0.1, update_every=PERIOD, basis=dsbp_optax.Basis(power_iterations=WINDOW)
        ),
    }
    loops = _training_loops(optimizers)
    seconds = timing.interleave(loops, rounds, warmup=PERIOD // 10)
    steps = PERIOD // 10 + np.arange(rounds)
    strata = (steps % PERIOD < WINDOW).astype(int)
    return _rows("b: mean step", "optax.sgd", seconds, loops, strata)


def refresh_step(rounds: int) -> list[Row]:
    """(c): whole steps that all refresh, p = q = 1."""
    every = {"update_every": 1, "basis": dsbp_optax.Basis(power_iterations=1)}
    optimizers = {
        "optax.sgd": optax.sgd(0.1),
        "dsbp": dsbp_optax.dsbp(0.01, **every),
        "dsbp_sgd": dsbp_optax.dsbp_sgd(0.1, **every),
    }
    loops = _training_loops(optimizers)
    seconds = timing.interleave(loops, rounds)
    return _rows("c: refresh", "optax.sgd", seconds, loops)


def whole_steps(
    workload: Workload,
    contenders: Sequence[Contender],
    baseline: Contender | None = None,
    rounds: int = PERIOD,
    after_round: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Whole training steps, the contenders taking turns, on one random batch.

    Args:
      workload: what to train.
      contenders: in the order of the rows.
      baseline: what the ratios are against; None for the plain optimizer whose place
        each contender takes. Joined in where it is missing.
      rounds: steps of each that are timed; those of a whole period by default.
      after_round: called after each.
    """
    against = {c.name: baseline or plain_of(c) for c in contenders}
    everyone = {c.name: c for c in (*contenders, *against.values())}
    pairs = {name: (workload, contender) for name, contender in everyone.items()}
    return in_turns(pairs, against, rounds, after_round)


def in_turns(
    pairs: Mapping[str, tuple[Workload, Contender]],
    against: Mapping[str, Contender],
    rounds: int = PERIOD,
    after_round: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The same where each contender has a workload of its own.

    Args:
      pairs: name -> what is trained, and how.
      against: name -> what its ratio is against; itself where it is missing.
      rounds: steps of each that are timed.
      after_round: called after each.
    """
    everyone = {name: contender for name, (_, contender) in pairs.items()}
    loops = {name: _loop(*pair) for name, pair in pairs.items()}
    warmup = max(2 * WINDOW, 1)
    seconds = timing.interleave(loops, rounds, warmup, after_round)
    flags = {
        name: np.asarray([c.refreshes(warmup + n) for n in range(rounds)], int)
        for name, c in everyone.items()
    }
    rows = []
    for name, values in seconds.items():
        other, mine = against.get(name, everyone[name]).name, flags[name]
        # Rounds in which neither, one or both refresh.
        strata = 2 * mine + flags[other]
        rows.append(
            {
                "contender": name,
                "against": other,
                "rounds": rounds,
                "seconds": timing.stratified_median(values, mine),
                "step_seconds": float(np.median(values[mine == 0])),
                "refresh_seconds": _refresh_median(values, mine),
                "dearest": _dearest(values, mine),
                "ratio": timing.ratio_of_medians(
                    values, seconds[other], strata
                )._asdict(),
                "compile_seconds": loops[name].compile_seconds,
            }
        )
    return rows


def _loop(workload: Workload, contender: Contender) -> Loop:
    batch = jax.device_put(workload.example(workload.batch_size))
    params = workload.init(0)
    opt_state = make_init(workload, contender)(params, batch)
    numbers = np.float32(1e-4), np.float32(1e6)
    step = make_step(workload, contender)
    return Loop(step, [params, opt_state], [batch, *numbers])


def _dearest(values: np.ndarray, flags: np.ndarray) -> dict[str, float] | None:
    """Steps that refresh against those that do not; None without any."""
    if not flags.any():
        return None
    ratio = timing.ratio_of_groups(values[flags == 1], values[flags == 0])
    return ratio._asdict()


def _refresh_median(values: np.ndarray, flags: np.ndarray) -> float | None:
    return float(np.median(values[flags == 1])) if flags.any() else None


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
    batch = jax.device_put(workload.example(BATCH))
    loops = {}
    for name, optimizer in optimizers.items():
        tx = optax.with_extra_args_support(optimizer)
        params = workload.init(0)
        opt_state = jax.jit(tx.init)(params)
        function = functools.partial(train_step, workload.loss, None, tx)
        step = jax.jit(function, donate_argnums=(0, 1))
        # Parameters are donated, so each loop gets its own.
        loops[name] = Loop(step, [params, opt_state], [batch])
    return loops


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
