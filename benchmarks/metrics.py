"""How a trained model is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import optax
from scipy import stats


@dataclass(frozen=True)
class Metric:
    """A figure of merit, a mean over samples.

    Attributes:
      label: for people, with unit.
      tuning_key: its name in a record judged on the validation part.
      final_key: its name in a record judged on the test part.
      function: ``(logits, targets) -> mean``.
      higher: whether more is better.
      factor: from the record's number to the one people read.
      digits: behind the point, of the number people read.
      tolerance: how far below the best peer still counts as the target.
    """

    label: str
    tuning_key: str
    final_key: str
    function: Callable[[jax.Array, jax.Array], jax.Array]
    higher: bool
    factor: float
    digits: int
    tolerance: float

    def score(self, value: float | None) -> float:
        """The same, more is better; what is missing or not finite is worst."""
        if value is None or not np.isfinite(value):
            return -np.inf
        return value if self.higher else -value

    def show(self, value: float) -> str:
        """The number people read."""
        return f"{self.factor * value:.{self.digits}f}"


def _accuracy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return (logits.argmax(-1) == targets).mean()


def _loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


ACCURACY = Metric(
    "test accuracy, %",
    "validation_accuracy",
    "test_accuracy",
    _accuracy,
    higher=True,
    factor=100,
    digits=2,
    tolerance=0.002,
)
LOSS = Metric(
    "loss on held-out text, nats",
    "val_loss",
    "val_loss",
    _loss,
    higher=False,
    factor=1,
    digits=4,
    tolerance=0.02,
)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The mean and its 95 % t interval; None with fewer than two values."""
    if len(values) < 2:
        return None
    found = np.asarray(values)
    error = found.std(ddof=1) / np.sqrt(len(found))
    reach = stats.t.ppf(0.975, len(found) - 1) * error
    mean = float(found.mean())
    return mean, float(mean - reach), float(mean + reach)
