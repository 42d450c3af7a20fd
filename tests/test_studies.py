"""Each study at a tiny size: what it finds, the record it leaves, its errors."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("foolbox")

from test_subspace_gradient import compiled
from typer.testing import CliRunner

import dsbp_optax
from benchmarks import optimizers
from benchmarks.core import device, records
from benchmarks.core.records import ROOT
from benchmarks.optimizers import CONTENDERS
from benchmarks.studies import (
    ablation,
    app,
    communication,
    constrained,
    controls,
    corruptions,
    cost,
    minima,
    scale,
    stability,
)
from benchmarks.studies.distributed import largest_gap
from benchmarks.tasks import WORKLOADS, base, vision
from benchmarks.tasks.base import DataError, Samples

TINY = dataclasses.replace(
    WORKLOADS["digits_cnn"], model=vision.Mlp((64,)), steps=24, quick_steps=6
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "digits_cnn", TINY)
    return TINY


def invoke(*args, code=0):
    told = [str(arg) for arg in args]
    result = CliRunner().invoke(app, told, env={"COLUMNS": "240"})
    assert result.exit_code == code, result.output
    return result.output


# Minima.

#: Of pixels, on which rounding leaves their range when they are taken back.
MEAN, STD = 0.4465, 0.2616


def look(out, names, *more):
    chosen = [word for name in names for word in ("--optimizer", name)]
    told = ("minima", "digits_cnn", *chosen, "--out", out, "--learning-rate", 0.1)
    output = invoke(*told, "--seeds", 1, *more)
    return records.read(out / "minima/digits_cnn.jsonl"), output


def test_every_run_is_looked_at_once(tmp_path, monkeypatch):
    def load(data_dir):
        parts = vision.load_digits(data_dir).limited(400)[:3]
        inputs = [(part.inputs - np.float32(MEAN)) / np.float32(STD) for part in parts]
        pairs = zip(inputs, parts, strict=True)
        return base.Data(*(Samples(x, part.targets) for x, part in pairs))

    small = {"load": load, "pixel_mean": (MEAN,), "pixel_std": (STD,)}
    monkeypatch.setitem(WORKLOADS, "digits_cnn", dataclasses.replace(TINY, **small))
    monkeypatch.setattr(minima, "ATTACKED", 64)
    monkeypatch.setattr(minima, "RADII", (1 / 255, 128 / 255))
    monkeypatch.setattr(minima, "PGD_STEPS", 10)
    monkeypatch.setattr(minima, "DRAWS", 3)
    monkeypatch.setattr(minima, "BATCH", 100)
    looks = "--look", "curvature", "--look", "attacks", "--look", "bound"
    (one,), printed = look(tmp_path, ("sgd",), *looks)
    assert records.problems(one) == []
    assert one["looks"] == ["curvature", "attacks", "bound"]
    assert "PGD-10" in printed and "PAC-Bayes" in printed
    values = np.asarray(one["hessian_eigenvalues"])
    assert len(values) == 10 and (np.diff(values) <= 0).all() and values[0] > 0
    assert max(one["hessian_residuals"]) < 0.05 * values[0]
    for small, large in one["attacks"].values():
        assert abs(small - one["test_accuracy"]) < 0.1, "one grey level fools nobody"
        assert large < one["test_accuracy"] - 0.2, "half of the range fools many"
    assert one["bound_risk"] < one["bound_risk_upper"] < one["bound"] <= 1
    assert one["bound_samples"] == 400
    found, _ = look(tmp_path, ("sgd", "dsbp_sgd_msam"), "--rho", 0.2)
    assert found[0] == one and len(found) == 2
    assert found[1]["hyperparameters"]["rho"] == 0.2
    for run in found:
        ours = run["optimizer"].startswith("dsbp")
        assert all(p["kl"] > 0 and ("kl_bases" in p) == ours for p in run["curve"])
    last = found[1]["curve"][-1]
    assert 0 < last["moved_inside"] <= 1 and 0 < last["kl_inside"] < last["kl_bases"]


def test_kl_along_training_is_that_of_the_formula():
    start = {"w": jnp.zeros(4)}
    found = minima.divergence({"w": jnp.full(4, 0.02)}, start, ())
    variance, squared = minima.NOISE**2, 4 * 0.02**2
    prior = variance + squared / 4
    exact = 0.5 * ((4 * variance + squared) / prior - 4 + 4 * np.log(prior / variance))
    assert found["kl"] == pytest.approx(exact, rel=1e-2) and found.keys() == {"kl"}


def has_opencv():
    try:
        corruptions.load()
    except DataError:
        return False
    return True


@pytest.mark.skipif(not has_opencv(), reason="OpenCV finds no libGL")
def test_corruptions_of_what_was_trained(monkeypatch):
    monkeypatch.setattr(corruptions, "SAMPLES", 32)
    one = minima.Trained(TINY, TINY.load(None), TINY.init(0), None)
    found = minima.LOOKS["corruptions"](one)["corruptions"]
    assert set(found) == set(corruptions.KINDS)
    assert all(0 <= value <= 1 for value in found.values())
    assert len(set(found.values())) > 3, "corruptions differ"


# A rule against itself, and against the plain one.


def test_controls_are_made_once_at_the_rate_of_their_rule(tiny, tmp_path, monkeypatch):
    of = controls.controls_of
    monkeypatch.setattr(controls, "controls_of", lambda rule: of(rule)[:1])
    told = "controls", "digits_cnn", "--of", "dsbp_sgd", "--out", tmp_path, "--quick"
    assert "campaign digits_cnn --optimizer dsbp_sgd" in invoke(*told, code=1)
    one = {"optimizer": "dsbp_sgd", "learning_rate": 0.1, "phase": "final", "round": 0}
    one |= {"test_accuracy": 0.5, "diverged": False, "kernel_state_bytes": 1}
    rows = [{**one, "seed": seed} for seed in (0, 1)]
    records.append(tmp_path / "campaign/digits_cnn.jsonl", "campaign", rows)
    assert "random basis" in invoke(*told, "--seeds", 2)
    found = records.read(tmp_path / "controls/digits_cnn.jsonl")
    assert [(one["seed"], one["learning_rate"]) for one in found] == [
        (0, 0.1),
        (1, 0.1),
    ]
    assert all(records.problems(record) == [] for record in found)
    invoke(*told, "--seeds", 2)
    assert records.read(tmp_path / "controls/digits_cnn.jsonl") == found


def test_the_ablation_goes_on_from_its_cells(tiny, tmp_path, monkeypatch):
    grid = [cell for cell in ablation.GRID if cell.form == ablation.PAPER.form][:3]
    grid = (ablation.PAPER, *(cell for cell in grid if cell != ablation.PAPER))
    monkeypatch.setattr(ablation, "RATES", (0.1, 0.3))
    monkeypatch.setattr(ablation, "_MOST", 2)
    monkeypatch.setattr(ablation, "RANKS", (8,))
    monkeypatch.setattr(ablation, "PERIODS", (2, 100))
    file, data = tmp_path / "cells.jsonl", tiny.load(None)
    plan = ablation.Plan(tiny, file, 2, 6, math.inf, grid[:1])
    assert not plan._replace(deadline=-math.inf).run(data, lambda: None)
    assert not file.exists()
    assert plan.run(data, lambda: None)
    found = records.read(file)
    cells = [ablation.cell_of(record) for record in found]
    assert cells == [ablation.PAPER, ablation.PAPER._replace(period=2)]
    assert all(len(one["accuracy"]) == 2 for one in found)
    assert found[0]["tried"] == found[1]["tried"] and len(found[0]["tried"]) == 2
    assert plan._replace(grid=grid[:2]).run(data, lambda: None)
    assert records.read(file)[:2] == found
    with pytest.raises(DataError, match=r"6 steps and 2 seeds, expected 9.*Remedy"):
        plan._replace(steps=9).found()


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


def test_a_number_takes_its_part_of_the_ablation_in(kernel):
    sgd = trained(optax.sgd(0.1, ablation.MOMENTUM), kernel)
    whole = trained(ablation.rule(0.1, bits=32, rank=4), kernel)
    np.testing.assert_allclose(whole, sgd, rtol=1e-4, atol=1e-5)
    plain = ablation.Cell("dropped", "none", "input", "none", rank=4)
    changes = {"outside": "scaled"}, {"filter": "whiten"}, {"sharpness": "spectral"}
    changes = {}, *changes, {"sharpness": "msam"}
    settings = [plain._replace(**change).settings for change in changes]
    ends = [trained(ablation.rule(0.1, rank=4, **one), kernel) for one in settings]
    for one, other in itertools.combinations([sgd, *ends], 2):
        assert np.abs(one - other).max() > 1e-3


def test_the_best_corner_is_projected_and_judged_on_validation():
    assert len({*ablation.GRID}) == 4 * 2 * 2 * 3 and ablation.PAPER in ablation.GRID
    told = {"rate": 0.1, "accuracy": [0.5], "train_loss": [0.1], "tried": [[0.1, 0.5]]}
    cells = [{**cell._asdict(), **told} for cell in ablation.GRID]
    names = [cell.outside for cell in ablation.GRID]
    whole, coarse = names.index("whole"), names.index("5 bits")
    cells[whole]["tried"], cells[coarse]["tried"] = [[0.1, 0.99]], [[0.1, 0.9]]
    cells[coarse + 1]["accuracy"] = [0.99]  # Of the test samples: has no say.
    assert ablation.best_corner(cells) == ablation.GRID[coarse]
    cells[coarse + 1] |= {"tried": [[0.1, 0.9]], "train_loss": [0.01]}
    assert ablation.best_corner(cells) == ablation.GRID[coarse + 1]


def test_stability_pairs_runs_at_every_rate_of_the_plain_optimizer(tiny, tmp_path):
    path = tmp_path / "stability.jsonl"
    told = "stability", "digits_cnn", "--optimizer", "dsbp_sgd", "--seeds", 2
    invoke(*told, "--steps", 6, "--json", path)
    (record,) = records.read(path)
    assert records.problems(record) == []
    rates = [row["learning_rate"] for row in record["rows"]]
    assert rates == list(CONTENDERS["sgd"].grid)
    for row in record["rows"]:
        ratio = np.mean(row["losses"]) / np.mean(row["losses_against"])
        assert row["ratio"]["value"] == pytest.approx(ratio)
        assert (row["diverged"], row["skipped"]) == (0, 0)
    fine, lost = stability.End(1.0, 0), stability.End(np.inf, 3)
    row = stability.row(("a", "b"), 0.1, [[fine, lost], [fine, fine]])
    assert (row["diverged"], row["diverged_against"], row["skipped"]) == (1, 0, 3)
    assert row["ratio"] is None


# Speed and cost.


def test_speed_of_a_workload_tells_refresh_steps_apart(tiny, tmp_path):
    path = tmp_path / "speed.jsonl"
    told = "speed", "digits_cnn", "--optimizer", "dsbp_sgd", "--rounds", 94
    assert "dsbp_sgd" in invoke(*told, "--json", path)
    (record,) = records.read(path)
    ours, plain = record["rows"]
    assert (ours["contender"], plain["contender"]) == ("dsbp_sgd", "sgd")
    assert ours["refresh_seconds"] > 0 and plain["refresh_seconds"] is None
    assert plain["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert plain["dearest"] is None and ours["dearest"]["value"] > 0


def test_coordinates_are_timed_counted_and_compared(tiny, tmp_path):
    path = tmp_path / "coordinates.jsonl"
    told = "coordinates", "digits_cnn", "--width", 32, "--layers", 1, "--samples", 64
    more = "--rank", 4, "--rounds", 2, "--steps", 3, "--json", path
    assert "float64" in invoke(*told, *more)
    (found,) = records.read(path)
    for row in found["figures"]["dense layers"]:
        copied = row["program"] == "gradient"
        assert (row["aliased_bytes"] == 0) == copied, "steps are donated"
        assert row["flops"] > 0 and row["parameter_bytes"] == 4 * (32 * 32 + 32)
    steps = {way: len(s) for way, s in found["times"]["seconds"].items()}
    assert steps == {"adamw": 6, "coordinates": 6}
    gaps = {name: one["gaps"]["coordinates"] for name, one in found["losses"].items()}
    assert gaps["float64"].keys() == {"1", "2", "3"}
    assert max(gaps["float64"].values()) < 1e-12
    assert max(gaps["float32"].values()) < 1e-3
    assert largest_gap([1.0, 2.2, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(0.1)


def test_processes_of_their_own_give_the_rows_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "DEFAULTS", ())  # Those of the tests compile sooner.
    for name, entrants in (("train", ("dsbp_sgd", "sgd")), ("temporaries", ("sgd",))):
        monkeypatch.setitem(cost.FIGURES, name, (entrants, True))
    path = tmp_path / "cost.jsonl"
    told = "cost", "--figure", "train", "--figure", "temporaries", "--repeats", 1
    sizes = "--width", 16, "--blocks", 1, "--wide", 32, "--json", path
    assert "instructions" in invoke(*told, *sizes)
    (record,) = records.read(path)
    rows = {(row["figure"], row["contender"]): row for row in record["rows"]}
    for figure in ("both_s", "peak_mib", "program_bytes", "instructions"):
        ours, plain = (rows[figure, name] for name in ("dsbp_sgd", "sgd"))
        assert ours["values"] == [ours["value"]] and plain["ratio"] is None
        assert ours["ratio"] == ours["value"] / plain["value"] > 0
    for layout in ("unrolled", "stacks of 8"):
        assert rows[f"temporary bytes a parameter, {layout}", "sgd"]["value"] > 0
    small = {"names": ("dsbp_adamw", "sgd"), "width": 16, "blocks": 1}
    ours, plain = cost.ask(ROOT, "turns", small).values()
    assert ours["refresh_step_ms"] > 0 and plain["mean_step_ms"] > 0
    assert plain["refresh_step_ms"] is None
    (curve,) = cost.ask(ROOT, "losses", {**small, "names": ("sgd",)}).values()
    assert 0 < curve["loss_200"] < curve["loss_1"] - 0.1
    with pytest.raises(RuntimeError, match="TypeError"):
        cost.ask(ROOT, "losses", {"depth": 3})


def test_versions_take_turns_and_plain_optimizers_run_once(monkeypatch):
    """Medians, growth and ratios of what workers are made to say."""
    asked = []

    def ask(root, task, settings):
        asked.append((root, settings["name"], settings["blocks"]))
        seconds = {"old": 8.0, "new": 4.0}[root] + asked.count(asked[-1])
        if settings["name"] in ("muon", "muon_kernels", "adamw"):
            seconds = 2.0
        blocks = f"{settings['blocks']} blocks"
        told = {f"update_both_cpu_s, {blocks}": seconds * settings["blocks"]}
        return {settings["name"]: told}

    monkeypatch.setattr(cost, "ask", ask)
    roots = {"against": "old", "here": "new"}
    found = cost.measure("update", roots, 3, {"width": 16, "blocks": 1}, 32)
    assert [name for _, name, _ in asked[:3]] == ["dsbp_muon", "dsbp_muon", "muon"]
    assert ("new", "muon", 1) not in asked
    rows = {(r["figure"], r["contender"], r["library"]): r for r in found}
    here = rows["update_both_cpu_s, 1 blocks", "dsbp_muon", "here"]
    assert here["values"] == [5.0, 6.0, 7.0] and here["ratio"] == 3.0
    grown = rows["growth of update_both_cpu_s", "dsbp_muon", "against"]
    assert grown["value"] == 3.0 and grown["ratio"] == 1.0


def test_a_cap_is_the_least_that_trains(monkeypatch):
    def ask(root, task, settings, *wrap, **env):
        limit = wrap[2].split()[2].rstrip(";")
        if limit != "unlimited" and int(limit) < 100 * 1024:
            raise RuntimeError("worker: out of memory")
        return {settings["name"]: {"data_mib": 150.0, "fell": 1.0}}

    monkeypatch.setattr(cost, "ask", ask)
    found = cost.caps(ROOT, {"name": "muon", "width": 16, "blocks": 1})
    assert 100 <= found["muon"]["cap_mib"] < 104


# Little memory.

linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
SIZES = {"width": 16, "layers": 1, "context": 8, "batch_size": 2}


@pytest.mark.parametrize("guess", [1, 37, 101, 1000])
def test_bisection_finds_a_planted_threshold(guess):
    for threshold, step in itertools.product((3, 100, 101, 777), (1, 8)):
        asked = []

        def works(cap, threshold=threshold, asked=asked):
            asked.append(cap)
            return cap >= threshold

        found = device.smallest(works, guess, step, 1000)
        assert threshold <= found < threshold + step or found == step > threshold
        assert found in asked and len(asked) < 25
    assert device.smallest(lambda cap: False, guess, 4, 50) is None
    assert device.smallest(lambda cap: cap >= 50, guess, 4, 50) == 50


@linux
def test_a_child_ends_under_a_cap_that_is_too_small(tmp_path):
    order = device.Order("nothing", str(tmp_path), {}, 2, 0.0)
    free = device.attempt(order, tmp_path / "cache")
    assert free.trained and free.rss_mib > free.data_mib / 2 > 0
    small = order._replace(cap=24 * device.MIB)
    assert device.attempt(small, tmp_path / "cache") is None
    assert not free._replace(losses=[2.0, 2.5]).trained
    assert not free._replace(losses=[2.0, float("nan"), 1.0]).trained


@linux
def test_the_artifact_trains_as_the_code_does(tmp_path):
    """A child with jax alone takes the steps that the model's code takes."""
    pytest.importorskip("flatbuffers")
    task = {**constrained.ENTRANTS["sgd"], "sizes": SIZES}
    workload, _ = device.parts(task)
    for number in range(3):
        arrays = jax.tree.leaves(workload.example(SIZES["batch_size"]))
        device.write_arrays(tmp_path / f"batch{number}.bin", arrays)
    sizes = constrained.export_step(task, tmp_path)
    assert sizes["artifact_bytes"] > 1000 and sizes["state_bytes"] > 0
    order = device.Order("exported", str(tmp_path), task, 3, 0.1)
    found = device.attempt(order, tmp_path / "cache")
    step = device._from_code(order)
    expected = [float(step(number)) for number in range(3)]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    assert found.trained


def test_rows_of_caps_are_not_made_again(tmp_path, monkeypatch):
    row = {"cap_mib": 180.0, "step_ms": 12.0, "compiling_rss_mib": 500.0}
    alone = {"optimizer": "jax alone", "size": None, "way": None, **row}
    monkeypatch.setattr(constrained, "baseline", lambda: alone)
    monkeypatch.setattr(constrained, "measure", lambda head, *_: {**head, **row})
    path = tmp_path / "caps.jsonl"
    told = "constrained", "--size", "small", "--optimizer", "sgd", "--json", path
    assert "jax alone" in invoke(*told, "--way", "code")
    assert "exported" in invoke(*told)
    ways = [row["way"] for row in records.read(path)]
    assert ways == [None, "code", "exported"]
    assert "another --json" in invoke(*told, "--steps", 3, code=1)


# Many devices.

SCRIPT = """
import dataclasses, json, jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
from benchmarks.studies import communication as c
from benchmarks.tasks import gpt
small = gpt.Gpt(width=48, layers=1, heads=2)
small = dataclasses.replace(gpt.WORKLOADS["shakespeare_gpt"], model=small)
routes = {r: c.account(*c.compile_step(small, 4, r, 4)) for r in c.ROUTES}
print(json.dumps(routes))
"""


def test_of_projected_kernels_only_coordinates_are_sent():
    """Both routes, in a process that has four devices."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    short, whole = map(
        json.loads(done.stdout.splitlines()[-1]).get, ("subspace", "whole")
    )
    sizes = {"qkv": (48, 144), "proj": (48, 48), "up": (48, 192), "down": (192, 48)}
    assert short["full"] == sum(d * m for d, m in sizes.values())
    assert short["coordinates"] == sum(4 * m for _, m in sizes.values())
    assert not short["forbidden"] and not short["unknown"]
    assert short["scalars"] == 1, "the loss"
    assert "embed/embedding" in short["others"]
    wide = sum(4 * d for d, _ in sizes.values())
    assert 0 < short["refresh"] <= wide + 2 * len(sizes), "sketch, two numbers"
    # The account of a step that does send whole gradients must say so.
    assert whole["coordinates"] == 0
    assert whole["forbidden"] == sorted([[48, 144], [48, 48], [48, 192], [48, 192]])


def test_operands_are_read_off_the_text():
    text = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %r = (f32[3,4]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={}
  %c = f32[2] conditional(%p, %q), branch_computations={%one, %two}
}
%one (a: f32[8]) -> f32[8] {
  %s = bf16[5,6]{1,0} all-gather-start(%a), dimensions={0}
}
"""
    assert communication.sent(text) == [
        ("all-reduce", (3, 4), False),
        ("all-reduce", (), False),
        ("all-gather", (5, 6), True),
    ]


def test_two_processes_of_two_devices_train_as_one(tmp_path):
    path = tmp_path / "record.jsonl"
    invoke("distributed", "digits_cnn", "--steps", 4, "--json", path)
    (record,) = records.read(path)
    together, alone = (np.asarray(record["losses"][k]) for k in ("together", "alone"))
    assert len(together) == 4 and (together[0] - together[-1]) > 1e-3
    assert record["gap"] == pytest.approx(np.max(np.abs(together / alone - 1)))
    assert record["gap"] < 1e-4
    # What fails in another process is told.
    told = "distributed", "digits_cnn", "--processes", 1, "--devices", 3
    assert "got 3 devices, expected a divisor" in invoke(*told, code=1)


# Estimates.

D, M, K = 512, 768, 16
REAL = {
    "adamw": optax.adamw(1.0),
    "muon": optimizers.CONTENDERS["muon"].factory(1.0),
    "galore": optimizers.CONTENDERS["galore"].factory(1.0, rank=K),
    "dsbp_muon": dsbp_optax.dsbp_muon(1.0, rank=K),
    "dsbp_adamw": dsbp_optax.dsbp_adamw(1.0, rank=K),
    "projected_muon": optimizers.projected_muon(1.0, rank=K),
    "subspace_adamw": dsbp_optax.subspace_adamw(1.0, rank=K),
}


@pytest.mark.parametrize("shape", [(D, M), (M, D)])
def test_state_bytes_are_those_of_the_arrays(shape):
    """Within 2 %, counters and spectra apart."""
    assert set(REAL) == set(scale.RULES)
    for name, rule in scale.RULES.items():
        state = jax.eval_shape(REAL[name].init, {"kernel": jnp.zeros(shape)})
        large = [x for x in jax.tree.leaves(state) if x.size > 8 * K]
        held = sum(x.size * x.dtype.itemsize for x in large)
        expected = rule.kernel_bytes(*shape, K) + rule.basis_bytes(*shape, K)
        assert held == pytest.approx(expected, rel=0.02), name


def test_flops_are_those_that_the_compiler_counts():
    """The first of six layers has no gradient of its input to take."""
    width, samples = 512, 2048
    layers = scale.Kernel("layer", width, width, 6, "layer before")
    found = compiled(width, samples, K, scanned=False)
    first = 2.0 * width * width * samples
    for way, subspace in (("plain", False), ("short", True)):
        flops = scale.gradient_flops(layers, samples, K, subspace) - first
        # A sketch is counted as if it were taken in every step.
        sketches = 4.0 * width * K * samples * 6 if subspace else 0.0
        assert found[way]["flops"] == pytest.approx(flops + sketches, rel=0.01)
    direction = dsbp_optax.orthogonalize()
    program = jax.jit(lambda x: direction(x, D, M)).lower(jnp.zeros((D, M))).compile()
    costs = program.cost_analysis()
    counted = (costs[0] if isinstance(costs, list) else costs)["flops"]
    steps = 5  # The compiler counts the body of their loop once.
    assert steps * counted == pytest.approx(scale.newton_schulz_flops(D, M), rel=0.02)


def test_what_follows_for_seven_billion_parameters(tmp_path):
    model, machine = scale.MODELS["llama-7b"], scale.Machine(256)
    assert (model.projected + model.others) / 1e9 == pytest.approx(6.74, abs=0.01)
    costs = {
        name: scale.estimate(model, rule, machine, rank=128, tokens=2**22)
        for name, rule in scale.RULES.items()
    }
    adamw, short = costs["adamw"], costs["subspace_adamw"]
    assert adamw.state == 8 * (model.projected + model.others)
    assert 0.66 < (short.flops / adamw.flops) < 0.72
    kernels = sum(128 * kernel.outputs * kernel.count for kernel in model.kernels)
    assert short.gradient == 4 * kernels + 2 * model.others
    assert short.sent < 0.1 * adamw.sent
    path = tmp_path / "SCALE.md"
    invoke("estimate", "--write", path)
    assert path.read_text() == (ROOT / "benchmarks/SCALE.md").read_text()
    assert "llama-7b" in invoke("estimate", "--model", "llama-8b", code=2)
