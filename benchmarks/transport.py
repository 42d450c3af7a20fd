"""Do moments that follow the basis pay? A stream whose subspace turns all the time.

A linear layer is fitted online while the top eigenspace of its inputs turns.
Contenders differ only in what becomes of Adam's moments when the basis changes; the
oracle keeps the last gradients and re-estimates both moments in each new basis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from dsbp_optax import Activations

_B1, _B2, _EPS = 0.9, 0.99, 1e-8
#: Gradients that the oracle remembers: the weight of older ones is below 2 %.
_MEMORY = 400

_ADAM = "ScaleByAdamState"
VARIANTS: dict[str, Any] = {
    "carried": None,
    "reset": "reset",
    "left as they are": {(_ADAM, "mu"): "invariant", (_ADAM, "nu"): "invariant"},
}
ORACLE = "oracle"


@dataclass(frozen=True)
class Stream:
    """The problem.

    Attributes:
      size: inputs of the layer, d.
      outputs: outputs of the layer, m.
      rank: of the planted subspace, k.
      samples: of a batch.
      steps: length.
      period: steps between refreshes.
      turn: radians that the subspace turns in one period.
      drift: radians a step of the target's swelling.
      noise: standard deviation of the targets' noise.
      learning_rate: the same for all.
    """

    size: int = 32
    outputs: int = 16
    rank: int = 6
    samples: int = 32
    steps: int = 1200
    period: int = 20
    turn: float = 0.1
    drift: float = 0.002
    noise: float = 1.0
    learning_rate: float = 0.02


def batches(stream: Stream, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs ``(steps, n, d)`` and targets ``(steps, n, m)``.

    The leading ``k`` axes of the inputs turn into the next ``k`` in planes of two; the
    linear map to the targets swells and shrinks, and does not turn.
    """
    rng = np.random.default_rng(seed)
    d, k = stream.size, stream.rank
    scale = np.concatenate([np.linspace(3, 1.5, k), np.full(d - k, 0.3)])
    frame, _ = np.linalg.qr(rng.normal(size=(d, d)))
    target = rng.normal(size=(d, stream.outputs))
    lead, other = frame[:, :k], frame[:, k : 2 * k]
    inputs, outputs = [], []
    for step in range(stream.steps):
        angle = stream.turn * step / stream.period
        turned = frame.copy()
        turned[:, :k] = np.cos(angle) * lead + np.sin(angle) * other
        turned[:, k : 2 * k] = np.cos(angle) * other - np.sin(angle) * lead
        x = (rng.normal(size=(stream.samples, d)) * scale) @ turned.T
        noise = stream.noise * rng.normal(size=(stream.samples, stream.outputs))
        inputs.append(x)
        outputs.append(x @ target * np.cos(stream.drift * step) + noise)
    return np.asarray(inputs, np.float32), np.asarray(outputs, np.float32)


def run_variant(
    stream: Stream, transport: Any, inputs: np.ndarray, outputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Losses ``(steps,)`` and bases ``(steps, d, k)`` of one rule."""
    tx = dsbp_optax.scale_by_spectral_projection(
        optax.scale_by_adam(_B1, _B2, _EPS),
        rank=stream.rank,
        update_every=stream.period,
        transport=transport,
        project="always",
        project_cold=True,
    )
    weight = jnp.zeros((stream.size, stream.outputs))

    def step(carry: Any, batch: Any) -> Any:
        weight, state = carry
        x, y = batch
        loss, grad = jax.value_and_grad(_loss)(weight, x, y)
        update, state = tx.update(
            {"kernel": grad}, state, statistics={"kernel": Activations(x)}
        )
        weight = weight - stream.learning_rate * update["kernel"]
        return (weight, state), (loss, dsbp_optax.by_path(state)["kernel"].basis)

    start = (weight, tx.init({"kernel": weight}))
    _, (losses, bases) = jax.lax.scan(step, start, (inputs, outputs))
    return np.asarray(losses), np.asarray(bases)


def run_oracle(
    stream: Stream, bases: np.ndarray, inputs: np.ndarray, outputs: np.ndarray
) -> np.ndarray:
    """Losses ``(steps,)`` with both moments re-estimated from past gradients."""
    weight = np.zeros((stream.size, stream.outputs))
    losses, past = [], []
    for step, (x, y, v) in enumerate(zip(inputs, outputs, bases, strict=True)):
        error = x @ weight - y
        losses.append(float((error**2).mean()))
        past = [*past[1 - _MEMORY :], 2 * x.T @ error / error.size]
        seen = np.einsum("dk,tdm->tkm", v, np.stack(past))
        age = np.arange(len(past))[::-1]
        first = np.tensordot((1 - _B1) * _B1**age, seen, 1) / (1 - _B1 ** (step + 1))
        second = np.tensordot((1 - _B2) * _B2**age, seen**2, 1)
        second /= 1 - _B2 ** (step + 1)
        weight -= stream.learning_rate * v @ (first / (np.sqrt(second) + _EPS))
    return np.asarray(losses)


def compare(
    seeds: Sequence[int],
    stream: Stream | None = None,
    after: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """One row a rule: mean loss over the second half of the stream, by seed.

    Args:
      seeds: of the streams.
      stream: the problem; None for the default one.
      after: called after each seed.
    """
    stream = stream or Stream()
    found: dict[str, list[float]] = {name: [] for name in (*VARIANTS, ORACLE)}
    for seed in seeds:
        data = batches(stream, seed)
        half = slice(stream.steps // 2, None)
        for name, transport in VARIANTS.items():
            losses, bases = run_variant(stream, transport, *data)
            found[name].append(float(losses[half].mean()))
        oracle = run_oracle(stream, bases, *data)
        found[ORACLE].append(float(oracle[half].mean()))
        after()
    best = np.asarray(found[ORACLE])
    return [
        {
            "rule": name,
            "losses": losses,
            "mean": float(np.mean(losses)),
            "ratios": (np.asarray(losses) / best).tolist(),
            "ratio_to_oracle": float(np.mean(np.asarray(losses) / best)),
        }
        for name, losses in found.items()
    ]


def _loss(weight: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((x @ weight - y) ** 2)
