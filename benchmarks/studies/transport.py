"""Do moments that follow the basis pay? A stream whose subspace turns all the time.

A linear layer is fitted online while the top eigenspace of its inputs turns.
Contenders differ only in what becomes of Adam's moments when the basis changes; the
oracle keeps the last gradients and re-estimates both moments in each new basis.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks import cli
from benchmarks.core.records import Record
from benchmarks.report import tables

_B1, _B2, _EPS = 0.9, 0.99, 1e-8
#: Gradients that the oracle remembers: the weight of older ones is below 2 %.
_MEMORY = 400
_ADAM = "ScaleByAdamState"
VARIANTS: dict[str, Any] = {
    "carried": None,
    "reset": "reset",
    "left as they are": {(_ADAM, "mu"): "invariant", (_ADAM, "nu"): "invariant"},
}


class Stream(NamedTuple):
    """The problem."""

    size: int = 32  # inputs of the layer, d
    outputs: int = 16  # of the layer, m
    rank: int = 6  # of the planted subspace, k
    samples: int = 32  # of a batch
    steps: int = 1200
    period: int = 20  # steps between refreshes
    turn: float = 0.1  # radians that the subspace turns in one period
    drift: float = 0.002  # radians a step of the target's swelling
    noise: float = 1.0  # standard deviation of the targets' noise
    learning_rate: float = 0.02  # the same for all


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

    def loss_of(weight: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((x @ weight - y) ** 2)

    def step(carry: Any, batch: Any) -> Any:
        weight, state = carry
        loss, grad = jax.value_and_grad(loss_of)(weight, *batch)
        seen = {"kernel": dsbp_optax.Activations(batch[0])}
        update, state = tx.update({"kernel": grad}, state, statistics=seen)
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
    stream: Stream = Stream(),  # noqa: B008 - it has no state
    after: Callable[[], None] = lambda: None,
) -> list[Record]:
    """One row a rule: mean loss over the second half of the stream, by seed."""
    found: dict[str, list[float]] = {name: [] for name in (*VARIANTS, "oracle")}
    half = slice(stream.steps // 2, None)
    for seed in seeds:
        data = batches(stream, seed)
        for name, transport in VARIANTS.items():
            losses, bases = run_variant(stream, transport, *data)
            found[name].append(float(losses[half].mean()))
        found["oracle"].append(run_oracle(stream, bases, *data)[half].mean())
        after()
    rows = []
    for name, losses in found.items():
        ratios = np.asarray(losses) / np.asarray(found["oracle"])
        means = {"mean": np.mean(losses), "ratio_to_oracle": ratios.mean()}
        rows.append({"rule": name, "losses": losses, "ratios": ratios, **means})
    return rows


@cli.app.command("transport")
def command(
    seeds: cli.Seeds = 10, json: cli.Save = None, quiet: cli.Quiet = False
) -> None:
    """What moments are worth that follow a turning basis, against an oracle."""
    with cli.bars(quiet) as progress:
        rows = compare(range(seeds), after=cli.bar(progress, "streams", seeds))
    cli.save(json, "transport", [{"rows": rows}])
    cli.show(quiet, ("mean loss, second half of the stream", tables.transport(rows)))
