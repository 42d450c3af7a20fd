"""The paper's rule in float64 NumPy, on one page. Imports nothing of the project.

Matrices have rows on the side that carries the basis: ``W (d, m)``, ``G (d, m)``,
``A (n, d)``, ``V (d, k)``. The output side of a kernel is its transpose.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Layer:
    """One weight matrix and what the rule knows of it."""

    weight: np.ndarray
    basis: np.ndarray
    leading: np.ndarray | None = None  # e_1
    share: float = 0.0  # lambda_1 / tr C


@dataclasses.dataclass(frozen=True)
class Rule:
    """The paper's five numbers."""

    learning_rate: float = 0.01
    sharpness: float = 0.1
    update_every: int = 100
    power_iterations: int = 5


def whole_refresh(layer: Layer, second_moment: np.ndarray, iterations: int) -> None:
    """All power iterations on one batch, then Rayleigh-Ritz."""
    v = layer.basis
    for _ in range(iterations):
        v, _ = np.linalg.qr(second_moment @ v)
    values, rotation = np.linalg.eigh(v.T @ second_moment @ v)
    layer.basis = v @ rotation[:, ::-1]
    layer.leading = layer.basis[:, 0]
    layer.share = values[-1] / np.trace(second_moment)


def sketched_refresh(layer: Layer, second_moment: np.ndarray) -> None:
    """One power iteration; eigenvalues are those of the basis it started from."""
    v = layer.basis
    product = second_moment @ v
    values, rotation = np.linalg.eigh(v.T @ product)
    layer.basis, _ = np.linalg.qr(product @ rotation[:, ::-1])
    layer.leading = layer.basis[:, 0]
    layer.share = values[-1] / np.trace(second_moment)


def update(layer: Layer, gradient: np.ndarray, rule: Rule) -> np.ndarray:
    """``-eta (P G + beta lambda_1 / tr(C) e_1 e_1^T W)``."""
    direction = layer.basis @ (layer.basis.T @ gradient)
    if layer.leading is not None:
        inside = layer.leading @ layer.weight
        direction = direction + rule.sharpness * layer.share * np.outer(
            layer.leading, inside
        )
    return -rule.learning_rate * direction


def step(
    layer: Layer,
    gradient: np.ndarray,
    activations: np.ndarray,
    count: int,
    rule: Rule,
    sketched: bool,
) -> np.ndarray:
    """One step of the rule; changes the layer and returns the update of its weight."""
    second_moment = activations.T @ activations  # not centred, not divided by n
    phase = count % rule.update_every
    if sketched and phase < rule.power_iterations:
        sketched_refresh(layer, second_moment)
    elif not sketched and phase == 0:
        whole_refresh(layer, second_moment, rule.power_iterations)
    change = update(layer, gradient, rule)
    layer.weight = layer.weight + change
    return change
