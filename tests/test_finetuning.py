"""Fine-tuning: what is adapted, what is held, how much is trained, what is recorded."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("qwix")

from typer.testing import CliRunner

import dsbp_optax
from benchmarks import (
    finetuning,
    kernels,
    models,
    pretraining,
    results_finetuning,
    train,
    tune,
    workloads,
)
from benchmarks.cli import app
from benchmarks.data import DataError, load_digits, load_shakespeare
from benchmarks.finetuning import (
    ALIKE,
    OURS_WHOLE,
    PEER,
    WHOLE,
    WIDE,
    Task,
    adapted,
    chosen,
    entrants,
)
from benchmarks.finetuning_tasks import TASKS
from benchmarks.results_page import document
from benchmarks.workloads import WORKLOADS

# qwix asks for a name that Flax has retired.
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed")

NAMES = (PEER, *ALIKE, WIDE, OURS_WHOLE, WHOLE)
MODEL = models.Mlp((32, 32))


def load(data_dir, weights):
    del weights
    inputs, _ = WORKLOADS["digits_cnn"].example(1)
    pretrained = MODEL.init(jax.random.key(7), inputs)["params"]
    return load_digits(data_dir)._replace(
        pretrained={name: pretrained[name] for name in ("Dense_0", "Dense_1")}
    )


TINY = Task(
    workload=adapted(WORKLOADS["digits_cnn"], name="tiny", model=MODEL, steps=6),
    modules="Dense_[01]",
    head="^Dense_2/",
    lora_rank=2,
    rank=5,
    wide_rank=8,
    grids=dict.fromkeys(NAMES, (1e-3, 1e-2)),
    load=load,
)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {kernels.path_of(keys): leaf for keys, leaf in leaves}


def shapes(workload):
    return jax.eval_shape(lambda: workload.init(0))


@pytest.mark.parametrize("task", [*TASKS.values(), TINY], ids=lambda task: task.name)
def test_both_ways_train_as_many_numbers_of_the_same_kernels(task):
    known = entrants(task)
    numbers = {n: finetuning.trained_numbers(*known[n]) for n in known}
    assert numbers["projected_adamw"] == numbers["projected_muon"]
    assert numbers["projected_adamw"] == pytest.approx(numbers[PEER], rel=0.05)
    whole = sum(leaf.size for leaf in jax.tree.leaves(shapes(task.workload)))
    assert numbers[PEER] < 0.2 * numbers[WHOLE] or task is TINY
    assert numbers[WHOLE] == numbers[OURS_WHOLE] == whole
    with_adapters = paths(shapes(known[PEER][0]))
    theirs = {
        path.removesuffix("_lora_a")
        for path in with_adapters
        if path.endswith("_lora_a")
    }
    workload, contender = known["projected_adamw"]
    plan = dsbp_optax.diagnostics.explain(contender.build(0.0), shapes(workload))
    ours = {p for p, found in plan.items() if any(d.projected for d in found)}
    assert ours == theirs
    assert {d.rank for p in ours for d in plan[p]} == {task.rank}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_wide_contender_has_as_much_state_as_lora(task):
    def state(workload, contender):
        tx = contender.build(0.0)
        return dsbp_optax.diagnostics.state_bytes(
            jax.eval_shape(tx.init, shapes(workload))
        )

    known = entrants(task)
    wide, peer = (state(*known[name]) for name in (WIDE, PEER))
    assert 0.95 * peer < wide <= peer


def test_lora_trains_both_factors_and_coordinates_the_output_side_alone():
    d, m = 64, 32  # of the first kernel; the second is m x m, the head m x 10 + 10
    lora = TINY.lora_rank * ((d + m) + (m + m))
    ours = TINY.rank * (m + m)
    head = m * 10 + 10
    known = entrants(TINY)
    assert finetuning.trained_numbers(*known[PEER]) == lora + head
    assert finetuning.trained_numbers(*known["projected_adamw"]) == ours + head


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_stays_bit_for_bit_and_the_rest_moves(name):
    (lane,) = finetuning.lanes(TINY, None, None, names=[name])
    program = finetuning.build_counted(lane.workload, lane.contender)
    data = lane.workload.load(None)
    run = train.train(program, data, data.test, rate=0.01, steps=6, seed=0)
    before = lane.workload.init(0, data.pretrained)
    marks = paths(chosen(before, lane.workload.trained))
    after, before = paths(run.params), paths(before)
    moved = {p for p in after if not np.array_equal(after[p], before[p])}
    assert moved == {p for p, mine in marks.items() if mine}
    assert len(moved) == {PEER: 6, WHOLE: 6, OURS_WHOLE: 6}.get(name, 4)
    assert run.curve[-1]["train_loss"] < run.curve[0]["train_loss"]
    moments = paths(run.opt_state)
    held = {p for p, mine in marks.items() if not mine and not p.endswith("kernel")}
    assert not [p for p in moments if any(f"/{q}/" in f"/{p}/" for q in held)]


def test_lora_starts_from_the_pretrained_function():
    workload, _ = entrants(TINY)[PEER]
    data = load(None, None)
    inputs, _ = TINY.workload.example(4)
    params = workload.init(0, data.pretrained)
    plain = {
        layer: {k: v for k, v in leaves.items() if "lora" not in k}
        for layer, leaves in params.items()
    }
    np.testing.assert_array_equal(
        workload.model.apply({"params": params}, inputs),
        TINY.workload.model.apply({"params": plain}, inputs),
    )
    assert paths(params)["Dense_1/kernel_lora_a"].any()
    assert not paths(params)["Dense_1/kernel_lora_b"].any()


def test_gradients_of_what_is_held_are_zero():
    workload, _ = entrants(TINY)["projected_adamw"]
    batch = workload.example(8)
    grads = paths(jax.grad(workload.loss)(workload.init(0), batch))
    zero = {path for path, leaf in grads.items() if not leaf.any()}
    assert zero == {"Dense_0/bias", "Dense_1/bias"}


def invoke(*args):
    found = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    return found.output


def test_the_command_leaves_records_that_are_made_once_and_shown(tmp_path, monkeypatch):
    pair = {name: entrants(TINY)[name] for name in (PEER, "projected_muon")}
    monkeypatch.setitem(TASKS, "tiny", TINY)
    monkeypatch.setattr(finetuning, "entrants", lambda task: pair)
    monkeypatch.setattr(tune, "EXTENSIONS", 0)
    out = tmp_path / results_finetuning.FOLDER
    command = ("finetune", "tiny", "--out", out, "--seeds", 2, "--rounds", 3)
    shown = invoke(*command)
    assert "all done" in shown and "Quality" in shown and "projected_muon" in shown
    made = {path: path.read_bytes() for path in out.rglob("*.json")}
    assert len(made) == 2 * (2 + 2 + 2) + 1
    assert invoke(*command) and made == {p: p.read_bytes() for p in made}
    record = json.loads((out / "tiny/lora/tune1-0.001-100.json").read_text())
    assert record["trained_numbers"] == finetuning.trained_numbers(*pair[PEER])
    assert record["judged_on"] == "validation"
    page = document(tmp_path)
    assert "## Fine-tuning: tiny" in page and "Other runs" not in page
    entries = {e.name: e for e in results_finetuning.read_entries(TINY, out)}
    assert list(entries) == list(pair)
    assert all(len(entry.finals) == 2 for entry in entries.values())
    ours, theirs = (entries[n].median("state_bytes") for n in ("projected_muon", PEER))
    assert ours < theirs


GPT = dataclasses.replace(
    WORKLOADS["shakespeare_gpt"],
    model=models.Gpt(width=16, layers=1, heads=2, context=8),
    example=workloads.tokens(8),
    load=load_shakespeare(8),
    steps=2,
    batch_size=4,
)


def test_weights_are_kept_as_they_were_and_described(tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be: " * 60)
    path = tmp_path / "weights.npz"
    params = pretraining.pretrain(tmp_path, GPT)
    pretraining.write(path, params)
    found = paths(pretraining.read(path, GPT))
    assert found.keys() == paths(params).keys()
    for name, leaf in paths(params).items():
        np.testing.assert_array_equal(found[name], leaf)
    record = pretraining.describe(path, tmp_path, GPT, GPT)
    expected = GPT.measure(params, GPT.load(tmp_path).test, None)
    assert record["pretraining"] == record["before_adaptation"] == expected
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_weights_that_are_missing_or_of_another_model_are_refused(tmp_path):
    path = tmp_path / "weights.npz"
    with pytest.raises(DataError, match=r"got no such file.*Remedy"):
        pretraining.read(path, GPT)
    pretraining.write(path, {"Dense_0": {"kernel": np.ones((2, 2))}})
    with pytest.raises(DataError, match=r"no array .*block_0.*Remedy"):
        pretraining.read(path, GPT)


def test_records_of_a_tie_show_no_difference(tmp_path):
    """Paired by seed: equal runs differ by nothing, and the interval says so."""
    values = [0.5, 0.7, 0.6]
    run = {"learning_rate": 0.01, "train_loss": 1.0, "diverged": False}
    runs = [
        {**run, "optimizer": name, "seed": seed, "test_accuracy": value}
        for name in (PEER, "projected_adamw")
        for seed, value in enumerate(values)
    ]
    entries = results_finetuning.compare.entries(TINY.workload, runs)
    table = results_finetuning.quality_table(entries)
    cells = {c.header: list(c.cells) for c in table.columns}
    assert cells["against lora (95 %)"] == ["-", "+0.00 [+0.00, +0.00]"]
    assert cells["against adamw (95 %)"] == ["-", "-"]
