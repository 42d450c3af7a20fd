"""Few-shot episodes on Omniglot-small: tune every learner alike, then judge it.

Rates are chosen by episodes of the validation alphabet; results are of episodes of the
test alphabets, the same for all learners and seeds. A new learner is one `Learner` in
`LEARNERS`: a function that trains and returns how it meets new tasks.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

import dsbp_optax
from benchmarks import cli
from benchmarks.controls import keep_basis
from benchmarks.core import records, tune
from benchmarks.core.records import RESULTS, Record
from benchmarks.core.train import Order, key_of, train_step
from benchmarks.optimizers import CONTENDERS, Contender
from benchmarks.report import tables
from benchmarks.report.entries import entries
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

#: ``(stacked episodes, inner rate) -> accuracy of each``.
Judge = Callable[[Episode, float], np.ndarray]


class Fitted(NamedTuple):
    """What training gave."""

    judge: Judge  # how it meets new tasks
    loss: float = 0.0  # of training, the mean of the last tenth
    seconds: float = 0.0  # its first step left out, which compiles
    state_bytes: int = 0


class Plan(NamedTuple):
    """One training run."""

    rate: float  # of the outer optimizer, the largest of its schedule
    inner_rate: float
    steps: int  # outer ones
    seed: int


#: What a learner is once its programs are made.
Fit = Callable[[Characters, Plan], Fitted]


def cross_entropy(
    model: DrawingsMlp, params: Params, images: Any, labels: Any
) -> jax.Array:
    """Mean cross-entropy of one batch."""
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def run_loop(
    step: Callable[..., Any], params: Params, opt_state: Any, batches: Iterator[Any]
) -> tuple[Params, Any, float, float]:
    """Train until there are no batches or the loss is not finite; loss and seconds."""
    losses: list[float] = []
    start = time.perf_counter()
    for batch in batches:
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(float(loss))
        start = time.perf_counter() if len(losses) == 1 else start
        if not np.isfinite(losses[-1]):
            break
    last = float(np.mean(losses[-max(1, len(losses) // 10) :]))
    return params, opt_state, last, time.perf_counter() - start


def by_parts(accuracies: Callable[[Episode], Any], tasks: Episode) -> np.ndarray:
    """Accuracies of many episodes, some at a time."""
    starts = range(0, len(tasks.support), _TOGETHER)
    parts = (Episode(*(x[s : s + _TOGETHER] for x in tasks)) for s in starts)
    return np.concatenate([np.asarray(accuracies(part)) for part in parts])


class Maml:
    """MAML for so many shots, compiled once for all rates and lengths.

    The outer optimizer has `keep_bases` where inner steps stay in the eigenbases.
    """

    def __init__(self, contender: Contender, shots: int, spectral: bool, first: bool):
        self.contender, self.shots, self.spectral = contender, shots, spectral
        self.first, self.model = first, DrawingsMlp(WAYS)
        self.loss = functools.partial(cross_entropy, self.model)
        self._init = jax.jit(contender.build(lambda count: jnp.zeros(())).init)
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1))
        self._accuracies = jax.jit(self._judge)

    def __call__(self, characters: Characters, plan: Plan) -> Fitted:
        """Train on episodes of these characters."""
        rng = np.random.default_rng([plan.seed, 0])
        drawn = episodes(characters, WAYS, self.shots, TRAIN_QUERIES, rng)
        batches = (stacked(drawn, TASKS) for _ in range(plan.steps))
        images = characters.images[0, :2]
        params = self.model.init(jax.random.key(plan.seed), images)["params"]
        numbers = tuple(map(np.float32, (plan.rate, plan.inner_rate, plan.steps)))
        params, state, loss, seconds = run_loop(
            lambda *told: self._step(*told, *numbers),
            *(params, self._init(params), batches),
        )

        def judge(tasks: Episode, rate: float) -> np.ndarray:
            return by_parts(
                lambda some: self._accuracies(params, state, some, rate), tasks
            )

        size = dsbp_optax.diagnostics.state_bytes(state)
        return Fitted(judge, loss, seconds, size)

    def _inner(self, opt_state: Any, rate: Any, steps: int) -> Inner:
        found = Inner(rate, steps, first_order=self.first)
        return found._replace(move=in_bases(opt_state)) if self.spectral else found

    def _train_step(
        self, params: Params, opt_state: Any, tasks: Episode, *numbers: jax.Array
    ) -> Any:
        rate, inner_rate, steps = numbers
        tx = self.contender.build(lambda count: cosine(count, rate, steps))
        inner = self._inner(opt_state, inner_rate, TRAIN_STEPS)

        def outer(params: Params, tasks: Episode) -> jax.Array:
            return meta_loss(self.loss, params, tasks, inner)

        return train_step(outer, None, tx, params, opt_state, tasks)

    def _judge(self, params: Params, opt_state: Any, tasks: Episode, rate: Any) -> Any:
        inner = self._inner(opt_state, rate, TEST_STEPS)

        def one(task: Episode) -> jax.Array:
            mine = adapt(self.loss, params, task.support, task.support_labels, inner)
            logits = self.model.apply({"params": mine}, task.query)
            return jnp.mean(logits.argmax(-1) == task.query_labels)

        return jax.vmap(one)(tasks)


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


def accuracies(
    features: Callable[[Any], Any], classifier: Any, tasks: Episode, rate: Any
) -> jax.Array:
    """Of a classifier of features; supports and queries pass the network together."""

    def one(task: Episode) -> jax.Array:
        count = len(task.support)
        seen = features(jnp.concatenate([task.support, task.query]))
        scores = classifier(seen[:count], task.support_labels, seen[count:], rate)
        return jnp.mean(scores.argmax(-1) == task.query_labels)

    return jax.vmap(one)(tasks)


def pretrained(classifier: Callable[..., jax.Array]) -> Fit:
    """A classifier of all training characters; its features meet the new ones."""
    init = jax.jit(_ADAM.build(lambda count: jnp.zeros(())).init)

    def step(params: Params, state: Any, batch: Any, model: Any, *told: Any) -> Any:
        tx = _ADAM.build(lambda count: cosine(count, *told))
        loss = functools.partial(cross_entropy, model)
        return train_step(lambda p, b: loss(p, *b), None, tx, params, state, batch)

    step = jax.jit(step, static_argnums=3, donate_argnums=(0, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def judged(model: DrawingsMlp, params: Params, tasks: Episode, rate: Any) -> Any:
        def features(images: jax.Array) -> Any:
            return model.apply({"params": params}, images, method="features")

        return accuracies(features, classifier, tasks, rate)

    def fit(characters: Characters, plan: Plan) -> Fitted:
        model, steps = DrawingsMlp(len(characters)), CLASSIFIER_STEPS * plan.steps
        rng, shape = np.random.default_rng([plan.seed, 0]), characters.images.shape
        batches = (_batch(characters, rng, *shape[:2]) for _ in range(steps))
        images = characters.images[0, :2]
        params = model.init(jax.random.key(plan.seed), images)["params"]
        told = model, np.float32(plan.rate), np.float32(steps)
        params, state, loss, seconds = run_loop(
            lambda *held: step(*held, *told), params, init(params), batches
        )
        size = dsbp_optax.diagnostics.state_bytes(state)
        return Fitted(
            lambda t, r: by_parts(lambda s: judged(model, params, s, r), t),
            *(loss, seconds, size),
        )

    return fit


def _batch(
    characters: Characters, rng: np.random.Generator, count: int, drawings: int
) -> Any:
    """Drawings of any characters, with the numbers of these."""
    who = rng.integers(0, count, BATCH)
    return characters.images[who, rng.integers(0, drawings, BATCH)], who


def pixels(characters: Characters, plan: Plan) -> Fitted:
    """Nothing trained: the nearest class mean of the pixels themselves."""
    del characters, plan

    @jax.jit
    def judged(tasks: Episode, rate: Any) -> jax.Array:
        return accuracies(lambda x: x.reshape(len(x), -1), nearest_mean, tasks, rate)

    return Fitted(lambda tasks, rate: by_parts(lambda s: judged(s, rate), tasks))


# ------------------------------------------------------------------------ learners


@dataclass(frozen=True)
class Learner:
    """One way to learn from few drawings."""

    name: str
    summary: str
    make: Callable[[int], Fit]  # shots -> the learner, ready to be trained
    grid: tuple[float, ...] = ()  # outer rates tried first; none: nothing is tuned
    inner_rates: tuple[float, ...] = INNER_RATES  # that are tried, in this order
    takes: str | None = None  # the learner whose tuned rates it takes


def _spectral_adam(
    learning_rate: optax.ScalarOrSchedule, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    settings = {"rank": RANK, "update_every": PERIOD, **settings}
    return keep_bases(optax.adam(learning_rate), **settings)


_ADAM = dataclasses.replace(CONTENDERS["adamw"], name="adam", factory=optax.adam)
_SPECTRAL = dataclasses.replace(_ADAM, name="spectral", factory=_spectral_adam)
_RANDOM = {"basis": dsbp_optax.Basis(solver=keep_basis)}


def _maml(
    name: str,
    summary: str,
    contender: Contender,
    settings: Any = None,
    spectral: bool = False,
    first: bool = False,
    takes: str | None = None,
) -> Learner:
    if settings is not None:
        contender = dataclasses.replace(contender, settings=settings)

    def make(shots: int) -> Fit:
        return Maml(contender, shots, spectral, first)

    return Learner(name, summary, make, contender.grid, takes=takes)


_OUTSIDE = "MAML, {} outside"
LEARNERS = {
    learner.name: learner
    for learner in (
        _maml("maml", "MAML of second order, Adam outside", _ADAM),
        _maml("fomaml", "MAML of first order, Adam outside", _ADAM, first=True),
        _maml(
            *("maml_projected_adamw", _OUTSIDE.format("projected_adamw")),
            *(CONTENDERS["projected_adamw"], {"weight_decay": 0.0}),
        ),
        _maml("maml_muon", _OUTSIDE.format("Muon"), CONTENDERS["muon"]),
        _maml(
            *("maml_projected_muon", _OUTSIDE.format("projected_muon")),
            CONTENDERS["projected_muon"],
        ),
        _maml(
            "maml_spectral",
            f"MAML, Adam outside, inner steps in {RANK} eigendirections a kernel",
            _SPECTRAL,
            spectral=True,
        ),
        _maml(
            *("spectral_random", "the same in 8 random directions", _SPECTRAL, _RANDOM),
            spectral=True,
            takes="maml_spectral",
        ),
        Learner(
            "nearest_mean",
            "classifier pretrained with Adam, nearest class mean of its features",
            *(lambda shots: pretrained(nearest_mean), _ADAM.grid, (0.0,)),
        ),
        Learner(
            "linear_probe",
            "classifier pretrained with Adam, linear probe of its features by SGD",
            *(lambda shots: pretrained(linear_probe), _ADAM.grid),
        ),
        Learner(
            "pixels",
            "nothing trained, nearest class mean of the pixels",
            *(lambda shots: pixels, (), (0.0,)),
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
        plan = Plan(order.rate, inner_rate, order.steps, order.seed)
        fitted = fit(alphabets.train, plan)
        diverged = not np.isfinite(fitted.loss)
        found = fitted.judge(judging(alphabets, self.shots, final), inner_rate)
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


def finals(file: Path, shots: int) -> list[Record]:
    """Final runs at one number of shots, in the order of `LEARNERS`."""
    rows = records.read(file, phase="final", workload=f"omniglot_{shots}_shot")
    names = [*LEARNERS]
    return sorted(rows, key=lambda row: names.index(row["optimizer"]))


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
    quiet: cli.Quiet = False,
) -> None:
    """MAML and its like on 5-way episodes of Omniglot-small; can be continued."""
    deadline, file = time.monotonic() + 3600 * hours, out / "fewshot.jsonl"
    load = functools.cache(lambda: load_omniglot(data_dir))
    with cli.bars(quiet) as progress:
        for one in cli.several(LEARNERS, learner, "--learner"):
            advance = cli.bar(progress, one.name, None)
            for shots in SHOTS:
                lane, fit = Lane(file, one, shots, seeds, steps), None
                while (run := lane.next_run()) and time.monotonic() < deadline:
                    fit = fit or one.make(shots)
                    record = lane.carry_out(load(), fit, *run)
                    records.append(file, "fewshot", [record])
                    advance()
    for shots in SHOTS:
        found = entries(ACCURACY, finals(file, shots))
        cli.show(quiet, *[(f"{shots} shot(s)", tables.fewshot(found))] * bool(found))
