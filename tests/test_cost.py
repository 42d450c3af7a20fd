"""The cost of a step: its workers, and the rows that are made of what they say."""

import json

import pytest

pytest.importorskip("flax")
pytest.importorskip("typer")

from typer.testing import CliRunner

from benchmarks import cost
from benchmarks.cli import app

GPT = {"width": 16, "blocks": 1}


def invoke(*args):
    result = CliRunner().invoke(app, ["cost", *map(str, args)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_processes_of_their_own_give_the_rows_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "DEFAULTS", ())  # Those of the tests compile sooner.
    for name, pair in (("train", "muon"), ("temporaries", "sgd")):
        entry = ((f"dsbp_{pair}", pair), True)
        monkeypatch.setitem(cost.FIGURES, name, entry)
    path = tmp_path / "cost.json"
    invoke(
        *("--figure", "train", "--figure", "temporaries", "--repeats", 1, "--quiet"),
        *("--width", 16, "--blocks", 1, "--wide", 32, "--json", path),
    )
    record = json.loads(path.read_text())
    assert record["machine"]["cores"] and record["versions"]["jax"]
    assert record["libraries"].keys() == {"here"}
    rows = {(row["figure"], row["contender"]): row for row in record["rows"]}
    for figure in ("both_s", "peak_mib", "program_bytes", "instructions"):
        ours, plain = (rows[figure, name] for name in ("dsbp_muon", "muon"))
        assert ours["value"] > 0 and ours["values"] == [ours["value"]]
        assert ours["ratio"] == ours["value"] / plain["value"]
        assert plain["ratio"] is None
    for layout in ("unrolled", "stacks of 8"):
        row = rows[f"temporary bytes a parameter, {layout}", "dsbp_sgd"]
        assert row["value"] > 0 and row["ratio"] > 0
    table = invoke("--report", path)
    assert "| instructions | dsbp_muon |" in table


def test_versions_take_turns_and_plain_optimizers_run_once(monkeypatch):
    """Medians, growth and ratios of what workers are made to say."""
    asked = []

    def ask(root, task, settings):
        asked.append((root, settings["name"], settings["blocks"]))
        seconds = {"old": 8.0, "new": 4.0}[root] + asked.count(asked[-1])
        if settings["name"] in ("muon", "muon_kernels", "adamw"):
            seconds = 2.0
        seconds *= settings["blocks"]
        blocks = f"{settings['blocks']} blocks"
        return {settings["name"]: {f"update_both_cpu_s, {blocks}": seconds}}

    monkeypatch.setattr(cost, "ask", ask)
    roots = {"against": "old", "here": "new"}
    found = cost.measure("update", roots, 3, GPT, 32)
    assert asked[:3] == [
        ("old", "dsbp_muon", 1),
        ("new", "dsbp_muon", 1),
        ("old", "muon", 1),
    ]
    assert ("new", "muon", 1) not in asked
    rows = {(r["figure"], r["contender"], r["library"]): r for r in found}
    here = rows["update_both_cpu_s, 1 blocks", "dsbp_muon", "here"]
    assert here["values"] == [5.0, 6.0, 7.0] and here["value"] == 6.0
    assert here["ratio"] == 3.0
    grown = rows["growth of update_both_cpu_s", "dsbp_muon", "against"]
    assert grown["value"] == 3.0 and grown["ratio"] == 1.0


def test_losses_that_cannot_be_and_ratios_without_a_base_are_left_out(monkeypatch):
    said = {"dsbp": {"loss_1": 4.0, "loss_10": None}}
    monkeypatch.setattr(cost, "ask", lambda *_: said)
    first, second = cost.measure("losses", {"here": "new"}, 3, GPT, 32)
    assert (first["value"], first["ratio"], first["values"]) == (4.0, None, [4.0])
    assert second["value"] is None


def test_a_worker_that_fails_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match="TypeError"):
        cost.ask(cost.HERE, "losses", {"depth": 3})
