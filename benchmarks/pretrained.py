"""Learners without meta-learning: a classifier's features, then something simple."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_optax
from benchmarks.data import Characters, Episode
from benchmarks.fitting import (
    WAYS,
    Fitted,
    Plan,
    by_parts,
    cross_entropy,
    fresh,
    run_loop,
)
from benchmarks.models import DrawingsMlp
from benchmarks.optimizers import Contender
from benchmarks.train import train_step
from benchmarks.workloads import cosine

#: Steps for each outer step of MAML, and their batch: about the drawings of one shot.
STEPS, BATCH = 2, 256
#: Steps of the linear probe, each on all supports.
PROBE_STEPS = 100

#: ``(support, support labels, query, inner rate) -> scores (queries, ways)``.
Classifier = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def nearest_mean(
    support: jax.Array, labels: jax.Array, query: jax.Array, rate: Any
) -> jax.Array:
    """The cosine of a query with the mean of each class's supports."""
    del rate
    support, query = (x / _length(x) for x in (support, query))
    means = jax.nn.one_hot(labels, WAYS).T @ support
    return query @ (means / _length(means)).T


def linear_probe(
    support: jax.Array, labels: jax.Array, query: jax.Array, rate: Any
) -> jax.Array:
    """A linear classifier, from zero, by gradient descent on the supports."""
    support, query = (x / _length(x) for x in (support, query))

    def loss(head: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = support @ head[0] + head[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(_: Any, head: Any) -> Any:
        return jax.tree.map(lambda p, g: p - rate * g, head, jax.grad(loss)(head))

    zero = jnp.zeros((support.shape[-1], WAYS)), jnp.zeros(WAYS)
    weight, bias = jax.lax.fori_loop(0, PROBE_STEPS, step, zero)
    return query @ weight + bias


class Pretrained:
    """A classifier of all training characters; its features meet the new ones.

    Supports and queries of an episode pass the network together, so that batch
    normalization sees all of them.

    Args:
      contender: the optimizer.
      classifier: of features.
    """

    def __init__(self, contender: Contender, classifier: Classifier):
        self.contender, self.classifier = contender, classifier
        self._init = jax.jit(contender.build(lambda count: jnp.zeros(())).init)
        self._step = jax.jit(self._train_step, static_argnums=0, donate_argnums=(1, 2))
        self._accuracies = jax.jit(self._judge, static_argnums=0)

    def __call__(self, characters: Characters, plan: Plan) -> Fitted:
        """Train on all drawings of these characters, a class each."""
        model, steps = DrawingsMlp(len(characters)), STEPS * plan.steps
        batches = _batches(characters, np.random.default_rng([plan.seed, 0]))
        params = fresh(model, characters, plan.seed)
        numbers = np.float32(plan.rate), np.float32(steps)
        step = functools.partial(self._step, model)
        done = run_loop(step, params, self._init(params), batches, numbers, steps)

        def judge(tasks: Episode, rate: float) -> np.ndarray:
            return by_parts(
                lambda some: self._accuracies(model, done.params, some, rate), tasks
            )

        size = dsbp_optax.diagnostics.state_bytes(done.opt_state)
        return Fitted(judge, done.loss, done.seconds, size)

    def _train_step(
        self,
        model: DrawingsMlp,
        params: Any,
        opt_state: Any,
        batch: Any,
        rate: Any,
        steps: Any,
    ) -> Any:
        tx = self.contender.build(lambda count: cosine(count, rate, steps))

        def loss(params: Any, batch: Any) -> jax.Array:
            return cross_entropy(model, params, *batch)

        return train_step(loss, None, tx, params, opt_state, batch)

    def _judge(
        self, model: DrawingsMlp, params: Any, tasks: Episode, rate: Any
    ) -> jax.Array:
        def features(images: jax.Array) -> Any:
            return model.apply({"params": params}, images, method="features")

        return _accuracies(features, self.classifier, tasks, rate)


class Pixels:
    """Nothing trained: the nearest class mean of the pixels themselves."""

    def __call__(self, characters: Characters, plan: Plan) -> Fitted:
        """No training."""
        del characters, plan
        judge = jax.jit(functools.partial(_accuracies, _flat, nearest_mean))
        return Fitted(
            lambda t, rate: by_parts(lambda s: judge(s, rate), t), 0.0, 0.0, 0
        )


def _accuracies(
    features: Callable[[jax.Array], jax.Array],
    classifier: Classifier,
    tasks: Episode,
    rate: Any,
) -> jax.Array:
    def one(task: Episode) -> jax.Array:
        count = len(task.support)
        seen = features(jnp.concatenate([task.support, task.query]))
        scores = classifier(seen[:count], task.support_labels, seen[count:], rate)
        return jnp.mean(scores.argmax(-1) == task.query_labels)

    return jax.vmap(one)(tasks)


def _batches(
    characters: Characters, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Drawings of any characters, with the numbers of these."""
    count, drawings = characters.images.shape[:2]
    while True:
        who = rng.integers(0, count, BATCH)
        yield characters.images[who, rng.integers(0, drawings, BATCH)], who


def _flat(images: jax.Array) -> jax.Array:
    return images.reshape(len(images), -1)


def _length(x: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
