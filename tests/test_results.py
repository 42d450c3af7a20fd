"""The committed records, the page made of them, and what the README quotes."""

import pathlib
import re
import types

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("adjustText")

from typer.testing import CliRunner

from benchmarks.core import records
from benchmarks.core.records import RESULTS
from benchmarks.report import claims, page, tables
from benchmarks.report.claims import CONFIRMED, REFUTED, UNMEASURED, UNTESTABLE
from benchmarks.report.entries import Entry, difference
from benchmarks.studies import app
from benchmarks.studies.scoreboard import BOARDS
from benchmarks.tasks.base import ACCURACY

ROOT = pathlib.Path(__file__).parent.parent
#: Pages that quote figures.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = "\n".join(path.read_text() for path in PAGES)


@pytest.fixture(scope="module")
def found():
    return page.Found(RESULTS)


def plain(text):
    """One space where there are several."""
    return re.sub(r"[ \n]+", " ", text)


# The records.


def test_every_committed_record_keeps_the_schema():
    every = records.read_all()
    assert len(every) > 1500
    lacking = {(one["file"], x) for one in every for x in records.problems(one)}
    assert lacking == set()


def test_no_committed_line_is_passed_over():
    for path in RESULTS.rglob("*.jsonl"):
        assert len(records.read(path)) == len(path.read_text().splitlines()), path


# What is quoted, computed from the records: the figures as they have always stood.

GOLDEN = {
    # Board, rule, against: mean and interval in three digits.
    ("gpt_d128_b24", "dsbp_adamw", "adamw"): "-0.122 [-0.133, -0.112]",
    ("gpt_d128_b24", "dsbp_muon", "muon"): "+0.000 [-0.007, +0.007]",
    ("gpt_d128_b24", "muon_6bit", "muon"): "+0.003 [-0.004, +0.009]",
    ("sotu_d128_b24", "dsbp_muon", "muon"): "-0.008 [-0.013, -0.003]",
    ("gpt_d64_b8", "dsbp_muon", "muon"): "-0.031 [-0.040, -0.022]",
    ("gpt_d64_b24", "dsbp_muon", "muon"): "-0.015 [-0.028, -0.003]",
    ("gpt_d128_b96", "dsbp_muon", "muon"): "-0.016 [-0.020, -0.012]",
    ("gpt_d128_b24_double_rate", "dsbp_muon", "muon"): "-0.043 [-0.077, -0.008]",
    ("gpt_d128_b24", "dsbp_adamw_gradient", "adamw"): "-0.103 [-0.113, -0.094]",
    ("gpt_d128_b24", "dsbp_adamw", "dsbp_adamw_gradient"): "-0.019 [-0.027, -0.010]",
    ("gpt_d128_b24", "dsbp_muon_gradient", "muon"): "+0.004 [-0.003, +0.011]",
    ("gpt_d128_b24", "dsbp_muon", "dsbp_muon_gradient"): "-0.004 [-0.011, +0.003]",
    ("gpt_d128_b24_short", "dsbp_muon", "muon"): "-0.031 [-0.045, -0.017]",
    ("gpt_d128_b24_long", "dsbp_muon", "muon"): "-0.004 [-0.026, +0.018]",
}
CONTROLS = {
    # Board -> control at its settings: to its Muon.
    "gpt_d128_b24_short": {
        "dsbp_muon_random": "+0.011 [-0.004, +0.026]",
        "dsbp_muon_rank1": "-0.023 [-0.039, -0.007]",
        "dsbp_muon_gradient": "-0.031 [-0.046, -0.016]",
        "muon_6bit": "+0.007 [-0.001, +0.016]",
    },
    "sotu_d128_b24": {
        "dsbp_muon_gradient": "-0.012 [-0.016, -0.008]",
        "muon_6bit": "+0.007 [+0.004, +0.011]",
    },
}
LOSSES = {
    "adamw": "1.931",
    "dsbp_adamw": "1.809",
    "dsbp_adamw_none": "1.934",
    "dsbp_adamw_random": "1.934",
    "dsbp_adamw_random_true": "1.943",
    "muon": "1.769",
    "dsbp_muon": "1.769",
    "muon_6bit": "1.772",
    "dsbp_adamw_gradient": "1.828",
    "dsbp_muon_gradient": "1.773",
}
CAMPAIGN = {
    ("fashion_mnist_cnn", "dsbp_sgd", "sgd"): "+1.47 [+1.15, +1.78]",
    ("cifar10_resnet", "dsbp_sgd", "sgd"): "+9.90 [+6.51, +13.29]",
    ("fashion_mnist_cnn", "projected_adamw", "adamw"): "+0.84 [+0.57, +1.10]",
    ("fashion_mnist_cnn", "projected_muon", "muon"): "+0.04 [-0.18, +0.26]",
    ("sotu_gpt", "dsbp_adamw_whole", "adamw"): "-0.068 [-0.070, -0.065]",
    ("sotu_gpt", "dsbp_muon_whole", "muon_whole"): "-0.027 [-0.031, -0.023]",
    ("sotu_gpt", "dsbp_muon_whole_gradient", "muon_whole"): "-0.028 [-0.031, -0.026]",
    ("sotu_gpt", "dsbp_adamw_whole_gradient", "adamw"): "-0.052 [-0.055, -0.050]",
    ("sotu_gpt_long", "dsbp_muon_whole", "muon_whole"): "-0.014 [-0.017, -0.012]",
    ("sotu_scratch", "dsbp_muon_whole", "muon_whole"): "-0.097 [-0.129, -0.065]",
    ("sotu_scratch", "dsbp_muon_whole_random", "muon_whole"): "+0.022 [-0.012, +0.057]",
    ("sotu_scratch", "dsbp_muon_whole_gradient", "muon_whole"): (
        "-0.097 [-0.126, -0.069]"
    ),
    ("sotu_gpt", "projected_muon_whole", "adamw"): "-0.039 [-0.043, -0.035]",
    ("sotu_gpt", "projected_muon_wide", "lora"): "-0.004 [-0.006, -0.002]",
}
EIGENVALUES = {
    ("sgd", 0.03): "18.9",
    ("sam 0.05", 0.1): "3.3",
    ("dsbp_sgd", 0.1): "24.8",
    ("dsbp_sgd_sam 0.05", 0.1): "5.7",
    ("dsbp_sgd_msam 0.1", 0.3): "2.5",
}


def test_differences_on_the_scoreboard(found):
    for (board, rule, other), expected in GOLDEN.items():
        finals = tables.finals_of(found.boards[board])
        gap = tables.gap_of(finals[rule], finals[other], f"test_{BOARDS[board].judge}")
        assert tables.signed(gap, 3) == expected and expected in plain(README)


def test_differences_of_controls_to_muon(found):
    for board, gaps in CONTROLS.items():
        tuned, controls = (
            tables.finals_of(found.boards[name])
            for name in (board, f"{board}_controls")
        )
        for name, expected in gaps.items():
            gap = tables.gap_of(controls[name], tuned["muon"], "test_loss")
            assert tables.signed(gap, 3) == expected and expected in plain(README)


def test_losses_on_the_scoreboard(found):
    finals = tables.finals_of(found.boards["gpt_d128_b24"])
    means = {
        name: np.mean([run["test_loss"] for run in finals[name].values()])
        for name in LOSSES
    }
    assert {name: f"{mean:.3f}" for name, mean in means.items()} == LOSSES
    assert all(loss in README for loss in LOSSES.values())


def test_differences_of_campaigns(found):
    for (workload, rule, other), expected in CAMPAIGN.items():
        known = {**found.campaign, **found.finetuned}[workload]
        named = {entry.name: entry for entry in known}
        digits = len(expected.split()[0]) - 3
        gap = difference(named[rule], named[other])
        assert tables.signed(gap, digits) == expected
        assert expected in README


def test_the_difference_at_full_length(found):
    named = {entry.name: entry for entry in found.full["fashion_mnist_cnn"]}
    gap = difference(named["dsbp_muon"], named["muon"])
    assert tables.signed(gap, 2) == "-0.39 [-0.82, +0.03]"
    assert "-0.39 [-0.82, +0.03]" in README


def test_curvature_and_what_steps_send(found):
    groups = tables.grouped(found.minima["fashion_mnist_cnn"])
    tops = {k: tables.mean_of(groups[k], "hessian_eigenvalues") for k in EIGENVALUES}
    assert {k: f"{top:.1f}" for k, top in tops.items()} == EIGENVALUES
    assert all(f"| {top} |" in README for top in EIGENVALUES.values())
    (sent,) = found.of("communication")
    assert (sent["coordinates"], sent["full"]) == (73_728, 786_432)
    assert "73 728" in README and "786 432" in README


# The page.


def test_the_committed_page_is_that_of_the_records(tmp_path):
    path = tmp_path / "RESULTS.md"
    result = CliRunner().invoke(app, ["results", "--write", str(path)])
    assert result.exit_code == 0, result.output
    made, kept = path.read_text(), page.PAGE.read_text()
    sections = (re.findall("^#.*$", text, re.MULTILINE) for text in (made, kept))
    assert next(sections) == next(sections), "Remedy: python -m benchmarks results"
    for figure in ("53.68 ± 1.10", "91.17 ± 0.25", "-0.1223 [-0.1326, -0.1120]"):
        assert figure in made
    for file in {one["file"] for one in records.read_all()}:
        assert f"`results/{file}`" in made
    for name in re.findall(r"benchmarks/(\w+\.png)", README):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_page_of_nothing_has_no_figures(tmp_path):
    text = page.document(page.Found(tmp_path))
    assert UNMEASURED in text and "## Scoreboard" not in text
    assert page.write(tmp_path / "R.md", tmp_path) == [tmp_path / "R.md"]


# Claims: a wrong verdict shows.


def entry(name, values, **more):
    runs = [
        {
            "optimizer": name,
            "seed": seed,
            "learning_rate": 0.1,
            "hyperparameters": {},
            "test_accuracy": value,
            "diverged": value is None,
            "curve": [{"step": s, "value": value} for s in (1, 2, 3)],
            **more,
        }
        for seed, value in enumerate(values)
    ]
    return Entry(name, ACCURACY, runs)


def evidence(pictures=(), found=(), looked_at=()):
    known = {name: {} for name in claims.DATA_SETS.values()}
    known["cifar10_resnet"] = {one.name: one for one in pictures}
    looked = {"fashion_mnist_cnn": [r for one in looked_at for r in one.records]}
    return types.SimpleNamespace(
        every=found,
        pictures=known,
        minima=looked,
        of=lambda study: [one for one in found if one["study"] == study],
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.95, 0.96, 0.95], CONFIRMED),
        ([0.80, 0.81, 0.80], REFUTED),
        ([0.95, 0.89, 0.93], REFUTED),  # Better by mean alone.
        ([0.95, 0.96, None], REFUTED),
    ],
)
def test_a_claim_needs_the_whole_interval(values, expected):
    given = evidence([entry("dsbp", values), entry("sam", [0.90, 0.91, 0.90])])
    verdicts = {claim: verdict for claim, _, verdict in claims.accuracy(given)}
    assert verdicts["more accurate than SAM on CIFAR-10"] == expected
    assert verdicts["more accurate than SAM on Fashion-MNIST"] == UNMEASURED
    assert verdicts["more accurate than SAM on Tiny ImageNet"] == UNTESTABLE


@pytest.mark.parametrize(("top", "expected"), [(1.0, CONFIRMED), (3.0, REFUTED)])
def test_flatness_is_judged_by_all_eigenvalues(top, expected):
    names = {"dsbp": [top, 0.1], "sgd": [5.0, 0.5], "sam": [2.0, 0.2]}
    looked = [entry(n, [0.9], hessian_eigenvalues=x) for n, x in names.items()]
    ((_, _, verdict),) = claims.flatness(evidence(looked_at=looked))
    assert verdict == expected


def test_few_directions_are_judged_by_the_paper_s_rule():
    base = dict(
        zip(("outside", "filter", "side", "sharpness"), claims.LITERAL, strict=True)
    )
    base |= {"study": "ablation", "workload": "digits_cnn", "period": 100}
    cells = [
        {**base, "rank": 2, "accuracy": [0.5, 0.51, None]},
        {**base, "rank": 32, "accuracy": [0.9, 0.92, 0.91]},
    ]
    ((claim, told, verdict),) = claims.failures(evidence(found=cells))
    assert "few directions" in claim and "rank 2: 33.7 %" in told
    assert verdict == REFUTED  # A lost run makes the interval wide.
    cells[0]["accuracy"][2] = 0.5
    ((*_, verdict),) = claims.failures(evidence(found=cells))
    assert verdict == CONFIRMED
