"""The ablation: its grid, its linear model on planted effects, its records."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import report_rules

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import dsbp_optax
from benchmarks import ablation, records, results_ablation, results_page
from benchmarks.ablation import FACTORS, GRID, PAPER, Cell
from benchmarks.data import DataError, Samples
from benchmarks.data.split import Data
from benchmarks.effects import effects
from benchmarks.markdown import of_rich
from benchmarks.plot_effects import plot_effects, shown
from benchmarks.workloads import WORKLOADS

SEEDS = 5


def planted(noise=0.1):
    """Cells, and values with known effects of levels and of pairs."""
    rng = np.random.default_rng(0)
    cells = [cell._asdict() for cell in GRID]
    values = np.zeros(len(cells))
    for number, cell in enumerate(GRID):
        dropped = cell.outside == "dropped"
        values[number] = 5.0 - 3.0 * (cell.side == "output") - 4.0 * dropped
        values[number] += 2.0 * (cell.filter == "whiten")
        values[number] -= 6.0 * (dropped and cell.side == "output")
    seeds = 0.3 * np.arange(SEEDS) + noise * rng.standard_normal((len(cells), SEEDS))
    return cells, values[:, None] + seeds


def made(cell, accuracy, loss, **changes):
    """A record of a cell."""
    return {
        **cell._asdict(),
        "rate": 0.1,
        "tried": [[0.1, accuracy[0] or 0.0]],
        "accuracy": accuracy,
        "train_loss": loss,
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abcdef0",
        **changes,
    }


def whole_record(workload="digits_cnn", step=0.0):
    """A record in which dropping costs ten points and one run is lost."""
    cells = []
    for number, cell in enumerate(GRID):
        base = 0.9 - 0.1 * (cell.outside == "dropped") - 1e-5 * number - step
        cells.append(made(cell, [base, base + 0.01], [0.1, 0.11]))
    cells[3] = {**cells[3], "accuracy": [None, 0.91], "train_loss": [None, 0.2]}
    cells += [
        made(cell, [0.7, 0.71], [0.3, 0.3]) for cell in ablation.corner_cells(PAPER)
    ]
    head = {"workload": workload, "steps": 30, "seeds": 2, "cells": cells}
    return {**records.environment(), **head}


# The linear model.


def test_effects_find_what_was_planted_and_nothing_else():
    found = {effect.name: effect for effect in effects(FACTORS, *planted())}
    # Half of the cells of the other factor: a main effect holds half of the pair's.
    expected = {
        "side: output": -3.0 - 6.0 / 4,
        "filter: whiten": 2.0,
        "outside: dropped": -4.0 - 6.0 / 2,
        "outside: dropped x side: output": -6.0,
    }
    for name, value in expected.items():
        assert found[name].low < value < found[name].high
        assert found[name].is_clear and found[name].high - found[name].low < 0.3
    others = [effect for name, effect in found.items() if name not in expected]
    assert len(found) == 7 + 17
    assert sum(effect.is_clear for effect in others) <= 3  # Of 20, at 95 %.
    assert max(abs(effect.value) for effect in others) < 0.15


def test_intervals_speak_of_seeds():
    """Three factors together are no noise; an unsteady level blurs no other."""
    cells, values = planted()
    before = {effect.name: effect for effect in effects(FACTORS, cells, values)}
    here = [c["outside"] == "dropped" and c["side"] == "output" for c in cells]
    both = [x and c["filter"] == "whiten" for x, c in zip(here, cells, strict=True)]
    three = 20.0 * np.asarray(both)
    unsteady = 9.0 * np.asarray(here)[:, None] * np.asarray([1, -1] * SEEDS)[:SEEDS]
    steady = effects(FACTORS, cells, values + three[:, None])
    rough = effects(FACTORS, cells, values + unsteady)
    for one, other in zip(steady, rough, strict=True):
        width = before[one.name].high - before[one.name].low
        assert np.isclose(one.high - one.low, width)
        if one.name in ("outside: 5 bits", "outside: scaled"):
            assert np.isclose(other.high - other.low, width)
        if one.name == "outside: dropped":
            assert other.high - other.low > 10 * width


def test_effects_refuse_cells_that_cannot_tell_them_apart():
    cells, values = planted()
    kept = [n for n, cell in enumerate(cells) if cell["side"] == "input"]
    with pytest.raises(ValueError, match=r"24 cells of 5 seed.*Remedy"):
        effects(FACTORS, [cells[n] for n in kept], values[kept])
    with pytest.raises(ValueError, match=r"of 1 seed.*Remedy"):
        effects(FACTORS, cells, values[:, :1])


# The grid and the rule.


def test_every_level_meets_every_other_once():
    assert len(GRID) == len({*GRID}) == 4 * 2 * 2 * 3
    assert PAPER in GRID
    forms = [cell.form for cell in GRID]
    assert len(list(itertools.groupby(forms))) == len({*forms}) == 6
    cells = list(ablation.corner_cells(PAPER))
    assert len({*cells, PAPER}) == 9 and PAPER not in cells


@pytest.fixture(scope="module")
def kernel():
    """A kernel, five gradients, and activations that leave the basis where it is."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    seen = draw(20, 12) * jnp.linspace(1.0, 10.0, 12)
    grads = [{"kernel": draw(12, 6)} for _ in range(5)]
    return {"kernel": draw(12, 6)}, grads, {"kernel": dsbp_optax.Activations(seen)}


def trained(tx, kernel):
    """The kernel after five steps."""
    params, grads, statistics = kernel
    update = jax.jit(optax.with_extra_args_support(tx).update)
    state = tx.init(params)
    for grad in grads:
        updates, state = update(grad, state, params, statistics=statistics)
        params = optax.apply_updates(params, updates)
    return params["kernel"]


def test_nothing_projected_away_is_momentum_sgd(kernel):
    sgd = trained(optax.sgd(0.1, ablation.MOMENTUM), kernel)
    whole = trained(ablation.rule(0.1, bits=32, rank=4), kernel)
    np.testing.assert_allclose(whole, sgd, rtol=1e-4, atol=1e-5)
    dropped = trained(ablation.rule(0.1, rank=4), kernel)
    assert np.abs(dropped - sgd).max() > 0.1


def test_a_number_takes_its_part_in(kernel):
    plain = Cell("dropped", "none", "input", "none", rank=4)
    changes = (
        *({"outside": "scaled"}, {"filter": "whiten"}),
        *({"sharpness": "spectral"}, {"sharpness": "msam"}),
    )
    cells = [plain, *(plain._replace(**change) for change in changes)]
    ends = [
        trained(ablation.rule(0.1, rank=4, **cell.settings), kernel) for cell in cells
    ]
    for one, other in itertools.combinations(ends, 2):
        assert np.abs(one - other).max() > 1e-3


# Records.


@pytest.fixture(scope="module")
def tiny():
    """Digits with few samples."""
    data = WORKLOADS["digits_cnn"].load(None)
    few = [Samples(part.inputs[:128], part.targets[:128]) for part in data[:3]]
    return Data(*few)


def test_a_run_goes_on_where_it_stood(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RANKS", (ablation.RANK,))
    monkeypatch.setattr(ablation, "PERIODS", (ablation.PERIOD, 7))
    workload = dataclasses.replace(WORKLOADS["digits_cnn"], batch_size=32)
    made = []
    plan = ablation.Plan(
        *(workload, tmp_path / "digits_cnn.json", 1, 3, time.monotonic()),
        (PAPER, PAPER._replace(outside="scaled")),
    )
    assert not ablation.run(plan, tiny, lambda: made.append(0)) and not made
    plan = plan._replace(deadline=time.monotonic() + 1000)
    assert ablation.run(plan, tiny, lambda: made.append(0))
    cells = [ablation.cell_of(cell) for cell in plan.found()]
    corners = {PAPER, ablation.best_corner(plan.found()[:2])}
    assert cells[:2] == list(plan.grid) and len(cells) == 2 + len(corners)
    assert all(cell._replace(period=100) in plan.grid for cell in cells[2:])
    known = {ablation.cell_of(cell): cell for cell in plan.found()}
    assert known[cells[2]]["tried"] == known[cells[2]._replace(period=100)]["tried"]
    assert len(made) >= 2 * (3 + 1) + len(corners)
    count = len(made)
    assert ablation.run(plan, tiny, lambda: made.append(0)) and len(made) == count
    with pytest.raises(DataError, match=r"got steps = 3, expected 4.*Remedy"):
        plan._replace(steps=4).found()


def test_the_best_corner_is_projected_and_judged_on_validation():
    cells = [made(cell, [0.5], [0.1]) for cell in GRID]
    whole = next(n for n, cell in enumerate(GRID) if cell.outside == "whole")
    coarse = next(n for n, cell in enumerate(GRID) if cell.outside == "5 bits")
    cells[whole]["tried"], cells[coarse]["tried"] = [[0.1, 0.99]], [[0.1, 0.9]]
    cells[coarse + 1]["accuracy"] = [0.99]  # Of the test samples: has no say.
    assert ablation.best_corner(cells) == GRID[coarse]
    cells[coarse + 1] |= {"tried": [[0.1, 0.9]], "train_loss": [0.01]}
    assert ablation.best_corner(cells) == GRID[coarse + 1]


# What is shown.


def test_the_section_shows_effects_cells_and_lost_runs(tmp_path):
    for name in ("digits_cnn", "fashion_mnist_mlp"):
        records.write(tmp_path / f"ablation/{name}.json", whole_record(name))
    page = tmp_path / "PAGE.md"
    written = results_page.write(page, tmp_path)
    assert [path.name for path in written] == ["PAGE.md", "ABLATION.png"]
    first = written[1].read_bytes()
    assert first.startswith(b"\x89PNG")
    results_page.write(page, tmp_path)
    assert written[1].read_bytes() == first
    text = page.read_text()
    (line,) = [x for x in text.splitlines() if x.startswith("| outside: dropped | ")]
    # 0.2 errors for 0.1, but one run of 24 without dropping counts as guessing.
    expected = 10 ** (np.log10(0.195 / 0.095) - np.log10(0.9 / 0.095) / 24)
    assert abs(float(line.split("|")[2].split()[0]) - expected) < 0.05
    assert "![Effects of the parts](ABLATION.png)" in text
    assert "`results/ablation/digits_cnn.json`" in text
    assert sum(x.endswith(" 1 |") for x in text.splitlines()) == 2


def test_half_a_grid_has_tables_and_no_effects(tmp_path):
    record = whole_record()
    record["cells"] = record["cells"][:10]
    records.write(tmp_path / "ablation/digits_cnn.json", record)
    (found,) = results_page.read_all(tmp_path)
    assert results_ablation.known_effects([found]) == {}
    assert [path.name for path in results_page.write(tmp_path / "P.md", tmp_path)] == [
        "P.md"
    ]
    table = of_rich(report_rules.ablation_table("", record["cells"]))
    assert table.count("\n") == 2 - 1 + 10


def test_the_picture_has_main_effects_and_the_largest_clear_pairs(tmp_path):
    both = effects(FACTORS, *planted())
    names = shown({"one": (both, both)})
    assert names[:7] == [effect.name for effect in both[:7]]
    assert names[7] == "outside: dropped x side: output"
    plot_effects({"one": (both, both)}, "planted", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
