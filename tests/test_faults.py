"""Real processes, really killed; what goes on is compared bit by bit."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsbp_optax
from benchmarks import faults
from benchmarks.checkpoints import Checkpoints, Saved, digests
from benchmarks.data import DataError
from benchmarks.faults import Event, Nursery, Order, Stream
from benchmarks.train import make_step
from benchmarks.workloads import WORKLOADS

KILLS = 5
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """A short run; XLA compiles in a hurry, once for all children."""
    before = pytest.MonkeyPatch()
    before.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    root = tmp_path_factory.mktemp("faults")
    order = Order("digits_cnn", "dsbp_muon", None, "", 24, 4, 0.01)
    yield Nursery(root, order, seconds=300)
    before.undo()


@pytest.fixture(scope="module")
def expected(nursery):
    return faults.unbroken(nursery)


def test_five_kills_change_no_bit(nursery, expected) -> None:
    found = faults.kill_at_random(nursery, expected, 0, KILLS, seed=2)
    assert found["different"] == []
    assert sum(found["places"].values()) == KILLS
    assert found["jobs"] >= 1
    losses = expected["losses"]
    assert len(losses) == nursery.order.steps and losses[-1] < losses[0]


def test_a_torn_checkpoint_gives_way_to_the_one_before(nursery, expected) -> None:
    """Written by a child, torn here in three ways, read by another process."""
    kept, folders = nursery.root / "unbroken", []
    for how in faults.TEARS:
        folders.append(nursery.root / f"torn {how}")
        shutil.copytree(kept, folders[-1])
        steps = sorted(int(x.name) for x in kept.iterdir() if x.name.isdigit())
        faults.tear(folders[-1] / str(steps[-1]), how)
    found = _worked("torn", *folders)
    for row in found:
        assert any(re.search(rf"/{steps[-1]}: torn", said) for said in row["said"])
        assert row["written"], "anew"
        assert len(row["losses"]) == steps[-2]
        assert row["losses"] == expected["losses"][: steps[-2]]
    rows = [(row["step"], row["steps"]) for row in found]
    assert rows == [(steps[-2], steps[:-1])] * 3


def _worked(what: str, *folders: pathlib.Path):
    """What `restore_worker` prints."""
    worker = pathlib.Path(__file__).parent / "restore_worker.py"
    command = [sys.executable, str(worker), what, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


#: What `dsbp_optax.RankFraction` gives the digits, but for the widest kernel.
FEWER = {"Dense_0/*": 4, "Conv_1/*": 4, "*": 1}


def _like(order: Order, **settings) -> object:
    """Shapes of parameters and state of an order."""
    workload = WORKLOADS[order.workload]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tx = dsbp_optax.dsbp_muon(lambda count: order.rate * count, **settings)

    def both():
        params = workload.init(0)
        return params, tx.init(params)

    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(both),
    )


def test_another_model_or_rank_is_an_error_with_the_path(nursery, expected) -> None:
    folder, order = nursery.root / "unbroken", nursery.order
    with Checkpoints(folder) as checkpoints:
        newest = checkpoints.steps()[-1]
        named = rf"{folder}/{newest}: checkpoint: "
        with pytest.raises(DataError, match=rf"{named}.*rank 16, .*expected .*rank 4"):
            checkpoints.restore(_like(order, rank=FEWER))
        other = _like(order._replace(workload="fashion_mnist_mlp"))
        with pytest.raises(DataError, match=rf"{named}of another model.*it has no '0/"):
            checkpoints.restore(other)
        assert checkpoints.steps()[-1] == newest, "none is thrown away"
        assert checkpoints.restore(_like(order)).step == newest


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path) -> None:
    arrays = ({"kernel": jnp.arange(5000.0)}, ())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(Saved(1, arrays, {"n": 1}))
        said = "/2: not written.*still that of step 1"
        with faults._disk(full=True), pytest.warns(UserWarning, match=said):
            assert not checkpoints.save(Saved(2, arrays, {"n": 2}))
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(like).notes == {"n": 1}
        assert checkpoints.save(Saved(3, arrays, {"n": 3}))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(like).notes == {"n": 3}


def test_a_checkpoint_goes_onto_meshes_of_other_shapes(nursery, expected):
    """From one device to 2 x 4 and from there to 4 x 2: the same bits elsewhere."""
    kept, other = nursery.root / "unbroken", nursery.root / "sharded"
    found = _worked("meshes", kept, other)
    with Checkpoints(kept) as checkpoints:
        alone = digests(checkpoints.restore(_like(nursery.order)).arrays)
    assert found["digests"] == [alone, alone]
    assert found["meshes"] == [{"data": 2, "model": 4}, {"data": 4, "model": 2}]
    split = [{p for p, s in specs.items() if any(s)} for specs in found["specs"]]
    assert split[0] and split[1]


def test_a_resume_that_forgets_something_is_caught(nursery, expected, monkeypatch):
    """Planted: the batches from the start; a step that refreshes out of turn."""
    order = nursery.order._replace(steps=10)
    place = jax.devices()[0]
    with Checkpoints(nursery.root / "unbroken") as checkpoints:
        saved = checkpoints.restore(_like(order))
    workload = WORKLOADS[order.workload]
    step = make_step(workload, faults.contender(order.optimizer))

    def go_on(saved, position) -> dict[str, str]:
        stream = Stream(workload, None, seed=0)
        stream.resume(saved.notes) if position else None
        arrays = jax.device_put(saved.arrays, place)
        batch = jax.device_put(next(stream), place)
        copies = jax.tree.map(jnp.copy, arrays)
        *arrays, _ = step(*copies, batch, np.float32(order.rate), np.float32(24))
        return {"digests": digests(tuple(arrays)), "notes": stream.notes()}

    right = go_on(saved, True)
    assert faults.difference(go_on(saved, True), right) == []
    forgot = faults.difference(go_on(saved, False), right)
    assert "notes" in forgot and any("/inner/" in path for path in forgot)
    params, (metric, *rest) = saved.arrays
    assert metric.step % faults.PERIOD >= faults.WINDOW
    begun = metric.step - metric.step % faults.PERIOD
    turn = metric._replace(step=begun, collect=jnp.ones_like(metric.collect))
    state = (turn, *rest)
    early = faults.difference(
        go_on(saved._replace(arrays=(params, state)), True), right
    )
    assert any("basis" in path for path in early), "the turn to refresh"
    wrong = {**saved.notes, "rng": {"state": 0}}
    with pytest.raises(DataError, match="the batches: got"):
        Stream(workload, None, seed=0).resume(wrong)


def test_one_process_of_two_that_is_killed_ends_the_other(nursery, expected) -> None:
    short = nursery._replace(order=nursery.order._replace(steps=8, timeout=10))
    found, results = faults.lose_one(short, victim=0, after=5)
    assert found["ended"] and found["seconds"] <= 2 * found["timeout"]
    assert found["resumed"] == 4
    assert results[0] == results[1]
    alone = expected["losses"][: short.order.steps]
    np.testing.assert_allclose(results[0]["losses"], alone, rtol=1e-4)


def test_where_a_kill_falls_is_what_the_child_said_last() -> None:
    places = [
        Event("step", 3, True),
        Event("step", 4),
        Event("save", 4),
        Event("saved", 4),
    ]
    assert [event.place for event in places] == [
        "refresh window",
        "other step",
        "save",
        "between steps",
    ]


def test_a_child_that_fails_says_why(nursery) -> None:
    child = nursery.child("nowhere", optimizer="nobody")
    with pytest.raises(DataError, match="KeyError: 'nobody'"):
        child.result()
