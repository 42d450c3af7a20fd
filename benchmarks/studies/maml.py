"""Model-agnostic meta-learning (MAML), and inner steps inside the eigenbases.

    theta_i <- theta_i - alpha M(grad L(theta_i; support of task i)),  from theta
    minimised over theta:  mean_i L(theta_i; queries of task i)

M is the identity in MAML (Finn, Abbeel, Levine, arXiv 1703.03400). With `in_bases` it
keeps of each kernel's gradient what lies in the top eigenbasis of its layer's
activations, V V^T G: what "spectral meta learning" may mean, which the paper (arXiv
2505.23369) names and the part of it at hand does not define.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dsbp_optax
from benchmarks.tasks.base import Params
from benchmarks.tasks.omniglot import Episode

#: ``(params, images, labels) -> loss``.
Loss = Callable[[Params, Any, Any], jax.Array]


class Inner(NamedTuple):
    """How a task is adapted to."""

    rate: Any  # alpha
    steps: int
    move: Callable[[Params], Params] = lambda grads: grads  # M
    first_order: bool = False  # whether inner gradients are constants to the outer one


def adapt(loss: Loss, params: Params, images: Any, labels: Any, inner: Inner) -> Params:
    """The parameters after the inner steps on one task's supports."""
    for _ in range(inner.steps):
        grads = inner.move(jax.grad(loss)(params, images, labels))
        if inner.first_order:
            grads = jax.lax.stop_gradient(grads)
        params = jax.tree.map(lambda p, g: p - inner.rate * g, params, grads)
    return params


def meta_loss(loss: Loss, params: Params, tasks: Episode, inner: Inner) -> jax.Array:
    """Mean loss on the queries of stacked tasks, each adapted to first."""

    def one(task: Episode) -> jax.Array:
        mine = adapt(loss, params, task.support, task.support_labels, inner)
        return loss(mine, task.query, task.query_labels)

    return jnp.mean(jax.vmap(one)(tasks))


def keep_bases(**settings: Any) -> optax.GradientTransformationExtraArgs:
    """Updates as they are; a state of eigenbases, for `in_bases`.

    `settings` are those of `dsbp_optax.scale_by_spectral_projection`.
    """
    projection = dsbp_optax.scale_by_spectral_projection(
        project="always", project_cold=True, **settings
    )

    def update(
        updates: Params,
        state: Any,
        params: Params = None,
        *,
        statistics: Any = None,
        **others: Any,
    ) -> tuple[Params, Any]:
        del others
        small = dsbp_optax.project_gradients(updates, state)
        _, state = projection.update(small, state, params, statistics=statistics)
        return updates, state

    return optax.GradientTransformationExtraArgs(projection.init, update)


def in_bases(opt_state: Any) -> Callable[[Params], Params]:
    """``V V^T G`` in the place of each kernel's gradient; others are whole.

    The bases are one for all tasks, and constants to the outer gradient.
    """
    layers = dsbp_optax.by_path(opt_state)

    def lift(path: Any, grad: Any, small: Any) -> Any:
        if not isinstance(small, dsbp_optax.Coordinates):
            return grad
        layer = layers[jax.tree_util.keystr(path, simple=True, separator="/")]
        return jnp.einsum("dk,mk->dm", layer.basis, small.values[0])

    def move(grads: Params) -> Params:
        small = dsbp_optax.project_gradients(grads, opt_state)
        return jax.tree_util.tree_map_with_path(lift, grads, small)

    return move
