"""Real processes, really killed; what goes on is compared bit by bit."""

import shutil
import time

import jax
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("orbax.checkpoint")

from typer.testing import CliRunner

import dsbp_optax
from benchmarks.core import records
from benchmarks.studies import app, distributed, faults
from benchmarks.studies.faults import Child, Job
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import DataError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def held():
    """Parameters, state and losses, as a child keeps them."""
    params = WORKLOADS["digits_cnn"].init(0)
    state = dsbp_optax.dsbp_muon(lambda count: 0.01, rank={"*": 4}).init(params)
    losses = np.arange(16, dtype=np.float32)
    return jax.device_put((params, state, losses), jax.devices()[0])


@pytest.fixture(scope="module")
def kept(held, tmp_path_factory):
    """A folder of checkpoints of two steps."""
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("kept")
    with faults.open_folder(folder) as manager:
        for step in (4, 8):
            mine = *held[:2], held[2] + step
            args = ocp.args.StandardSave((mine, faults.sealed(mine)))
            manager.save(step, args=args)
    return folder


@pytest.mark.parametrize("how", ["truncated", "deleted", "overwritten"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(how, held, kept, tmp_path):
    """The largest file is damaged, as a disk may."""
    shutil.copytree(kept, tmp_path / "torn")
    files = [x for x in (tmp_path / "torn" / "8").rglob("*") if x.is_file()]
    largest = max(files, key=lambda x: x.stat().st_size)
    whole = largest.read_bytes()
    middle = len(whole) // 2
    inverted = bytes(255 - byte for byte in whole[middle : middle + 64])
    torn = inverted + whole[middle + 64 :] if how == "overwritten" else b""
    largest.write_bytes(whole[:middle] + torn)
    if how == "deleted":
        largest.unlink()
    with faults.open_folder(tmp_path / "torn") as manager:
        with pytest.warns(UserWarning, match="step 8 is torn"):
            step, found = faults.restore(manager, held)
        assert manager.all_steps() == [4]
    expected = *held[:2], held[2] + 4
    assert step == 4 and faults.digests(found) == faults.digests(expected)


def test_another_rank_is_an_error_and_throws_nothing_away(held, kept):
    state = dsbp_optax.dsbp_muon(lambda count: 0.01, rank={"*": 5}).init(held[0])
    other = jax.device_put((held[0], state, held[2]), jax.devices()[0])
    with faults.open_folder(kept) as manager:
        with pytest.raises(DataError, match=r"rank 4, .*expected .*rank 5"):
            faults.restore(manager, other)
        assert sorted(manager.all_steps()) == [4, 8]


def test_kills_change_no_bit(tmp_path):
    told = ["faults", "--optimizer", "dsbp_muon", "--kills", "2", "--steps", "20"]
    result = CliRunner().invoke(app, [*told, "--json", str(tmp_path / "faults.jsonl")])
    assert result.exit_code == 0, result.output
    (record,) = records.read(tmp_path / "faults.jsonl")
    assert records.problems(record) == [] and record["passed"]
    assert sum(record["kills"][0]["places"].values()) == 2
    assert "identical" in result.output
    assert faults.different({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == ["b"]


def test_one_process_of_two_that_is_killed_ends_the_other(tmp_path):
    job = Job(str(tmp_path / "pair"), str(tmp_path / "cache"), steps=8, every=4)

    def pair():
        address = f"127.0.0.1:{distributed.free_port()}"
        places = [distributed.Place(address, 2, number) for number in range(2)]
        return [Child(job._replace(place=one)) for one in places]

    victim, other = pair()
    assert victim.kill_at(5) in ("step", "saved")
    begun = time.monotonic()
    other.process.join(4 * job.timeout)
    assert other.process.exitcode and time.monotonic() - begun < 4 * job.timeout
    (start, one), (again, two) = (child.finish() for child in pair())
    assert start == again == 4 and faults.different(one, two) == []
