"""Memory, arithmetic and traffic of a training step of a large language model.

Formulas over the shapes of its kernels; `tests/test_estimate.py` holds them against
what arrays and compiled programs of small models measure. Times follow from stated
bandwidths and are no measurements.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Bytes of a float32, of a bfloat16, and of a number in six and in five bits.
_FLOAT, _HALF, _SIX_BITS, _FIVE_BITS = 4, 2, 6 / 8, 5 / 8
_NEWTON_SCHULZ = 5


class Kernel(NamedTuple):
    """A group of alike kernels.

    Attributes:
      name: for people; kernels of one `source` in a layer have one input.
      inputs: d.
      outputs: m.
      count: how many there are.
      source: what enters it.
    """

    name: str
    inputs: int
    outputs: int
    count: int
    source: str

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Model:
    """A decoder with gated feed-forward layers.

    Attributes:
      layers: number of blocks.
      width: of the residual stream.
      hidden: width of the feed-forward layers.
      heads: of the queries.
      groups: of keys and values.
      vocabulary: number of tokens; embedding and head are two tables.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    groups: int
    vocabulary: int

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Those that are projected."""
        d, count = self.width, self.layers
        small = d // self.heads * self.groups
        return (
            Kernel("query", d, d, count, "attention"),
            Kernel("key", d, small, count, "attention"),
            Kernel("value", d, small, count, "attention"),
            Kernel("out", d, d, count, "heads"),
            Kernel("gate", d, self.hidden, count, "feed-forward"),
            Kernel("up", d, self.hidden, count, "feed-forward"),
            Kernel("down", self.hidden, d, count, "hidden"),
        )

    @property
    def projected(self) -> int:
        """Numbers in the kernels."""
        return sum(kernel.size for kernel in self.kernels)

    @property
    def others(self) -> int:
        """Numbers in embedding, head and normalisations."""
        return (2 * self.vocabulary + 2 * self.layers + 1) * self.width


MODELS = {
    "llama-7b": Model(32, 4096, 11_008, 32, 32, 32_000),
    "llama-70b": Model(80, 8192, 28_672, 64, 8, 32_000),
}


@dataclass(frozen=True)
class Machine:
    """What a step runs on, in data parallel.

    Attributes:
      devices: number of devices.
      flops: of one device, per second, as far as a step reaches them.
      memory: bytes per second to and from the memory of one device.
      network: bytes per second into and out of one device.
    """

    devices: int
    flops: float = 4e14
    memory: float = 3.3e12
    network: float = 5e10


class Cost(NamedTuple):
    """Of one step.

    Attributes:
      state: bytes of optimizer state, of the whole model.
      flops: of gradient and update, of all devices.
      gradient: bytes of the gradients that exist at once, whole or in coordinates.
      sent: bytes of gradients, and of sketches averaged over a period, each device.
      seconds: arithmetic, then the reduction, then the optimizer's memory traffic,
        none hidden behind another.
    """

    state: float
    flops: float
    gradient: float
    sent: float
    seconds: float


class Rule(NamedTuple):
    """One optimizer.

    Attributes:
      kernel_bytes: (d, m, k) -> bytes of state of one kernel, its basis apart.
      basis_bytes: (d, m, k) -> bytes of its basis.
      update_flops: (d, m, k) -> FLOPs of one kernel's update.
      subspace: whether gradients are taken in coordinates.
      sketched: whether sketches are sent.
      period: steps from refresh to refresh.
      window: steps of each period that send sketches.
    """

    kernel_bytes: Callable[[int, int, int], float]
    basis_bytes: Callable[[int, int, int], float] = lambda d, m, k: 0.0
    update_flops: Callable[[int, int, int], float] = lambda d, m, k: 12.0 * d * m
    subspace: bool = False
    sketched: bool = False
    period: int = 100
    window: int = 5


def newton_schulz_flops(d: int, m: int) -> float:
    """Of `dsbp_optax.orthogonalize`: a Gram matrix, its square and a product a step."""
    small, large = sorted((d, m))
    return _NEWTON_SCHULZ * 2.0 * small**2 * (2 * large + small)


def _projections(d: int, m: int, k: int) -> float:
    """Into the basis, and back twice: the update and the residual."""
    return 6.0 * d * m * k


def _metric(d: int, m: int, k: int) -> float:
    """Into the basis and back, before the direction and behind it."""
    return 8.0 * d * m * k


RULES: Mapping[str, Rule] = {
    "adamw": Rule(lambda d, m, k: 2 * _FLOAT * d * m),
    "muon": Rule(
        lambda d, m, k: _FLOAT * d * m,
        update_flops=lambda d, m, k: newton_schulz_flops(d, m) + 4.0 * d * m,
    ),
    "galore": Rule(
        lambda d, m, k: 2 * _FLOAT * k * min(d, m),
        lambda d, m, k: _FLOAT * k * max(d, m),
        lambda d, m, k: 4.0 * d * m * k,
    ),
    "dsbp_muon": Rule(
        lambda d, m, k: _FIVE_BITS * d * m + _HALF * (d + m),
        lambda d, m, k: _HALF * k * d,
        lambda d, m, k: _metric(d, m, k) + newton_schulz_flops(d, m) + 4.0 * d * m,
        sketched=True,
        period=20,
        window=2,
    ),
    "dsbp_adamw": Rule(
        lambda d, m, k: _FIVE_BITS * d * m + (_HALF + _FLOAT) * (d + m),
        lambda d, m, k: _HALF * k * d,
        lambda d, m, k: _metric(d, m, k) + 12.0 * d * m,
        sketched=True,
        period=20,
        window=2,
    ),
    "projected_muon": Rule(
        lambda d, m, k: _HALF * k * m + _SIX_BITS * d * m + _HALF * (d + m),
        lambda d, m, k: _HALF * k * d,
        lambda d, m, k: _projections(d, m, k) + newton_schulz_flops(d, m),
        sketched=True,
    ),
    "subspace_adamw": Rule(
        lambda d, m, k: 2 * _HALF * k * m,
        lambda d, m, k: _HALF * k * d,
        lambda d, m, k: 2.0 * d * m * k,
        subspace=True,
        sketched=True,
    ),
}


def gradient_flops(kernel: Kernel, tokens: int, rank: int, subspace: bool) -> float:
    """Forward and backward through so many tokens, of all of a group."""
    d, m = kernel.inputs, kernel.outputs
    if not subspace:
        return 6.0 * kernel.size * tokens
    return (4.0 * d * m + 2.0 * rank * (d + m)) * kernel.count * tokens


def state_bytes(model: Model, rule: Rule, rank: int, share: bool = False) -> float:
    """Of the optimizer state: kernels by the rule, the rest by Adam in float32.

    Args:
      model: its shapes.
      rule: the optimizer.
      rank: k.
      share: whether kernels with one input keep one basis.
    """
    total, seen = 2.0 * _FLOAT * model.others, set()
    for kernel in model.kernels:
        sizes = kernel.inputs, kernel.outputs, rank
        total += kernel.count * rule.kernel_bytes(*sizes)
        if not (share and rule.sketched and kernel.source in seen):
            total += kernel.count * rule.basis_bytes(*sizes)
        seen.add(kernel.source)
    return total


def estimate(
    model: Model,
    rule: Rule,
    machine: Machine,
    *,
    rank: int,
    tokens: int,
    share: bool = False,
) -> Cost:
    """One step of data parallel training, whole gradients in bfloat16.

    Attention's own products, which no optimizer changes, are left out.

    Args:
      model: its shapes.
      rule: the optimizer.
      machine: what it runs on.
      rank: k.
      tokens: in the whole batch.
      share: whether kernels with one input keep one basis.
    """
    flops = 6.0 * model.vocabulary * model.width * tokens  # the head; a table is read
    sent = small = _HALF * model.others
    updates = 12.0 * model.others
    for kernel in model.kernels:
        d, m, count = kernel.inputs, kernel.outputs, kernel.count
        flops += gradient_flops(kernel, tokens, rank, rule.subspace)
        numbers = (rank if rule.subspace else d) * m * count
        width = _FLOAT if rule.subspace else _HALF
        small += width * numbers
        sent += width * numbers
        updates += count * rule.update_flops(d, m, rank)
        if rule.sketched:
            sketch = d * rank * count
            sent += _FLOAT * sketch * rule.window / rule.period
            flops += 4.0 * d * rank * tokens * count * rule.window / rule.period
    state = state_bytes(model, rule, rank, share)
    traffic = 2 * state + small + 2 * _HALF * (model.projected + model.others)
    ring = 2 * (machine.devices - 1) / machine.devices
    seconds = (
        flops / machine.devices / machine.flops
        + updates / machine.flops
        + ring * sent / machine.network
        + traffic / machine.memory
    )
    total = flops + updates * machine.devices
    return Cost(state, total, small, sent, seconds)


def document(names: Sequence[str], machine: Machine, rank: int, each: int) -> str:
    """SCALE.md: tables for some models, so many tokens a device."""
    head = """# Scale

Estimates by the formulas of `benchmarks/estimate.py`, written by
`python -m benchmarks estimate --write benchmarks/SCALE.md`; nothing of this size has
been run. State and FLOPs of the formulas are held against small models by a test. Times
follow from the stated rates: no sending overlaps with computing, and every device
makes the whole update. Kernels with one input share a basis.
"""
    tables = [markdown(name, machine, rank, each * machine.devices) for name in names]
    return "\n".join([head, *tables])


def markdown(name: str, machine: Machine, rank: int, tokens: int) -> str:
    """A table of every rule."""
    model = MODELS[name]
    billions = (model.projected + model.others) / 1e9
    lines = [
        f"## {name}: {billions:.1f} billion parameters, rank {rank}",
        "",
        f"{machine.devices} devices in data parallel, {tokens:,} tokens a step; each "
        f"{machine.flops:.0e} FLOPs, {machine.memory:.1e} bytes of memory and "
        f"{machine.network:.0e} bytes of network a second.",
        "",
        "| optimizer | state, GB | of Adam's | gradients, GB | sent, GB | "
        "PFLOP a step | s a step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = state_bytes(model, RULES["adamw"], rank)
    for rule_name, rule in RULES.items():
        cost = estimate(model, rule, machine, rank=rank, tokens=tokens, share=True)
        lines.append(
            f"| {rule_name} | {cost.state / 1e9:.2f} | {cost.state / base:.3f} | "
            f"{cost.gradient / 1e9:.2f} | {cost.sent / 1e9:.2f} | "
            f"{cost.flops / 1e15:,.0f} | {cost.seconds:.2f} |"
        )
    return "\n".join([*lines, ""])
