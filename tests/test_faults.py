"""Real processes, really killed; what goes on is compared bit by bit."""

import pathlib
import re
import shutil
import subprocess
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
from benchmarks.studies.faults import Job
from benchmarks.tasks import WORKLOADS
from benchmarks.tasks.base import DataError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """XLA compiles in a hurry, once for all children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def job(place):
    return Job(str(place / "whole"), steps=16, every=4)


@pytest.fixture(scope="module")
def expected(place, job):
    return faults.finish(faults.start(job, place / "cache"))


def test_kills_change_no_bit(place, job, expected):
    """In a step that refreshes, in another, and while a checkpoint is written."""
    mine = job._replace(folder=str(place / "killed"))
    for step, wait in ((2, 0.0), (7, 0.01), (9, 0.0)):
        last = faults.kill_at(faults.start(mine, place / "cache"), f" {step}", wait)
        assert last in ("step", "saved")
    found = faults.finish(faults.start(mine, place / "cache"))
    assert found["started"] == 8 and expected["started"] == 0
    assert faults.different(found, expected) == []
    assert len(expected) > 10


def tear(folder: pathlib.Path, how: str) -> None:
    """Damage the largest file of a checkpoint, as a disk may."""
    files = sorted(x for x in folder.rglob("*") if x.is_file())
    largest = max(files, key=lambda x: x.stat().st_size)
    whole = largest.read_bytes()
    middle = len(whole) // 2
    if how == "deleted":
        largest.unlink()
        return
    inverted = bytes(255 - byte for byte in whole[middle : middle + 64])
    torn = inverted + whole[middle + 64 :] if how == "overwritten" else b""
    largest.write_bytes(whole[:middle] + torn)


def test_a_torn_checkpoint_gives_way_to_the_one_before(place, job, expected):
    children = {}
    for how in ("truncated", "deleted", "overwritten"):
        mine = job._replace(folder=str(place / how), steps=20)
        shutil.copytree(job.folder, mine.folder)
        tear(pathlib.Path(mine.folder) / "16", how)
        children[how] = faults.start(mine._replace(steps=16), place / "cache")
    for how, child in children.items():
        found = faults.finish(child)
        assert found["started"] == 12, how
        assert "step 16 is torn" in found["said"], how
        assert faults.different(found, expected) == [], how


def test_another_rank_is_an_error_and_throws_nothing_away(place, job, expected):
    workload = WORKLOADS["digits_cnn"]
    params = workload.init(0)
    losses = np.zeros(job.steps, np.float32)
    with faults.open_folder(pathlib.Path(job.folder)) as manager:
        for rank, words in ((4, r"rank 1, .*expected .*rank 4"), (None, None)):
            told = {} if rank is None else {"rank": {"Dense_0/*": rank, "*": 4}}
            tx = dsbp_optax.dsbp_muon(lambda count: 0.01, **told)
            held = jax.device_put((params, tx.init(params), losses), jax.devices()[0])
            if words is None:
                step, found = faults.restore(manager, held)
                assert step == 16 and faults.digests(found).items() <= expected.items()
                continue
            with pytest.raises(DataError, match=words):
                faults.restore(manager, held)
        assert sorted(manager.all_steps()) == [8, 12, 16]


def test_one_process_of_two_that_is_killed_ends_the_other(place, job, expected):
    def pair():
        address = f"127.0.0.1:{distributed.free_port()}"
        told = [(address, 2, number, 1) for number in range(2)]
        mine = job._replace(folder=str(place / "pair"), steps=8)
        return [faults.start(mine._replace(place=one), place / "cache") for one in told]

    victim, other = pair()
    assert faults.kill_at(victim, " 5") in ("step", "saved")
    begun = time.monotonic()
    try:
        said, _ = other.communicate(timeout=4 * job.timeout)
    except subprocess.TimeoutExpired:
        other.kill()
        raise
    assert other.returncode and re.search(r"step \d", said)
    assert time.monotonic() - begun < 4 * job.timeout
    one, two = (faults.finish(child) for child in pair())
    assert one["started"] == two["started"] == 4
    assert faults.different(one, two) == []


def test_the_command_compares_jobs_that_were_killed(place):
    path = place / "faults.jsonl"
    told = ["faults", "--optimizer", "sgd", "--kills", "1", "--steps", "20"]
    result = CliRunner().invoke(app, [*told, "--json", str(path)])
    assert result.exit_code == 0, result.output
    (record,) = records.read(path)
    assert records.problems(record) == [] and record["passed"]
    assert sum(record["kills"][0]["places"].values()) == 1
    assert "identical" in result.output
