"""What kind of minimum an optimizer finds: train, then look closely; resumable.

A look is a function of a trained run: curvature, attacks, corruptions, a bound. Each
run leaves one record; one that has all looks asked for is not made again.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer

from benchmarks import cli
from benchmarks.core import campaign, records
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Order, build, carry_out
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.report import tables
from benchmarks.studies.corruptions import corrupted
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import Data, Params, Workload
from dsbp_optax import diagnostics

#: Of the curvature: training samples, eigenvalues, and the radius of the m-sharpness,
#: where m is the batch size.
SAMPLES, COUNT, RADIUS = 512, 10, 0.05
#: Of the attacks: radii in the largest norm, pixels lying in [0, 1]; steps; samples.
RADII, PGD_STEPS, ATTACKED = (2 / 255, 4 / 255, 8 / 255), 40, 256
#: Of the bound: standard deviation of the posterior, fixed beforehand; draws from it;
#: samples a batch.
NOISE, DRAWS, BATCH = 0.01, 40, 1_000


class Trained(NamedTuple):
    """A trained network, as the looks see it."""

    workload: Workload
    data: Data
    params: Params  # as they are evaluated
    start: Params  # at initialisation


def _training_batches(one: Trained, size: int, most: int) -> Any:
    """Whole batches of the first training samples, and how many samples they hold."""
    train = one.data.train
    count = max(min(most, len(train)) // size, 1) * size

    def read() -> Iterator[Any]:
        for first in range(0, count, size):
            yield train.take(np.arange(first, first + size))

    return diagnostics.stream_batches(read), count


def curvature(one: Trained) -> dict[str, Any]:
    """Eigenvalues of the Hessian of the training loss, its trace, the m-sharpness."""
    batches, _ = _training_batches(one, one.workload.batch_size, SAMPLES)
    loss = one.workload.loss
    product = diagnostics.hessian_product(loss, one.params, batches)
    top = diagnostics.top_eigenvalues(product, one.params, COUNT)
    trace = diagnostics.trace(product, one.params, jax.random.key(0), samples=16)
    rise = diagnostics.m_sharpness(loss, one.params, batches, RADIUS)
    return {
        "hessian_eigenvalues": np.asarray(top.values),
        "hessian_residuals": np.asarray(top.residuals),
        "hessian_trace": float(trace.mean),
        "hessian_trace_error": float(trace.standard_error),
        "m_sharpness": float(rise),
    }


def attacks(one: Trained) -> dict[str, Any]:
    """Accuracy under attacks of foolbox, one number a radius of `RADII`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Of SciPy, on import.
        import foolbox

    workload, samples = one.workload, one.data.test
    inputs, labels = samples.take(np.arange(min(ATTACKED, len(samples))))
    # Foolbox refuses what rounding put outside.
    pixels = jnp.clip(jnp.asarray(workload.to_pixels(inputs), jnp.float32), 0, 1)
    labels, size = jnp.asarray(labels), workload.batch_size

    @jax.jit
    def predict(x: jax.Array) -> Any:
        return workload.model.apply({"params": one.params}, workload.from_pixels(x))

    model, kinds = foolbox.JAXModel(predict, bounds=(0, 1)), foolbox.attacks
    pgd = kinds.LinfProjectedGradientDescentAttack(steps=PGD_STEPS, random_start=False)
    fgsm = kinds.LinfFastGradientAttack(random_start=False)
    found = {}
    for name, attack in {"FGSM": fgsm, f"PGD-{PGD_STEPS}": pgd}.items():
        fooled = []
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            _, _, success = attack(model, pixels[part], labels[part], epsilons=RADII)
            fooled.append(np.asarray(success))
        found[name] = (1 - np.concatenate(fooled, axis=1).mean(1)).tolist()
    return {"attacks": found, "attack_radii": RADII}


def corruptions(one: Trained) -> dict[str, Any]:
    """Accuracy under each corruption."""
    return {"corruptions": corrupted(one.workload, one.params, one.data.test)}


def bound(one: Trained) -> dict[str, float]:
    """The PAC-Bayes bound on the error of the noisy network."""
    size = min(BATCH, len(one.data.train))
    batches, count = _training_batches(one, size, len(one.data.train))

    def error(params: Params, batch: Any) -> jax.Array:
        inputs, targets = batch
        logits = one.workload.model.apply({"params": params}, inputs)
        return jnp.mean(jnp.argmax(logits, -1) != targets)

    found = diagnostics.pac_bayes_bound(
        *(error, one.params, one.start, batches, jax.random.key(0)),
        noise=NOISE,
        count=count,
        samples=DRAWS,
    )
    return {
        "bound": float(found.bound),
        "bound_risk": float(found.risk),
        "bound_risk_upper": float(found.risk_bound),
        "bound_kl": float(found.divergence.kl),
        "bound_samples": count,
        "bound_noise": NOISE,
    }


LOOKS: dict[str, Callable[[Trained], Mapping[str, Any]]] = {
    look.__name__: look for look in (curvature, attacks, corruptions, bound)
}


def divergence(params: Params, start: Params, opt_state: Any) -> dict[str, float]:
    """KL terms of the bound at one moment of training.

    ``kl`` has one scale of the prior. Where the state holds eigenbases ``kl_bases`` has
    one scale inside and one outside, ``kl_inside`` is the part inside, and
    ``moved_inside`` the share of the squared distance from the start there.
    """
    found = {"kl": _kl(params, start, None).kl}
    if diagnostics.snapshot(opt_state).energy:
        held = _kl(params, start, opt_state)
        whole = jnp.maximum(held.distance, jnp.finfo(jnp.float32).tiny)
        found |= {
            "kl_bases": held.kl,
            "kl_inside": held.inside,
            "moved_inside": jnp.square(held.distance_inside / whole),
        }
    return {key: float(value) for key, value in found.items()}


@jax.jit
def _kl(params: Params, start: Params, opt_state: Any) -> diagnostics.Divergence:
    return diagnostics.kl_divergence(params, start, NOISE, opt_state=opt_state)


def _known(found: list[Record], contender: Contender, order: Order) -> Record | None:
    """The last record of a run."""
    told = contender.name, order.rate, order.seed, contender.settings.get("rho")
    for one in reversed(found):
        held = one["optimizer"], one["learning_rate"], one["seed"]
        if (*held, one["hyperparameters"].get("rho")) == told:
            return one
    return None


@cli.app.command("minima")
def command(
    workload: cli.WorkloadName,
    optimizer: cli.OptimizerNames = None,
    look: Annotated[
        list[str] | None, typer.Option(help=f"repeat it; {', '.join(LOOKS)}")
    ] = None,
    learning_rate: cli.Rate = None,
    rho: Annotated[
        float | None, typer.Option(min=0, help="radius, of those that have one")
    ] = None,
    data_dir: cli.DataDir = None,
    steps: cli.Steps = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each")] = 3,
    first: Annotated[int, typer.Option(min=0, help="from 100: to tune")] = 0,
    hours: cli.Hours = 1.0,
    out: cli.Out = RESULTS,
    quick: cli.Quick = False,
) -> None:
    """Train, the KL term along the way, then look at the minimum; can be continued."""
    deadline = time.monotonic() + 3600 * hours
    chosen = cli.lookup(WORKLOADS, workload, "WORKLOAD")
    looks = [name for name in look or () if cli.lookup(LOOKS, name, "--look")]
    file = out / "minima" / f"{workload}.jsonl"
    length = steps or (chosen.quick_steps if quick else chosen.steps)
    contenders = cli.several(CONTENDERS, optimizer, "--optimizer")
    with cli.bars() as progress:
        data = chosen.load(data_dir)
        advance = cli.bar(progress, "runs", seeds * len(contenders))
        for contender in contenders:
            program, (rate, source) = None, (learning_rate, "given")
            if rate is None:
                rate, source = campaign.rate_for(chosen, contender, out)
            if rho is not None and "rho" in contender.settings:
                settings = {**contender.settings, "rho": rho}
                contender = replace(contender, settings=settings)
            for seed in range(first, first + seeds):
                advance()
                order = Order("final", rate, seed, length, quick, source=source)
                made = _known(records.read(file), contender, order)
                if made and (made["diverged"] or {*looks} <= {*made["looks"]}):
                    continue
                if time.monotonic() > deadline:
                    continue
                program = program or build(chosen, contender)
                start = jax.device_get(chosen.init(seed, data.pretrained))
                record, run = carry_out(
                    *(program, data, order),
                    observe=lambda *at, start=start: divergence(at[0], start, at[1]),
                )
                record["looks"] = [] if run.diverged else looks
                for name in record["looks"]:
                    record |= LOOKS[name](Trained(chosen, data, run.params, start))
                records.append(file, "minima", [record])
    found = tables.latest_looks(records.read(file))
    cli.show(*tables.minima(chosen, found).items())
