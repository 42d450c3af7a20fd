"""What a task is: data in three parts, a metric, a model, a schedule, a length."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any
Batch = tuple[Any, np.ndarray]
Schedule = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_DEPTH = 3


# --------------------------------------------------------------------------- files


class DataError(ValueError):
    """A file that is missing, truncated or altered; says which and what to do."""


def locate(data_dir: Path | None, name: str, source: str) -> Path:
    """A file or folder: ``data_dir/name``, or up to three folders further down."""
    if data_dir is None:
        raise DataError(
            f"{name}: got no folder, expected one that holds {source}. Remedy: pass "
            "--data-dir DIR."
        )
    for depth in range(_DEPTH + 1):
        found = sorted(data_dir.glob("*/" * depth + name))
        if found:
            return found[0]
    raise DataError(
        f"{data_dir / name}: got no such file, expected {source}. Remedy: "
        "`python -m benchmarks fetch --list` says how to get it; then point "
        "--data-dir at the folder."
    )


@contextlib.contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Whatever a reader says of a file that is not as published, with its path."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise damaged(path, f"{type(error).__name__} ({error})", expected) from error


def damaged(path: Path, got: str, expected: str) -> DataError:
    """The error of a file that is there but not what it should be."""
    return DataError(
        f"{path}: got {got}, expected {expected}. Remedy: get the file again from its "
        "source; it must not be edited."
    )


# ------------------------------------------------------------------------- samples


class Samples(NamedTuple):
    """Inputs and targets, one row a sample."""

    inputs: Any  # an array, or what an index array turns into model inputs
    targets: np.ndarray  # int32, ``(n,)`` labels or ``(n, t)`` tokens

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.targets)

    def take(self, chosen: Any) -> Batch:
        """The batch of some rows."""
        return self.inputs[chosen], self.targets[chosen]

    def part(self, chosen: slice) -> "Samples":
        """The samples of a slice."""
        return Samples(self.inputs[chosen], self.targets[chosen])


class Data(NamedTuple):
    """A data set in three parts."""

    train: Samples  # what gradients see
    validation: Samples  # what tuning sees
    test: Samples  # what the final figures see
    pretrained: Params = None  # they replace those of a fresh model; a nested dict

    def limited(self, count: int | None) -> "Data":
        """The same with only the first `count` training samples."""
        return self._replace(train=self.train.part(slice(count)))


def hold_out(train: Samples, test: Samples, count: int) -> Data:
    """The last `count` training samples become the validation set."""
    kept = len(train) - count
    return Data(train.part(slice(kept)), train.part(slice(kept, None)), test)


Sampler = Callable[[Samples, int, np.random.Generator], Iterator[Batch]]


def orders(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Which samples form each full batch, epoch after epoch; the remainder is left."""
    while True:
        order = rng.permutation(count)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def shuffled(train: Samples, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Full batches without end; each epoch in an order drawn from `rng`."""
    return (train.take(chosen) for chosen in orders(len(train), size, rng))


def drawn(train: Samples, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Full batches without end, drawn with replacement."""
    while True:
        yield train.take(rng.integers(0, len(train), size))


# -------------------------------------------------------------------------- metric


@dataclass(frozen=True)
class Metric:
    """A figure of merit, a mean over samples."""

    name: str  # in records, behind "validation_" and "test_"
    label: str  # for people, with unit
    function: Callable[[jax.Array, jax.Array], jax.Array]  # (logits, targets) -> mean
    higher: bool  # whether more is better
    factor: float  # from the record's number to the one people read
    digits: int  # behind the point, of the number people read
    tolerance: float  # how far below the best peer still counts as the target

    @property
    def validation(self) -> str:
        """Its name in a record, of validation samples."""
        return f"validation_{self.name}"

    @property
    def test(self) -> str:
        """Its name in a record, of test samples."""
        return f"test_{self.name}"

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


ACCURACY = Metric("accuracy", "test accuracy, %", _accuracy, True, 100, 2, 0.002)
LOSS = Metric("loss", "test loss, nats", _loss, False, 1, 4, 0.02)


# ------------------------------------------------------------------------ workload


def constant(step: jax.Array, rate: jax.Array, steps: jax.Array) -> jax.Array:
    """constant"""  # noqa: D403, D415 - records quote it
    del step, steps
    return rate


def cosine(step: jax.Array, rate: jax.Array, steps: jax.Array) -> jax.Array:
    """linear over the first twelfth, then a cosine to 0"""  # noqa: D403, D415 - records quote it
    warm = steps / 12
    share = jnp.clip((step - warm) / (steps - warm), 0, 1)
    return rate * jnp.minimum(step / warm, 0.5 * (1 + jnp.cos(jnp.pi * share)))


@dataclass(frozen=True)
class Workload:
    """One training task."""

    name: str  # as typed on the command line
    summary: str  # one line for people
    model: nn.Module  # inputs to logits
    example: Callable[[int], Batch]  # so many samples, random: right in shape and type
    load: Callable[[Path | None], Data]  # data folder -> data
    batch_size: int  # samples a step
    steps: int  # length of a run
    quick_steps: int  # length with ``--quick``: at most three minutes on two cores
    metric: Metric = ACCURACY  # what judges
    sampler: Sampler = shuffled
    schedule: Schedule = cosine  # its docstring names it
    clip: float | None = None  # largest norm of the gradient, for every contender
    grid_shift: int = 0  # half decades by which every grid of rates is moved
    # Samples that judge along the way; None for all. The last evaluation takes all.
    curve_samples: int | None = None
    heavy: bool = False  # for accelerators; a campaign takes it only by name
    pixel_mean: tuple[float, ...] = (0.0,)  # of images: taken off pixels in [0, 1]
    pixel_std: tuple[float, ...] = (1.0,)  # what they were divided by then

    def to_pixels(self, inputs: Any) -> Any:
        """Images as pixels in [0, 1]."""
        return inputs * np.asarray(self.pixel_std) + np.asarray(self.pixel_mean)

    def from_pixels(self, pixels: Any) -> Any:
        """The inverse of `to_pixels`."""
        return (pixels - np.asarray(self.pixel_mean)) / np.asarray(self.pixel_std)

    def init(self, seed: int, pretrained: Params = None) -> Params:
        """Fresh parameters, those in `pretrained` replaced by theirs."""
        inputs, _ = self.example(1)
        params = _init(self.model, seed, inputs)
        return params if pretrained is None else _replaced(params, pretrained)

    def loss(self, params: Params, batch: Any) -> jax.Array:
        """Mean cross entropy of a batch."""
        inputs, targets = batch
        return _loss(self.model.apply({"params": params}, inputs), targets)

    def measure(self, params: Params, samples: Samples, count: int | None) -> float:
        """The metric over the first `count` samples (None: all)."""
        total, count = 0.0, len(samples) if count is None else count
        size = 4 * self.batch_size
        for start in range(0, count, size):
            batch = samples.take(np.arange(start, min(start + size, count)))
            mean = _measure(self.model, self.metric, params, batch)
            total += float(mean) * len(batch[1])
        return total / count


@functools.partial(jax.jit, static_argnums=0)
def _init(model: nn.Module, seed: int, inputs: Any) -> Params:
    return model.init(jax.random.key(seed), inputs)["params"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(model: nn.Module, metric: Metric, params: Params, batch: Any) -> jax.Array:
    inputs, targets = batch
    return metric.function(model.apply({"params": params}, inputs), targets)


def _replaced(params: Params, pretrained: Params) -> Params:
    if not isinstance(pretrained, dict):
        if pretrained.shape != params.shape:
            raise DataError(
                f"pretrained weights: got shape {pretrained.shape}, expected "
                f"{params.shape}. Remedy: the weights of the named model."
            )
        return jnp.array(pretrained)  # A copy: the step donates its parameters.
    known = {name: _replaced(params[name], value) for name, value in pretrained.items()}
    return {**params, **known}
