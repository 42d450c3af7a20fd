"""What one data-parallel training step sends, read off its compiled program.

Parameters and optimizer state are replicated, the batch is split. The compiler then
adds a reduction over devices for every sum over samples; its operands are what is sent.
"""

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import typer

import dsbp_optax
from benchmarks import cli
from benchmarks.core import hlo
from benchmarks.core.kernels import path_of
from benchmarks.core.records import Record
from benchmarks.core.train import train_step
from benchmarks.report import tables
from benchmarks.studies.distributed import Layout
from benchmarks.studies.speed import PERIOD, WINDOW
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Workload
from dsbp_optax import Coordinates

Shape = tuple[int, ...]
#: Ways to a gradient.
ROUTES = ("whole", "subspace")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(?:-start)?\("
)
_ARRAY = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")


class Sent(NamedTuple):
    """One operand of a collective."""

    kind: str  # such as "all-reduce"
    shape: Shape
    conditional: bool  # whether it lies in a branch that most steps do not take


def sent(program: str) -> list[Sent]:
    """Every operand of every collective in the text of a compiled program."""
    _, bodies = hlo.computations(program)
    lines = itertools.chain.from_iterable(bodies.values())
    chosen = {name for line in lines for name in hlo.branches(line)}
    operands = []
    for computation, line in ((name, x) for name in bodies for x in bodies[name]):
        if (found := _COLLECTIVE.search(line)) is not None:
            for dims in _ARRAY.findall(found[1]):
                shape = tuple(int(n) for n in dims.split(",") if n)
                operands.append(Sent(found[2], shape, computation in chosen))
    return operands


def compile_step(
    workload: Workload, rank: int, route: str, devices: int
) -> tuple[str, Any, Any]:
    """The text of a compiled step, parameters and optimizer state (shapes)."""
    layout, coordinates = Layout(), route == "subspace"
    basis = dsbp_optax.Basis(power_iterations=WINDOW)
    tx = dsbp_optax.subspace_adamw(1e-3, rank=rank, update_every=PERIOD, basis=basis)
    params = jax.eval_shape(lambda: workload.init(0))
    opt_state = jax.eval_shape(tx.init, params)
    rows = workload.batch_size - workload.batch_size % devices
    program = jax.jit(
        functools.partial(train_step, workload.loss, None, tx, coordinates=coordinates),
        in_shardings=(layout.everywhere, layout.everywhere, layout.split),
        out_shardings=layout.everywhere,
        donate_argnums=(0, 1),
    )
    text = program.lower(params, opt_state, workload.example(rows)).compile().as_text()
    return text, params, opt_state


def account(program: str, params: Any, opt_state: Any) -> Record:
    """The numbers that a step sends, by what they are.

    ``coordinates`` of projected kernels, in every step; ``full``, of their whole
    gradients; ``others``, of parameters in full space; ``scalars``; ``refresh``, in
    branches that refresh. ``unknown`` and ``forbidden`` are shapes that are none of
    these, and those of projected kernels.
    """
    small = _by_path(jax.eval_shape(dsbp_optax.project_gradients, params, opt_state))
    whole = _by_path(params)
    projected = {p: x for p, x in small.items() if isinstance(x, Coordinates)}
    others = {p: x.shape for p, x in whole.items() if p not in projected}
    operands = sent(program)
    steady = Counter(_plain(one.shape) for one in operands if not one.conditional)
    forms = (x.values.shape for x in projected.values())  # The output axes are one.
    expected = Counter(_plain((math.prod(form[:-1]), form[-1])) for form in forms)
    named = Counter(map(_plain, others.values()))
    kernels = {_plain(whole[path].shape) for path in projected} - {*named, *expected}
    coordinates = sum(math.prod(s) * min(n, steady[s]) for s, n in expected.items())
    full = sum(math.prod(whole[path].shape) for path in projected)
    known = expected + named + Counter({(): steady[()]})
    return {
        "coordinates": coordinates,
        "full": full,
        "share": coordinates / full,
        "others": {p: math.prod(s) for p, s in others.items() if steady[_plain(s)]},
        "scalars": steady[()],
        "refresh": sum(math.prod(one.shape) for one in operands if one.conditional),
        "refresh_share": WINDOW / PERIOD,
        "unknown": sorted((steady - known).elements()),
        "forbidden": sorted(s for s in steady.elements() if s in kernels),
    }


def _plain(shape: Sequence[int]) -> Shape:
    """Without axes of length 1, in an order of its own: compilers move axes."""
    return tuple(sorted(n for n in shape if n > 1))


def _by_path(tree: Any) -> Mapping[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, Coordinates)
    )
    return {path_of(keys): leaf for keys, leaf in leaves}


@cli.app.command("communication")
def command(
    workload: cli.WorkloadName = "shakespeare_gpt",
    devices: Annotated[int, typer.Option(min=2, help="that share the batch")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="of every basis")] = 16,
    route: Annotated[str, typer.Option(help="subspace, or whole")] = "subspace",
    json: cli.Save = None,
) -> None:
    """What a data-parallel step sends, read off its compiled program; nothing runs."""
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    cli.lookup(dict.fromkeys(ROUTES), route, "--route")
    jax.config.update("jax_num_cpu_devices", devices)
    found = account(*compile_step(chosen, rank, route, devices))
    record = {"workload": workload, "rank": rank, "devices": devices, "route": route}
    cli.save(json, "communication", [{**record, **found}])
    cli.show((f"{workload}, {route} route", tables.communication(found)))
