"""Few-shot episodes on Omniglot-small: tune every learner alike, then judge it.

Rates are chosen by episodes of the validation alphabet; results are of episodes of the
test alphabets, the same for all learners and seeds. A learner adapts its network to a
task (`maml`), or classifies by the features of one that was trained on all characters
(`pretrained`). A new one is one `Learner` in `LEARNERS`.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

import dsbp_optax
from benchmarks import cli
from benchmarks.core import records, tune
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Order, key_of, train_step
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.report import tables
from benchmarks.report.entries import entries
from benchmarks.studies.controls import keep_basis
from benchmarks.studies.maml import Inner, adapt, in_bases, keep_bases, meta_loss
from benchmarks.tasks.base import ACCURACY, DataError, Params, cosine
from benchmarks.tasks.omniglot import (
    Alphabets,
    Characters,
    DrawingsMlp,
    Episode,
    episodes,
    load_omniglot,
    stacked,
)

#: Rates are tuned at the first number of shots, and taken over by the others.
SHOTS, STEPS = (1, 5), 300
#: Classes of an episode, and queries of each where it judges.
WAYS, QUERIES = 5, 15
#: Tasks of an outer step, and queries of each of their classes.
TASKS, TRAIN_QUERIES = 16, 5
VALIDATION_EPISODES, TEST_EPISODES = 200, 600
#: Inner steps of MAML in training and after it, as in its own experiments.
TRAIN_STEPS, TEST_STEPS = 1, 3
#: Steps of a classifier for each outer step of MAML, and their batch; steps of a probe.
CLASSIFIER_STEPS, BATCH, PROBE_STEPS = 2, 256, 100
#: Inner rates that are tried; the first while the outer one is tuned.
INNER_RATES = (0.4, 0.1, 1.0)
#: Directions a kernel in which spectral inner steps move, and the age they reach.
RANK, PERIOD = 8, 20
#: The round of tuning in which inner rates are tried.
_INNER_ROUND = len(tune.ROUNDS) + 1
#: Episodes that are judged at once.
_TOGETHER = 50


class Fitted(NamedTuple):
    """What training gave."""

    judge: Callable[[Episode], np.ndarray]  # accuracies in stacked episodes
    loss: float = 0.0  # of training, the mean of the last tenth
    seconds: float = 0.0  # its first step left out, which compiles
    state_bytes: int = 0


#: What a learner is once its programs are made: of a run and its inner rate.
Fit = Callable[[Order, float], Fitted]


def cross_entropy(
    model: nn.Module, params: Params, images: Any, labels: Any
) -> jax.Array:
    """Mean cross-entropy of one batch."""
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def by_parts(accuracy: Callable[[Episode], Any]) -> Callable[[Episode], np.ndarray]:
    """The same for many episodes, some at a time."""

    def judge(tasks: Episode) -> np.ndarray:
        starts = range(0, len(tasks.support), _TOGETHER)
        parts = (Episode(*(x[s : s + _TOGETHER] for x in tasks)) for s in starts)
        return np.concatenate([np.asarray(accuracy(part)) for part in parts])

    return judge


def trained(
    contender: Contender,
    model: nn.Module,
    images: Any,
    batches: Callable[[np.random.Generator], Iterator[Any]],
    loss: Callable[..., jax.Array],
    accuracy: Callable[..., jax.Array],
    longer: int = 1,
) -> Fit:
    """A network trained with a contender, compiled once for all rates and lengths.

    `loss` takes ``params, opt_state, batch, inner rate``; `accuracy` a task instead of
    a batch.
    """
    init = jax.jit(contender.build(lambda count: jnp.zeros(())).init)
    judged = jax.jit(jax.vmap(accuracy, in_axes=(None, None, 0, None)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Params, state: Any, batch: Any, rate: Any, inner: Any, steps: Any
    ) -> Any:
        tx = contender.build(lambda count: cosine(count, rate, steps))

        def outer(params: Params, batch: Any) -> jax.Array:
            return loss(params, state, batch, inner)

        return train_step(outer, None, tx, params, state, batch)

    def fit(order: Order, inner: float) -> Fitted:
        steps, losses = longer * order.steps, list[float]()
        params = model.init(jax.random.key(order.seed), images)["params"]
        state, drawn = init(params), batches(np.random.default_rng([order.seed, 0]))
        told = tuple(map(np.float32, (order.rate, inner, steps)))
        start = time.perf_counter()
        while len(losses) < steps and np.isfinite(losses[-1:]).all():
            params, state, value = step(params, state, next(drawn), *told)
            losses.append(float(value))
            start = time.perf_counter() if len(losses) == 1 else start
        return Fitted(
            by_parts(lambda some: judged(params, state, some, inner)),
            loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
            seconds=time.perf_counter() - start,
            state_bytes=dsbp_optax.diagnostics.state_bytes(state),
        )

    return fit


# ------------------------------------------------------------------- kinds of them


def maml(
    contender: Contender,
    characters: Characters,
    shots: int,
    spectral: bool = False,
    first: bool = False,
) -> Fit:
    """MAML; the contender has `keep_bases` where inner steps stay in the eigenbases."""
    model = DrawingsMlp(WAYS)
    loss = functools.partial(cross_entropy, model)

    def inner(state: Any, rate: Any, steps: int) -> Inner:
        found = Inner(rate, steps, first_order=first)
        return found._replace(move=in_bases(state)) if spectral else found

    def batches(rng: np.random.Generator) -> Iterator[Episode]:
        drawn = episodes(characters, WAYS, shots, TRAIN_QUERIES, rng)
        while True:
            yield stacked(drawn, TASKS)

    def outer(params: Params, state: Any, tasks: Episode, rate: Any) -> jax.Array:
        return meta_loss(loss, params, tasks, inner(state, rate, TRAIN_STEPS))

    def accuracy(params: Params, state: Any, task: Episode, rate: Any) -> jax.Array:
        how = inner(state, rate, TEST_STEPS)
        mine = adapt(loss, params, task.support, task.support_labels, how)
        logits = model.apply({"params": mine}, task.query)
        return jnp.mean(logits.argmax(-1) == task.query_labels)

    images = characters.images[0, :2]
    return trained(contender, model, images, batches, outer, accuracy)


def nearest_mean(support: Any, labels: Any, query: Any, rate: Any) -> jax.Array:
    """The cosine of a query with the mean of each class's supports."""
    del rate
    support, query = _unit(support), _unit(query)
    return query @ _unit(jax.nn.one_hot(labels, WAYS).T @ support).T


def linear_probe(support: Any, labels: Any, query: Any, rate: Any) -> jax.Array:
    """A linear classifier, from zero, by gradient descent on the supports."""
    support, query = _unit(support), _unit(query)

    def loss(head: Any) -> jax.Array:
        logits = support @ head[0] + head[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(_: Any, head: Any) -> Any:
        return jax.tree.map(lambda p, g: p - rate * g, head, jax.grad(loss)(head))

    zero = jnp.zeros((support.shape[-1], WAYS)), jnp.zeros(WAYS)
    weight, bias = jax.lax.fori_loop(0, PROBE_STEPS, step, zero)
    return query @ weight + bias


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def accuracy_of(
    features: Callable[[Any], Any], classifier: Any, task: Episode, rate: Any
) -> jax.Array:
    """Of a classifier of features; supports and queries pass the network together."""
    count = len(task.support)
    seen = features(jnp.concatenate([task.support, task.query]))
    scores = classifier(seen[:count], task.support_labels, seen[count:], rate)
    return jnp.mean(scores.argmax(-1) == task.query_labels)


def pretrained(
    classifier: Callable[..., jax.Array], characters: Characters, shots: int
) -> Fit:
    """A network that tells all training characters; its features meet the new ones."""
    del shots
    images, model = characters.images, DrawingsMlp(len(characters))

    def batches(rng: np.random.Generator) -> Iterator[Any]:
        while True:
            who = rng.integers(0, images.shape[0], BATCH)
            yield images[who, rng.integers(0, images.shape[1], BATCH)], who

    def loss(params: Params, state: Any, batch: Any, rate: Any) -> jax.Array:
        del state, rate
        return cross_entropy(model, params, *batch)

    def accuracy(params: Params, state: Any, task: Episode, rate: Any) -> jax.Array:
        def features(images: jax.Array) -> Any:
            return model.apply({"params": params}, images, method="features")

        del state
        return accuracy_of(features, classifier, task, rate)

    told = _ADAM, model, images[0, :2], batches, loss, accuracy
    return trained(*told, longer=CLASSIFIER_STEPS)


def pixels(characters: Characters, shots: int) -> Fit:
    """Nothing trained: the nearest class mean of the pixels themselves."""
    del characters, shots

    def flat(images: jax.Array) -> jax.Array:
        return images.reshape(len(images), -1)

    one = functools.partial(accuracy_of, flat, nearest_mean, rate=0.0)
    found = Fitted(by_parts(jax.jit(jax.vmap(one))))
    return lambda order, inner: found


# ------------------------------------------------------------------------ learners


class Learner(NamedTuple):
    """One way to learn from few drawings."""

    name: str
    summary: str
    make: Callable[[Characters, int], Fit]  # of training characters and shots
    grid: tuple[float, ...] = ()  # outer rates tried first; none: nothing is tuned
    inner_rates: tuple[float, ...] = INNER_RATES  # that are tried, in this order
    takes: str | None = None  # the learner whose tuned rates it takes


def _spectral_adam(
    learning_rate: optax.ScalarOrSchedule, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    settings = {"rank": RANK, "update_every": PERIOD, **settings}
    return optax.chain(keep_bases(**settings), optax.adam(learning_rate))


_ADAM = dataclasses.replace(CONTENDERS["adamw"], name="adam", factory=optax.adam)
_SPECTRAL = dataclasses.replace(_ADAM, name="spectral", factory=_spectral_adam)
_RANDOM = {"basis": dsbp_optax.Basis(solver=keep_basis)}


def _maml(
    name: str,
    summary: str,
    contender: Contender,
    settings: Any = None,
    takes: str | None = None,
    **told: Any,
) -> Learner:
    if settings is not None:
        contender = dataclasses.replace(contender, settings=settings)
    make = functools.partial(maml, contender, **told)
    return Learner(name, f"MAML{summary}", make, contender.grid, takes=takes)


_OUTSIDE = {
    "projected_adamw": {"weight_decay": 0.0},
    **dict.fromkeys(("muon", "projected_muon")),
}
_INSIDE = ", Adam outside, inner steps in {}directions a kernel"
LEARNERS = {
    learner.name: learner
    for learner in (
        _maml("maml", " of second order, Adam outside", _ADAM),
        _maml("fomaml", " of first order, Adam outside", _ADAM, first=True),
        *(
            _maml(f"maml_{name}", f", {name} outside", CONTENDERS[name], settings)
            for name, settings in _OUTSIDE.items()
        ),
        _maml(
            "maml_spectral", _INSIDE.format(f"{RANK} eigen"), _SPECTRAL, spectral=True
        ),
        _maml(
            *("spectral_random", _INSIDE.format(f"{RANK} random "), _SPECTRAL, _RANDOM),
            takes="maml_spectral",
            spectral=True,
        ),
        Learner(
            "nearest_mean",
            "classifier pretrained with Adam, nearest class mean of its features",
            *(functools.partial(pretrained, nearest_mean), _ADAM.grid, (0.0,)),
        ),
        Learner(
            "linear_probe",
            "classifier pretrained with Adam, linear probe of its features by SGD",
            *(functools.partial(pretrained, linear_probe), _ADAM.grid),
        ),
        Learner(
            "pixels",
            "nothing trained, nearest class mean of the pixels",
            *(pixels, (), (0.0,)),
        ),
    )
}


# ---------------------------------------------------------------------------- runs


class Lane(NamedTuple):
    """One learner at one number of shots."""

    file: Path
    learner: Learner
    shots: int
    seeds: int  # number of final runs
    steps: int = STEPS  # outer ones of a final run

    @property
    def workload(self) -> str:
        """As in records."""
        return f"omniglot_{self.shots}_shot"

    def found(self) -> list[Record]:
        """What was made; an error where it has another length."""
        name = self.learner.name
        rows = records.read(self.file, optimizer=name, workload=self.workload)
        if any(row["full_steps"] != self.steps for row in rows):
            raise DataError(
                f"{self.file}: got runs of {rows[0]['full_steps']} steps, expected "
                f"{self.steps}. Remedy: another --out, or the same --steps."
            )
        return rows

    def tuned(self) -> tuple[Order, float] | tuple[float, float]:
        """The next run of the tuning and its inner rate, or both rates.

        First the outer rate is tuned, by successive halving at the first inner rate;
        then the other inner rates are tried at that outer rate and full length.
        """
        learner = LEARNERS[self.learner.takes or self.learner.name]
        owner = self._replace(learner=learner, shots=SHOTS[0])
        tried = [one for one in owner.found() if one["phase"] == "tune"]
        scores = {
            tune.Trial(one["round"] - 1, one["learning_rate"]): _score(one)
            for one in tried
            if one["round"] < _INNER_ROUND
        }
        first, *others = learner.inner_rates
        if not learner.grid:
            return 0.0, first
        step = tune.next_trial(learner.grid, scores)
        known: dict[float, float] = {}
        if isinstance(step, tune.Trial):
            steps = math.ceil(tune.ROUNDS[step.round][0] * self.steps)
            told = Order("tune", step.rate, tune.SEED, steps, False, step.round + 1)
        else:
            known = {first: scores[tune.Trial(len(tune.ROUNDS) - 1, step.rate)]}
            inner = [one for one in tried if one["round"] == _INNER_ROUND]
            known |= {one["inner_rate"]: _score(one) for one in inner}
            told = Order("tune", step.rate, tune.SEED, self.steps, False, _INNER_ROUND)
        missing = [rate for rate in (first, *others) if rate not in known]
        if not missing:
            return step.rate, max(known, key=lambda rate: known[rate])
        if owner[1:3] != self[1:3]:
            raise DataError(
                f"{self.learner.name}, {self.shots} shot(s): got no tuned rates of "
                f"{learner.name}, expected its records. Remedy: fewshot --learner "
                f"{learner.name} first."
            )
        return told, missing[0]

    def next_run(self) -> tuple[Order, float] | None:
        """The next run and its inner rate; None when all are made."""
        rate, inner = self.tuned()
        if isinstance(rate, Order):
            return rate, inner
        made = {key_of(one) for one in self.found()}
        for seed in range(self.seeds):
            order = Order("final", rate, seed, self.steps)
            if order.key not in made:
                return order, inner
        return None

    def carry_out(
        self, alphabets: Alphabets, fit: Fit, order: Order, inner_rate: float
    ) -> Record:
        """Train once, judge and describe."""
        final = order.phase == "final"
        fitted = fit(order, inner_rate)
        diverged = not np.isfinite(fitted.loss)
        found = fitted.judge(judging(alphabets, self.shots, final))
        accuracy = ACCURACY.test if final else ACCURACY.validation
        return {
            "workload": self.workload,
            "optimizer": self.learner.name,
            "phase": order.phase,
            "round": order.round,
            "learning_rate": order.rate,
            "inner_rate": inner_rate,
            "seed": order.seed,
            "steps": order.steps,
            "full_steps": self.steps,
            "tasks": TASKS,
            "metric": ACCURACY.name,
            accuracy: None if diverged else float(found.mean()),
            "standard_error_of_episodes": found.std(ddof=1) / np.sqrt(len(found)),
            "episodes": len(found),
            "train_loss": fitted.loss,
            "diverged": diverged,
            "seconds": fitted.seconds,
            "state_bytes": fitted.state_bytes,
        }


def _score(record: Record) -> float:
    return ACCURACY.score(record[ACCURACY.validation])


def judging(alphabets: Alphabets, shots: int, final: bool) -> Episode:
    """The fixed episodes that judge: of test alphabets, or of the validation one."""
    part = alphabets.test if final else alphabets.validation
    drawn = episodes(part, WAYS, shots, QUERIES, np.random.default_rng([0, 1 + final]))
    return stacked(drawn, TEST_EPISODES if final else VALIDATION_EPISODES)


@cli.app.command("fewshot")
def command(
    learner: Annotated[
        list[str] | None, typer.Option("--learner", help="repeat it; default: all")
    ] = None,
    data_dir: cli.DataDir = None,
    out: cli.Out = RESULTS,
    hours: cli.Hours = 1.0,
    seeds: cli.Seeds = 3,
    steps: Annotated[int, typer.Option(min=3, help="outer steps")] = STEPS,
) -> None:
    """MAML and its like on 5-way episodes of Omniglot-small; can be continued."""
    deadline, file = time.monotonic() + 3600 * hours, out / "fewshot.jsonl"
    load = functools.cache(lambda: load_omniglot(data_dir))
    with cli.bars() as progress:
        for one in cli.several(LEARNERS, learner, "--learner"):
            advance = cli.bar(progress, one.name, None)
            for shots in SHOTS:
                lane, fit = Lane(file, one, shots, seeds, steps), None
                while (run := lane.next_run()) and time.monotonic() < deadline:
                    fit = fit or one.make(load().train, shots)
                    record = lane.carry_out(load(), fit, *run)
                    records.append(file, "fewshot", [record])
                    advance()
    for shots in SHOTS:
        wanted = {"phase": "final", "workload": f"omniglot_{shots}_shot"}
        if found := entries(ACCURACY, records.read(file, **wanted)):
            cli.show((f"{shots} shot(s)", tables.fewshot(found)))
