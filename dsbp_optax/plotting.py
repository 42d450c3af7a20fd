"""Pictures of a run: one call each, on Matplotlib axes (``pip install matplotlib``).

history = [diagnostics.snapshot(opt_state), ...]  # as often as you like
plotting.captured_energy(history).figure.savefig("energy.png")
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from dsbp_optax.core import checks
from dsbp_optax.instruments.curvature import Density
from dsbp_optax.instruments.snapshot import Snapshot
from dsbp_optax.instruments.surface import Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["captured_energy", "eigenvalues", "loss_surface", "spectral_density"]


def eigenvalues(
    history: Sequence[Snapshot], path: str, ax: "Axes | None" = None
) -> "Axes":
    """The eigenvalues of one layer's covariance over time, one line each.

    Args:
      history: snapshots, see `dsbp_optax.diagnostics.snapshot`.
      path: of the kernel.
      ax: where to draw; None for a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: for an empty history, or a path that it does not hold.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from dsbp_optax import diagnostics, plotting
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2, update_every=1)
      >>> params = {"kernel": jnp.eye(8)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> ax = plotting.eigenvalues([diagnostics.snapshot(state)], "kernel")
    """
    _check(history, path)
    ax = _axes(ax)
    steps = [shot.step for shot in history]
    values = np.stack([shot.eigenvalues[path] for shot in history])
    count = values.shape[1]
    shades = _colours("viridis")(np.linspace(0, 0.9, count))
    for number in range(count):
        shown = np.where(values[:, number] > 0, values[:, number], np.nan)
        label = f"$\\lambda_{{{number + 1}}}$" if number in (0, count - 1) else None
        ax.plot(steps, shown, color=shades[number], marker=".", label=label)
    ax.set(yscale="log", xlabel="step", ylabel="eigenvalue", title=path)
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    return ax


def captured_energy(history: Sequence[Snapshot], ax: "Axes | None" = None) -> "Axes":
    """The share of each layer's gradient inside its basis, by layer and step.

    Args:
      history: snapshots, see `dsbp_optax.diagnostics.snapshot`.
      ax: where to draw; None for a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: for an empty history.

    Example:
      >>> import jax.numpy as jnp, dsbp_optax
      >>> from dsbp_optax import diagnostics, plotting
      >>> tx = dsbp_optax.dsbp_sgd(0.1, rank=2, update_every=1)
      >>> params = {"kernel": jnp.eye(8)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> ax = plotting.captured_energy([diagnostics.snapshot(state)])
    """
    _check(history)
    paths = list(history[0].energy)
    ax = _axes(ax, height=1.2 + 0.35 * len(paths))
    values = np.asarray([[shot.energy[path] for shot in history] for path in paths])
    steps = np.asarray([shot.step for shot in history])
    image = ax.pcolormesh(
        np.arange(len(history) + 1),
        np.arange(len(paths) + 1),
        values,
        vmin=0,
        vmax=1,
        cmap="viridis",
    )
    shown = np.unique(np.linspace(0, len(history) - 1, min(len(history), 8)).round())
    ax.set_xticks(shown + 0.5, [str(steps[int(i)]) for i in shown])
    ax.set_yticks(np.arange(len(paths)) + 0.5, paths)
    ax.invert_yaxis()
    ax.set(xlabel="step", title="share of the gradient's energy in the eigenbasis")
    ax.figure.colorbar(image, ax=ax)
    return ax


def spectral_density(
    densities: Mapping[str, Density],
    *,
    width: float | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Densities of Hessian spectra, on a logarithmic scale.

    Args:
      densities: name -> `Density`.
      width: standard deviation of the smoothing; None for a hundredth of the range.
      ax: where to draw; None for a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: for no density.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics, plotting
      >>> density = diagnostics.Density(jnp.array([[0.0, 1.0]]), jnp.full((1, 2), 0.5))
      >>> ax = plotting.spectral_density({"SGD": density})
    """
    if not densities:
        raise ValueError("spectral_density: got no density, expected at least one.")
    ax = _axes(ax)
    nodes = np.concatenate([np.ravel(d.nodes) for d in densities.values()])
    low, high = float(nodes.min()), float(nodes.max())
    width = width or max((high - low) / 100, 1e-6)
    grid = np.linspace(low - 4 * width, high + 4 * width, 1000)
    for name, density in densities.items():
        ax.plot(
            grid, np.asarray(density.smoothed(jnp.asarray(grid), width)), label=name
        )
    floor = 1e-4 / width
    ax.set(
        yscale="log",
        ylim=(1e-3 * floor, None),
        xlabel="eigenvalue of the Hessian",
        ylabel="density",
    )
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    return ax


def loss_surface(surface: Surface, ax: "Axes | None" = None) -> "Axes":
    """Contours of the loss on a plane, the parameters in the middle.

    Args:
      surface: see `dsbp_optax.diagnostics.loss_surface`.
      ax: where to draw; None for a new figure.

    Returns:
      The axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_optax import diagnostics, plotting
      >>> surface = diagnostics.Surface(jnp.arange(3.0), jnp.arange(9.0).reshape(3, 3))
      >>> ax = plotting.loss_surface(surface)
    """
    ax = _axes(ax)
    offsets, losses = np.asarray(surface.offsets), np.asarray(surface.losses)
    image = ax.contourf(offsets, offsets, losses, levels=24, cmap="viridis")
    ax.contour(offsets, offsets, losses, levels=12, colors="white", linewidths=0.4)
    ax.plot(0, 0, marker="+", color="white", markersize=12)
    ax.set(aspect="equal", xlabel="along the first", ylabel="along the second")
    ax.locator_params(nbins=5)
    ax.figure.colorbar(image, ax=ax, label="loss")
    return ax


def _axes(ax: "Axes | None", height: float = 4.0) -> "Axes":
    if ax is not None:
        return ax
    with checks.brought_by("instruments"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    FigureCanvasAgg(figure)  # So that no window and no global state is involved.
    return figure.add_subplot()


def _colours(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name]


def _check(history: Sequence[Snapshot], path: str | None = None) -> None:
    if not history:
        raise ValueError("history: got no snapshot, expected at least one.")
    if path is not None and path not in history[0].eigenvalues:
        raise ValueError(
            f"path: got '{path}', expected one of {', '.join(history[0].eigenvalues)}."
        )
