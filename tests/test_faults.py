"""Real processes, really killed; what goes on is compared bit by bit."""

import pathlib
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
def job(tmp_path_factory):
    place = tmp_path_factory.mktemp("faults")
    return Job(str(place / "whole"), str(place / "cache"), steps=16, every=4)


@pytest.fixture(scope="module")
def expected(job):
    """The hashes of an unbroken run."""
    start, found = Child(job).finish()
    assert start == 0 and len(found) > 10
    return found


def folder(job, name):
    return job._replace(folder=f"{job.folder}_{name}")


def test_kills_change_no_bit(job, expected):
    """In a step that refreshes, and while a checkpoint is written."""
    mine = folder(job, "killed")
    for step, wait in ((2, 0.0), (7, 0.01)):
        assert Child(mine).kill_at(step, wait) in ("step", "saved")
    start, found = Child(mine).finish()
    assert start in (4, 8, 12) and faults.different(found, expected) == []


def tear(place: pathlib.Path, how: str) -> None:
    """Damage the largest file of a checkpoint, as a disk may."""
    files = [x for x in place.rglob("*") if x.is_file()]
    largest = max(files, key=lambda x: x.stat().st_size)
    whole = largest.read_bytes()
    middle = len(whole) // 2
    inverted = bytes(255 - byte for byte in whole[middle : middle + 64])
    torn = inverted + whole[middle + 64 :] if how == "overwritten" else b""
    largest.write_bytes(whole[:middle] + torn)
    if how == "deleted":
        largest.unlink()


def test_a_torn_checkpoint_gives_way_to_the_one_before(job, expected):
    children = {}
    for how in ("truncated", "deleted", "overwritten"):
        mine = folder(job, how)
        shutil.copytree(job.folder, mine.folder)
        tear(pathlib.Path(mine.folder) / "16", how)
        children[how] = Child(mine)
    for how, child in children.items():
        start, found = child.finish()
        assert start == 12 and faults.different(found, expected) == [], how


def test_another_rank_is_an_error_and_throws_nothing_away(job, expected):
    params, losses = WORKLOADS["digits_cnn"].init(0), np.zeros(job.steps, np.float32)

    def held(**told):
        state = dsbp_optax.dsbp_muon(lambda count: 0.01, **told).init(params)
        return jax.device_put((params, state, losses), jax.devices()[0])

    with faults.open_folder(job.folder) as manager:
        with pytest.raises(DataError, match=r"rank 1, .*expected .*rank 4"):
            faults.restore(manager, held(rank={"Dense_0/*": 4, "*": 4}))
        step, found = faults.restore(manager, held())
        assert step == 16 and faults.digests(found).items() <= expected.items()
        assert sorted(manager.all_steps()) == [8, 12, 16]


def test_one_process_of_two_that_is_killed_ends_the_other(job, expected):
    def pair():
        address = f"127.0.0.1:{distributed.free_port()}"
        places = [distributed.Place(address, 2, number) for number in range(2)]
        mine = folder(job, "pair")._replace(steps=8)
        return [Child(mine._replace(place=one)) for one in places]

    victim, other = pair()
    assert victim.kill_at(5) in ("step", "saved")
    begun = time.monotonic()
    other.process.join(4 * job.timeout)
    assert other.process.exitcode and time.monotonic() - begun < 4 * job.timeout
    (start, one), (again, two) = (child.finish() for child in pair())
    assert start == again == 4 and faults.different(one, two) == []


def test_the_command_compares_jobs_that_were_killed(tmp_path):
    told = ["faults", "--optimizer", "sgd", "--kills", "1", "--steps", "20"]
    result = CliRunner().invoke(app, [*told, "--json", str(tmp_path / "faults.jsonl")])
    assert result.exit_code == 0, result.output
    (record,) = records.read(tmp_path / "faults.jsonl")
    assert records.problems(record) == [] and record["passed"]
    assert sum(record["kills"][0]["places"].values()) == 1
    assert "identical" in result.output
