"""The scoreboard: groups of runs, tuning as a function of records, and its entry."""

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

BOARD = scoreboard.dry(BOARDS["gpt_d128_b24"])
DATA = jax.device_put(scoreboard.random_parts(BOARD.task))
RUNS = [
    Run(0.02, 0.003, 0.1, 7),
    Run(0.02, 0.003, 0.1, 8),
    Run(0.01, 0.006, 0.0, 7),
]
FIELDS = {
    *(
        "schema",
        "study",
        "workload",
        "optimizer",
        "phase",
        "rate",
        "aux_rate",
        "decay",
        "seed",
        "steps",
    ),
    *("first_loss", "train_loss", "curve", "validation_loss", "validation_error"),
    *("test_loss", "test_error", "diverged", "seconds", "runs_at_once"),
    *("compile_seconds", "state_bytes", "kernel_state_bytes", "date", "machine"),
    *("versions", "commit", "clean", "variant"),
}
#: Those with a program of their own.
LEADERS = [name for name, contender in CONTENDERS.items() if not contender.program]
#: Of each kind one.
SOME = ("muon", "soap", "newton_muon", "dsbp_muon", "dsbp_adamw")


@pytest.fixture(scope="module")
def muon():
    return sweep.build(BOARD.task, CONTENDERS["muon"], 3, DATA, in_turn=False)


@pytest.fixture(scope="module")
def params():
    """Initial parameters of the first run."""
    init, _ = sweep.jitted(BOARD.task)
    many = init(np.full(3, RUNS[0].seed, np.int32), DATA[0])
    return jax.tree.map(lambda leaf: leaf[0], many)


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


# Groups of runs.


def test_a_run_in_a_group_is_the_run_alone(muon):
    together = sweep.train(muon, RUNS, 6, DATA, test=True)
    for run, row in zip(RUNS, together, strict=True):
        (alone,) = sweep.train(muon, [run], 6, DATA, test=True)
        for name in ("first_loss", "train_loss", "validation_loss", "test_loss"):
            assert row[name] == pytest.approx(alone[name], abs=2e-4), name


def test_a_group_of_one_is_the_plain_loop(params):
    """The step without any vectorised axis gives the same losses."""
    contender, run = CONTENDERS["dsbp_muon"], RUNS[0]
    program = sweep.build(BOARD.task, contender, 1, DATA, in_turn=False)
    (row,) = sweep.train(program, [run], 2, DATA, test=False)
    step = jax.jit(sweep.step_of(BOARD.task, contender))
    state = jax.jit(contender.build(1.0, 1.0, 0.0, 0).init)(params)
    losses = []
    for number in range(2):
        params, state, loss = step(params, state, run, DATA[0], number, 2.0)
        losses.append(float(loss))
    assert row["first_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert row["train_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    judged = float(jax.jit(BOARD.task.judge)(params, DATA[1])[0])
    assert row["validation_loss"] == pytest.approx(judged, abs=1e-4)


def test_length_is_no_constant_of_the_program(muon):
    for steps in (4, 8):
        (row,) = sweep.train(muon, RUNS[:1], steps, DATA, test=False)
        assert row["curve"][-1]["step"] == row["steps"] == steps
    with pytest.raises(ValueError, match="3 steps"):
        sweep.train(muon, RUNS, 3, DATA, test=False)


@pytest.mark.parametrize("name", SOME)
def test_branches_on_counters_stay_branches(name, params):
    """As many in the vectorised step as in a single one, counters being common."""
    task, contender = BOARD.task, CONTENDERS[name]
    state = jax.eval_shape(contender.build(1.0, 1.0, 0.0, 0).init, params)
    run, number = Run(0.1, 0.1, 0.1, 0), np.int32(0)
    single = jax.make_jaxpr(sweep.step_of(task, contender))(
        params, state, run, DATA[0], number, 1.0
    )
    start, advance = sweep.group_of(task, contender, params)
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), params)
    states = jax.eval_shape(start, many)
    runs = Run(*jnp.zeros((3, 2)), *jnp.zeros((2, 2), jnp.int32))
    group = jax.make_jaxpr(advance)(many, states, runs, DATA[0], number, 1.0)
    assert conds(group.jaxpr) == conds(single.jaxpr)
    refreshing = contender.ours or name in ("soap", "cosmos", "newton_muon")
    assert bool(conds(group.jaxpr)) == refreshing


def test_the_guard_of_branches_can_fail(params, monkeypatch):
    contender = CONTENDERS["soap"]
    monkeypatch.setattr(sweep, "_COUNTERS", ())
    start, advance = sweep.group_of(BOARD.task, contender, params)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    runs = Run(*jnp.zeros((3, 2)), *jnp.zeros((2, 2), jnp.int32))
    arguments = many, jax.eval_shape(start, many), runs, DATA[0], np.int32(0), 1.0
    assert conds(jax.make_jaxpr(advance)(*arguments).jaxpr) == 0


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
        assert np.isfinite(new).all()
        assert (old != new).any()


@pytest.mark.parametrize("name", ["muon", "soap", "dsbp_adamw"])
def test_rates_and_decay_act_where_they_should(name, params):
    """No rate, no movement: of kernels by the first, of the rest by the second."""
    grads = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def step(settings, state):
        return CONTENDERS[name].build(*settings, 0).update(grads, state, params)

    def moved(*settings: float) -> set[str]:
        state = CONTENDERS[name].build(*settings, 0).init(params)
        for _ in range(2):
            updates, state = step(settings, state)
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        return {sweep.kernels.path_of(k) for k, x in leaves if (x != 0).any()}

    kernels = {f"block_0/{n}/kernel" for n in ("qkv", "proj", "up", "down")}
    assert moved(0.1, 0.0, 0.1) == kernels
    assert len(moved(0.0, 0.1, 0.1)) == len(jax.tree.leaves(params)) - len(kernels)
    assert moved(0.0, 0.1, 0.1) & kernels == set()


def test_grids_are_geometric_and_decay_begins_at_zero():
    for contender in CONTENDERS.values():
        for grid in (contender.rates, contender.aux_rates):
            assert len(grid) == 4
            np.testing.assert_allclose(np.diff(np.log(grid)), np.log(grid[1] / grid[0]))
        assert len(contender.decays) == 4
        assert contender.decays[0] == 0


# Controls.

D, M, RANK = 24, 10, 4
PATH = "dense/kernel"
INPUTS = np.random.default_rng(1).normal(size=(99, D)) * np.geomspace(5, 0.2, D)
INPUTS = INPUTS.astype(np.float32)


def metric_run(variant, steps=21):
    """Two refreshes of the metric round an orthogonalisation; the last step's parts."""
    rng = np.random.default_rng(0)
    seen = {PATH: dsbp_optax.Activations(INPUTS)}
    grads = {"dense": {"kernel": jnp.asarray(rng.normal(size=(D, M)), jnp.float32)}}
    direction = dsbp_optax.orthogonalize()

    @jax.jit
    def step(variant, state):
        tx = peers.control(RANK, variant, direction, 0.5, "both")
        return tx.update(grads, state, statistics=seen)

    tx = peers.control(RANK, variant, direction, 0.5, "both")
    states = [tx.init(grads)]
    for _ in range(steps):
        updates, state = step(jnp.int32(variant), states[-1])
        states.append(state)
    matrix = grads["dense"]["kernel"]
    return matrix, updates["dense"]["kernel"], states


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


def test_without_the_metric_the_direction_is_all_there_is():
    matrix, update, _ = metric_run(peers.NO_BASIS)
    expected = dsbp_optax.orthogonalize()(matrix, D, M)
    np.testing.assert_allclose(update, expected, atol=1e-5)
    _, ours, _ = metric_run(0)
    assert np.abs(ours - expected).max() > 0.02


def test_random_directions_stay_and_have_their_energies():
    _, update, states = metric_run(peers.OWN_ENERGIES)
    assert turned(states[-1], states[0]) < 0.02
    *_, ours = metric_run(0)
    assert turned(ours[-1], ours[0]) > 0.5
    mine, true = energies(states[-1]), energies(ours[-1])
    along = (INPUTS @ basis_of(states[-1])) ** 2
    np.testing.assert_allclose(mine, along.mean(0), rtol=0.03)
    assert mine.max() < 0.8 * true.max()
    assert np.abs(update - metric_run(0)[1]).max() > 0.02


def test_true_eigenvalues_act_along_other_directions():
    matrix, update, states = metric_run(peers.TRUE_ENERGIES)
    _, ours_update, ours = metric_run(0)
    np.testing.assert_allclose(energies(states[-1]), energies(ours[-1]))
    assert turned(states[-1], ours[-1]) < 1e-6
    assert np.abs(update - ours_update).max() > 0.02
    # The update is shortened, against the direction alone, where it is said to be.
    alone = dsbp_optax.orthogonalize()(matrix, D, M)
    basis = basis_of(ours[-1])
    inside = {
        name: float(jnp.linalg.norm(basis.T @ x) / jnp.linalg.norm(x))
        for name, x in {"alone": alone, "ours": ours_update, "true": update}.items()
    }
    assert inside["ours"] < 0.5 * inside["alone"]
    assert inside["true"] > 0.9 * inside["alone"]


def test_controls_share_a_program_and_are_told_apart_by_their_variant(campaign):
    for name in ("dsbp_muon", "dsbp_adamw"):
        group = [c for c in CONTENDERS.values() if name in (c.name, c.program)]
        assert [c.variant for c in group] == [0, 1, 2, 3]
        assert [c.name.removeprefix(name) for c in group][1:] == [
            *("_none", "_random", "_random_true")
        ]
        assert len({(c.build, c.rates, c.aux_rates, c.decays) for c in group}) == 1
        assert {(c.ours, c.plain) for c in group} == {(True, name.split("_")[1])}
        assert len({id(campaign.compile(BOARD, c)) for c in group[1:]}) == 1
    assert campaign.compile(BOARD, CONTENDERS["muon"]) is not campaign.compile(
        BOARD, CONTENDERS["adamw"]
    )


def test_runs_of_one_program_with_other_variants_end_elsewhere():
    program = sweep.build(BOARD.task, CONTENDERS["dsbp_muon"], 4, DATA)
    runs = [RUNS[0]._replace(variant=variant) for variant in range(4)]
    rows = sweep.train(program, runs, 24, DATA, test=False)
    assert [row["variant"] for row in rows] == [0, 1, 2, 3]
    assert len({row["first_loss"] for row in rows}) == 1
    assert len({row["validation_loss"] for row in rows}) == 4


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


def test_the_choice_is_the_planted_one():
    chosen, phases, scores = tune(planted(0.02, 0.012, 0.1))
    assert chosen[:3] == (0.02, 0.012, 0.1)
    assert phases == [("rates", 16), ("decay", 14), ("final", 16)]
    assert {run.seed for run in scores} == {*scoreboard.TUNING, *scoreboard.FINAL}


def test_a_best_rate_at_the_edge_is_followed_outward():
    chosen, phases, _ = tune(planted(0.005, 0.048, 0.0))
    assert chosen[:3] == (0.005, 0.048, 0.0)
    assert phases == [("rates", 16), ("further", 12), ("decay", 14), ("final", 16)]
    _, phases, _ = tune(planted(0.16, 0.006, 0.0))
    assert phases[1] == ("further", 8)


def test_brief_boards_tune_both_rates_and_nothing_else():
    chosen, phases, scores = tune(planted(0.005, 0.048, 0.3), brief=True)
    assert chosen[:3] == (0.01, 0.024, 0.0)  # At the edge, and not followed.
    assert phases == [("rates", 16), ("final", 16)]
    assert {run.seed for run in scores} == {scoreboard.TUNING[0], *scoreboard.FINAL}
    assert [name for name, board in BOARDS.items() if not board.brief] == [
        *("gpt_d128_b24", "fashion_cnn")
    ]


def test_a_control_is_tuned_and_run_as_its_variant():
    chosen, _, scores = tune(planted(0.02, 0.012, 0), CONTENDERS["dsbp_muon_random"])
    assert chosen.variant == peers.OWN_ENERGIES
    assert {run.variant for run in scores} == {peers.OWN_ENERGIES}


def test_failures_lose():
    def score(run: Run) -> float:
        return math.inf if run.rate > 0.01 else planted(0.02, 0.006, 0)(run)

    chosen, *_ = tune(score)
    assert chosen.rate == 0.01


def test_tuning_goes_on_from_any_subset_of_its_records():
    *_, scores = tune(planted(0.02, 0.012, 0.1))
    known = dict(list(scores.items())[:20])
    stage = scoreboard.next_stage(CONTENDERS["muon"], known)
    assert stage.phase == "decay"
    assert {*stage.runs} == {*list(scores)[20:30]}


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


def test_records_hold_what_a_number_needs(campaign):
    rows = BOARD.rows(campaign.out)
    assert {frozenset(row) for row in rows} == {frozenset(FIELDS)}
    for row in rows:
        final = row["phase"] == "final"
        assert records.problems(row) == []
        assert (row["test_loss"] is not None) == final == (row["seed"] >= 2000)
        assert [point["step"] for point in row["curve"]] == list(range(2, 25, 2))
        assert row["curve"][-1]["loss"] == row["validation_loss"]
        assert 0 < row["kernel_state_bytes"] < row["state_bytes"]


def test_a_campaign_that_was_killed_goes_on(campaign, tmp_path):
    lines = BOARD.file(campaign.out).read_text().splitlines(keepends=True)
    copy = BOARD.file(tmp_path)
    copy.parent.mkdir()
    copy.write_text("".join(lines[:-3]) + lines[-3][:40])
    again = scoreboard.Campaign(tmp_path, lambda board: DATA, 16)
    again._programs = campaign._programs
    assert again.complete(BOARD, CONTENDERS["adamw"])
    rows, old = BOARD.rows(tmp_path), BOARD.rows(campaign.out)
    assert len(rows) == len(old)
    for one, other in zip(rows, old, strict=True):
        assert one["seed"] == other["seed"]
        assert one["test_loss"] == pytest.approx(other["test_loss"], abs=1e-4)


def test_tuning_never_sees_test_data(campaign, tmp_path):
    poisoned = (*DATA[:2], DATA[2]._replace(inputs=DATA[2].inputs[::-1]))
    other = scoreboard.Campaign(tmp_path, lambda board: poisoned, 16)
    other._programs = campaign._programs
    other.complete(BOARD, CONTENDERS["adamw"])
    rows, old = BOARD.rows(tmp_path), BOARD.rows(campaign.out)
    for one, two in zip(rows, old, strict=True):
        same = [one[name] == two[name] for name in ("curve", *Run._fields)]
        assert all(same)
        if one["phase"] == "final":
            assert one["test_loss"] != two["test_loss"]


def test_no_stage_begins_when_time_is_up(tmp_path):
    late = scoreboard.Campaign(tmp_path, lambda board: DATA, 16, seconds=-1)
    assert not late.complete(BOARD, CONTENDERS["adamw"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(monkeypatch):
    """Programs that train nothing; Muon's does not compile, COSMOS' fails later."""

    def build(task, contender, runs, data):
        if contender.name == "muon":
            raise RuntimeError("out of memory")
        return types.SimpleNamespace(runs=runs, name=contender.name)

    def train(program, runs, steps, data, test):
        if program.name == "cosmos" and len(runs) == 16 and test:
            raise ValueError("lost")
        return [
            {
                **run._asdict(),
                "validation_loss": run.rate,
                "seconds": 0.0,
                "runs_at_once": 16,
                "compile_seconds": 0.0,
            }
            for run in runs
        ]

    monkeypatch.setattr(sweep, "build", build)
    monkeypatch.setattr(sweep, "train", train)


def test_a_contender_that_fails_does_not_stop_the_others(quick, tmp_path):
    jobs = ["sotu_d128_b24:cosmos,muon,soap", "gpt_d128_b96:adamw"]
    said = invoke(*jobs, "--dry", "--out", tmp_path)
    assert "sotu_d128_b24 muon failed" in said and "sotu_d128_b24 cosmos failed" in said
    rows = BOARDS["sotu_d128_b24"].rows(tmp_path)
    phases = [(row["optimizer"], row["phase"]) for row in rows]
    assert list(dict.fromkeys(phases)) == [
        *(("cosmos", "rates"), ("soap", "rates"), ("soap", "final"))
    ]
    assert len(rows) == 48
    assert len(BOARDS["gpt_d128_b96"].rows(tmp_path, "adamw")) == 32


def test_jobs_are_done_in_the_order_of_the_command_line(quick, tmp_path):
    jobs = ["sotu_d128_b24:soap,adamw", "gpt_d128_b96:soap", "sotu_d128_b24:cosmos"]
    said = invoke(*jobs, "--dry", "--out", tmp_path, "--minutes", 0)
    assert [line.split(":")[0] for line in said.splitlines()] == [
        *("sotu_d128_b24 soap", "sotu_d128_b24 adamw", "gpt_d128_b96 soap"),
        "sotu_d128_b24 cosmos",
    ]
    for job in ("gpt:muon", "gpt_d128_b24:moon", "gpt_d128_b24"):
        assert "expected one of" in invoke(job, code=2)


def test_images_follow_one_another(tmp_path):
    board = scoreboard.dry(BOARDS["fashion_cnn"])
    data = jax.device_put(scoreboard.random_parts(board.task))
    program = sweep.build(board.task, CONTENDERS["muon_6bit"], 2, data)
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
    rows += [row("muon", 1000, 3, phase="rates", rate=rate) for rate in (0.01, 0.04)]
    shown = tables.scoreboard(rows, "loss").set_index("contender")
    assert list(shown.index) == ["dsbp_muon", "dsbp_muon_none", "muon", "adamw"]
    ours, muon = shown.loc["dsbp_muon"], shown.loc["muon"]
    assert ours["test loss"] == "1.6000" and ours["state, % of plain"] == "25.0"
    assert ours["to Muon"] == "-0.5000 [-0.5000, -0.5000]"
    assert ours["to `_none`"] == "-0.2500 [-0.2500, -0.2500]"
    assert ours["steps to Muon's end"] == "15"
    assert ours["rate, auxiliary, decay"] == "0.02*, 0.01*, 0.1*"
    assert muon["rate, auxiliary, decay"] == "0.02, 0.01*, 0.1*"
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
    assert "no time left" in invoke("--dry", *told, "--minutes", 0)
    assert "optax.contrib.muon" in invoke("--list", *told)
    rows = [row("muon", seed, 2.0) for seed in range(2)]
    records.append(BOARD.file(tmp_path), "scoreboard", rows)
    assert "2 of 2" in invoke("--report", *told)
    missing = "--workload", "sotu_d128_b24", "--data-dir", tmp_path
    assert "got no such file" in invoke(*told, *missing)
