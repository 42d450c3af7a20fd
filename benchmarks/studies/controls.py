"""What the basis is worth: a rule against itself with a basis from elsewhere.

Controls train at the rule's own learning rate and are paired with it by seed.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import jax.numpy as jnp
import optax
import typer

import dsbp_optax
from benchmarks import cli
from benchmarks.core import campaign, records
from benchmarks.core.records import RESULTS
from benchmarks.core.train import Order, Program, build, carry_out, key_of
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.report import tables
from benchmarks.report.entries import control_entries
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import DataError


def keep_basis(
    operator: dsbp_optax.Operator, basis: Any, iterations: Any
) -> dsbp_optax.Eigenpairs:
    """A solver that finds nothing: the first basis, which is random, for good.

    Eigenvalues are the Rayleigh quotients of its columns.
    """
    del iterations
    basis, _ = jnp.linalg.qr(basis)  # As stored it is orthonormal to half precision.
    product = operator.matmul(basis)
    values = jnp.sum(basis * product, axis=0)
    order = jnp.argsort(-values)
    basis, values = basis[:, order], values[order]
    rest = jnp.linalg.norm(product[:, order] - basis * values) / jnp.max(values)
    return dsbp_optax.Eigenpairs(basis, values, rest)


def without_statistics(
    factory: Callable[..., optax.GradientTransformationExtraArgs],
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The same optimizer, never shown an activation: bases are those of gradients."""

    def make(
        learning_rate: optax.ScalarOrSchedule, **settings: Any
    ) -> optax.GradientTransformationExtraArgs:
        tx = factory(learning_rate, **settings)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            return tx.update(updates, state, params, **{**extra, "statistics": {}})

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


def controls_of(rule: Contender) -> tuple[Contender, Contender]:
    """The rule with a random basis, and with that of its gradients."""
    kept = {**rule.settings, "basis": dsbp_optax.Basis(solver=keep_basis)}
    blind = without_statistics(rule.factory)
    return (
        replace(rule, name=f"{rule.name}, random basis", settings=kept),
        replace(rule, name=f"{rule.name}, gradient basis", factory=blind),
    )


@cli.app.command("controls")
def command(
    workload: cli.WorkloadName,
    of: Annotated[str, typer.Option(help="the rule; see `list`")] = "dsbp_sgd",
    data_dir: cli.DataDir = None,
    out: cli.Out = RESULTS,
    hours: cli.Hours = 1.0,
    seeds: cli.Seeds = 3,
    quick: cli.Quick = False,
) -> None:
    """A rule with a basis from elsewhere, at the rule's rate; can be continued."""
    deadline = time.monotonic() + 3600 * hours
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    projecting = {n: c for n, c in CONTENDERS.items() if c.ours and c.window > 2}
    rule = cli.lookup(projecting, of, "--of")
    rate, _ = campaign.rate_for(chosen, rule, out)
    steps = chosen.quick_steps if quick else chosen.steps
    file = out / "controls" / f"{workload}.jsonl"
    with cli.bars() as progress:
        if not campaign.finals(chosen, rule, out):
            raise DataError(
                f"{out}: got no final record of {of} on {workload}, expected those of "
                f"the rule itself. Remedy: campaign {workload} --optimizer {of} first."
            )
        data, advance = chosen.load(data_dir), cli.bar(progress, of, 2 * seeds)
        for control in controls_of(rule):
            program: Program | None = None
            made = {key_of(one) for one in records.read(file, optimizer=control.name)}
            for seed in range(seeds):
                source = f"that of {of}"
                order = Order("final", rate, seed, steps, quick, source=source)
                if order.key not in made and time.monotonic() < deadline:
                    program = program or build(chosen, control)
                    record, _ = carry_out(program, data, order)
                    records.append(file, "controls", [record])
                advance()
    found = control_entries(chosen, of, out)
    cli.show((f"{workload}: {of} and its controls", tables.controls(found)))
