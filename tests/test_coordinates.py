"""Gradients summed up in the coordinates of the bases equal those summed up whole."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import layer, with_basis

import dsbp_optax
from dsbp_optax import Activations, Axes, Coordinates, project_gradients

D, M, K, N = 12, 10, 3, 40
PATH = "dense/kernel"


def params_of(**shapes: Any) -> Any:
    rng = np.random.default_rng(0)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[-1:]), jnp.float32),
        }
        for name, shape in shapes.items()
    }


def gradients(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def projection(inner: Any = None, **keywords: Any) -> Any:
    chosen = {"rank": K, "update_every": 3, "power_iterations": 1, **keywords}
    chosen = with_basis(**{"project": "always", **chosen})
    inner = optax.scale_by_adam() if inner is None else inner
    return dsbp_optax.scale_by_spectral_projection(inner, **chosen)


def activations(seed: int, d: int = D) -> Activations:
    rng = np.random.default_rng(100 + seed)
    return Activations(jnp.asarray(rng.normal(size=(N, d)) * 1.5 ** -np.arange(d)))


def refused(call: Any, *words: str) -> None:
    with pytest.raises(ValueError) as raised:
        call()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


def assert_close(left: Any, right: Any, rtol: float = 1e-4) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def mean_of(trees: list[Any]) -> Any:
    total = trees[0]
    for tree in trees[1:]:
        total = jax.tree.map(jnp.add, total, tree)
    return jax.tree.map(lambda x: x / len(trees), total)


CASES = {
    "input": ({"dense": (D, M)}, {}),
    "output": ({"dense": (M, D)}, {"side": "output"}),
    "stacked": ({"dense": (2, D, M)}, {}),
    "a stack of one": ({"dense": (1, D, M)}, {}),
    "heads": ({"dense": (D, 2, 5)}, {"axes": {PATH: Axes((0,), (1, 2))}}),
    "behind": ({"dense": (D, 2, M)}, {"axes": {PATH: Axes((0,), (2,), (1,))}}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_coordinates_are_those_of_the_moments(case: str) -> None:
    """Between refreshes an update from coordinates is that from whole gradients."""
    shapes, keywords = CASES[case]
    params = params_of(**shapes)
    tx = projection(project_cold=True, update_every=10**6, **keywords)
    state = tx.init(params)
    state = state._replace(step=state.step + 5)
    parts = [gradients(params, i) for i in range(3)]
    small = mean_of([project_gradients(g, state) for g in parts])
    held = small["dense"]["kernel"]
    assert isinstance(held, Coordinates)
    assert held.values.size == optax.tree.get(state.inner, "mu").size
    update = jax.jit(tx.update)
    expected, after = update(mean_of(parts), state)
    got, mine = update(small, state)
    assert_close(got, expected)
    assert_close(mine, after)
    fewer, _ = update(mean_of([project_gradients(g, state) for g in parts[1:]]), state)
    gap = jnp.abs(fewer["dense"]["kernel"] - got["dense"]["kernel"]).max()
    assert float(gap) > 1e-3, "every part counts"


def test_coordinates_turn_with_the_basis() -> None:
    """On a refresh ``V_new^T V_old P``, which is what projecting ``V_old P`` gives."""
    params = params_of(dense=(D, M))
    tx = projection(optax.trace(0.9), update_every=1)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(2):
        statistics = {PATH: activations(i)}
        _, state = update(gradients(params, i), state, statistics=statistics)
    statistics, grads = {PATH: activations(7)}, gradients(params, 7)
    small = project_gradients(grads, state)
    basis = layer(state, PATH).basis
    inside = basis @ (basis.T @ grads["dense"]["kernel"])
    held = {"dense": {**grads["dense"], "kernel": inside}}
    expected, after = update(held, state, statistics=statistics)
    got, mine = update(small, state, statistics=statistics)
    assert float(jnp.abs(layer(after, PATH).basis - basis).max()) > 1e-2
    assert_close(got, expected)
    assert_close(mine.basis, after.basis)
    assert_close(mine.inner, after.inner)
    whole, _ = update(grads, state, statistics=statistics)
    assert (
        float(jnp.abs(whole["dense"]["kernel"] - got["dense"]["kernel"]).max()) > 1e-3
    )
    energies = [layer(s, PATH).spectrum.energy for s in (mine, state)]
    np.testing.assert_array_equal(*energies)


def test_without_a_statistic_the_basis_stays() -> None:
    params = params_of(dense=(D, M), other=(D, M))
    tx = projection(update_every=1)
    state = tx.init(params)
    small = project_gradients(params, state)
    small["other"]["kernel"] = params["other"]["kernel"]
    _, new = jax.jit(tx.update)(small, state)
    np.testing.assert_array_equal(layer(new, PATH).basis, layer(state, PATH).basis)
    assert int(layer(new, PATH).spectrum.iterations) == 0
    assert int(layer(new, PATH).spectrum.failures) == 0
    assert int(layer(new, "other/kernel").spectrum.iterations) == 1
    whole, _ = jax.jit(tx.update)(params, state)
    mixed, _ = jax.jit(tx.update)(small, state)
    assert_close(mixed["other"], whole["other"])


def test_a_cold_layer_uses_them_as_they_are() -> None:
    params = params_of(dense=(D, M))
    tx = projection(optax.identity())
    state = tx.init(params)
    small = project_gradients(params, state)
    updates, _ = jax.jit(tx.update)(small, state)
    basis = layer(state, PATH).basis
    expected = basis @ (basis.T @ params["dense"]["kernel"])
    np.testing.assert_allclose(updates["dense"]["kernel"], expected, atol=1e-5)


def test_numbers_that_are_not_finite_change_nothing() -> None:
    params = params_of(dense=(D, M))
    tx = projection(update_every=1)
    state = tx.init(params)
    small = project_gradients(params, state)
    bad = Coordinates(small["dense"]["kernel"].values.at[0, 0, 0].set(jnp.nan))
    small["dense"]["kernel"] = bad
    updates, new = jax.jit(tx.update)(small, state, statistics={PATH: activations(0)})
    assert not any(x.any() for x in jax.tree.leaves(updates))
    assert int(new.skipped) == 1
    assert_close((new.basis, new.inner), (state.basis, state.inner), rtol=0)


def test_shared_bases_and_wrappers() -> None:
    """Members of a group by the owner's basis; inside of a chain, a mask, a recipe."""
    params = params_of(dense=(D, M), gate=(D, M))
    share = [("dense/kernel", "gate/kernel")]
    tx = optax.chain(
        optax.masked(
            projection(share=share, project_cold=True),
            {"dense": True, "gate": {"kernel": True, "bias": False}},
        ),
        optax.add_decayed_weights(0.1),
    )
    state = tx.init(params)
    parts = [gradients(params, i) for i in range(2)]
    small = mean_of([project_gradients(g, state) for g in parts])
    statistics = {PATH: activations(0)}
    _, state = jax.jit(tx.update)(small, state, params, statistics=statistics)
    small = mean_of([project_gradients(g, state) for g in parts])
    got, mine = jax.jit(tx.update)(small, state, params)
    expected, after = jax.jit(tx.update)(mean_of(parts), state, params)
    assert_close(got, expected)
    assert_close(mine, after)


# ---------------------------------------------------------------- what is refused


def test_a_residual_needs_the_whole_gradient() -> None:
    params = params_of(dense=(D, M))
    words = (f"'{PATH}'", "Remedy", "residual=None", "whole gradients")
    for tx in (
        dsbp_optax.subspace_adamw(0.1, rank=K, residual="int5"),
        projection(residual=dsbp_optax.scale_residual(1.0)),
        optax.chain(dsbp_optax.add_spectral_sharpness(0.1), projection()),
    ):
        state = tx.init(params)
        small = project_gradients(params, state)
        refused(lambda tx=tx, s=state, g=small: tx.update(g, s, params), *words)


def test_rules_of_whole_gradients_refuse_coordinates() -> None:
    params = params_of(dense=(D, M))
    state = projection().init(params)
    small = project_gradients(params, state)
    words = (f"'{PATH}'", "Remedy", "subspace_muon", "whole gradients")
    for tx in (
        dsbp_optax.dsbp_adamw(0.1, rank=K),
        dsbp_optax.dsbp_muon(0.1, rank=K),
        dsbp_optax.scale_by_activation_metric(rank=K),
        dsbp_optax.scale_by_quantized_momentum(),
        dsbp_optax.scale_by_quantized_adam(),
    ):
        state = tx.init(params)
        refused(lambda tx=tx, s=state: tx.update(small, s, params), *words)
    for name in ("dsbp_adamw", "dsbp_muon"):
        state = getattr(dsbp_optax, name)(0.1, rank=K).init(params)
        refused(lambda s=state: project_gradients(params, s), "subspace_muon", "Remedy")


def test_wrong_trees_and_states_are_named() -> None:
    params = params_of(dense=(D, M))
    tx = projection()
    state = tx.init(params)
    small = project_gradients(params, state)
    refused(lambda: project_gradients(params, ()), "tuple", "scale_by_spectral")
    refused(lambda: project_gradients(small, state), f"'{PATH}'", "Coordinates")
    refused(lambda: project_gradients({"a": params["dense"]}, state), f"'{PATH}'")
    other = params_of(dense=(D + 1, M))
    refused(lambda: project_gradients(other, state), f"'{PATH}'", "(13, 10)", "(12, 10")
    two = projection(rank=2).init(params)
    refused(
        lambda: tx.update(project_gradients(params, two), state),
        f"'{PATH}'",
        "(1, 10, 2)",
        "(1, 10, 3)",
        "Remedy",
    )
    bare = projection(rank=lambda path, shape: None)
    refused(lambda: bare.update(small, bare.init(params)), f"'{PATH}'", "no basis")


# ---------------------------------------------------------------- micro-batches


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(nn.Dense(self.width, name="first")(x))
        return nn.Dense(self.width, name="second")(x)


def accumulate(collect: Any, small: bool) -> Any:
    """``(params, state, micro-batches) -> (sum of gradients, sum of statistics)``."""

    def convert(grads: Any, state: Any) -> Any:
        return project_gradients(grads, state) if small else grads

    def run(params: Any, state: Any, batches: Any) -> Any:
        def body(total: Any, x: Any) -> Any:
            _, grads, statistics = collect(params, x, opt_state=state)
            total = jax.tree.map(jnp.add, total, convert(grads, state))
            return total, statistics

        start = jax.tree.map(jnp.zeros_like, convert(params, state))
        total, stacked = jax.lax.scan(body, start, batches)
        return total, dsbp_optax.sum_statistics(stacked)

    return run


def problem(width: int, **keywords: Any) -> Any:
    model = Net(width)
    batches = jax.random.normal(jax.random.key(0), (4, 8, width)) + 0.3
    params = model.init(jax.random.key(1), batches[0])["params"]

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    tx = projection(project_cold=True, **keywords)
    return tx, params, batches, dsbp_optax.linen.value_and_grad(loss_fn)


def test_micro_batches_in_a_scan() -> None:
    """Sketches add up beside; steps without a refresh equal those of whole gradients.

    On a refresh only the part in the old basis is seen.
    """
    tx, params, batches, collect = problem(D, update_every=3)
    state, update = tx.init(params), jax.jit(tx.update)
    sums = {small: jax.jit(accumulate(collect, small)) for small in (False, True)}
    for i in range(4):
        small, statistics = sums[True](params, state, batches + i)
        whole, same = sums[False](params, state, batches + i)
        assert_close(statistics, same)
        got, mine = update(small, state, statistics=statistics)
        expected, after = update(whole, state, statistics=statistics)
        assert_close(mine.basis, after.basis)
        if i % 3:
            assert_close(got, expected, rtol=1e-3)
        else:
            gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), got, expected)
            assert float(gap["first"]["kernel"]) > 1e-3, "the basis has turned"
        state = mine
    assert int(layer(state, "first/kernel").spectrum.activations.max()) == 1


def test_accumulators_hold_k_m_numbers() -> None:
    """By shapes, and by what XLA reserves for the loop."""
    width, rank = 256, 4
    tx, params, batches, collect = problem(width, rank=rank)
    state = jax.eval_shape(tx.init, params)
    memory = {}
    for small in (False, True):
        compiled = jax.jit(accumulate(collect, small)).lower(params, state, batches)
        total, _ = jax.eval_shape(accumulate(collect, small), params, state, batches)
        size = sum(x.size for x in jax.tree.leaves(total)) - 2 * width
        assert size == 2 * width * (rank if small else width)
        found = compiled.compile().memory_analysis()
        memory[small] = found.temp_size_in_bytes + found.output_size_in_bytes
    saved = memory[False] - memory[True]
    assert saved > 0.8 * 2 * 4 * width * (width - rank), memory


def test_orthogonalised_updates_of_coordinates_and_a_fallback() -> None:
    """A direction, a fallback and a kernel in full space beside coordinates."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"wide": draw(32, 24), "narrow": draw(3, 2), "bias": draw(24)}
    grads = jax.tree.map(lambda p: draw(*p.shape), params)
    tx = dsbp_optax.scale_by_spectral_projection(
        optax.trace(0.9),
        rank=4,
        direction=dsbp_optax.orthogonalize(),
        fallback=optax.scale_by_sign(),
        project_cold=True,
    )
    state = tx.init(params)
    small = project_gradients(grads, state)
    seen = {"wide": Activations(draw(64, 32))}
    still = state._replace(step=state.step + 50)  # between two refreshes
    got, _ = jax.jit(tx.update)(small, still, statistics=seen)
    expected, _ = jax.jit(tx.update)(grads, still, statistics=seen)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4), got, expected
    )
    assert float(jnp.abs(got["wide"]).max()) > 0


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_sharpness_term_keeps_its_size_beside_a_direction(side) -> None:
    """It is the same added term whatever the direction, linear in the parameters."""
    params = {"kernel": params_of(dense=(D, M))["dense"]["kernel"]}
    grads, zeros = gradients(params, 1), jax.tree.map(jnp.zeros_like, params)
    direction = dsbp_optax.orthogonalize()
    tx = projection(optax.identity(), side=side, sharpness=0.5, direction=direction)
    seen = {"kernel": activations(0, D if side == "input" else M)}
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params, statistics=seen)
    _, basis, spectrum, _ = layer(state, "kernel")
    share = float(spectrum.eigenvalues.max() / spectrum.trace.max())
    leading = np.asarray(basis[:, 0])
    square = 0.5 * share * np.outer(leading, leading)
    weight = np.asarray(params["kernel"])
    term = square @ weight if side == "input" else weight @ square
    assert np.abs(term).max() > 1e-2
    for given in (grads, project_gradients(grads, state)):
        with_term, _ = update(given, state, params)
        without, _ = update(given, state, zeros)
        added = with_term["kernel"] - without["kernel"]
        np.testing.assert_allclose(added, term, atol=1e-5)
        assert float(jnp.abs(without["kernel"]).max()) > 0.1


def test_bases_stored_in_half_precision_are_widened_before_they_project() -> None:
    """Products in bfloat16 would be off in the third digit."""
    tx = projection(dtype=jnp.bfloat16)
    params = params_of(dense=(D, M))
    state = tx.init(params)
    for seed in range(3):
        grads = gradients(params, seed)
        _, state = jax.jit(tx.update)(
            grads, state, params, statistics={PATH: activations(seed)}
        )
    basis = layer(state, PATH).basis
    assert basis.dtype == jnp.bfloat16
    kernel = np.asarray(grads["dense"]["kernel"], np.float64)
    exact = np.asarray(basis, np.float64).T @ kernel
    found = project_gradients(grads, state)["dense"]["kernel"].values
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0].T, exact, rtol=1e-5, atol=1e-5)
    rounded = basis.T @ grads["dense"]["kernel"].astype(jnp.bfloat16)
    assert not np.allclose(rounded.astype(jnp.float32), exact, rtol=1e-5, atol=1e-5)
    angles = dsbp_optax.diagnostics.principal_angles(state, state)[PATH]
    assert angles.dtype == jnp.float32 and float(angles.max()) < 0.1


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (3, 24, 10)])
@pytest.mark.filterwarnings("ignore:the axes of kernels were guessed")
def test_the_direction_of_coordinates_is_that_of_the_lifted_matrix(side, shape) -> None:
    """The polar factor of ``V u`` is V times that of u, at ``k / d`` of the cost."""
    direction = dsbp_optax.orthogonalize()
    tx = dsbp_optax.scale_by_spectral_projection(
        rank=4, basis=dsbp_optax.Basis(side=side), direction=direction, project="always"
    )
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    state = tx.init(params)
    held = project_gradients(params, state)
    got, _ = jax.jit(tx.update)(held, state, params)
    plain = dsbp_optax.scale_by_spectral_projection(
        rank=4, basis=dsbp_optax.Basis(side=side), project="always"
    )
    lifted, _ = plain.update(held, plain.init(params), params)
    expected = direction(lifted["kernel"], *shape[-2:])
    np.testing.assert_allclose(got["kernel"], expected, rtol=1e-3, atol=1e-4)
    assert float(jnp.abs(lifted["kernel"] - got["kernel"]).max()) > 0.1

    def flops(gradients: Any) -> float:
        program = jax.jit(tx.update).lower(gradients, state, params).compile()
        costs = program.cost_analysis()
        return (costs[0] if isinstance(costs, list) else costs)["flops"]

    assert flops(held) < 0.9 * flops(params)
