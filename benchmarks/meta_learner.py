"""MAML as a learner of few-shot episodes: its two programs and its run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsbp_optax
from benchmarks.data import Characters, Episode, episodes, stacked
from benchmarks.fitting import (
    TASKS,
    TRAIN_QUERIES,
    WAYS,
    Fitted,
    Plan,
    by_parts,
    cross_entropy,
    fresh,
    run_loop,
)
from benchmarks.maml import Inner, adapt, in_bases, meta_loss
from benchmarks.models import DrawingsMlp
from benchmarks.optimizers import Contender
from benchmarks.train import train_step
from benchmarks.workloads import cosine

#: Inner steps in training and after it, as in MAML's own experiments on Omniglot.
TRAIN_STEPS, TEST_STEPS = 1, 3


class Maml:
    """MAML for so many shots, compiled once for all rates and lengths.

    Args:
      contender: the outer optimizer, with `keep_bases` where `spectral`.
      shots: labelled drawings of each character.
      spectral: whether inner steps stay in the eigenbases.
      first_order: whether the outer gradient takes the inner ones as constants.
    """

    def __init__(
        self,
        contender: Contender,
        shots: int,
        *,
        spectral: bool = False,
        first_order: bool = False,
    ):
        self.contender, self.shots = contender, shots
        self.spectral, self.first_order = spectral, first_order
        self.model = DrawingsMlp(WAYS)
        self.loss = functools.partial(cross_entropy, self.model)
        self._init = jax.jit(contender.build(lambda count: jnp.zeros(())).init)
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1))
        self._accuracies = jax.jit(self._judge)

    def __call__(self, characters: Characters, plan: Plan) -> Fitted:
        """Train on episodes of these characters."""
        rng = np.random.default_rng([plan.seed, 0])
        drawn = episodes(characters, WAYS, self.shots, TRAIN_QUERIES, rng)
        batches = (stacked(drawn, TASKS) for _ in range(plan.steps))
        params = fresh(self.model, characters, plan.seed)
        numbers = tuple(map(np.float32, (plan.rate, plan.inner_rate, plan.steps)))
        done = run_loop(
            *(self._step, params, self._init(params), batches, numbers, plan.steps)
        )

        def judge(tasks: Episode, rate: float) -> np.ndarray:
            held = done.params, done.opt_state
            return by_parts(lambda some: self._accuracies(*held, some, rate), tasks)

        size = dsbp_optax.diagnostics.state_bytes(done.opt_state)
        return Fitted(judge, done.loss, done.seconds, size)

    def _inner(self, opt_state: Any, rate: Any, steps: int) -> Inner:
        found = Inner(rate, steps, first_order=self.first_order)
        return found._replace(move=in_bases(opt_state)) if self.spectral else found

    def _train_step(
        self, params: Any, opt_state: Any, tasks: Episode, *numbers: jax.Array
    ) -> Any:
        rate, inner_rate, steps = numbers
        tx = self.contender.build(lambda count: cosine(count, rate, steps))
        inner = self._inner(opt_state, inner_rate, TRAIN_STEPS)

        def outer(params: Any, tasks: Episode) -> jax.Array:
            return meta_loss(self.loss, params, tasks, inner)

        return train_step(outer, None, tx, params, opt_state, tasks)

    def _judge(self, params: Any, opt_state: Any, tasks: Episode, rate: Any) -> Any:
        inner = self._inner(opt_state, rate, TEST_STEPS)

        def one(task: Episode) -> jax.Array:
            mine = adapt(self.loss, params, task.support, task.support_labels, inner)
            logits = self.model.apply({"params": mine}, task.query)
            return jnp.mean(logits.argmax(-1) == task.query_labels)

        return jax.vmap(one)(tasks)
