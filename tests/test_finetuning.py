"""Fine-tuning: what is adapted, what is held, how much is trained, what is recorded."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("qwix")

from typer.testing import CliRunner

import dsbp_optax
from benchmarks.core import records, train, tune
from benchmarks.core.kernels import path_of
from benchmarks.report import page
from benchmarks.studies import app, finetune
from benchmarks.studies.finetune import ALIKE, PEER, TASKS, WHOLE, WIDE, Task, chosen
from benchmarks.tasks import WORKLOADS, gpt, vision
from benchmarks.tasks.base import DataError

# qwix asks for a name that Flax has retired.
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed")

OURS_WHOLE = "projected_muon_whole"
NAMES = (PEER, *ALIKE, WIDE, OURS_WHOLE, WHOLE)
MODEL = vision.Mlp((32, 32))


def load(data_dir):
    inputs, _ = WORKLOADS["digits_cnn"].example(1)
    pretrained = MODEL.init(jax.random.key(7), inputs)["params"]
    return vision.load_digits(data_dir)._replace(
        pretrained={name: pretrained[name] for name in ("Dense_0", "Dense_1")}
    )


TINY = Task(
    workload=finetune._adapted(
        WORKLOADS["digits_cnn"], name="tiny", model=MODEL, steps=6, load=load
    ),
    modules="Dense_[01]",
    head="^Dense_2/",
    lora_rank=2,
    rank=5,
    wide_rank=8,
    rates=dict.fromkeys(NAMES, 3e-3),
)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(keys): leaf for keys, leaf in leaves}


def numbers_of(workload, contender):
    """The trained numbers, without compiling anything."""
    with pytest.MonkeyPatch.context() as patch:
        made = train.Program(workload, contender, None, None, {})
        patch.setattr(finetune, "build", lambda *_: made)
        return finetune.build_counted(workload, contender).figures["trained_numbers"]


def shapes(workload):
    return jax.eval_shape(lambda: workload.init(0))


@pytest.mark.parametrize("task", [*TASKS.values(), TINY], ids=lambda task: task.name)
def test_both_ways_train_as_many_numbers_of_the_same_kernels(task):
    known = task.entrants()
    numbers = {n: numbers_of(*known[n]) for n in known}
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

    known = task.entrants()
    wide, peer = (state(*known[name]) for name in (WIDE, PEER))
    assert 0.95 * peer < wide <= peer


def test_lora_trains_both_factors_and_coordinates_the_output_side_alone():
    d, m = 64, 32  # of the first kernel; the second is m x m, the head m x 10 + 10
    lora = TINY.lora_rank * ((d + m) + (m + m))
    ours = TINY.rank * (m + m)
    head = m * 10 + 10
    known = TINY.entrants()
    assert numbers_of(*known[PEER]) == lora + head
    assert numbers_of(*known["projected_adamw"]) == ours + head


@pytest.mark.parametrize("name", [PEER, "projected_muon", WHOLE])
def test_what_is_held_stays_bit_for_bit_and_the_rest_moves(name):
    (lane,) = TINY.lanes(None, names=[name])
    program = finetune.build_counted(lane.workload, lane.contender)
    data = lane.workload.load(None)
    run = train.train(program, data, data.test, rate=0.01, steps=6, seed=0)
    before = lane.workload.init(0, data.pretrained)
    marks = paths(chosen(before, lane.workload.trained))
    after, before = paths(run.params), paths(before)
    moved = {p for p in after if not np.array_equal(after[p], before[p])}
    assert moved == {p for p, mine in marks.items() if mine}
    assert len(moved) == {PEER: 6, WHOLE: 6}.get(name, 4)
    assert run.curve[-1]["train_loss"] < run.curve[0]["train_loss"]
    moments = paths(run.opt_state)
    held = {p for p, mine in marks.items() if not mine and not p.endswith("kernel")}
    assert not [p for p in moments if any(f"/{q}/" in f"/{p}/" for q in held)]


def test_lora_starts_from_the_pretrained_function():
    workload, _ = TINY.entrants()[PEER]
    data = load(None)
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
    workload, _ = TINY.entrants()["projected_adamw"]
    batch = workload.example(8)
    grads = paths(jax.grad(workload.loss)(workload.init(0), batch))
    zero = {path for path, leaf in grads.items() if not leaf.any()}
    assert zero == {"Dense_0/bias", "Dense_1/bias"}


def test_the_command_leaves_records_that_are_made_once_and_shown(tmp_path, monkeypatch):
    pair = {name: TINY.entrants()[name] for name in (PEER, "projected_muon")}
    monkeypatch.setitem(TASKS, "tiny", TINY)
    monkeypatch.setattr(Task, "entrants", lambda task: pair)
    monkeypatch.setattr(tune, "EXTENSIONS", 0)
    told = ["finetune", "tiny", "--out", str(tmp_path), "--seeds", "2", "--rounds", "3"]
    for _ in range(2):
        result = CliRunner().invoke(app, told, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert "all done" in result.output and "projected_muon" in result.output
        found = records.read(tmp_path / "finetune/tiny.jsonl")
        assert len(found) == 2 * (3 + 2 + 2) + 1
    runs = [one for one in found if one["study"] == "finetune"]
    assert all(records.problems(one) == [] for one in runs)
    lora = next(one for one in runs if one["optimizer"] == PEER)
    assert lora["trained_numbers"] == numbers_of(*pair[PEER])
    entries = {one.name: one for one in TINY.entries(tmp_path)}
    assert list(entries) == list(pair)
    assert all(len(one.finals) == 2 and one.speed for one in entries.values())
    assert entries["projected_muon"].median("state_bytes") < lora["state_bytes"]
    assert "## Fine-tuning: tiny" in page.document(page.Found(tmp_path))


GPT = dataclasses.replace(
    WORKLOADS["shakespeare_gpt"],
    model=gpt.Gpt(width=16, layers=1, heads=2, context=8),
    example=gpt.tokens(8),
    load=gpt.load_shakespeare(8),
    steps=2,
    batch_size=4,
)


def test_weights_are_kept_or_refused(tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be: " * 60)
    start = finetune.Start(GPT, path := tmp_path / "weights.npz")
    with pytest.raises(DataError, match=r"got no such file.*Remedy"):
        finetune.read_weights(start)
    finetune.pretrain(tmp_path, start)
    found = finetune.read_weights(start)
    assert paths(found).keys() == paths(GPT.init(0)).keys()
    data = GPT.load(tmp_path)
    held = GPT.init(5, found)
    value = GPT.measure(held, data.test, 8)
    assert value != GPT.measure(GPT.init(5), data.test, 8)
    assert [p.name for p in tmp_path.glob(".*")] == []
    np.savez(path, a=np.ones(2))
    with pytest.raises(DataError, match=r"weights of shakespeare_gpt.*Remedy"):
        finetune.read_weights(start)
