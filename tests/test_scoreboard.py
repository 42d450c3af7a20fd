"""The scoreboard: groups of runs, tuning as a function of records, and its entry."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import layer
from typer.testing import CliRunner

import dsbp_optax
from benchmarks import peers
from benchmarks.core import records, sweep
from benchmarks.core.sweep import Run
from benchmarks.peers import CONTENDERS
from benchmarks.report import plots, tables
from benchmarks.studies import app, scoreboard
from benchmarks.studies.scoreboard import BOARDS
from benchmarks.tasks.base import DataError

BOARD = scoreboard.dry(BOARDS["gpt_d128_b24"])
DATA = jax.device_put(scoreboard.random_parts(BOARD.task))
RUNS = [Run(0.02, 0.003, 0.1, 7), Run(0.02, 0.003, 0.1, 8), Run(0.01, 0.006, 0.0, 7)]
#: Of each way to build a contender one.
LEADERS = (
    *("muon_6bit", "newton_muon", "cosmos", "soap", "adamw_5bit", "adafactor"),
    "dsbp_adamw_after",
)


@pytest.fixture(scope="module")
def muon():
    return sweep.build(BOARD.task, CONTENDERS["muon"], 3, DATA, in_turn=False)


@pytest.fixture(scope="module")
def params():
    """Initial parameters of the first run."""
    init, _ = sweep.jitted(BOARD.task)
    many = init(np.full(3, RUNS[0].seed, np.int32), DATA[0])
    return jax.tree.map(lambda leaf: leaf[0], many)


# Groups of runs.


def test_a_run_in_a_group_is_the_run_alone(muon):
    together = sweep.train(muon, RUNS, 6, DATA, test=True)
    for run, row in zip(RUNS, together, strict=True):
        (alone,) = sweep.train(muon, [run], 6, DATA, test=True)
        for name in ("first_loss", "train_loss", "validation_loss", "test_loss"):
            assert row[name] == pytest.approx(alone[name], abs=2e-4), name
    for steps in (4, 8):  # The length is no constant of the program.
        (row,) = sweep.train(muon, RUNS[:1], steps, DATA, test=False)
        assert row["curve"][-1]["step"] == row["steps"] == steps
    with pytest.raises(ValueError, match="3 steps"):
        sweep.train(muon, RUNS, 3, DATA, test=False)


def test_controls_share_a_program_whose_first_run_is_the_plain_loop(params):
    """The step without a vectorised axis gives the same losses; variants others."""
    contender = CONTENDERS["dsbp_muon"]
    program = sweep.build(BOARD.task, contender, 4, DATA, in_turn=False)
    runs = [RUNS[0]._replace(variant=variant) for variant in range(4)]
    rows = sweep.train(program, runs, 24, DATA, test=False)
    assert [row["variant"] for row in rows] == [0, 1, 2, 3]
    assert len({row["first_loss"] for row in rows}) == 1
    assert len({row["validation_loss"] for row in rows}) == 4
    step = jax.jit(sweep.step_of(BOARD.task, contender))
    state = jax.jit(contender.build(1.0, 1.0, 0.0, 0).init)(params)
    losses = []
    for number in range(24):
        params, state, loss = step(params, state, runs[0], DATA[0], number, 24.0)
        losses.append(float(loss))
    assert rows[0]["first_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert rows[0]["train_loss"] == pytest.approx(np.mean(losses[-2:]), abs=1e-3)
    judged = float(jax.jit(BOARD.task.judge)(params, DATA[1])[0])
    assert rows[0]["validation_loss"] == pytest.approx(judged, abs=1e-3)


def conds(jaxpr) -> int:
    """Branches anywhere inside a jaxpr."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "cond"
        for value in equation.params.values():
            inner = value if isinstance(value, tuple | list) else [value]
            inner = [getattr(one, "jaxpr", one) for one in inner]
            found += sum(conds(one) for one in inner if hasattr(one, "eqns"))
    return found


def branches(contender, params):
    """Of a group of two."""
    start, advance = sweep.group_of(BOARD.task, contender, params)
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), params)
    runs = Run(*jnp.zeros((3, 2)), *jnp.zeros((2, 2), jnp.int32))
    told = many, jax.eval_shape(start, many), runs, DATA[0], np.int32(0), 1.0
    return conds(jax.make_jaxpr(advance)(*told).jaxpr)


@pytest.mark.parametrize("name", ["muon", "soap", "dsbp_adamw"])
def test_branches_on_counters_stay_branches(name, params, monkeypatch):
    """As many in the vectorised step as in a single one, counters being common."""
    contender = CONTENDERS[name]
    state = jax.eval_shape(contender.build(1.0, 1.0, 0.0, 0).init, params)
    told = params, state, Run(0.1, 0.1, 0.1, 0), DATA[0], np.int32(0), 1.0
    single = conds(jax.make_jaxpr(sweep.step_of(BOARD.task, contender))(*told).jaxpr)
    assert branches(contender, params) == single and bool(single) == (name != "muon")
    if name == "soap":  # The guard can fail.
        monkeypatch.setattr(sweep, "_COUNTERS", ())
        assert branches(contender, params) == 0


def test_gradients_that_are_not_finite_leave_a_trace(params):
    contender = CONTENDERS["adamw"]
    step = jax.jit(sweep.step_of(BOARD.task, contender))
    params = {**params, "pos_embed": params["pos_embed"].at[0, 0].set(jnp.nan)}
    state = contender.build(1.0, 1.0, 0.0, 0).init(params)
    _, state, loss = step(params, state, RUNS[0], DATA[0], 5, 10)
    assert math.isnan(loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


# Contenders.


@pytest.mark.parametrize("name", LEADERS)
def test_contenders_move_stay_finite_and_are_paired_by_seed(name, muon, params):
    contender, start, losses = CONTENDERS[name], params, []
    step = jax.jit(sweep.step_of(BOARD.task, contender))
    state = jax.jit(contender.build(1.0, 1.0, 0.0, 0).init)(params)
    for number in range(3):
        params, state, loss = step(params, state, RUNS[0], DATA[0], number, 24.0)
        losses.append(float(loss))
    (row,) = sweep.train(muon, RUNS[:1], 2, DATA, test=False)
    assert losses[0] == pytest.approx(row["first_loss"], abs=1e-5)
    assert np.isfinite(losses).all()
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True):
        assert np.isfinite(new).all() and (old != new).any()


def test_rates_and_decay_act_where_they_should(params):
    """No rate, no movement: of kernels by the first, of the rest by the second."""
    grads, build = jax.tree.map(jnp.ones_like, params), CONTENDERS["muon"].build
    update = jax.jit(
        lambda settings, state: build(*settings, 0).update(grads, state, params)
    )

    def moved(*settings: float) -> set[str]:
        updates, _ = update(settings, build(*settings, 0).init(params))
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        return {sweep.kernels.path_of(k) for k, x in leaves if (x != 0).any()}

    kernels = {f"block_0/{n}/kernel" for n in ("qkv", "proj", "up", "down")}
    assert moved(0.1, 0.0, 0.1) == kernels
    assert len(moved(0.0, 0.1, 0.1)) == len(jax.tree.leaves(params)) - len(kernels)
    assert moved(0.0, 0.1, 0.1) & kernels == set()


def test_contenders_are_tuned_alike_and_controls_as_their_rule():
    for contender in CONTENDERS.values():
        grids = contender.rates, contender.aux_rates
        for grid in grids:
            np.testing.assert_allclose(np.diff(np.log(grid)), np.log(grid[1] / grid[0]))
        if contender.name == "dsbp_adamw_gradient":  # around its rule's best
            assert [len(grid) for grid in (*grids, contender.decays)] == [3, 3, 2]
            continue
        assert [len(grid) for grid in (*grids, contender.decays)] == [4, 4, 4]
        assert contender.decays[0] == 0
    for name in ("dsbp_muon", "dsbp_adamw"):
        group = [c for c in CONTENDERS.values() if name in (c.name, c.program)]
        assert [(c.name.removeprefix(name), c.variant) for c in group] == [
            *(("", 0), ("_none", 1), ("_random", 2), ("_random_true", 3))
        ]
        assert len({(c.build, c.rates, c.aux_rates, c.decays) for c in group}) == 1
        assert {(c.ours, c.plain) for c in group} == {(True, name.split("_")[1])}


# Controls.

D, M, RANK = 24, 10, 4
PATH = "dense/kernel"
INPUTS = np.random.default_rng(1).normal(size=(99, D)) * np.geomspace(5, 0.2, D)
INPUTS = INPUTS.astype(np.float32)
MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(D, M)), jnp.float32)


def metric(variant):
    return peers.control(RANK, variant, dsbp_optax.orthogonalize(), 0.5, "both")


@jax.jit
def metric_step(variant, state):
    seen = {PATH: dsbp_optax.Activations(INPUTS)}
    grads = {"dense": {"kernel": MATRIX}}
    return metric(variant).update(grads, state, statistics=seen)


@functools.cache
def metric_run(variant):
    """Two refreshes round an orthogonalisation: last update, first and last state."""
    first = state = metric(variant).init({"dense": {"kernel": MATRIX}})
    for _ in range(21):
        updates, state = metric_step(jnp.int32(variant), state)
    return updates["dense"]["kernel"], first, state


def basis_of(state):
    """Orthonormal, ``(D, RANK)``."""
    return jnp.linalg.qr(layer(state, PATH).basis.astype(jnp.float32))[0]


def turned(one, other):
    """Part of the basis of one state that lies outside of the other's."""
    one, other = basis_of(one), basis_of(other)
    return float(jnp.linalg.norm(one - other @ (other.T @ one)))


def energies(state):
    """The eigenvalues that the state holds."""
    return np.asarray(layer(state, PATH).spectrum.eigenvalues, np.float32)


def test_each_control_takes_one_part_of_the_metric_away():
    alone = dsbp_optax.orthogonalize()(MATRIX, D, M)
    ours, first, last = metric_run(0)
    assert np.abs(ours - alone).max() > 0.02 and turned(last, first) > 0.5
    # Without the metric the direction is all there is.
    none, *_ = metric_run(peers.NO_BASIS)
    np.testing.assert_allclose(none, alone, atol=1e-5)
    # Random directions stay, and have the energies that lie along them.
    random, begun, ended = metric_run(peers.OWN_ENERGIES)
    assert turned(ended, begun) < 0.02 and np.abs(random - ours).max() > 0.02
    along = ((INPUTS @ basis_of(ended)) ** 2).mean(0)
    np.testing.assert_allclose(energies(ended), along, rtol=0.03)
    assert energies(ended).max() < 0.8 * energies(last).max()
    # True eigenvalues act along other directions: ours are not shortened.
    true, _, ended = metric_run(peers.TRUE_ENERGIES)
    np.testing.assert_allclose(energies(ended), energies(last))
    assert turned(ended, last) < 1e-6 and np.abs(true - ours).max() > 0.02
    inside, whole, other = (
        float(jnp.linalg.norm(basis_of(last).T @ x) / jnp.linalg.norm(x))
        for x in (ours, alone, true)
    )
    assert inside < 0.5 * whole and other > 0.9 * whole


# Tuning.


def planted(rate: float, aux: float, decay: float):
    """Validation losses with their least value at one setting."""

    def score(run: Run) -> float:
        steps = (math.log2(run.rate / rate), math.log2(run.aux_rate / aux))
        return sum(x * x for x in steps) + (run.decay - decay) ** 2 + 1e-6 * run.seed

    return score


def tune(score, contender=CONTENDERS["muon"], brief=False):
    scores, phases = {}, []
    while stage := scoreboard.next_stage(contender, scores, brief):
        phases.append((stage.phase, len(stage.runs)))
        scores |= {run: score(run) for run in stage.runs}
    return scoreboard.choice(contender, scores, brief), phases, scores


def test_the_choice_is_the_planted_one_and_edges_are_followed_outward():
    chosen, phases, scores = tune(planted(0.02, 0.012, 0.1))
    assert chosen[:3] == (0.02, 0.012, 0.1)
    assert phases == [("rates", 16), ("decay", 14), ("final", 16)]
    assert {run.seed for run in scores} == {*scoreboard.TUNING, *scoreboard.FINAL}
    known = dict(list(scores.items())[:20])  # It goes on from any subset.
    stage = scoreboard.next_stage(CONTENDERS["muon"], known)
    assert stage.phase == "decay" and {*stage.runs} == {*list(scores)[20:30]}
    chosen, phases, _ = tune(planted(0.005, 0.048, 0.0))
    assert chosen[:3] == (0.005, 0.048, 0.0)
    assert phases == [("rates", 16), ("further", 12), ("decay", 14), ("final", 16)]
    _, phases, _ = tune(planted(0.16, 0.006, 0.0))
    assert phases[1] == ("further", 8)


def test_brief_boards_tune_both_rates_and_nothing_else():
    chosen, phases, scores = tune(planted(0.005, 0.048, 0.3), brief=True)
    assert chosen[:3] == (0.005, 0.048, 0.0)
    assert phases == [("rates", 16), ("further", 12), ("final", 16)]
    assert {run.seed for run in scores} == {scoreboard.TUNING[0], *scoreboard.FINAL}


def test_failures_lose_and_a_control_is_tuned_as_its_variant():
    def score(run: Run) -> float:
        return math.inf if run.rate > 0.01 else planted(0.02, 0.006, 0)(run)

    chosen, _, scores = tune(score, CONTENDERS["dsbp_muon_random"])
    assert chosen.rate == 0.01
    assert {run.variant for run in scores} == {peers.OWN_ENERGIES}


# Campaigns.


def invoke(*args, code=0):
    told = ["scoreboard", *map(str, args)]
    result = CliRunner().invoke(app, told, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    out = tmp_path_factory.mktemp("records")
    made = scoreboard.Campaign(out, lambda board: DATA, 16)
    assert made.complete(BOARD, CONTENDERS["adamw"])
    return made


def again(campaign, out, data=DATA):
    """Another campaign with the same programs; its records and the first one's."""
    other = scoreboard.Campaign(out, lambda board: data, 16)
    other._programs = campaign._programs
    assert other.complete(BOARD, CONTENDERS["adamw"])
    return BOARD.rows(out), BOARD.rows(campaign.out)


def test_records_hold_what_a_number_needs(campaign):
    for row in BOARD.rows(campaign.out):
        final = row["phase"] == "final"
        assert records.problems(row) == []
        assert {*Run._fields, "first_loss", "runs_at_once", "compile_seconds"} <= {*row}
        assert (row["test_loss"] is not None) == final == (row["seed"] >= 2000)
        assert [point["step"] for point in row["curve"]] == list(range(2, 25, 2))
        assert row["curve"][-1]["loss"] == row["validation_loss"]
        assert 0 < row["kernel_state_bytes"] < row["state_bytes"]


def test_a_campaign_that_was_killed_goes_on(campaign, tmp_path):
    lines = BOARD.file(campaign.out).read_text().splitlines(keepends=True)
    copy = BOARD.file(tmp_path)
    copy.parent.mkdir()
    copy.write_text("".join(lines[:-3]) + lines[-3][:40])
    for one, other in zip(*again(campaign, tmp_path), strict=True):
        assert one["seed"] == other["seed"]
        assert one["test_loss"] == pytest.approx(other["test_loss"], abs=1e-4)
    late = scoreboard.Campaign(tmp_path / "late", lambda board: DATA, 16, seconds=-1)
    assert not late.complete(BOARD, CONTENDERS["adamw"])
    assert not (tmp_path / "late").exists()


def test_tuning_never_sees_test_data(campaign, tmp_path):
    poisoned = (*DATA[:2], DATA[2]._replace(inputs=DATA[2].inputs[::-1]))
    for one, two in zip(*again(campaign, tmp_path, poisoned), strict=True):
        assert all(one[name] == two[name] for name in ("curve", *Run._fields))
        if one["phase"] == "final":
            assert one["test_loss"] != two["test_loss"]


def test_jobs_follow_their_order_and_a_failure_stops_no_other(tmp_path, monkeypatch):
    """Programs that train nothing; Muon's does not compile, COSMOS' fails later."""

    def build(task, contender, runs, data):
        if contender.name == "muon":
            raise RuntimeError("out of memory")
        return types.SimpleNamespace(runs=runs, name=contender.name)

    def train(program, runs, steps, data, test):
        if program.name == "cosmos" and test:
            raise ValueError("lost")
        told = {"seconds": 0.0, "runs_at_once": 16, "compile_seconds": 0.0}
        return [{**r._asdict(), "validation_loss": r.rate, **told} for r in runs]

    monkeypatch.setattr(sweep, "build", build)
    monkeypatch.setattr(sweep, "train", train)
    jobs = "sotu_d128_b24:cosmos,muon,soap", "gpt_d128_b96:adamw"
    told = "--dry", "--out", tmp_path
    said = invoke(*jobs, *told, "--minutes", 0)
    names = ("sotu_d128_b24 cosmos", "sotu_d128_b24 muon", "sotu_d128_b24 soap")
    names += ("gpt_d128_b96 adamw",)
    assert [line.split(":")[0] for line in said.splitlines()] == [*names]
    said = invoke(*jobs, *told)
    assert all(f"{name} failed" in said for name in names[:2])
    rows = BOARDS["sotu_d128_b24"].rows(tmp_path)
    phases = [(row["optimizer"], row["phase"]) for row in rows]
    assert list(dict.fromkeys(phases)) == [
        *(("cosmos", "rates"), ("cosmos", "further")),
        *(("soap", "rates"), ("soap", "further"), ("soap", "final")),
    ]
    assert len(rows) == 72
    assert len(BOARDS["gpt_d128_b96"].rows(tmp_path, "adamw")) == 44
    for job in ("gpt:muon", "gpt_d128_b24:moon", "gpt_d128_b24"):
        assert "expected one of" in invoke(job, code=2)


def test_controls_take_the_settings_of_their_rule(tmp_path):
    tuned = BOARDS["sotu_d128_b24"]
    board = BOARDS["sotu_d128_b24_controls"]
    made = scoreboard.Campaign(tmp_path, lambda board: DATA, 16)
    control = CONTENDERS["dsbp_muon_random"]
    with pytest.raises(DataError, match=r"no tuned dsbp_muon, .*Remedy"):
        made.missing(board, control)
    rule = CONTENDERS["dsbp_muon"]
    _, _, scores = tune(planted(0.02, 0.012, 0.0), rule, brief=True)
    rows = [{**run._asdict(), "validation_loss": x} for run, x in scores.items()]
    rows = [{"optimizer": rule.name, **row} for row in rows]
    records.append(tuned.file(tmp_path), "scoreboard", rows)
    stage = made.missing(board, control)
    assert stage.phase == "final" and len(stage.runs) == len(scoreboard.FINAL)
    assert {run[:3] for run in stage.runs} == {(0.02, 0.012, 0.0)}
    assert {run.variant for run in stage.runs} == {peers.OWN_ENERGIES}
    assert {run.variant for run in made.missing(board, rule).runs} == {0}
    done = {**stage.runs[0]._asdict(), "validation_loss": 1.0}
    records.append(board.file(tmp_path), "x", [{"optimizer": control.name, **done}])
    assert made.missing(board, control).runs == stage.runs[1:]
    double = dataclasses.replace(board, name="double", times=2.0)
    stage = made.missing(double, control)
    assert {run[:3] for run in stage.runs} == {(0.04, 0.012, 0.0)}
    assert "2 times the rate" in double.summary


def test_images_follow_one_another():
    board = scoreboard.dry(BOARDS["fashion_cnn"])
    data = jax.device_put(scoreboard.random_parts(board.task))
    program = sweep.build(board.task, CONTENDERS["adamw"], 2, data)
    rows = sweep.train(program, RUNS[:2], 4, data, test=True)
    (alone,) = sweep.train(program, RUNS[1:2], 4, data, test=True)
    assert rows[1]["test_loss"] == pytest.approx(alone["test_loss"], abs=1e-5)
    assert rows[0]["test_loss"] != rows[1]["test_loss"]


# Tables, pictures, files and the command line.


def row(contender, seed, loss, **changes):
    end = math.nan if loss is None else loss
    curve = [{"step": 10, "loss": end + 1}, {"step": 20, "loss": end}]
    made = {"optimizer": contender, "phase": "final", "seed": seed, "curve": curve}
    made |= {"rate": 0.02, "aux_rate": 0.01, "decay": 0.1, "kernel_state_bytes": 100}
    return {**made, "validation_loss": loss, "test_loss": loss, **changes}


def test_the_table_says_what_the_records_say(tmp_path):
    rows = [row("muon", seed, 2 + 0.1 * seed) for seed in range(3)]
    rows += [
        row("dsbp_muon", s, 1.5 + 0.1 * s, kernel_state_bytes=25) for s in range(3)
    ]
    rows += [row("dsbp_muon_none", s, 1.75 + 0.1 * s) for s in range(3)]
    rows += [row("adamw", 0, 3.0), row("adamw", 1, None)]
    tried = {"phase": "rates", "aux_rate": 0.005}
    rows += [row("muon", 1000, 3, rate=rate, **tried) for rate in (0.01, 0.04)]
    shown = tables.scoreboard(rows, "loss").set_index("contender")
    assert list(shown.index) == ["dsbp_muon", "dsbp_muon_none", "muon", "adamw"]
    ours, muon = shown.loc["dsbp_muon"], shown.loc["muon"]
    assert ours["test loss"] == "1.6000" and ours["state, % of plain"] == "25.0"
    assert ours["to Muon"] == "-0.5000 [-0.5000, -0.5000]"
    assert ours["to `_none`"] == "-0.2500 [-0.2500, -0.2500]"
    assert ours["steps to Muon's end"] == "15"
    assert ours["rate, auxiliary, decay"] == "0.02, 0.01, 0.1"
    assert muon["rate, auxiliary, decay"] == "0.02, 0.01*, 0.1"
    assert (muon["runs"], muon["to Muon"]) == ("3 of 5", "-")
    assert "nan" in shown.loc["adamw", "to Muon"]
    plots.scoreboard(rows, "test_loss", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_texts_are_cut_by_position(tmp_path):
    text = "".join(chr(97 + i // 100) for i in range(2000))
    (tmp_path / "sotu.txt").write_text(text)
    train, validation, test = scoreboard.load("sotu", tmp_path)
    assert [part.length for part in (train, validation, test)] == [1800, 100, 100]
    letters = [np.unique(p.inputs[: p.length]) for p in (validation, test)]
    assert [len(found) for found in letters] == [1, 1]
    assert letters[0] + 1 == letters[1]


def test_the_command_line(tmp_path):
    invoke("--dry", code=2)
    told = "--out", tmp_path, "--optimizer", "muon"
    assert "optax.contrib.muon" in invoke("--list", *told)
    missing = "--workload", "sotu_d128_b24", "--data-dir", tmp_path
    assert "got no such file" in invoke(*told, *missing)
