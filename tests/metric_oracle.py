"""The metric's rules in float64 NumPy, on one page. Imports nothing of the project.

Kernels are ``(inputs, outputs)``; the metric acts on one side of them.
"""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

#: Width of a level in units of the standard deviation, by bits (Max, 1960).
WIDTHS = {5: 0.1881, 6: 0.1041}


@dataclasses.dataclass(frozen=True)
class Rule:
    """The numbers; `moments` is "muon", "adam" or "none", before the metric or in it.

    `direction` is "muon" (Newton-Schulz and Muon's size) or "none".
    """

    moments: str = "none"
    direction: str = "none"
    inside: bool = False
    bits: int = 32
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    nesterov: bool = False
    exponent: Callable[[int], float] = lambda count: 0.5
    damping: float = 0.2
    where: str = "both"
    side: str = "input"
    update_every: int = 20
    power_iterations: int = 2
    floor: float = 1e-3
    learning_rate: float = 1.0
    weight_decay: float = 0.0


@dataclasses.dataclass
class Kernel:
    """One matrix and what the rule keeps of it."""

    weight: np.ndarray
    basis: np.ndarray
    values: np.ndarray | None = None
    trace: float = 0.0
    first: np.ndarray | float = 0.0
    rows: np.ndarray | float = 0.0
    columns: np.ndarray | float = 0.0


def few_bits(matrix: np.ndarray, bits: int) -> np.ndarray:
    """What storage leaves of a matrix: scales of rows and columns in bfloat16."""
    if bits == 32:
        return matrix
    half, width = 2**bits // 2, WIDTHS[bits]
    rows = np.sqrt((matrix**2).mean(1, keepdims=True)).astype(ml_dtypes.bfloat16)
    rows = rows.astype(np.float64)
    scaled = matrix / rows
    unit = scaled / np.sqrt((scaled**2).mean(0, keepdims=True)) / width
    levels = np.clip(np.floor(unit), -half, half - 1) + 0.5
    best = (scaled * levels).sum(0, keepdims=True) / (levels**2).sum(0, keepdims=True)
    return rows * levels * best.astype(ml_dtypes.bfloat16).astype(np.float64)


def stored(matrix: np.ndarray, rule: Rule) -> np.ndarray:
    """What is left of moments; the rows of their storage are on the metric's side."""
    if rule.side == "output":
        return few_bits(matrix.T, rule.bits).T
    return few_bits(matrix, rule.bits)


def moments(kernel: Kernel, g: np.ndarray, count: int, rule: Rule) -> np.ndarray:
    if rule.moments == "none":
        return g
    if rule.moments == "muon":
        m = rule.momentum * kernel.first + g
        kernel.first = stored(m, rule)
        return rule.momentum * m + g if rule.nesterov else m
    m = rule.b1 * kernel.first + (1 - rule.b1) * g
    kernel.first = stored(m, rule)
    for name, axis in (("rows", 1), ("columns", 0)):
        mean = (1 - rule.b2) * (g**2).mean(axis, keepdims=True)
        setattr(kernel, name, rule.b2 * getattr(kernel, name) + mean)
    v = kernel.rows * kernel.columns / kernel.rows.mean()
    return m / (1 - rule.b1**count) / (np.sqrt(v / (1 - rule.b2**count)) + rule.eps)


def muon(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps, times ``sqrt(max(1, fan out / fan in))``."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return np.sqrt(max(1, matrix.shape[1] / matrix.shape[0])) * x


def refresh(kernel: Kernel, second_moment: np.ndarray, iterations: int) -> None:
    """Power iterations from the basis before, then Rayleigh-Ritz."""
    v = kernel.basis
    for _ in range(iterations):
        v, _ = np.linalg.qr(second_moment @ v)
    values, rotation = np.linalg.eigh(v.T @ second_moment @ v)
    kernel.basis, kernel.values = v @ rotation[:, ::-1], values[::-1]
    kernel.trace = np.trace(second_moment)


def sketched_refresh(kernel: Kernel, second_moment: np.ndarray) -> None:
    """One power iteration; eigenvalues are those of the basis it started from."""
    product = second_moment @ kernel.basis
    values, rotation = np.linalg.eigh(kernel.basis.T @ product)
    kernel.basis, _ = np.linalg.qr(product @ rotation[:, ::-1])
    kernel.values, kernel.trace = values[::-1], np.trace(second_moment)


def factors(kernel: Kernel, rule: Rule, exponent: float) -> np.ndarray:
    d, k = kernel.basis.shape
    mean = kernel.trace / d
    rest = mean
    if k < d:
        rest = (kernel.trace - kernel.values.sum()) / (d - k)
        rest = np.clip(rest, rule.floor * mean, mean)
    shift = rule.damping * mean
    ratio = (rest + shift) / (kernel.values + shift)
    return (np.minimum(ratio, 1) if k < d else ratio) ** exponent


def metric(kernel: Kernel, m: np.ndarray, rule: Rule, exponent: float) -> np.ndarray:
    """``S M``, or ``M S`` on the side of the outputs."""
    if kernel.values is None:
        return m
    v = kernel.basis
    less = v @ np.diag(1 - factors(kernel, rule, exponent)) @ v.T
    return m - (less @ m if rule.side == "input" else m @ less)


def keep_norm(like: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return matrix * np.linalg.norm(like) / np.linalg.norm(matrix)


def step(
    kernel: Kernel,
    gradient: np.ndarray,
    samples: np.ndarray | None,
    count: int,
    rule: Rule,
) -> np.ndarray:
    """Update number `count`; without samples the basis is that of what comes in."""
    m = gradient if rule.inside else moments(kernel, gradient, count + 1, rule)
    phase = count % rule.update_every
    if samples is None and phase < rule.power_iterations:
        seen = m.T if rule.side == "input" else m
        sketched_refresh(kernel, seen.T @ seen / len(seen))
    elif samples is not None and phase == 0:
        refresh(kernel, samples.T @ samples / len(samples), rule.power_iterations)
    exponent = rule.exponent(count)
    if rule.where != "after":
        m = metric(kernel, m, rule, exponent)
    d = moments(kernel, m, count + 1, rule) if rule.inside else m
    d = muon(d) if rule.direction == "muon" else d
    if rule.where != "before":
        d = keep_norm(d, metric(kernel, d, rule, exponent))
    change = -rule.learning_rate * (d + rule.weight_decay * kernel.weight)
    kernel.weight = kernel.weight + change
    return change
