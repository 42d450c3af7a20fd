"""What kind of minimum was found: looks at trained runs, their records and tables."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("foolbox")

from typer.testing import CliRunner

from benchmarks import data, guarantee, minima, models, reaches_minima, robustness
from benchmarks.cli import app
from benchmarks.data import DataError
from benchmarks.optimizers import CONTENDERS
from benchmarks.results_page import document, write
from benchmarks.workloads import WORKLOADS

NAMES = ("sgd", "sam", "dsbp_sgd_msam")


#: Of pixels, on which rounding leaves their range when they are taken back.
MEAN, STD = 0.4465, 0.2616


def standardized(samples):
    inputs = (samples.inputs - np.float32(MEAN)) / np.float32(STD)
    return data.Samples(inputs, samples.targets)


def first_images(data_dir):
    found = data.load_digits(data_dir).limited(400)
    return data.Data(*map(standardized, found[:3]))


@pytest.fixture
def tiny(monkeypatch):
    """A perceptron wide enough to be projected, a minute's work made seconds'."""
    small = dataclasses.replace(
        WORKLOADS["digits_cnn"],
        model=models.Mlp((64,)),
        load=first_images,
        steps=24,
        pixel_mean=(MEAN,),
        pixel_std=(STD,),
    )
    monkeypatch.setitem(WORKLOADS, "digits_cnn", small)
    return small


CURVATURE = ("--look", "curvature")


def look(out, *more, names=NAMES):
    chosen = [word for name in names for word in ("--optimizer", name)]
    words = ("minima", "digits_cnn", *chosen, "--out", out, "--learning-rate", 0.1)
    result = CliRunner().invoke(
        app, [str(word) for word in (*words, *more)], env={"COLUMNS": "240"}
    )
    assert result.exit_code == 0, result.output
    return result.output


def read(out):
    paths = sorted(out.rglob("*.json"))
    return {path.name: json.loads(path.read_text()) for path in paths}


def test_every_run_leaves_a_record_that_is_not_made_again(tiny, tmp_path):
    out = tmp_path / "minima"
    printed = look(out, "--seeds", 1, *CURVATURE)
    found = read(out)
    assert len(found) == 3 and "sam-0.1-rho0.05-0.json" in found
    for record in found.values():
        values = np.asarray(record["hessian_eigenvalues"])
        assert len(values) == 10 and (np.diff(values) <= 0).all() and values[0] > 0
        assert max(record["hessian_residuals"]) < 0.05 * values[0]
        assert record["m_sharpness"] > 0
        ours = record["optimizer"].startswith("dsbp")
        for point in record["curve"]:
            assert point["kl"] > 0
            assert ("kl_bases" in point) == ours
        if ours:
            last = record["curve"][-1]
            assert 0 < last["moved_inside"] <= 1
            assert 0 < last["kl_inside"] < last["kl_bases"]
    assert all(name in printed for name in NAMES)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    look(out, "--seeds", 1, *CURVATURE)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}


def test_a_look_that_is_lacking_is_taken_and_another_radius_is_another_run(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(robustness, "ATTACKED", 64)
    monkeypatch.setattr(robustness, "RADII", (1 / 255, 128 / 255))
    monkeypatch.setattr(guarantee, "DRAWS", 3)
    look(tmp_path, "--seeds", 1, names=("sgd",))
    more = ("--look", "attacks", "--look", "bound")
    printed = look(tmp_path, "--seeds", 1, *more, names=("sgd",))
    (record,) = read(tmp_path).values()
    assert record["looks"] == ["attacks", "bound"]
    clean = record["test_accuracy"]
    for small, large in record["attacks"].values():
        assert abs(small - clean) < 0.1, "one grey level in 255 fools nobody"
        assert large < clean - 0.2, "half of the range fools many"
    assert record["attacks"]["PGD-40"][1] < 0.1
    assert record["bound_risk"] < record["bound_risk_upper"] < record["bound"] <= 1
    assert "PGD-40" in printed
    look(tmp_path, "--seeds", 1, "--rho", 0.2, names=("sam",))
    assert set(read(tmp_path)) == {"sgd-0.1-0.json", "sam-0.1-rho0.2-0.json"}


def test_no_run_starts_after_the_deadline(tiny, tmp_path):
    plan = minima.Plan(tiny, CONTENDERS["sgd"], None, range(1), ("curvature",))
    order = minima.Order("final", 0.1, 0, 24)
    plan = dataclasses.replace(plan, order=order)
    assert not minima.carry_out([plan], tmp_path, None, time.monotonic() - 1)
    assert minima.made([plan], tmp_path) == []


def test_a_radius_is_for_those_that_have_one():
    plain, peer = CONTENDERS["sgd"], CONTENDERS["sam"]
    assert minima.with_radius(plain, 0.2) is plain
    assert minima.with_radius(peer, None) is peer
    assert minima.with_radius(peer, 0.2).settings["rho"] == 0.2


def test_the_page_shows_lost_runs_and_ratios(tiny, tmp_path):
    out = tmp_path / minima.FOLDER
    look(out, "--seeds", 2, *CURVATURE, names=("sgd", "sam"))
    paths = {path.name: path for path in out.rglob("*.json")}
    tops = {"sgd-0.1-0.json": 8.0, "sgd-0.1-1.json": 12.0}
    tops |= {"sam-0.1-rho0.05-0.json": 2.0, "sam-0.1-rho0.05-1.json": None}
    for name, top in tops.items():
        record = json.loads(paths[name].read_text())
        if top is None:
            record |= {"diverged": True, "test_accuracy": None, "looks": []}
            del record["hessian_eigenvalues"]
        else:
            record["hessian_eigenvalues"][0] = top
        paths[name].write_text(json.dumps(record))
    text = document(tmp_path)
    assert "## Minima: digits_cnn" in text
    assert "| sgd | 0.1 | 2 | 10.00 ± 2.83 | 1.00 | 5.00 |" in text
    assert "| sam 0.05 | 0.1 | 1 | 2.00 | 0.20 | 1.00 |" in text
    assert "2, 1 bad" in text
    page, *pictures = write(tmp_path / "RESULTS.md", tmp_path)
    assert page.read_text() == text
    assert [path.name for path in pictures] == ["MINIMA.png"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")


def made_up(optimizer, values, top, rho=None):
    """Final records on the Fashion-MNIST CNN, one a seed."""
    about = {"optimizer": optimizer, "learning_rate": 0.1, "diverged": False}
    about["hyperparameters"] = {} if rho is None else {"rho": rho}
    return [
        {**about, "seed": s, "test_accuracy": v, "hessian_eigenvalues": [top, 1.0]}
        for s, v in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("sam", "ours", "top", "flat", "accurate"),
    [
        ([0.89, 0.90, 0.91], [0.89, 0.90, 0.91], 4.0, True, True),
        ([0.89, 0.90, 0.91], [0.89, 0.90, 0.91], 4.9, False, True),
        ([0.89, 0.90, 0.91], [0.885, 0.895, 0.905], 4.0, True, False),
        ([0.90, 0.91, 0.921], [0.899, 0.909, 0.919], 4.0, True, True),
        ([0.90, 0.91, 0.921], [0.897, 0.907, 0.917], 4.0, True, False),
    ],
)
def test_flat_reaches_are_judged_by_the_records(sam, ours, top, flat, accurate):
    plain = made_up("sgd", [0.89, 0.90, 0.91], 20.0)
    mode = "dsbp_sgd_msam"
    runs = [*plain, *made_up("sam", sam, 4.0, 0.05), *made_up(mode, ours, top, 0.1)]
    found = list(reaches_minima.lines({"fashion_mnist_cnn": runs}))
    mine = [x for x in found if x.optimizer == mode and x.workload.startswith("fash")]
    assert [line.met for line in mine] == [flat, accurate]
    others = [line for line in found if line not in mine]
    assert others and all(line.met is None for line in others)


def test_kl_along_training_is_that_of_the_formula(tiny):
    start = {"w": jnp.zeros(4)}
    found = guarantee.divergence({"w": jnp.full(4, 0.02)}, start, ())
    variance, squared = guarantee.NOISE**2, 4 * 0.02**2
    prior = variance + squared / 4
    exact = 0.5 * ((4 * variance + squared) / prior - 4 + 4 * np.log(prior / variance))
    assert found["kl"] == pytest.approx(exact, rel=1e-2)
    assert found.keys() == {"kl"}


def has_opencv():
    try:
        robustness.load_corruptions()
    except DataError:
        return False
    return True


@pytest.mark.skipif(not has_opencv(), reason="OpenCV finds no libGL")
def test_corruptions_of_what_was_trained(tiny, monkeypatch):
    monkeypatch.setattr(robustness, "CORRUPTED", 32)
    params, samples = tiny.init(0), tiny.load(None).test
    found = robustness.corrupted(tiny, params, samples)
    assert set(found) == set(robustness.CORRUPTIONS)
    assert all(0 <= value <= 1 for value in found.values())
    assert len(set(found.values())) > 3, "corruptions differ"


def test_the_bound_holds_more_data_than_one_batch(tiny, monkeypatch):
    monkeypatch.setattr(guarantee, "DRAWS", 2)
    monkeypatch.setattr(guarantee, "BATCH", 100)
    params = tiny.init(0)
    train = tiny.load(None).train
    found = guarantee.bound(tiny, params, jax.device_get(params), train)
    assert found["bound_samples"] == 100 * (len(train) // 100) > 100
    assert found["bound_kl"] < 1, "nothing has moved yet"
