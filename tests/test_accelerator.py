"""The command for an accelerator, at tiny sizes, with nothing but what it may need."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.core import hlo, records
from benchmarks.core.records import ROOT
from benchmarks.studies import accelerator
from benchmarks.tasks import png

#: Refuses what is not installed beside an accelerator; what jax and Flax bring with
#: them, only to files of this project.
HOOK = """
import runpy, sys
NEVER = {"typer", "pandas", "matfree", "pooch", "sklearn", "PIL", "matplotlib"}
THEIRS = {"rich", "scipy", "orbax"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        first, frame = name.partition(".")[0], sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        file = "" if frame is None else frame.f_code.co_filename
        ours = file.startswith(ROOT) and "site-packages" not in file
        if first in NEVER or (first in THEIRS and ours):
            raise ImportError(f"refused: {name}")

sys.meta_path.insert(0, Refuse())
sys.argv[0] = "benchmarks"
runpy.run_module("benchmarks", run_name="__main__")
"""


def run(*args, code=0):
    script = f"ROOT = {str(ROOT)!r}\n{HOOK}"
    command = [sys.executable, "-c", script, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr * bool(code)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Everything once: the folder, and what is printed."""
    out = tmp_path_factory.mktemp("accelerator")
    return out, run("accelerator", "--dry", "--out", out, "--commit", "0" * 40)


def read(out):
    return records.read(out / "accelerator.jsonl")


def test_each_name_leaves_records_that_keep_the_schema(dry):
    rows = read(dry[0])
    assert {row["name"] for row in rows} == {*accelerator.NAMES}
    assert [row["error"] for row in rows if row["error"]] == []
    assert [x for row in rows for x in records.problems(row)] == []
    assert {(row["commit"], row["clean"]) for row in rows} == {("0" * 40, None)}
    assert {row["data"] for row in rows if "data" in row} == {"generated"}
    assert all("test_loss" not in row for row in rows if row.get("seed") == 1000)


def test_the_table_comes_last_and_judges_every_reach(dry):
    table = dry[1].rpartition("\n\n")[2].splitlines()
    assert table[0].split()[0] == "measurement" and len({*table}) == len(table)
    judged = {line.split("  ")[0] for line in table if line.endswith(("yes", "no"))}
    assert judged == {n for n in accelerator.NAMES if n[:4] in ("cost", "upda")}
    assert "the paper  0.963" in dry[1]


def test_programs_are_kept_and_come_back_from_the_cache(dry):
    assert any((dry[0] / "cache").iterdir())
    told = {"name": "cost_gpt98", "contender": "adamw", "part": "adamw"}
    (row,) = records.read(dry[0] / "accelerator.jsonl", **told)
    assert row["compile_s"] > 0 and row["launches"] > 0 and row["state_bytes"] > 0
    assert row["total_bytes"] > row["temporary_bytes"] > 0


def test_a_second_run_goes_on_and_finds_nothing_to_do(dry):
    before = (dry[0] / "accelerator.jsonl").read_bytes()
    run("accelerator", "--dry", "--out", dry[0])
    assert (dry[0] / "accelerator.jsonl").read_bytes() == before


def test_without_time_there_is_a_table_and_no_record(tmp_path):
    told = run("accelerator", "--dry", "--minutes", "0", "--out", tmp_path)
    assert read(tmp_path) == [] and told.splitlines()[-1].startswith("measurement")


def test_what_fails_is_a_record_and_is_tried_again(tmp_path, monkeypatch):
    def broken(told):
        def fail():
            raise RuntimeError("out of memory")

        yield accelerator.Item("cost_gpt98", "adamw", 1.0, fail)
        yield accelerator.Item("cost_gpt98", "muon", 1.0, lambda: [{"contender": "m"}])

    monkeypatch.setattr(accelerator, "NAMES", {"cost_gpt98": broken})
    told = accelerator.Told(dry=False, minutes=1, only=None, out=tmp_path, commit=None)
    for _ in range(2):
        accelerator.carry_out(told)
    parts = [row["part"] for row in read(tmp_path)]
    assert parts == ["adamw", "muon", "adamw"]
    assert "failed: RuntimeError: out of memory" in accelerator.table(read(tmp_path))


def test_unknown_names_are_refused_and_known_ones_listed():
    assert run("accelerator", "--list").split() == [*accelerator.NAMES]
    assert "invalid choice" in run("accelerator", "--only", "nothing", code=2)


def test_it_is_among_the_commands():
    pytest.importorskip("typer")
    command = [sys.executable, "-m", "benchmarks", "--help"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert "accelerator" in done.stdout, done.stderr


def test_launches_follow_loops_and_branches():
    text = """HloModule m
%inside (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %a = f32[2]{0} add(%p, %p)
}
%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %t = (s32[], f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%t), index=1
  %f = f32[2]{0} fusion(%x), kind=kLoop, calls=%inside
  ROOT %r = (s32[], f32[2]{0}) tuple(%x, %f)
}
%few (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %w = (s32[], f32[2]{0:T(128)}) while(%p), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %u = (s32[], f32[2]{0}) while(%p), condition=%c, body=%body
  %b = f32[2]{0} conditional(%i, %w, %w), branch_computations={%few, %inside}
  ROOT %d = f32[2]{0} custom-call(%b), custom_call_target="x"
}
"""
    assert hlo.launches(text) == hlo.Launches(5 + 1 + 0 + 1, 5 + 1 + 1 + 1, 1)


def test_pictures_are_those_of_another_reader(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (9, 24, 3), np.uint8)
    smooth = np.cumsum(rng.integers(-3, 4, (40, 24, 3)), 0).astype(np.uint8)
    wide = np.cumsum(rng.integers(-3, 4, (12, 60, 3)), 1).astype(np.uint8)
    for number, pixels in enumerate((noise, smooth, wide, np.concatenate([noise] * 3))):
        path = tmp_path / f"{number}.png"
        image.fromarray(pixels).save(path, optimize=True)
        np.testing.assert_array_equal(png.read_rgb(path), pixels)
    image.fromarray(noise[..., 0]).save(path)
    with pytest.raises(ValueError, match="colours"):
        png.read_rgb(path)
    Path(path).write_bytes(b"none")
    with pytest.raises(ValueError, match="no PNG"):
        png.read_rgb(path)
