"""Pictures show the figures they are given; how they look is for eyes."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import dsbp_optax
from dsbp_optax import Activations, diagnostics, plotting


@pytest.fixture(scope="module")
def history() -> Any:
    """Snapshots of two layers over some steps."""
    rng = np.random.default_rng(0)
    tx = dsbp_optax.dsbp_sgd(
        0.1, rank=3, update_every=1, basis=dsbp_optax.Basis(power_iterations=3)
    )
    names = ("first", "second")
    params = {name: {"kernel": jnp.ones((16, 12))} for name in names}
    state, shots = tx.init(params), []
    for step in range(5):
        x = jnp.asarray(rng.standard_normal((64, 16)) * 1.5 ** -np.arange(16))
        statistics = {
            f"{name}/kernel": Activations((1 + step) * x)
            for name in ("first", "second")
        }
        _, state = tx.update(params, state, params, statistics=statistics)
        shots.append(diagnostics.snapshot(state))
    return shots


def saved(ax: Any, path: Any) -> None:
    ax.figure.savefig(path)
    assert path.stat().st_size > 5000


def test_a_snapshot_is_what_the_metrics_say(history: Any) -> None:
    shot = history[-1]
    assert shot.step == 5
    assert set(shot.energy) == {"first/kernel", "second/kernel"}
    assert 0 < shot.energy["first/kernel"] <= 1
    assert 0 < shot.explained["first/kernel"] < 1
    values = [s.eigenvalues["first/kernel"] for s in history]
    assert all((np.diff(v) <= 0).all() for v in values)
    assert values[-1][0] > 10 * values[0][0], "the inputs grew five times"


def test_eigenvalues_over_time(history: Any, tmp_path: Any) -> None:
    ax = plotting.eigenvalues(history, "first/kernel")
    lines = ax.get_lines()
    assert len(lines) == 3
    expected = [shot.eigenvalues["first/kernel"][1] for shot in history]
    np.testing.assert_allclose(lines[1].get_ydata(), expected)
    np.testing.assert_array_equal(lines[1].get_xdata(), [1, 2, 3, 4, 5])
    assert ax.get_yscale() == "log"
    saved(ax, tmp_path / "eigenvalues.png")


def test_energy_by_layer_and_step(history: Any, tmp_path: Any) -> None:
    ax = plotting.captured_energy(history)
    drawn = np.asarray(ax.collections[0].get_array()).reshape(2, 5)
    expected = [[s.energy[p] for s in history] for p in history[0].energy]
    np.testing.assert_allclose(drawn, expected)
    assert [t.get_text() for t in ax.get_yticklabels()] == list(history[0].energy)
    saved(ax, tmp_path / "energy.png")


def test_densities_of_two_runs(tmp_path: Any) -> None:
    one, two = (
        diagnostics.Density(jnp.array([[0.0, top]]), jnp.array([[0.9, 0.1]]))
        for top in (1.0, 4.0)
    )
    ax = plotting.spectral_density({"flat": one, "sharp": two})
    flat, sharp = ax.get_lines()
    x, y = sharp.get_data()
    assert x[y > 0.01].max() == pytest.approx(4.0, abs=0.2)
    x, y = flat.get_data()
    assert x[y > 0.01].max() == pytest.approx(1.0, abs=0.2)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["flat", "sharp"]
    saved(ax, tmp_path / "density.png")


def test_surface_has_its_values_where_they_belong(tmp_path: Any) -> None:
    def loss(w: Any, batch: Any) -> Any:
        return w[0] ** 2 + 10 * (w[1] - 0.5) ** 2 + 0 * batch

    first, second = jnp.array([2.0, 0.0, 0.0]), jnp.array([1.0, 3.0, 0.0])
    surface = diagnostics.loss_surface(
        loss, jnp.zeros(3), jnp.zeros(2), first, second, radius=1.0, points=21
    )
    row, column = np.unravel_index(np.argmin(surface.losses), (21, 21))
    assert float(surface.offsets[row]) == pytest.approx(0.5)
    assert float(surface.offsets[column]) == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(surface.losses[10, 20], 1 + 10 * 0.25, rtol=1e-5)
    saved(plotting.loss_surface(surface), tmp_path / "surface.png")


def test_axes_of_ones_own(history: Any) -> None:
    ax = plotting.captured_energy(history)
    (again,) = ax.figure.subplots(1, 1, squeeze=False).ravel()
    assert plotting.eigenvalues(history, "first/kernel", ax=again) is again


def test_refusals(history: Any) -> None:
    with pytest.raises(ValueError, match="no snapshot"):
        plotting.captured_energy([])
    with pytest.raises(ValueError, match="expected one of first/kernel"):
        plotting.eigenvalues(history, "third")
    with pytest.raises(ValueError, match="no density"):
        plotting.spectral_density({})
