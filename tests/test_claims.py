"""The paper's claims are judged by records, and a wrong verdict shows."""

from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from benchmarks import claims, comparison, hours
from benchmarks.claims import CONFIRMED, REFUTED, UNMEASURED, UNTESTABLE, Evidence
from benchmarks.compare import Entry
from benchmarks.found import Found
from benchmarks.metrics import ACCURACY, LOSS

CIFAR, FASHION = "cifar10_resnet", "fashion_mnist_cnn"


def run(optimizer, value, seed=0, **figures):
    metric = figures.pop("metric", ACCURACY)
    return {
        "workload": FASHION,
        "optimizer": optimizer,
        "learning_rate": 0.1,
        "hyperparameters": {},
        "seed": seed,
        "metric": metric.final_key,
        metric.final_key: value,
        "diverged": value is None,
        "curve": [{"step": 1, "train_loss": 1.0, "value": value}],
        **figures,
    }


def entry(optimizer, values, metric=ACCURACY):
    runs = [run(optimizer, v, seed, metric=metric) for seed, v in enumerate(values)]
    return Entry(optimizer, metric, runs)


def evidence(pictures=None, finetuned=None, looked_at=None, found=()):
    known = {name: {} for name in comparison.DATA_SETS.values()}
    for name, entries in (pictures or {}).items():
        known[name] = {one.name: one for one in entries}
    return Evidence(found, known, finetuned or {}, looked_at or {})


def verdict(judge, given, words=""):
    (line,) = [line for line in judge(given) if words in line.claim]
    return line.verdict


SAM = entry("sam", [0.90, 0.91, 0.90])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.95, 0.96, 0.95], CONFIRMED),
        ([0.80, 0.81, 0.80], REFUTED),
        ([0.95, 0.89, 0.93], REFUTED),  # Better by mean alone.
        ([0.95, None, 0.95], REFUTED),  # A lost run.
        ([0.95], UNMEASURED),
    ],
)
def test_accuracy_is_judged_by_the_whole_interval(values, expected):
    given = evidence({CIFAR: [entry("dsbp", values), SAM]})
    assert verdict(claims.accuracy, given, "CIFAR-10") == expected
    assert verdict(claims.accuracy, given, "Fashion-MNIST") == UNMEASURED
    assert verdict(claims.accuracy, given, "Tiny ImageNet") == UNTESTABLE


def test_the_best_of_ours_stands_beside_the_papers_rule():
    ours = (
        entry("dsbp_sgd", [0.92, 0.93, 0.92]),
        entry("projected_muon", [0.93, 0.94, 0.93]),
    )
    given = evidence({FASHION: [entry("dsbp", [0.8, 0.8, 0.8]), SAM, *ours]})
    (line,) = [one for one in claims.accuracy(given) if "Fashion" in one.claim]
    assert "projected_muon: +3.00" in line.figure
    assert line.verdict == REFUTED


def test_less_is_better_where_the_figure_is_a_loss():
    peer = entry("lora", [2.0, 2.01, 2.0], LOSS)
    better = entry("projected_adamw", [1.9, 1.91, 1.9], LOSS)
    worse = entry("projected_muon", [2.1, 2.11, 2.1], LOSS)
    given = evidence(finetuned={"sotu_gpt": [peer, better, worse]})
    assert verdict(claims.lora, given, "sotu_gpt, projected_adamw") == CONFIRMED
    assert verdict(claims.lora, given, "sotu_gpt, projected_muon in") == REFUTED
    assert verdict(claims.lora, given, "minilm_mail, projected_muon in") == UNMEASURED


def flat(scale):
    values = [scale * x for x in (20.0, 10.0, 4.0)]
    return {"hessian_eigenvalues": values}


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, CONFIRMED), (1.5, REFUTED), (3.0, REFUTED)]
)
def test_flat_means_flatter_than_both(scale, expected):
    runs = [
        run(name, 0.9, **flat(s))
        for name, s in (("dsbp", scale), ("sgd", 2.0), ("sam", 1.0))
    ]
    assert verdict(claims.flatness, evidence(looked_at={FASHION: runs})) == expected
    lacking = evidence(looked_at={FASHION: runs[:2]})
    assert verdict(claims.flatness, lacking) == UNMEASURED


@pytest.mark.parametrize(("end", "expected"), [(1100.0, CONFIRMED), (4000.0, REFUTED)])
def test_a_kl_term_that_grows_on_is_not_bounded(end, expected):
    terms = (100.0, 1000.0, 1050.0, end)
    curve = [{"step": n, "value": 0.5, "kl": kl} for n, kl in enumerate(terms)]
    runs = [run("dsbp", 0.9, curve=curve)]
    given = evidence(looked_at={FASHION: runs})
    assert verdict(claims.bounded, given, "KL term") == expected
    assert verdict(claims.bounded, given, "limits") == UNMEASURED


@pytest.mark.parametrize(("bound", "expected"), [(0.6, CONFIRMED), (0.95, REFUTED)])
def test_a_vacuous_bound_limits_nothing(bound, expected):
    given = evidence(looked_at={"fashion_mnist_mlp": [run("sgd", 0.9, bound=bound)]})
    assert verdict(claims.bounded, given, "limits") == expected


def cell(rank, period, accuracy, **levels):
    literal = {
        "outside": "dropped",
        "filter": "none",
        "side": "output",
        "sharpness": "spectral",
    }
    place = {"rank": rank, "period": period, "accuracy": accuracy}
    return {**literal, **place, **levels}


@pytest.mark.parametrize(
    ("poor", "expected"),
    [
        ([0.60, 0.61, 0.62], CONFIRMED),
        ([0.95, 0.96, 0.97], REFUTED),
        ([0.11, 0.90, 0.91], REFUTED),  # One lost seed makes the mean.
    ],
)
def test_failure_signatures_are_judged_in_the_papers_corner_alone(poor, expected):
    rich = [0.90, 0.91, 0.92]
    cells = [
        *(cell(2, 20, poor), cell(2, 400, poor)),
        *(cell(32, 20, rich), cell(32, 400, rich)),
        cell(64, 20, [0.0, 0.0, 0.0], outside="scaled"),
    ]
    record = {"workload": "digits_cnn", "cells": cells}
    given = evidence(found=[Found(Path("ablation/digits_cnn.json"), record)])
    assert verdict(claims.failures, given, "few directions") == expected
    assert verdict(claims.failures, given, "stale") == REFUTED


def test_flops_decide_on_the_cost():
    def record(flops):
        rows = [
            {"way": way, "program": "gradient", "flops": value}
            for way, value in (("adamw", 100.0), ("coordinates", flops))
        ]
        return Found(
            Path("coordinates-2026-01-01.json"), {"figures": {"dense layers": rows}}
        )

    for flops, expected in ((66.0, CONFIRMED), (80.0, REFUTED)):
        given = evidence(found=[record(flops)])
        assert verdict(claims.cost, given, "coordinates") == expected
    assert verdict(claims.cost, evidence(), "coordinates") == UNMEASURED
    assert verdict(claims.cost, evidence(), "as published") == REFUTED


def test_every_claim_has_a_line_without_a_single_record():
    text = claims.section(evidence())
    for words in ("O(k d)", "SAM", "LoRA", "MAML", "Hessian", "PAC-Bayes", "equation"):
        assert words in text


def test_runs_of_the_campaign_go_before_those_that_were_looked_at():
    campaign = {FASHION: [entry("sgd", [0.5, 0.5])]}
    looked_at = {
        FASHION: [run(name, 0.9, s) for name in ("sgd", "sam") for s in (0, 1)]
    }
    known = comparison.known(campaign, looked_at)
    assert known[FASHION]["sgd"].mean == 0.5
    assert known[FASHION]["sam"].mean == 0.9
    assert known[CIFAR] == {}
    text = comparison.section(known)
    assert "| sam | - | 90.00 ± 0.00 (2) | - | - |" in text


def test_hours_are_those_of_single_runs():
    paths = ("campaign/a/sgd/final-1.json", "campaign/a/sgd/final-2.json", "x-1.json")
    timed = [Found(Path(path), run("sgd", 0.9, seconds=1800.0)) for path in paths]
    table = Found(Path("speed-1.json"), {"seconds": 9e9})
    text = hours.section([*timed, table])
    assert "| campaign/a | 2 | 1.0 |" in text
    assert f"| all | 3 | 1.5 of {hours.BUDGET} |" in text
    assert "speed" not in text
