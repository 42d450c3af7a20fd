"""Two processes train as one does: real processes, jax's own runtime."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import distributed
from benchmarks.cli import app
from benchmarks.data import DataError


def test_two_processes_of_two_devices_train_as_one(tmp_path) -> None:
    path = tmp_path / "record.json"
    command = ["distributed", "digits_cnn", "--steps", "4", "--json", str(path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    together, alone = (np.asarray(record["losses"][k]) for k in ("together", "alone"))
    assert len(together) == 4 and (together[0] - together[-1]) > 1e-3
    assert record["gap"] == pytest.approx(np.max(np.abs(together / alone - 1)))
    assert record["gap"] < 1e-4
    assert distributed.largest_gap([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)


def test_a_process_that_fails_ends_the_others_and_says_why() -> None:
    place = distributed.Place("", 2, 0, 1)
    code = (
        "import json, os, sys, time\n"
        f"place = json.loads(os.environ['{distributed.VARIABLE}'])\n"
        "sys.exit('out of luck') if place[2] else time.sleep(600)\n"
    )
    with pytest.raises(DataError, match="one process of 2 failed: out of luck"):
        distributed.run([distributed.command([])[0], "-c", code], place, 60)


def test_different_losses_and_endless_runs_are_errors() -> None:
    place, python = distributed.Place("", 2, 0, 1), distributed.command([])[0]
    number = (
        f"__import__('json').loads(__import__('os').environ['{distributed.VARIABLE}'])"
    )
    with pytest.raises(DataError, match="different losses"):
        distributed.run([python, "-c", f"print([{number}[2]])"], place, 60)
    with pytest.raises(DataError, match=r"no end after 1 s.*--timeout"):
        distributed.run([python, "-c", "import time; time.sleep(600)"], place, 1)


def test_devices_must_divide_the_batch() -> None:
    command = ["distributed", "digits_cnn", "--processes", "1", "--devices", "3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "got 3 devices, expected a divisor of its batch of 64" in result.stderr
