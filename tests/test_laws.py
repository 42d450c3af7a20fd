"""Laws of eigenbasis and projection, each shown to fail on a wrong answer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from versions import x64

import dsbp_optax
from dsbp_optax import Activations, Basis, Covariance, Sketch
from dsbp_optax.core import layout, refresh, stacks
from dsbp_optax.linalg import subspace

D, K, N = 24, 4, 60
SOLVERS = {"power_iteration": dsbp_optax.power_iteration, "eigh": dsbp_optax.eigh}


def orthonormal(rng: np.random.Generator, d: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(d, k)))[0]


def planted(
    rng: np.random.Generator, gap: float = 2.0, d: int = D, k: int = K
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, the top-k directions, the per-sample eigenvalues; `gap` after each."""
    vectors, left = orthonormal(rng, d, d), orthonormal(rng, N, d)
    values = gap ** -np.arange(d, dtype=float)
    samples = left * np.sqrt(values * N) @ vectors.T
    return samples, vectors[:, :k], values[:k]


def nearby(rng: np.random.Generator, truth: np.ndarray, radians: float) -> np.ndarray:
    """A basis of which every principal angle to `truth` is `radians`."""
    d, k = truth.shape
    away = rng.normal(size=(d, k))
    away = np.linalg.qr(away - truth @ (truth.T @ away))[0]
    return np.cos(radians) * truth + np.sin(radians) * away


def gap_between(left: Any, right: Any) -> float:
    """Distance of two subspaces: the norm of the difference of their projectors."""
    left, right = np.asarray(left, float), np.asarray(right, float)
    return float(np.linalg.norm(left @ left.T - right @ right.T, 2))


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("form", ["activations", "covariance"])
def test_planted_spectrum_is_found_in_five_iterations(solver: str, form: str) -> None:
    rng = np.random.default_rng(1)
    samples, truth, values = planted(rng)
    start = jnp.asarray(nearby(rng, truth, 0.1))
    statistic = (
        Activations(jnp.asarray(samples))
        if form == "activations"
        else Covariance(jnp.asarray(samples.T @ samples), float(N))
    )
    pairs = SOLVERS[solver](statistic.operator(start), start, 5)
    assert gap_between(pairs.basis, truth) < 1e-2  # sin(0.1) 2^-5
    leading = np.asarray(pairs.eigenvalues)
    np.testing.assert_allclose(leading, values, rtol=1e-4)
    assert np.all(np.diff(leading) < 0)
    wrong = np.asarray(pairs.basis)[:, ::-1] * leading[::-1]
    assert gap_between(start, truth) > 0.05, "the start must be wrong"
    assert abs(np.linalg.norm(wrong, axis=0) / leading - 1).max() > 0.5


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_projector_is_found_to_four_digits(solver: str) -> None:
    """With a gap of 2 after each of 24 eigenvalues, and of 8 behind the basis."""
    rng = np.random.default_rng(2)
    vectors, left = orthonormal(rng, D, D), orthonormal(rng, N, D)
    values = np.r_[8.0 ** np.arange(K, 0, -1), np.ones(D - K)]
    samples = jnp.asarray(left * np.sqrt(values * N) @ vectors.T)
    start = jnp.asarray(nearby(rng, vectors[:, :K], 0.1))
    pairs = SOLVERS[solver](Activations(samples).operator(start), start, 5)
    assert gap_between(pairs.basis, vectors[:, :K]) < 1e-4
    shifted = SOLVERS[solver](Activations(samples + 0.3).operator(start), start, 5)
    assert gap_between(shifted.basis, vectors[:, :K]) > 1e-2, "a wrong C must show"


def is_projector(p: np.ndarray, rank: int) -> bool:
    symmetric, idempotent = (
        np.allclose(p, p.T, atol=1e-5),
        np.allclose(p @ p, p, atol=1e-5),
    )
    return symmetric and idempotent and np.linalg.matrix_rank(p, tol=1e-3) == rank


def test_projector_is_idempotent_symmetric_and_of_rank_k() -> None:
    rng = np.random.default_rng(3)
    samples, truth, _ = planted(rng)
    start = jnp.asarray(nearby(rng, truth, 0.5), jnp.float32)
    operator = Activations(jnp.asarray(samples)).operator(start)
    basis = np.asarray(dsbp_optax.power_iteration(operator, start, 5).basis)
    p = basis @ basis.T
    assert is_projector(p, K)
    assert not is_projector(2 * p, K)
    assert not is_projector(p + 1e-2 * np.outer(p[0], p[1]), K)
    assert not is_projector(basis[:, :-1] @ basis[:, :-1].T, K)


PROJECTION = dsbp_optax.scale_by_spectral_projection(
    optax.trace(0.9),
    rank=K,
    update_every=10**6,
    residual=dsbp_optax.normalize_residual(0.5),
    project="always",
)
UPDATE = jax.jit(PROJECTION.update)


def of_kernel(state: Any) -> Any:
    """What a state holds of the one kernel."""
    return dsbp_optax.by_path(state)["kernel"]


def moment_of(state: Any) -> Any:
    """The momentum of its coordinates."""
    return of_kernel(state).inner[0].trace


def given_basis(state: Any, basis: Any) -> Any:
    """A state with another basis."""
    layer = of_kernel(state)._replace(basis=basis)
    return dsbp_optax.with_layers(state, {"kernel": layer})


def one_update(basis: Any, moment: Any, params: Any, grads: Any) -> Any:
    """The update of a warm state that was given another basis and moment."""
    state = PROJECTION.init(params)
    layer = of_kernel(state)
    spectrum = layer.spectrum._replace(iterations=layer.spectrum.iterations + 5)
    layer = layer._replace(
        basis=basis,
        spectrum=spectrum,
        inner=(optax.TraceState(trace=moment), layer.inner[1]),
    )
    state = dsbp_optax.with_layers(state, {"kernel": layer})
    state = state._replace(step=state.step + 7)
    return UPDATE(grads, state, params)[0]["kernel"]


@given(st.permutations(range(K)), st.lists(st.booleans(), min_size=K, max_size=K))
@settings(max_examples=10, deadline=None)
def test_update_does_not_see_order_and_sign_of_the_basis(
    order: list[int], flips: list[bool]
) -> None:
    rng = np.random.default_rng(4)
    basis = jnp.asarray(orthonormal(rng, D, K), jnp.float32)
    params = {"kernel": jnp.asarray(rng.normal(size=(D, 10)), jnp.float32)}
    grads = {"kernel": jnp.asarray(rng.normal(size=(D, 10)), jnp.float32)}
    moment = jnp.asarray(rng.normal(size=(K, 10)), jnp.float32)
    other = basis[:, jnp.asarray(order)] * jnp.where(jnp.asarray(flips), -1.0, 1.0)
    rotation = subspace.rotation(other, basis)
    carried = subspace.rotate_first_moment(rotation, moment)
    plain = one_update(basis, moment, params, grads)
    np.testing.assert_allclose(
        one_update(other, carried, params, grads), plain, rtol=1e-4, atol=1e-5
    )
    if order != sorted(order) or any(flips):
        uncarried = one_update(other, moment, params, grads)
        assert float(jnp.abs(uncarried - plain).max()) > 1e-2, "transport must matter"


def test_the_two_sides_transpose_into_each_other() -> None:
    rng = np.random.default_rng(5)
    w, g = rng.normal(size=(2, D, 10)).astype(np.float32)
    a = rng.normal(size=(N, D)).astype(np.float32)

    def run(weight: Any, gradient: Any, side: str, start: Any) -> Any:
        tx = dsbp_optax.dsbp(0.1, rank=K, basis=Basis(side=side))
        params = {"kernel": jnp.asarray(weight)}
        state = given_basis(tx.init(params), start)
        statistics = {"kernel": Activations(jnp.asarray(a))}
        grads = {"kernel": jnp.asarray(gradient)}
        return tx.update(grads, state, params, statistics=statistics)[0]["kernel"]

    start = jnp.asarray(orthonormal(rng, D, K), jnp.float32)
    left = run(w, g, "input", start)
    right = run(w.T, g.T, "output", start)
    np.testing.assert_allclose(left, right.T, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(left - run(w, g + 0.1, "input", start)).max()) > 1e-4


def sketch(a: Any, basis: Any) -> Sketch:
    """By its definition, in the kernel form of a (D, m) kernel."""
    a = jnp.asarray(a)
    return Sketch(
        product=(a.T @ (a @ basis))[:, None, :],
        count=jnp.full((1, 1, 1), float(a.shape[0])),
        trace=jnp.sum(a * a).reshape(1, 1, 1),
    )


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_three_forms_give_one_basis(decay: float) -> None:
    """One batch fed repeatedly, from one start: five sketches equal five iterations."""
    with x64(True):
        rng = np.random.default_rng(6)
        a = jnp.asarray(planted(rng, gap=1.3)[0] + 0.2)
        params = {"kernel": jnp.asarray(rng.normal(size=(D, 10)))}
        make = functools.partial(
            dsbp_optax.scale_by_spectral_projection,
            rank=K,
            basis=Basis(decay=decay),
            update_every=100,
            project="always",
        )

        def run(form: Any, steps: int) -> Any:
            tx = make()
            state = tx.init(params)
            for _ in range(steps):
                statistics = {"kernel": form(of_kernel(state).basis)}
                _, state = jax.jit(tx.update)(
                    params, state, params, statistics=statistics
                )
            return of_kernel(state).basis

        whole = run(lambda _: Activations(a), 1)
        dense = run(lambda _: Covariance(a.T @ a, float(N)), 1)
        spread = run(lambda basis: sketch(a, basis), 5)
        short = run_short(params, a)
    assert gap_between(whole, dense) < 1e-8
    if decay == 0.0:  # decay blends in a rank-k past, which the first batch lacks
        assert gap_between(whole, spread) < 1e-8
    assert gap_between(whole, short) > 1e-4


def run_short(params: Any, a: Any) -> Any:
    """One iteration too few: what the law must reject."""
    tx = dsbp_optax.scale_by_spectral_projection(
        rank=K, basis=Basis(power_iterations=2), project="always"
    )
    state = tx.init(params)
    statistics = {"kernel": Activations(a)}
    _, state = tx.update(params, state, params, statistics=statistics)
    return of_kernel(state).basis


@pytest.mark.parametrize("rank", [D, D + 5])
def test_full_rank_is_the_identity(rank: int) -> None:
    rng = np.random.default_rng(8)
    params = {"kernel": jnp.asarray(rng.normal(size=(D, 10)), jnp.float32)}
    grads = {"kernel": jnp.asarray(rng.normal(size=(D, 10)), jnp.float32)}
    a = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    for project in ("auto", "always"):
        tx = dsbp_optax.scale_by_spectral_projection(rank=rank, project=project)
        updates, _ = jax.jit(tx.update)(
            grads, tx.init(params), params, statistics={"kernel": Activations(a)}
        )
        np.testing.assert_allclose(updates["kernel"], grads["kernel"], atol=2e-5)
    tx = dsbp_optax.dsbp(1.0, rank=D - 1, basis=Basis(side="input"))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert float(jnp.abs(updates["kernel"] + grads["kernel"]).max()) > 1e-2


@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
@settings(max_examples=10, deadline=None)
def test_principal_angles_of_a_planted_rotation(seed: int, radians: float) -> None:
    rng = np.random.default_rng(seed)
    left = orthonormal(rng, D, K)
    angles = subspace.principal_angles(
        jnp.asarray(left, jnp.float32),
        jnp.asarray(nearby(rng, left, radians), jnp.float32),
    )
    np.testing.assert_allclose(angles, radians, atol=1e-3)


def test_moments_follow_the_basis() -> None:
    """A gradient that stays put keeps its momentum through a rotation of the basis."""
    rng = np.random.default_rng(9)
    old = jnp.asarray(orthonormal(rng, D, K), jnp.float32)
    turn = jnp.asarray(orthonormal(rng, K, K), jnp.float32)
    new = old @ turn
    moment = jnp.asarray(rng.normal(size=(K, 10)), jnp.float32)
    carried = subspace.rotate_first_moment(subspace.rotation(new, old), moment)
    before = subspace.lift(old, moment)
    np.testing.assert_allclose(before, subspace.lift(new, carried), atol=1e-5)
    assert float(jnp.abs(subspace.lift(new, moment) - before).max()) > 1e-2
    second = subspace.rotate_second_moment(subspace.rotation(new, old), moment**2)
    assert bool((second >= 0).all())
    np.testing.assert_allclose(second.sum(), (moment**2).sum(), rtol=1e-4)


def test_transport_happens_inside_the_refresh() -> None:
    """Momentum of the kernel is the same matrix before and after a refresh."""
    rng = np.random.default_rng(10)
    params = {"kernel": jnp.asarray(rng.normal(size=(D, 20)), jnp.float32)}
    a = jnp.asarray(planted(rng)[0], jnp.float32)
    tx = dsbp_optax.scale_by_spectral_projection(
        optax.trace(1.0), rank=K, update_every=3, project="always"
    )
    statistics = {"kernel": Activations(a)}
    state = tx.init(params)
    for _ in range(3):
        _, state = jax.jit(tx.update)(params, state, params, statistics=statistics)
    before = of_kernel(state).basis @ moment_of(state)
    turned = Activations(
        a @ jnp.asarray(np.diag(1 + 0.3 * rng.normal(size=D)), a.dtype)
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    _, after_state = jax.jit(tx.update)(
        zero, state, params, statistics={"kernel": turned}
    )
    basis = of_kernel(after_state).basis
    after = basis @ moment_of(after_state)
    assert gap_between(basis, of_kernel(state).basis) > 1e-3
    np.testing.assert_allclose(after, basis @ (basis.T @ before), rtol=1e-3, atol=1e-4)


def test_decay_is_right_on_the_first_step_and_averages_after() -> None:
    rng = np.random.default_rng(11)
    one, two = np.diag(4.0 ** -np.arange(6.0)), np.diag(4.0 ** -np.arange(6.0))
    two[0, 0], two[1, 1] = 0.1, 5.0
    tx = dsbp_optax.scale_by_spectral_projection(
        rank=3,
        basis=Basis(decay=0.75, power_iterations=30),
        update_every=1,
        project="always",
    )
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    state = tx.init(params)
    seen = []
    for c in (one, two):
        statistics = {"kernel": Covariance(jnp.asarray(c, jnp.float32))}
        _, state = jax.jit(tx.update)(params, state, params, statistics=statistics)
        seen.append(np.asarray(of_kernel(state).spectrum.eigenvalues))
    np.testing.assert_allclose(seen[0], [1, 0.25, 0.0625], rtol=1e-3)
    past = 0.75 * 0.25 / (0.75 * 0.25 + 0.25)  # bias-corrected share of the past
    model = past * np.diag([1, 0.25, 0.0625, 0, 0, 0]) + (1 - past) * two
    expected = np.sort(np.linalg.eigvalsh(model))[::-1][:3]
    np.testing.assert_allclose(seen[1], expected, rtol=1e-3)
    assert abs(seen[1][0] - 5.0) > 0.5, "the past must count"


def test_views_and_kernel_form_are_inverses() -> None:
    shape = (2, 3, 5, 4, 6)
    axes = layout.check_axes("p", shape, dsbp_optax.Axes((1, 3), (2, 4), (0,)))
    kernel = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    for side in ("input", "output"):
        view = layout.matrix_view(shape, axes, side)
        matrices = layout.to_matrices(kernel[None], view)
        assert matrices.shape == (view.matrices, view.size, view.other)
        assert view.matrices == 2 and view.size * view.other == kernel[0].size
        first = kernel[0].transpose(0, 2, 1, 3).reshape(12, 30)
        np.testing.assert_array_equal(
            matrices[0], first if side == "input" else first.T
        )
        (again,) = layout.from_matrices(matrices, view)
        np.testing.assert_array_equal(again, kernel)
        basis = jnp.arange(2.0 * view.size * 3).reshape(2, view.size, 3)
        held = layout.to_kernel_form(basis, view)
        assert held.shape == view.form(True, 3)
        np.testing.assert_array_equal(layout.from_kernel_form(held, view), basis)
        numbers = jnp.arange(2.0).reshape(2, 1, 1)
        held = layout.to_kernel_form(numbers, view)
        assert held.shape == view.form(False, 1)
        np.testing.assert_array_equal(layout.from_kernel_form(held, view), numbers)
        moment = jnp.arange(2.0 * 3 * view.other).reshape(2, 3, view.other)
        held = layout.from_coordinates(moment, view)
        assert held.shape == view.coordinate_form(3)
        np.testing.assert_array_equal(layout.to_coordinates(held, view), moment)


def test_a_basis_follows_from_the_path_alone() -> None:
    params = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))}
    one = dsbp_optax.by_path(dsbp_optax.dsbp(rank=3).init(params))
    two = dsbp_optax.by_path(dsbp_optax.dsbp(rank=3).init({"b": params["b"] * 2}))
    np.testing.assert_array_equal(one["b"].basis, two["b"].basis)
    assert gap_between(one["a"].basis, one["b"].basis) > 0.1


@pytest.mark.parametrize("at_once", [1, 2**20])
def test_kernels_alike_fare_as_if_alone(at_once: int, monkeypatch: Any) -> None:
    """In one array, all of it worked on at once or matrix by matrix."""
    monkeypatch.setattr(stacks, "_AT_ONCE", at_once)
    shapes = {**dict.fromkeys("abc", (D, 10)), "wide": (D, 14), "long": (30, 10)}
    rng = np.random.default_rng(12)
    draws = {
        path: jnp.asarray(rng.normal(size=(5, *shape)), jnp.float32)
        for path, shape in shapes.items()
    }
    seen = jnp.asarray(rng.normal(size=(5, N, D)), jnp.float32)
    tx = dsbp_optax.scale_by_spectral_projection(
        optax.trace(0.9),
        rank=K,
        update_every=4,
        residual=dsbp_optax.residual_momentum(0.9, 32),
        basis=Basis(power_iterations=2),
        project="always",
    )

    def trail(*paths: str) -> Any:
        update = jax.jit(tx.update)
        state, found = tx.init({path: draws[path][0] for path in paths}), []
        for step in range(5):
            layers = dsbp_optax.by_path(state)
            statistics = {
                "a": Activations(seen[step]),
                "b": sketch(seen[step], layers["b"].basis) if "b" in paths else None,
            }
            told = {p: x for p, x in statistics.items() if p in paths}
            grads = {path: draws[path][step] for path in paths}
            updates, state = update(grads, state, statistics=told)
            found.append(updates)
        return state, found

    state, together = trail(*shapes)
    stacked = {name: len(x[0].trace) for name, x in state.inner.items()}
    assert stacked == {"a": 3, "long": 1, "wide": 1}
    assert {name: len(x) for name, x in state.basis.items()} == {"a": 4, "long": 1}
    for path in shapes:
        for one, all_of_them in zip(trail(path)[1], together, strict=True):
            np.testing.assert_allclose(one[path], all_of_them[path], atol=1e-4)
    assert float(jnp.abs(together[4]["a"] - together[4]["b"]).max()) > 1e-2


def test_refresh_takes_place_when_it_should() -> None:
    """q sketches in each period of p; whole matrices once a period."""
    rng = np.random.default_rng(13)
    params = {"kernel": jnp.asarray(rng.normal(size=(D, 10)), jnp.float32)}
    tx = dsbp_optax.dsbp(
        rank=K, update_every=5, power_iterations=2, basis=Basis(side="input")
    )
    for form, expected in (
        (lambda b: sketch(rng.normal(size=(N, D)), b), [1, 2, 2, 2, 2, 3, 4, 4]),
        (
            lambda b: Activations(jnp.asarray(rng.normal(size=(N, D)))),
            [2] * 5 + [4] * 3,
        ),
    ):
        state, done, collects = tx.init(params), [], []
        for _ in range(8):
            collects.append(bool(state[0].collect))
            statistics = {"kernel": form(of_kernel(state).basis)}
            _, state = jax.jit(tx.update)(params, state, params, statistics=statistics)
            done.append(int(of_kernel(state).spectrum.iterations))
        assert done == expected
        assert collects == [True, True, False, False, False, True, True, False]


def test_usable_refuses_what_must_not_enter() -> None:
    rng = np.random.default_rng(14)
    samples, truth, _ = planted(rng)
    basis = jnp.asarray(truth, jnp.float32)
    operator = Activations(jnp.asarray(samples, jnp.float32)).operator(basis)
    good = dsbp_optax.power_iteration(operator, basis, 2)
    assert bool(refresh._usable(operator, good))
    lacking = good._replace(eigenvalues=good.eigenvalues.at[-1].set(0.0))
    few = dataclasses.replace(operator, count=jnp.asarray(basis.shape[1] - 1.0))
    assert bool(refresh._usable(operator, lacking))
    assert bool(refresh._usable(few, good))
    assert not bool(refresh._usable(few, lacking))
    for bad in (
        good._replace(basis=good.basis * 1.01),
        good._replace(basis=good.basis.at[0, 0].set(jnp.nan)),
        good._replace(eigenvalues=good.eigenvalues * 0),
        good._replace(eigenvalues=good.eigenvalues.at[0].set(jnp.inf)),
    ):
        assert not bool(refresh._usable(operator, bad))
