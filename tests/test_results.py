"""The page of results: from the records alone, all of them, misses included."""

import json
import pathlib
import re

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from benchmarks import compare, generic, markdown, reaches, records, results_page
from benchmarks.cli import app
from benchmarks.data import DataError
from benchmarks.found import read_all
from benchmarks.results_page import PAGE, RESULTS, document
from benchmarks.workloads import WORKLOADS

ROOT = pathlib.Path(__file__).parent.parent
BYTES = {"adamw": 2000, "muon": 1000, "projected_muon": 200, "galore": 210}


def run(optimizer, value, seed=0, **changes):
    """A final record of the small GPT."""
    curve = [
        {"step": step, "train_loss": 2.0, "value": value} for step in (200, 400, 600)
    ]
    size = BYTES.get(optimizer, 300)
    return {
        "workload": "shakespeare_gpt",
        "optimizer": optimizer,
        "phase": "final",
        "round": 0,
        "learning_rate": 0.01,
        "learning_rate_source": "tuned",
        "seed": seed,
        "steps": 600,
        "quick": True,
        "batch_size": 24,
        "schedule": "constant",
        "metric": "val_loss",
        "val_loss": value,
        "train_loss": 1.5,
        "diverged": value is None,
        "curve": curve,
        "step_ms": 10.0,
        "refresh_step_ms": None,
        "mean_step_ms": 10.0,
        "state_bytes": size + 10,
        "projected_state_bytes": size,
        "temporary_bytes": 100,
        "compile_seconds": 1.0,
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {
            "system": "Linux",
            "architecture": "arm64",
            "processor": "Abacus",
            "cores": 3,
            "backend": "cpu",
            "device": "cpu",
        },
        "versions": {"python": "3.11", "jax": "0.9"},
        "git": {"commit": "abcdef0123", "modified": False},
        **changes,
    }


def write_campaign(root, values):
    """Final records, and the tuning that chose their rate, of a few seeds."""
    for optimizer, found in values.items():
        folder = root / "campaign/shakespeare_gpt" / optimizer
        for seed, value in enumerate(found):
            made = run(optimizer, value, seed)
            records.write(folder / f"final-0.01-{seed}.json", made)
        for stage in (1, 2):
            for rate in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 3e-4, 1e-4):
                score = 2 + abs(np.log10(rate / 0.01))
                made = run(optimizer, score, 100, round=stage, phase="tune")
                name = f"tune{stage}-{rate:g}-100.json"
                records.write(folder / name, {**made, "learning_rate": rate})


GOOD = {
    "projected_muon": [1.79, 1.80, 1.80],
    "muon": [1.79, 1.79, 1.80],
    "adamw": [2.0, 2.0, 2.01],
    "galore": [2.1, 2.1, 2.12],
}


def lines_of(text, words):
    return [line for line in text.splitlines() if words in line]


def verdicts(root):
    entries = results_page.campaign_entries(root)
    found = reaches.lines(entries, {}, [])
    return {
        line.reach: line.met for line in found if line.optimizer == "projected_muon"
    }


# The committed page.


def test_the_page_is_the_one_that_the_command_writes(tmp_path):
    path = tmp_path / "RESULTS.md"
    result = CliRunner().invoke(app, ["results", "--write", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == PAGE.read_bytes(), (
        "the page is not that of the records. Remedy: python -m benchmarks results"
    )
    assert (tmp_path / "RESULTS.png").read_bytes().startswith(b"\x89PNG")


def test_every_committed_record_is_on_the_page():
    text = PAGE.read_text()
    paths = [path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json")]
    assert len(paths) > 100
    paths += [path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.jsonl")]
    assert [path for path in paths if f"`results/{path}`" not in text] == []
    known = [one.path for one in read_all(RESULTS)]
    tops = {path.stem for path in known if len(path.parts) == 1}
    headings = " ".join(lines_of(text, "## "))
    assert [stem for stem in tops if f"`{stem}`" not in headings] == []


def test_every_table_has_its_provenance():
    """A heading of the second level leads to a commit, dates and a machine.

    Apart from those that sum up what other sections show.
    """
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    apart = ("Reached and missed", "The paper's", "Hours", "Machines", "Records")
    measured = [part for part in parts if not part.startswith(apart)]
    assert len(measured) > 5
    for part in measured:
        assert re.search(r"\bM\d", part) and re.search(r"\bV\d", part), part[:60]
        assert re.search(r"\b[0-9a-f]{7}\b|commit not recorded", part), part[:60]
        assert re.search(r"20\d\d-\d\d-\d\d", part), part[:60]


def test_the_site_shows_the_picture_and_leads_to_the_page():
    text = (ROOT / "docs" / "evidence.md").read_text()
    for target in ("benchmarks/RESULTS.png", "benchmarks/RESULTS.md"):
        assert f"(../{target})" in text and (ROOT / target).is_file()


# Made-up records.


def test_a_campaign_is_shown_with_its_misses(tmp_path):
    write_campaign(tmp_path, {**GOOD, "projected_muon": [1.9, 1.9, None]})
    text = document(tmp_path)
    (row,) = lines_of(text, "| projected_muon | 0.01 |")
    assert "3, 1 bad" in row
    missed = lines_of(text, "**missed**")
    assert [line for line in missed if "within 0.02 of Muon" in line]
    assert "Abacus, 3 core(s)" in text and "abcdef0" in text and "| 0-2 |" in text
    (row,) = lines_of(text, "| adamw | 0.01 |")
    assert "2.0033 ± 0.0058" in row


def test_runs_at_replaced_rates_are_not_hidden(tmp_path):
    write_campaign(tmp_path, GOOD)
    folder = tmp_path / "campaign/shakespeare_gpt/muon"
    records.write(
        folder / "final-0.5-7.json", run("muon", 1.2345, 7, learning_rate=0.5)
    )
    text = document(tmp_path)
    assert "At rates that tuning replaced" in text
    assert "| muon | 0.5 | 1.2345 | 7 |" in text
    (row,) = lines_of(text, "| muon | 0.01 | 1.7")
    assert "1.2345" not in row


@pytest.mark.parametrize(
    "place",
    [
        "faults-2027-01-01.json",
        "coordinates-2027-01-01.json",
        "new/kind-2027-01-01.json",
        "campaign/shakespeare_gpt/unheard_of/final-0.1-0.json",
        "campaign/unheard_of/muon/final-0.1-0.json",
        "campaign/shakespeare_gpt/controls/dsbp_sgd-odd-0.1-0.json",
    ],
)
@pytest.mark.parametrize("form", ["plain", "rows", "runs", "nested", "run"])
def test_no_record_of_an_unknown_kind_is_left_out(tmp_path, place, form):
    write_campaign(tmp_path, GOOD)
    about = {
        key: run("muon", 1.0)[key] for key in ("date", "machine", "versions", "git")
    }
    number = 0.1234
    content = {
        "plain": {"measured": number},
        "rows": {"rows": [{"what": "a", "measured": number}, {"what": "b"}]},
        "runs": {"records": [{**about, "seed": 3, "measured": number}]},
        "nested": {"cases": {"kill": {"deep": {"measured": number}}}},
        "run": {"optimizer": "dsbp_sgd, odd", "phase": "final", "seed": 3},
    }[form]
    content |= {"learning_rate": 0.1} if form == "run" else {}
    content |= {"measured": number} if form == "run" else {}
    records.write(tmp_path / place, {**about, **content})
    text = document(tmp_path)
    assert f"`results/{place}`" in text
    assert "0.1234" in text.partition("## Records")[0]


def test_what_is_no_record_is_refused(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"got no JSON.*Remedy"):
        document(tmp_path)
    result = CliRunner().invoke(
        app, ["results", "--records", str(tmp_path), "--write", str(tmp_path / "R.md")]
    )
    assert result.exit_code == 1 and not (tmp_path / "R.md").exists()


def test_the_page_does_not_depend_on_where_it_is_made(tmp_path):
    write_campaign(tmp_path / "one", GOOD)
    write_campaign(tmp_path / "two", dict(reversed(GOOD.items())))
    assert document(tmp_path / "one") == document(tmp_path / "two")


# Reaches.


@pytest.mark.parametrize(
    ("changed", "bytes_", "missed"),
    [
        ({}, {}, set()),
        ({"projected_muon": [1.82, 1.82, 1.83]}, {}, {"Muon"}),
        ({"adamw": [1.83, 1.83, 1.84]}, {}, {"AdamW"}),
        ({"galore": [1.95, 1.95, 1.96]}, {}, {"GaLore"}),
        ({}, {"projected_muon": 390}, {"Muon"}),
        ({}, {"projected_muon": 410}, {"AdamW", "Muon"}),
        ({"projected_muon": [1.79, 1.79, None]}, {}, {"AdamW", "Muon", "GaLore"}),
    ],
)
def test_a_reach_is_met_or_missed_by_the_records(
    tmp_path, monkeypatch, changed, bytes_, missed
):
    for name, size in bytes_.items():
        monkeypatch.setitem(BYTES, name, size)
    write_campaign(tmp_path, {**GOOD, **changed})
    found = {
        next(name for name in ("AdamW", "Muon", "GaLore") if name in reach): met
        for reach, met in verdicts(tmp_path).items()
    }
    assert found == {name: name not in missed for name in ("AdamW", "Muon", "GaLore")}


def test_what_was_not_run_is_not_measured(tmp_path):
    write_campaign(tmp_path, {"projected_muon": [1.8], "muon": [1.8, 1.8]})
    assert set(verdicts(tmp_path).values()) == {None}
    assert {line.met for line in reaches.lines({}, {}, [])} == {None}
    assert "not measured" in document(tmp_path)


def vision_entries(ours, peer, times=(1.0, 1.0)):
    """Fashion-MNIST; accuracies of seeds; the share of state is a fifth."""
    metric, entries = WORKLOADS["fashion_mnist_cnn"].metric, []
    for name, values, size, milliseconds in (
        ("dsbp_sgd", ours, 200, times[0]),
        ("muon", peer, 1000, times[1]),
    ):
        found = []
        for seed, value in enumerate(values):
            made = run(name, value, seed, mean_step_ms=milliseconds)
            made |= {"test_accuracy": value, "projected_state_bytes": size}
            for point in made["curve"]:
                point["value"] = value
            found.append(made)
        entries.append(compare.Entry(name, metric, found))
    return {"fashion_mnist_cnn": entries}


@pytest.mark.parametrize(
    ("ours", "times", "expected"),
    [
        ([0.910, 0.911, 0.912], (1, 1), (True, False)),
        ([0.910, 0.911, 0.912], (0.5, 1), (True, True)),
        ([0.908, 0.909, 0.910], (0.5, 1), (True, True)),
        ([0.905, 0.906, 0.907], (0.5, 1), (False, False)),
        ([0.900, 0.911, 0.922], (0.5, 1), (False, True)),
    ],
)
def test_accuracy_is_judged_by_the_bound_and_time_by_the_target(ours, times, expected):
    entries = vision_entries(ours, [0.910, 0.911, 0.912], times)
    found = reaches.lines(entries, {}, [])
    mine = [line.met for line in found if line.optimizer == "dsbp_sgd"]
    assert tuple(mine) == expected


@pytest.mark.parametrize(
    ("mean", "refresh", "met"),
    [(1.04, 1.19, True), (1.06, 1.0, False), (1.0, 1.21, False), (1.0, None, True)],
)
def test_steps_are_held_against_the_plain_optimizers(mean, refresh, met):
    row = {"contender": "dsbp_sgd", "against": "sgd", "ratio": {"value": mean}}
    plain = {"contender": "sgd", "against": "sgd", "step_seconds": 2.0}
    row |= {"step_seconds": 2.0, "refresh_seconds": refresh and 2 * refresh}
    speeds = {"cifar10_resnet": [row, plain]}
    found = {(line.optimizer, line.met) for line in reaches.lines({}, speeds, [])}
    assert ("dsbp_sgd", met) in found


@pytest.mark.parametrize(
    ("lost", "ratio", "met"), [(0, 1.04, True), (0, 1.06, False), (1, None, False)]
)
def test_stability_is_that_of_the_newest_record(lost, ratio, met):
    def record(lost, ratio):
        row = {"contender": "dsbp_sgd", "learning_rate": 0.1, "seeds": 5}
        row |= {"diverged": lost, "ratio": ratio and {"value": ratio}}
        return {"workload": "digits_cnn", "rows": [row]}

    old = record(0, 1.0) if not met else record(3, None)
    found = reaches.lines({}, {}, [old, record(lost, ratio)])
    (line,) = [line for line in found if line.optimizer == "dsbp_sgd"]
    assert line.met is met and f"{lost} of 5 runs lost" in line.measured


# Tables.


def test_seeds_are_merged_and_other_differences_kept():
    runs = [
        {"optimizer": "a", "rank": rank, "seed": seed, "gap": rank + seed / 10}
        for rank in (1, 8)
        for seed in (0, 1, 2)
    ]
    text = generic.tables({"records": runs})
    assert len(lines_of(text, "| 0-2 |")) == 2 and "| 8 | 0-2 | 8.1 ± 0.1 |" in text
    twice = [{"optimizer": "a", "width": w, "seed": 0, "gap": 0.5} for w in (0.1, 0.2)]
    text = generic.tables({"records": twice})
    assert "0.1" in text and "0.2" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "True"),
        (1234567, "1,234,567"),
        (0.00012345, "0.0001234"),
        ({"value": 1.0, "low": 0.5, "high": 2.0}, "1 [0.5, 2]"),
        ([1, 2], "1, 2"),
        ([1.0, None, 3.0, 5.0], "3 (1 to 5, 4 numbers, 1 not finite)"),
        (["a", "b"], "a, b"),
        ([{"a": 1}], "1 entries"),
        ([], "none"),
    ],
)
def test_cells_are_for_people(value, text):
    assert generic.cell(value) == text


def test_numbers_stand_to_the_right_and_bars_are_escaped():
    text = markdown.table(("a", "b"), [("x|y", "1.5"), ("z", "")])
    head, rule, first, _ = text.splitlines()
    assert head == "| a | b |" and rule == "|---|---:|" and first == "| x\\|y | 1.5 |"
    text = markdown.table(("a", "b"), [("x", "inf"), ("z", "1 of 3"), ("y", "none")])
    assert text.splitlines()[1] == "|---|---|"


def test_the_page_is_plain_json_away_from_the_library(tmp_path):
    """Nothing but JSON goes in: a changed number in a file changes the page."""
    write_campaign(tmp_path, GOOD)
    before = document(tmp_path)
    path = tmp_path / "campaign/shakespeare_gpt/muon/final-0.01-0.json"
    content = json.loads(path.read_text())
    content["val_loss"] = 1.5
    path.write_text(json.dumps(content))
    after = document(tmp_path)
    assert before != after and "1.6967" in after
