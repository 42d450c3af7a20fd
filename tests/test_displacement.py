"""Gradients in coordinates at ``K + V S``, a kernel that is not formed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import NETWORKS, ScanNet, batch, init
from test_adapters import loss_of, nnx_twin, optimizer
from test_subspace_gradient import differentiated, exact_adamw, warm

import dsbp_optax
from dsbp_optax import (
    Coordinates,
    project_gradients,
)
from dsbp_optax.core import coordinates, paths
from dsbp_optax.sharpness import subspace

RHO = 0.3


def flat(tree: Any) -> dict[str, Any]:
    return paths.flatten(tree)[0]


def random_steps(params: Any, state: Any) -> dict[str, Coordinates]:
    grads = coordinates.find(project_gradients(params, state))
    rng = np.random.default_rng(5)
    return {
        path: Coordinates(jnp.asarray(rng.normal(size=x.values.shape), jnp.float32))
        for path, x in grads.items()
    }


def formed(params: Any, state: Any, steps: dict[str, Coordinates]) -> Any:
    """The parameters with ``K + V S`` in the place of K."""
    spaces = subspace.subspaces(subspace.projections(state, "test"), flat(params))
    lifts = {p: spaces[p].lift(spaces[p].project(s)) for p, s in steps.items()}
    return subspace.add(params, lifts)


def close(got: Any, expected: Any) -> None:
    """To rounding of the largest number of each part: a key's bias has no gradient."""
    for left, right in zip(got, expected, strict=True):
        one, two = jax.tree.leaves(left), jax.tree.leaves(right)
        most = max(float(jnp.abs(x).max()) for x in two)
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4 * most)


@pytest.mark.parametrize("name", [*NETWORKS, "remat"])
def test_equals_projecting_the_whole_gradient_there(name: str) -> None:
    network = NETWORKS["scan" if name == "remat" else name]
    model = ScanNet(remat=True) if name == "remat" else network.linen
    params, x = init(network), batch(network, 3)
    loss_fn = loss_of(model)
    state = warm(optimizer(), params, loss_fn, x)
    short = dsbp_optax.linen.subspace_value_and_grad(loss_fn)
    long = dsbp_optax.linen.value_and_grad(loss_fn)
    steps = random_steps(params, state)

    @jax.jit
    def run(params: Any, state: Any, steps: Any) -> Any:
        value, grads, seen = long(formed(params, state, steps), x, opt_state=state)
        expected = value, project_gradients(grads, state), seen
        got = short(params, x, opt_state=state, displacement=steps)
        zero = jax.tree.map(jnp.zeros_like, steps)
        still = short(params, x, opt_state=state, displacement=zero)
        return got, expected, short(params, x, opt_state=state), still

    got, expected, here, still = run(params, state, steps)
    close(got, expected)
    gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), got[1], here[1])
    assert max(map(float, jax.tree.leaves(gaps))) > 1e-3, "the step matters"
    close(still, here)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_is_the_same_either_way(adaptive: bool) -> None:
    """With a rule that has no residual, over refreshes; unprojected leaves step too."""
    network = NETWORKS["dense"]
    loss_fn, params, x = loss_of(network.linen), init(network), batch(network, 3)
    inner = exact_adamw()

    def train(short: bool, radius: float) -> Any:
        tx = dsbp_optax.subspace_sam(inner, radius, adaptive=adaptive)
        collect = differentiated(loss_fn, short)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            _, grads, seen = collect(params, x, opt_state=state)
            grads = grads if short else project_gradients(grads, state)

            def grad_fn(params: Any, step: Any) -> Any:
                if not short:
                    there = formed(params, state, step)
                    return project_gradients(jax.grad(loss_fn)(there, x), state)
                return collect(params, x, opt_state=state, displacement=step)[1]

            updates, state = tx.update(
                grads, state, params, grad_fn=grad_fn, statistics=seen
            )
            return optax.apply_updates(params, updates), state

        held = params
        state = dsbp_optax.linen.warm_start(
            loss_fn, params, x, opt_state=tx.init(params)
        )
        for _ in range(6):
            held, state = step(held, state)
        return held

    got, expected, still = train(True, RHO), train(False, RHO), train(True, 0.0)
    for path, leaf in flat(expected).items():
        np.testing.assert_allclose(flat(got)[path], leaf, rtol=1e-3, atol=1e-4)
    gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), got, still)
    assert max(map(float, jax.tree.leaves(gap))) > 1e-3, "the ascent matters"


def test_nnx_takes_the_second_gradient_in_coordinates() -> None:
    network = NETWORKS["dense"]
    params, x = init(network), batch(network, 3)
    inner = dsbp_optax.subspace_adamw(0.01, rank=2)

    def loss_fn(model: Any, x: Any) -> Any:
        return jnp.mean(model(x) ** 2)

    def train(radius: float) -> Any:
        model = nnx_twin(network, params)
        tx = dsbp_optax.subspace_sam(inner, radius)
        opt = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, opt: Any) -> None:
            collect = dsbp_optax.nnx.subspace_value_and_grad(loss_fn)
            _, grads, seen = collect(model, x, opt_state=opt)
            grad_fn = dsbp_optax.nnx.make_grad_fn(loss_fn, model, x, opt_state=opt)
            opt.update(model, grads, grad_fn=grad_fn, statistics=seen)

        for _ in range(3):
            step(model, opt)
        return nnx.state(model, nnx.Param)

    def linen(radius: float) -> Any:
        loss_fn = loss_of(network.linen)
        collect = dsbp_optax.linen.subspace_value_and_grad(loss_fn)
        tx = dsbp_optax.subspace_sam(inner, radius)
        held, state = params, tx.init(params)
        for _ in range(3):
            _, grads, seen = collect(held, x, opt_state=state)

            def grad_fn(there: Any, step: Any, state: Any = state) -> Any:
                return collect(there, x, opt_state=state, displacement=step)[1]

            updates, state = tx.update(
                grads, state, held, grad_fn=grad_fn, statistics=seen
            )
            held = optax.apply_updates(held, updates)
        return held

    got, still = train(RHO), train(0.0)
    gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), got, still)
    assert max(map(float, jax.tree.leaves(gap))) > 1e-4
    for radius, mine in ((RHO, got), (0.0, still)):
        total = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(linen(radius)))
        ours = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(mine))
        assert ours == pytest.approx(total, rel=0.05)


def test_no_second_set_of_kernels_is_held() -> None:
    """Temporary bytes of the whole step, by the compiler's account."""
    import flax.linen as nn

    model = nn.Sequential([f for _ in range(6) for f in (nn.Dense(256), nn.relu)])
    x = jnp.ones((32, 256))
    params = model.init(jax.random.key(0), x)["params"]
    inner = dsbp_optax.subspace_adamw(0.01, rank=4)
    tx = dsbp_optax.subspace_sam(inner, RHO)
    loss_fn = loss_of(model)

    def temporary(short: bool) -> int:
        collect = differentiated(loss_fn, short)

        def step(params: Any, state: Any) -> Any:
            _, grads, seen = collect(params, x, opt_state=state)

            def grad_fn(there: Any, step: Any) -> Any:
                if not short:
                    return jax.grad(loss_fn)(there, x)
                return collect(there, x, opt_state=state, displacement=step)[1]

            return grads, grad_fn(params, coordinates.find(grads)), seen

        compiled = jax.jit(step).lower(params, jax.eval_shape(tx.init, params))
        memory = compiled.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    kernels = 6 * 4 * 256 * 256
    assert temporary(False) > 2 * kernels
    assert temporary(True) < 0.5 * kernels


def test_a_step_that_does_not_fit_is_refused() -> None:
    network = NETWORKS["dense"]
    loss_fn, params, x = loss_of(network.linen), init(network), batch(network, 3)
    state = optimizer().init(params)
    collect = dsbp_optax.linen.subspace_value_and_grad(loss_fn)
    steps = random_steps(params, state)
    path = next(iter(steps))
    for wrong, words in (
        ({path: Coordinates(jnp.zeros((1, 2, 3)))}, (path, "expected", "Remedy")),
        ({"nothing/kernel": steps[path]}, ("nothing/kernel", "no basis", "Remedy")),
    ):
        with pytest.raises(ValueError) as raised:
            collect(params, x, opt_state=state, displacement=wrong)
        assert all(word in str(raised.value) for word in words), raised.value
