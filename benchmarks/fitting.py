"""What learners of few-shot episodes share: the loop of a training run, its result."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks.data import Characters, Episode
from benchmarks.models import DrawingsMlp

#: Classes of an episode, and queries of each where it judges.
WAYS, QUERIES = 5, 15
#: Tasks of an outer step, and queries of each of their classes.
TASKS, TRAIN_QUERIES = 16, 5
#: Episodes that are judged at once.
_TOGETHER = 50

#: ``(stacked episodes, inner rate) -> accuracy of each``.
Judge = Callable[[Episode, float], np.ndarray]


class Fitted(NamedTuple):
    """What training gave.

    Attributes:
      judge: how it meets new tasks.
      loss: of training, the mean of the last tenth; not finite where it diverged.
      seconds: of training, its first step left out, which compiles.
      state_bytes: of the optimizer.
    """

    judge: Judge
    loss: float
    seconds: float
    state_bytes: int


class Plan(NamedTuple):
    """One training run.

    Attributes:
      rate: of the outer optimizer, the largest of its schedule.
      inner_rate: of the inner steps.
      steps: outer steps.
      seed: of parameters and episodes.
    """

    rate: float
    inner_rate: float
    steps: int
    seed: int


#: What a learner is once its programs are made.
Fit = Callable[[Characters, Plan], Fitted]


def cross_entropy(
    model: DrawingsMlp, params: Any, images: Any, labels: Any
) -> jax.Array:
    """Mean cross-entropy of one batch."""
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fresh(model: DrawingsMlp, characters: Characters, seed: int) -> Any:
    """Parameters to begin with."""
    return model.init(jax.random.key(seed), characters.images[0, :2])["params"]


class Trained(NamedTuple):
    """Where a loop ended; `loss` and `seconds` as in `Fitted`."""

    params: Any
    opt_state: Any
    loss: float
    seconds: float


def run_loop(
    step: Callable[..., Any],
    params: Any,
    opt_state: Any,
    batches: Iterator[Any],
    numbers: tuple[Any, ...],
    steps: int,
) -> Trained:
    """Train on the host's loop, until the end or a loss that is not finite.

    Args:
      step: ``(params, opt_state, batch, *numbers) -> (params, opt_state, loss)``.
      params: to begin with.
      opt_state: of them.
      batches: one for each step.
      numbers: further arguments, the same at every step.
      steps: how many.
    """
    losses: list[float] = []
    start = time.perf_counter()
    for number in range(steps):
        params, opt_state, loss = step(params, opt_state, next(batches), *numbers)
        losses.append(float(loss))
        start = time.perf_counter() if number == 0 else start
        if not np.isfinite(losses[-1]):
            break
    seconds = time.perf_counter() - start
    last = float(np.mean(losses[-max(1, steps // 10) :]))
    return Trained(params, opt_state, last, seconds)


def by_parts(accuracies: Callable[[Episode], Any], tasks: Episode) -> np.ndarray:
    """Accuracies of many episodes, some at a time."""
    parts = [
        Episode(*(part[start : start + _TOGETHER] for part in tasks))
        for start in range(0, len(tasks.support), _TOGETHER)
    ]
    return np.concatenate([np.asarray(accuracies(part)) for part in parts])
