"""One core and little memory: bisection, real children, the record's table."""

import itertools
import sys

import jax
import numpy as np
import pytest

from benchmarks import report_scale

pytest.importorskip("flax")
pytest.importorskip("flatbuffers")

from benchmarks import constrained, device, records
from benchmarks.data import DataError
from benchmarks.device import Order, Report, smallest
from benchmarks.markdown import of_rich

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="RLIMIT_DATA and /proc are Linux's"
)

SIZES = {"width": 16, "layers": 1, "context": 8, "batch_size": 2}
TASK = {"optimizer": "sgd", "sizes": SIZES}
STEPS = 3


@pytest.mark.parametrize("guess", [1, 37, 100, 101, 400, 1000])
def test_bisection_finds_a_planted_threshold(guess):
    for threshold, step in itertools.product((3, 100, 101, 777), (1, 8)):
        asked = []

        def works(cap, threshold=threshold, asked=asked):
            asked.append(cap)
            return cap >= threshold

        found = smallest(works, guess, step, 1000)
        assert threshold <= found < threshold + step or found == step > threshold
        assert found in asked  # It was seen to work, not only inferred.
        assert len(asked) < 25


def test_bisection_gives_up_at_the_most():
    asked = []
    assert smallest(lambda cap: asked.append(cap) is not None, 10, 4, 50) is None
    assert max(asked) == 50
    assert smallest(lambda cap: cap >= 50, 10, 4, 50) == 50


def test_losses_must_fall_and_be_finite():
    def trained(*losses):
        return Report(list(losses), 1.0, 1.0, 1.0).trained

    assert trained(2.0, 2.5, 1.5)
    assert not trained(2.0, 2.5) and not trained(2.0, float("nan"), 1.0)
    assert not trained(2.0, float("inf"), 1.0)


def test_arrays_come_back_from_a_file(tmp_path):
    arrays = [np.arange(6, dtype=np.int32).reshape(2, 3), np.float32(0.5)]
    arrays += [np.asarray(jax.numpy.ones(3, "bfloat16"))]
    arrays = [np.asarray(x) for x in arrays]
    device.write_arrays(tmp_path / "a.bin", arrays)
    back = device.read_arrays(tmp_path / "a.bin", arrays)
    for one, other in zip(arrays, back, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_child_ends_under_a_cap_that_is_too_small(tmp_path):
    order = Order("nothing", str(tmp_path), {}, 2, 0.0)
    free = device.attempt(order, tmp_path / "cache")
    assert free.trained and free.rss_mib > free.data_mib / 2 > 0
    small = order._replace(cap=24 * device.MIB)
    assert device.attempt(small, tmp_path / "cache") is None


def test_the_artifact_trains_as_the_code_does(tmp_path):
    """A child with jax alone takes the steps that the model's code takes here."""
    workload = constrained.sized(**SIZES)
    for number in range(STEPS):
        arrays = jax.tree.leaves(workload.example(SIZES["batch_size"]))
        device.write_arrays(tmp_path / f"batch{number}.bin", arrays)
    sizes = constrained.export_step(TASK, tmp_path)
    parameters = (tmp_path / "state.bin").stat().st_size - sizes["state_bytes"]
    assert sizes["artifact_bytes"] > 1000 and parameters > 0
    order = Order("exported", str(tmp_path), {}, STEPS, 0.1)
    found = device.attempt(order, tmp_path / "cache")
    step = constrained.stepper(order._replace(way="code", task=TASK))
    expected = [float(step(number)) for number in range(STEPS)]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    assert found.trained


def record(**changes):
    row = {
        "optimizer": "sgd",
        "size": "small",
        "way": "exported",
        "learning_rate": 0.1,
        "artifact_bytes": 2048,
        "state_bytes": 2**20,
        "compiling_rss_mib": 500.0,
        "cap_mib": 180.0,
        "rss_mib": 210.0,
        "step_ms": 12.0,
        "losses": [4.0, 3.0],
    }
    lost = {"cap_mib": None, "step_ms": None, "losses": None}
    alone = {"cap_mib": 130.0, "step_ms": 0.1, "compiling_rss_mib": 200.0}
    rows = [row, {**row, "optimizer": "muon", **lost}]
    return {"steps": 20, "baseline": alone, "rows": rows, **changes}


def test_the_table_takes_off_what_jax_needs_and_keeps_failures():
    lines = of_rich(report_scale.constrained_table("", record())).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells[0][:5] == ["jax alone", "-", "-", "130", "0"]
    assert cells[1][:8] == [
        "sgd",
        "small",
        "exported",
        "180",
        "50",
        "12.0",
        "1.00",
        "2",
    ]
    assert cells[2][3:5] == ["does not train", "-"]


def test_a_record_goes_on_with_the_same_steps(tmp_path):
    path = tmp_path / "constrained.json"
    records.write(path, record())
    assert constrained.resume(path, 20)["rows"] == record()["rows"]
    with pytest.raises(DataError, match=r"got steps = 20, expected 8.*Remedy"):
        constrained.resume(path, 8)
