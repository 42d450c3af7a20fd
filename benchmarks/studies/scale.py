"""Memory, arithmetic and traffic of a training step of a large language model.

Formulas over the shapes of its kernels; `tests/test_studies.py` holds them against
what arrays and compiled programs of small models measure. Times follow from stated
bandwidths and are no measurements.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from benchmarks import cli
from benchmarks.report.tables import markdown, table

#: Bytes of a float32, of a bfloat16, and of a number in six and in five bits.
_FLOAT, _HALF, _SIX_BITS, _FIVE_BITS = 4, 2, 6 / 8, 5 / 8
_NEWTON_SCHULZ = 5


class Kernel(NamedTuple):
    """A group of alike kernels."""

    name: str
    inputs: int  # d
    outputs: int  # m
    count: int
    source: str  # what enters it: kernels of one source in a layer have one input

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return self.inputs * self.outputs * self.count


class Model(NamedTuple):
    """A decoder with gated feed-forward layers; embedding and head are two tables."""

    layers: int
    width: int  # of the residual stream
    hidden: int  # width of the feed-forward layers
    heads: int  # of the queries
    groups: int  # of keys and values
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


class Machine(NamedTuple):
    """What a step runs on, in data parallel; rates are of one device, a second."""

    devices: int
    flops: float = 4e14  # as far as a step reaches them
    memory: float = 3.3e12  # bytes to and from its memory
    network: float = 5e10  # bytes into and out of it


class Cost(NamedTuple):
    """Of one step."""

    state: float  # bytes of optimizer state, of the whole model
    flops: float  # of gradient and update, of all devices
    gradient: float  # bytes of the gradients that exist at once
    sent: float  # bytes of gradients, and of sketches over a period, each device
    seconds: float  # arithmetic, reduction, memory traffic, none behind another


Size = Callable[[int, int, int], float]


class Rule(NamedTuple):
    """One optimizer: figures of one kernel as functions of d, m and k."""

    kernel_bytes: Size  # of state, its basis apart
    basis_bytes: Size = lambda d, m, k: 0.0
    update_flops: Size = lambda d, m, k: 12.0 * d * m
    subspace: bool = False  # whether gradients are taken in coordinates
    sketched: bool = False  # whether sketches are sent
    period: int = 100  # steps from refresh to refresh
    window: int = 5  # steps of each period that send sketches


def newton_schulz_flops(d: int, m: int) -> float:
    """Of `dsbp_optax.orthogonalize`: a Gram matrix, its square and a product a step."""
    small, large = sorted((d, m))
    return _NEWTON_SCHULZ * 2.0 * small**2 * (2 * large + small)


def _basis(d: int, m: int, k: int) -> float:
    return _HALF * k * d


#: Into the metric's basis and back, before the direction and behind it: 8 d m k; into
#: that of a projection, and back twice: 6 d m k.
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
        _basis,
        lambda d, m, k: 8.0 * d * m * k + newton_schulz_flops(d, m) + 4.0 * d * m,
        *(False, True, 20, 2),
    ),
    "dsbp_adamw": Rule(
        lambda d, m, k: _FIVE_BITS * d * m + (_HALF + _FLOAT) * (d + m),
        _basis,
        lambda d, m, k: 8.0 * d * m * k + 12.0 * d * m,
        *(False, True, 20, 2),
    ),
    "projected_muon": Rule(
        lambda d, m, k: _HALF * k * m + _SIX_BITS * d * m + _HALF * (d + m),
        _basis,
        lambda d, m, k: 6.0 * d * m * k + newton_schulz_flops(d, m),
        *(False, True),
    ),
    "subspace_adamw": Rule(
        lambda d, m, k: 2 * _HALF * k * m,
        _basis,
        lambda d, m, k: 2.0 * d * m * k,
        *(True, True),
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

    With `share` kernels with one input keep one basis.
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
    """One step of data parallel training on a whole batch of so many tokens.

    Whole gradients are in bfloat16. Attention's own products, which no optimizer
    changes, are left out.
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
            sketch = d * rank * count * rule.window / rule.period
            sent += _FLOAT * sketch
            flops += 4.0 * sketch * tokens
    state = state_bytes(model, rule, rank, share)
    traffic = 2 * state + small + 2 * _HALF * (model.projected + model.others)
    ring = 2 * (machine.devices - 1) / machine.devices
    seconds = (
        flops / machine.devices / machine.flops
        + updates / machine.flops
        + ring * sent / machine.network
        + traffic / machine.memory
    )
    return Cost(state, flops + updates * machine.devices, small, sent, seconds)


_HEAD = """# Scale

Estimates by the formulas of `benchmarks/studies/scale.py`, written by
`python -m benchmarks estimate --write benchmarks/SCALE.md`; nothing of this size has
been run. State and FLOPs of the formulas are held against small models by a test. Times
follow from the stated rates: no sending overlaps with computing, and every device
makes the whole update. Kernels with one input share a basis."""


def document(names: Sequence[str], machine: Machine, rank: int, each: int) -> str:
    """SCALE.md: a table for each model, so many tokens a device."""
    parts = [_HEAD]
    for name in names:
        model, tokens = MODELS[name], each * machine.devices
        billions = (model.projected + model.others) / 1e9
        base = state_bytes(model, RULES["adamw"], rank)
        rows = []
        for title, rule in RULES.items():
            cost = estimate(model, rule, machine, rank=rank, tokens=tokens, share=True)
            rows.append(
                {
                    "optimizer": title,
                    "state, GB": f"{cost.state / 1e9:.2f}",
                    "of Adam's": f"{cost.state / base:.3f}",
                    "gradients, GB": f"{cost.gradient / 1e9:.2f}",
                    "sent, GB": f"{cost.sent / 1e9:.2f}",
                    "PFLOP a step": f"{cost.flops / 1e15:,.0f}",
                    "s a step": f"{cost.seconds:.2f}",
                }
            )
        parts += [
            f"## {name}: {billions:.1f} billion parameters, rank {rank}",
            f"{machine.devices} devices in data parallel, {tokens:,} tokens a step; "
            f"each {machine.flops:.0e} FLOPs, {machine.memory:.1e} bytes of memory and "
            f"{machine.network:.0e} bytes of network a second.",
            markdown(table(rows)),
        ]
    return "\n\n".join(parts) + "\n"


@cli.app.command("estimate")
def command(
    model: Annotated[
        list[str] | None, typer.Option("--model", help="repeat it; default: all")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="of every basis")] = 128,
    devices: Annotated[int, typer.Option(min=1, help="in data parallel")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="a step and device")] = 16_384,
    write: Annotated[Path | None, typer.Option(help="a Markdown file")] = None,
) -> None:
    """State, FLOPs, traffic and time of a step of a large model, by formulas."""
    cli.several(MODELS, model, "--model")
    text = document(model or list(MODELS), Machine(devices), rank, tokens)
    if write is None:
        cli.console.print(text, markup=False)
        return
    write.write_text(text)
    cli.written(write)
