"""The activation metric and the rules in it: against float64, its laws, bad input."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import metric_oracle as oracle
import numpy as np
import optax
import pytest
from metric_oracle import Rule
from states import basis_of, layer, owners, with_basis
from versions import x64

import dsbp_optax
from benchmarks import peers
from dsbp_optax import Activations, Covariance, Sketch
from dsbp_optax.core.state import find_states

STEPS, RANK = 7, 3
#: Kernel shape, axes of the inputs, of the outputs, stacked ones, name of its layer.
SHAPES = {
    "dense": ((16, 12), (0,), (1,), (), "dense"),
    "wide": ((10, 24), (0,), (1,), (), "dense"),
    "conv": ((3, 2, 4, 10), (0, 1, 2), (3,), (), "conv"),
    "attention": ((2, 6, 9), (0, 1), (2,), (), "out"),
    "scan": ((3, 14, 11), (1,), (2,), (0,), "dense"),
}
Make = Callable[..., optax.GradientTransformationExtraArgs]
#: Bases in the dtype that the tests' tolerances are for.
OFTEN = {"update_every": 3, "power_iterations": 2, "dtype": jnp.float32}


def only(state: Any) -> Any:
    (found,) = find_states(state)
    return found


def matrices(array: Any, *groups: Any) -> np.ndarray:
    """As float64 ``(stack, inputs, outputs)``; `groups` are the stacked axes first."""
    stacked, *sides = groups
    array = np.asarray(array, np.float64).transpose(
        *stacked, *(a for s in sides for a in s)
    )
    lengths = np.asarray(array.shape)
    stack = int(np.prod(lengths[: len(stacked)]))
    rows = int(np.prod(lengths[len(stacked) : len(stacked) + len(sides[0])]))
    return array.reshape(stack, rows, -1)


def draw_samples(rng: Any, count: int, d: int, spread: float = 3.0) -> np.ndarray:
    """Samples; eigenvalues ``spread^-i`` of their second moment, random directions."""
    directions, _ = np.linalg.qr(rng.normal(size=(d, d)))
    left, _ = np.linalg.qr(rng.normal(size=(count, d)))
    return 4 * left * spread ** (-0.5 * np.arange(d)) @ directions.T


@functools.cache
def compiled(update: Any) -> Any:
    """Of one transformation once, however many rules its run is compared with."""
    return jax.jit(lambda g, s, p, x: update(g, s, p, statistics=x))


def largest_error(
    tx: Any,
    rule: Rule,
    shape: str = "dense",
    samples: Callable[[Any, int], Any] | None = lambda rng, d: draw_samples(rng, 40, d),
    statistic: Callable[[Any], Any] = Activations,
    steps: int = STEPS,
) -> float:
    """The largest relative error of any update of a run, in float64."""
    size, ins, outs, stacked, layer = SHAPES[shape]
    groups = stacked, ins, outs
    with x64():
        rng = np.random.default_rng(3)
        params = {layer: {"kernel": jnp.asarray(rng.normal(size=size))}}
        path, worst = f"{layer}/kernel", 0.0
        state = tx.init(params)
        update = compiled(tx.update)
        side = ins if rule.side == "input" else outs
        other = outs if rule.side == "input" else ins
        starts = matrices(basis_of(state, path), stacked, side, (*other, len(size)))
        weights = matrices(params[layer]["kernel"], *groups)
        kernels = [oracle.Kernel(w, v) for w, v in zip(weights, starts, strict=True)]
        for count in range(steps):
            grads = jax.tree.map(
                lambda w: jnp.asarray(rng.normal(size=w.shape)), params
            )
            d = kernels[0].basis.shape[0]
            seen = [samples and samples(rng, d) for _ in kernels]
            given = {}
            if samples is not None:
                stack = np.stack(seen) if stacked else seen[0]
                given = {path: statistic(jnp.asarray(stack))}
            updates, state = update(grads, state, params, given)
            params = optax.apply_updates(params, updates)
            got = matrices(updates[layer]["kernel"], *groups)
            matrix = matrices(grads[layer]["kernel"], *groups)
            expected = [
                oracle.step(kernel, g, x, count, rule)
                for kernel, g, x in zip(kernels, matrix, seen, strict=True)
            ]
            gap = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            worst = max(worst, float(gap))
    return worst


#: What is stored in float32 is decoded in it: exact to its rounding.
TOLERANCE = 1e-5

MUON = Rule("muon", "muon", bits=5, nesterov=True, update_every=3)
ADAMW = Rule("adam", inside=True, bits=5, update_every=3)


def make_muon(**more: Any) -> Any:
    settings = {"learning_rate": 1.0, "rank": RANK, **OFTEN, **more}
    return dsbp_optax.dsbp_muon(**with_basis(**settings))


def make_adamw(**more: Any) -> Any:
    settings = {"learning_rate": 1.0, "rank": RANK, "weight_decay": 0.0, **OFTEN}
    return dsbp_optax.dsbp_adamw(**with_basis(**{**settings, **more}))


def make_metric(*args: Any, **more: Any) -> Any:
    settings = with_basis(**{"rank": RANK, **OFTEN, **more})
    return dsbp_optax.scale_by_activation_metric(*args, **settings)


RECIPES = {"muon": (make_muon, MUON), "adamw": (make_adamw, ADAMW)}
every_recipe = pytest.mark.parametrize("name", RECIPES)


# ---------------------------------------------------------------- against float64


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", SHAPES)
@every_recipe
def test_recipes_are_those_of_the_oracle(name, shape, side) -> None:
    make, rule = RECIPES[name]
    rule = dataclasses.replace(rule, side=side)
    assert largest_error(make(side=side), rule, shape) < TOLERANCE


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bits": ({"moment_dtype": "int6"}, {"bits": 6}),
    "floats": ({"moment_dtype": "float32"}, {"bits": 32}),
    "exponent": ({"exponent": 0.8}, {"exponent": lambda count: 0.8}),
    "schedule": (
        {"exponent": lambda count: 0.2 * count},
        {"exponent": lambda count: 0.2 * count},
    ),
    "period": ({"update_every": 2}, {"update_every": 2}),
    "iterations": ({"power_iterations": 4}, {"power_iterations": 4}),
    "whole rank": ({"rank": 16}, {}),
    "rates": (
        {"learning_rate": 0.3, "weight_decay": 0.1},
        {"learning_rate": 0.3, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@every_recipe
def test_each_setting_is_that_of_the_oracle(name, change) -> None:
    """And is seen: the oracle without it gives something else."""
    make, rule = RECIPES[name]
    told, changed = CHANGES[change]
    tx, other = make(**told), dataclasses.replace(rule, **changed)
    assert largest_error(tx, other) < TOLERANCE
    if changed:
        assert largest_error(tx, rule) > 1e3 * TOLERANCE


@pytest.mark.parametrize(
    ("where", "direction", "rank"),  # every pair of two of them
    [
        ("both", "none", RANK),
        ("both", "muon", 16),
        ("before", "none", 16),
        ("before", "muon", RANK),
        ("after", "none", RANK),
        ("after", "muon", 16),
    ],
)
def test_the_metric_alone_is_that_of_the_oracle(where, direction, rank) -> None:
    given = dsbp_optax.orthogonalize() if direction == "muon" else None
    tx = make_metric(given, where=where, rank=rank)
    rule = Rule(direction=direction, where=where, update_every=3, learning_rate=-1.0)
    assert largest_error(tx, rule) < TOLERANCE
    for other in {"both", "before", "after"} - {where}:
        wrong = dataclasses.replace(rule, where=other)
        assert largest_error(tx, wrong) > 1e3 * TOLERANCE


@pytest.mark.parametrize("damping", [0.0, 2.0])
def test_the_damping_is_that_of_the_oracle(damping) -> None:
    tx, rule = make_metric(damping=damping), Rule(update_every=3, learning_rate=-1.0)
    right = dataclasses.replace(rule, damping=damping)
    assert largest_error(tx, right) < TOLERANCE < 1e-3 * largest_error(tx, rule)


def test_a_second_moment_is_as_good_as_its_samples() -> None:
    def statistic(a: Any) -> Any:
        return Covariance(jnp.swapaxes(a, -1, -2) @ a, a.shape[-2])

    for name in ("dense", "scan"):
        error = largest_error(make_muon(), MUON, name, statistic=statistic)
        assert error < TOLERANCE


@pytest.mark.parametrize("side", ["input", "output"])
@every_recipe
def test_without_statistics_the_basis_is_that_of_what_comes_in(name, side) -> None:
    """The momentum's own for Muon, the gradient's for Adam."""
    make, rule = RECIPES[name]
    rule = dataclasses.replace(rule, side=side)
    for shape in ("wide", "scan"):
        error = largest_error(make(side=side), rule, shape, samples=None)
        assert error < 10 * TOLERANCE
    assert largest_error(make(side=side), rule, "wide") < TOLERANCE


def test_a_spectrum_with_nothing_outside_stops_at_the_floor() -> None:
    """Activations of no more directions than the basis has, and no damping."""

    def flat(rng: Any, d: int) -> Any:
        left = np.linalg.qr(rng.normal(size=(40, RANK)))[0]
        return left * [3.0, 2.0, 1.0] @ np.linalg.qr(rng.normal(size=(d, RANK)))[0].T

    tx = make_metric(damping=0.0, where="before")
    rule = Rule(damping=0.0, where="before", update_every=3, learning_rate=-1.0)
    assert largest_error(tx, rule, samples=flat) < TOLERANCE
    for floor in (0.0, 1e-2):
        wrong = dataclasses.replace(rule, floor=floor)
        assert largest_error(tx, wrong, samples=flat) > 1e2 * TOLERANCE


def test_a_direction_weaker_than_the_rest_is_not_lengthened() -> None:
    """A solver that finds the wrong end of the spectrum: then S is the identity."""

    def weakest(operator: Any, basis: Any, iterations: Any) -> Any:
        del iterations
        values, vectors = jnp.linalg.eigh(operator.matmul(jnp.eye(len(basis))))
        k = basis.shape[1]
        return dsbp_optax.Eigenpairs(
            vectors[:, :k][:, ::-1], values[:k][::-1], jnp.zeros(())
        )

    samples = jnp.asarray(
        draw_samples(np.random.default_rng(0), 40, 16, 1.3), jnp.float32
    )
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 12))}
    given = {"kernel": Activations(samples)}
    for rank, same in ((RANK, True), (16, False)):
        tx = make_metric(rank=rank, solver=weakest)
        updates, state = jax.jit(tx.update)(params, tx.init(params), statistics=given)
        assert layer(state, "kernel").spectrum.activations.all()
        gap = float(jnp.abs(updates["kernel"] - params["kernel"]).max())
        assert (gap < 1e-5) == same


WRONG: dict[str, Callable[[Rule], Rule]] = {
    "inverted": lambda rule: dataclasses.replace(rule, exponent=lambda count: -0.5),
    "once": lambda rule: dataclasses.replace(rule, where="before"),
    "behind alone": lambda rule: dataclasses.replace(rule, where="after"),
    "squared": lambda rule: dataclasses.replace(rule, exponent=lambda count: 1.0),
    "damping of the trace": lambda rule: dataclasses.replace(rule, damping=0.2 * 16),
    "damping of a sample": lambda rule: dataclasses.replace(rule, damping=0.2 / 40),
    "moments outside": lambda rule: dataclasses.replace(rule, inside=not rule.inside),
    "another side": lambda rule: dataclasses.replace(rule, learning_rate=2.0),
}


@pytest.mark.parametrize("wrong", WRONG)
@every_recipe
def test_wrong_answers_are_told_apart(name, wrong) -> None:
    make, rule = RECIPES[name]
    assert largest_error(make(), WRONG[wrong](rule)) > 1e3 * TOLERANCE


@every_recipe
def test_wrong_formulas_are_told_apart(name, monkeypatch) -> None:
    """The norm not kept; the rest taken for zero; the past of the basis forgotten."""
    make, rule = RECIPES[name]
    right = oracle.factors

    def of_zero(kernel: Any, rule: Any, exponent: float) -> Any:
        mean = kernel.trace / len(kernel.basis)
        shift = rule.damping * mean
        return (shift / (kernel.values + shift)) ** exponent

    def of_the_wrong_order(*args: Any) -> Any:
        return right(*args)[::-1]

    plants = {
        "keep_norm": [lambda like, matrix: matrix],
        "factors": [of_zero, of_the_wrong_order],
    }
    for attribute, wrongs in plants.items():
        for wrong in wrongs:
            with monkeypatch.context() as patch:
                patch.setattr(oracle, attribute, wrong)
                assert largest_error(make(), rule) > 1e3 * TOLERANCE
    assert largest_error(make(), rule) < TOLERANCE


# ---------------------------------------------------------------- laws

D, M = 16, 12
SAMPLES = jnp.asarray(draw_samples(np.random.default_rng(1), 40, D), jnp.float32)
PARAMS = {
    "dense": {"kernel": jnp.ones((D, M)), "bias": jnp.ones(M)},
    "embed": {"embedding": jnp.ones((5, D))},
}
PATH = "dense/kernel"
GIVEN = {PATH: Activations(SAMPLES)}


def gradients(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS
    )


def run(tx: Any, statistics: Any = GIVEN, steps: int = 5) -> list[np.ndarray]:
    """Updates of the kernel."""
    state, found = tx.init(PARAMS), []
    update = compiled(tx.update)
    for count in range(steps):
        updates, state = update(gradients(count), state, PARAMS, statistics)
        found.append(np.asarray(updates["dense"]["kernel"]))
    return found


def test_an_exponent_of_zero_is_the_direction_alone() -> None:
    direction = dsbp_optax.orthogonalize()

    def alone(updates: Any, params: Any = None) -> Any:
        kernel = direction(updates["dense"]["kernel"], D, M)
        return {**updates, "dense": {**updates["dense"], "kernel": kernel}}

    momentum = dsbp_optax.scale_by_quantized_momentum(bits=5)

    def make(**more: Any) -> Any:
        metric = dsbp_optax.scale_by_activation_metric(direction, rank=RANK, **more)
        return optax.chain(momentum, metric)

    plain = run(optax.chain(momentum, optax.stateless(alone), drop_statistics()))
    for nothing in (0.0, lambda count: 0.0):
        np.testing.assert_allclose(run(make(exponent=nothing)), plain, atol=1e-5)
    assert np.abs(np.subtract(run(make(exponent=0.5)), plain)).max() > 1e-2
    for factory in (dsbp_optax.dsbp_muon, dsbp_optax.dsbp_adamw):
        off, none = run(factory(1.0, exponent=0.0)), run(factory(1.0, exponent=0.0), {})
        np.testing.assert_array_equal(off, none, "statistics no longer matter")


def drop_statistics() -> Any:
    """The identity, which takes any keyword."""
    return optax.with_extra_args_support(optax.identity())


@pytest.mark.parametrize(
    ("where", "power"), [("before", -0.5), ("after", -0.5), ("both", -1.0)]
)
def test_with_a_whole_basis_it_preconditions_by_the_second_moment(where, power) -> None:
    """One factor is ``(C + g I)^(-1/2)``, two of them its square, up to length."""
    tx = make_metric(where=where, rank=D, power_iterations=8)
    samples = draw_samples(np.random.default_rng(2), 40, D, 1.5)
    (got,) = run(tx, {PATH: Activations(jnp.asarray(samples, jnp.float32))}, 1)
    c = samples.T @ samples / len(samples)
    shifted = c + 0.2 * np.trace(c) / D * np.eye(D)
    values, vectors = np.linalg.eigh(shifted)

    def preconditioned(power: float) -> np.ndarray:
        g = np.asarray(gradients(0)["dense"]["kernel"], np.float64)
        found = vectors * values**power @ vectors.T @ g
        return found / np.linalg.norm(found)

    got = got / np.linalg.norm(got)
    np.testing.assert_allclose(got, preconditioned(power), atol=1e-4)
    for wrong in (-power, power / 2, 2 * power):
        assert np.abs(got - preconditioned(wrong)).max() > 1e-2


def test_order_and_signs_of_the_columns_do_not_matter() -> None:
    tx = make_muon(update_every=20)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    _, state = update(gradients(0), state, PARAMS, statistics=GIVEN)
    order, signs = np.asarray([2, 0, 1]), jnp.asarray([1.0, -1.0, -1.0])

    def turned(values: Any) -> Any:
        one = layer(state, PATH)
        eigenvalues = one.spectrum.eigenvalues[values]
        spectrum = one.spectrum._replace(eigenvalues=eigenvalues)
        one = one._replace(basis=one.basis[:, order] * signs, spectrum=spectrum)
        return dsbp_optax.with_layers(state, {PATH: one})

    def kernel(state: Any) -> Any:
        updates, _ = update(gradients(1), state, PARAMS, statistics=GIVEN)
        return updates["dense"]["kernel"]

    np.testing.assert_allclose(kernel(turned(order)), kernel(state), atol=1e-5)
    gap = jnp.abs(kernel(turned(np.arange(3))) - kernel(state)).max()
    assert float(gap) > 1e-2, "eigenvalues belong to their directions"


@every_recipe
def test_the_scale_of_activations_does_not_matter(name) -> None:
    make, _ = RECIPES[name]
    base = run(make())
    for factor in (1e-6, 37.0, 1e6):
        scaled = run(make(), {PATH: Activations(factor * SAMPLES)})
        np.testing.assert_allclose(scaled, base, atol=2e-3 * np.abs(base).max())
    stretched = SAMPLES * jnp.linspace(0.1, 3.0, D)
    other = run(make(), {PATH: Activations(stretched)})
    assert np.abs(np.subtract(other, base)).max() > 5e-2 * np.abs(base).max()


@every_recipe
def test_the_norm_is_that_of_the_direction(name) -> None:
    """Of an update in the metric and of one whose last factor is left out."""
    adam = dsbp_optax.scale_by_quantized_adam()
    momentum = dsbp_optax.scale_by_quantized_momentum()

    def make(where: str) -> Any:
        if name == "adamw":
            return make_metric(inner=adam, where=where)
        direction = dsbp_optax.orthogonalize()
        return optax.chain(momentum, make_metric(direction, where=where))

    both, before = run(make("both")), run(make("before"))
    norms = [[np.linalg.norm(x) for x in found] for found in (both, before)]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert np.abs(np.subtract(both, before)).max() > 1e-2


def test_before_the_first_samples_it_is_the_identity() -> None:
    """Statistics of no sample leave a basis cold, and a cold basis does nothing."""
    nothing = {PATH: Activations(SAMPLES[:0])}
    tx = dsbp_optax.scale_by_activation_metric(rank=RANK)
    for count, got in enumerate(run(tx, nothing)):
        np.testing.assert_array_equal(got, gradients(count)["dense"]["kernel"])
    assert np.abs(run(tx)[0] - gradients(0)["dense"]["kernel"]).max() > 1e-2


def test_parameters_that_are_no_kernels_pass() -> None:
    tx = dsbp_optax.scale_by_activation_metric(dsbp_optax.orthogonalize(), rank=RANK)
    grads = gradients(0)
    updates, _ = compiled(tx.update)(grads, tx.init(PARAMS), PARAMS, GIVEN)
    for path in ("embed", "dense"):
        leaf = "bias" if path == "dense" else "embedding"
        np.testing.assert_array_equal(updates[path][leaf], grads[path][leaf])


def test_kernels_that_share_an_input_share_a_basis() -> None:
    """The update of each is that of the kernel alone with the same statistics."""
    params = {name: {"kernel": jnp.ones((D, M))} for name in "qk"}
    grads = {
        name: {"kernel": gradients(seed)["dense"]["kernel"]}
        for seed, name in enumerate("qk")
    }
    settings = {"rank": D, "power_iterations": 20}
    shared = make_metric(share=[("q/kernel", "k/kernel")], **settings)
    state = shared.init(params)
    assert owners(state) == {"q/kernel"}
    samples = jnp.asarray(
        draw_samples(np.random.default_rng(5), 40, D, 1.5), jnp.float32
    )
    one = {"q/kernel": Activations(samples)}
    both = {**one, "k/kernel": Activations(samples)}
    got, _ = jax.jit(shared.update)(grads, state, params, statistics=one)
    tx = make_metric(**settings)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params, statistics=both)
    chex.assert_trees_all_close(got, expected, atol=1e-3)


# ---------------------------------------------------------------- bad input

BAD = [
    ({"exponent": -0.1}, "exponent: got -0.1, expected a number at least 0"),
    ({"exponent": "half"}, "exponent: got 'half'"),
    ({"rank": 0}, "rank: got 0"),
    ({"update_every": 0}, "update_every: got 0"),
]
OF_THE_METRIC = [
    ({"damping": -1.0}, "damping: got -1.0, expected a number at least 0"),
    ({"damping": float("nan")}, "damping: got nan"),
    ({"where": "behind"}, r"where: got 'behind', expected one of \('both', 'before'"),
    ({"direction": 0.5}, r"direction: got 0\.5, expected a function.*orthogonalize"),
    ({"inner": 3}, "inner: got 3"),
]


@pytest.mark.parametrize(("keywords", "said"), BAD)
def test_numbers_out_of_range(keywords, said) -> None:
    for make in (
        dsbp_optax.scale_by_activation_metric,
        lambda **more: dsbp_optax.dsbp_muon(0.1, **more),
        lambda **more: dsbp_optax.dsbp_adamw(0.1, **more),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            make(**keywords)


@pytest.mark.parametrize(("keywords", "said"), OF_THE_METRIC)
def test_what_else_the_metric_refuses(keywords, said) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        dsbp_optax.scale_by_activation_metric(**keywords)


def test_a_direction_of_another_shape_is_named() -> None:
    tx = dsbp_optax.scale_by_activation_metric(lambda matrix, a, b: matrix[:-1], rank=2)
    said = r"direction of a 16 x 12 kernel: got shape \(15, 12\), expected.*Remedy"
    with pytest.raises(ValueError, match=said):
        jax.jit(tx.update)(gradients(0), tx.init(PARAMS), PARAMS, statistics=GIVEN)


def bad_sketch(basis: Any, value: float) -> Any:
    whole = jnp.ones((1, 1, 1))
    product = jnp.ones_like(basis).at[0, 0, 0].set(value)
    return Sketch(product, 40 * whole, 40 * whole)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@every_recipe
def test_what_is_not_finite_never_enters_the_state(name, value) -> None:
    make, _ = RECIPES[name]
    tx = make(update_every=1)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for count in range(2):
        _, state = update(gradients(count), state, PARAMS, statistics=GIVEN)
    for leaf in ("kernel", "bias"):
        grads = gradients(2)
        broken = grads["dense"][leaf].at[0].set(value)
        grads = {**grads, "dense": {**grads["dense"], leaf: broken}}
        updates, after = update(grads, state, PARAMS, statistics=GIVEN)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        assert int(only(after).skipped) == int(only(state).skipped) + 1
        same = optax.tree.set(after, skipped=only(state).skipped)
        chex.assert_trees_all_equal(same, state)
    for bad in (
        Activations(SAMPLES.at[3, 2].set(value)),
        Covariance(jnp.eye(D).at[0, 0].set(value)),
        bad_sketch(basis_of(state, PATH), value),
    ):
        updates, after = jax.jit(tx.update)(
            gradients(2), state, PARAMS, statistics={PATH: bad}
        )
        chex.assert_tree_all_finite((updates, after))
        old, new = only(state), only(after)
        chex.assert_trees_all_equal(new.basis, old.basis)
        failures = [int(layer(s, PATH).spectrum.failures) for s in (old, new)]
        assert failures[1] == failures[0] + 1
        assert int(new.skipped) == int(old.skipped)
        assert jnp.abs(updates["dense"]["kernel"]).max() > 0


# ---------------------------------------------------------------- as it was measured


@pytest.mark.parametrize("name", ["dsbp_muon", "dsbp_adamw"])
def test_the_contender_of_the_scoreboard_is_the_public_rule(name) -> None:
    """With the scoreboard's decays and its plain Adam for what is no kernel."""
    rate, aux, decay, b1, b2 = 0.02, 0.003, 0.1, 0.9, 0.95
    settings: dict[str, Any] = {"weight_decay": decay, "fallback_learning_rate": aux}
    contender = peers.CONTENDERS[name].build(rate, aux, decay, jnp.asarray(0))
    mask = {"dense": {"kernel": True, "bias": False}, "embed": {"embedding": False}}
    settings["mask"] = mask
    if name == "dsbp_muon":
        settings["fallback"] = optax.scale_by_adam(b1, b2)
    else:
        settings |= {"b1": b1, "b2": b2}
    public = getattr(dsbp_optax, name)(rate, **settings)

    def train(tx: Any) -> Any:
        params = jax.tree.map(lambda x: 0.3 * x, gradients(50))
        state, update = tx.init(params), jax.jit(tx.update)
        for count in range(5):
            given = {PATH: Activations(SAMPLES + 0.1 * count)}
            updates, state = update(gradients(count), state, params, statistics=given)
            params = optax.apply_updates(params, updates)
        return params

    expected = train(public)
    chex.assert_trees_all_close(train(contender), expected, rtol=2e-4, atol=2e-5)
    moved = getattr(dsbp_optax, name)(rate, **{**settings, "exponent": 0.0})
    gap = optax.tree.norm(optax.tree.sub(train(moved), expected))
    assert float(gap) > 1e-3
