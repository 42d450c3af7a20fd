"""The scoreboard: groups of runs, tuning as a function of records, and its entry."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import boards, records, scoreboard, sweep
from benchmarks.boards import BOARDS
from benchmarks.peers import CONTENDERS
from benchmarks.sweep import Run

BOARD = boards.dry(BOARDS["gpt_d128_b24"])
DATA = jax.device_put(boards.random_parts(BOARD.task))
RUNS = [
    Run(0.02, 0.003, 0.1, 7),
    Run(0.02, 0.003, 0.1, 8),
    Run(0.01, 0.006, 0.0, 7),
]
FIELDS = {
    *("workload", "contender", "phase", "rate", "aux_rate", "decay", "seed", "steps"),
    *("first_loss", "train_loss", "curve", "validation_loss", "validation_error"),
    *("test_loss", "test_error", "diverged", "seconds", "runs_at_once"),
    *("compile_seconds", "state_bytes", "kernel_state_bytes", "date", "machine"),
    *("versions", "commit", "clean"),
}


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
    state = jax.jit(contender.build(1.0, 1.0, 0.0).init)(params)
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


@pytest.mark.parametrize("name", CONTENDERS)
def test_branches_on_counters_stay_branches(name, params):
    """As many in the vectorised step as in a single one, counters being common."""
    task, contender = BOARD.task, CONTENDERS[name]
    state = jax.eval_shape(contender.build(1.0, 1.0, 0.0).init, params)
    run, number = Run(0.1, 0.1, 0.1, 0), np.int32(0)
    single = jax.make_jaxpr(sweep.step_of(task, contender))(
        params, state, run, DATA[0], number, 1.0
    )
    start, advance = sweep.group_of(task, contender, params)
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), params)
    states = jax.eval_shape(start, many)
    runs = Run(*jnp.zeros((3, 2)), jnp.zeros(2, jnp.int32))
    group = jax.make_jaxpr(advance)(many, states, runs, DATA[0], number, 1.0)
    assert conds(group.jaxpr) == conds(single.jaxpr)
    refreshing = {"dsbp_muon", "dsbp_adamw", "soap", "cosmos", "newton_muon"}
    assert bool(conds(group.jaxpr)) == (name in refreshing)


def test_the_guard_of_branches_can_fail(params, monkeypatch):
    contender = CONTENDERS["soap"]
    monkeypatch.setattr(sweep, "_COUNTERS", ())
    start, advance = sweep.group_of(BOARD.task, contender, params)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    runs = Run(*jnp.zeros((3, 2)), jnp.zeros(2, jnp.int32))
    arguments = many, jax.eval_shape(start, many), runs, DATA[0], np.int32(0), 1.0
    assert conds(jax.make_jaxpr(advance)(*arguments).jaxpr) == 0


def test_gradients_that_are_not_finite_leave_a_trace(params):
    contender = CONTENDERS["adamw"]
    step = jax.jit(sweep.step_of(BOARD.task, contender))
    params = {**params, "pos_embed": params["pos_embed"].at[0, 0].set(jnp.nan)}
    state = contender.build(1.0, 1.0, 0.0).init(params)
    _, state, loss = step(params, state, RUNS[0], DATA[0], 5, 10)
    assert math.isnan(loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


# Contenders.


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_move_stay_finite_and_are_paired_by_seed(name, muon, params):
    contender, start, losses = CONTENDERS[name], params, []
    step = jax.jit(sweep.step_of(BOARD.task, contender))
    state = jax.jit(contender.build(1.0, 1.0, 0.0).init)(params)
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
        return CONTENDERS[name].build(*settings).update(grads, state, params)

    def moved(*settings: float) -> set[str]:
        state = CONTENDERS[name].build(*settings).init(params)
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


# Tuning.


def planted(rate: float, aux: float, decay: float):
    """Validation losses with their least value at one setting."""

    def score(run: Run) -> float:
        steps = (math.log2(run.rate / rate), math.log2(run.aux_rate / aux))
        return sum(x * x for x in steps) + (run.decay - decay) ** 2 + 1e-6 * run.seed

    return score


def tune(score, contender=CONTENDERS["muon"]):
    scores, phases = {}, []
    while stage := scoreboard.next_stage(contender, scores):
        phases.append((stage.phase, len(stage.runs)))
        scores |= {run: score(run) for run in stage.runs}
    return scoreboard.choice(contender, scores), phases, scores


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


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    out = tmp_path_factory.mktemp("records")
    made = scoreboard.Campaign(out, lambda board: DATA, 16)
    assert made.complete(BOARD, CONTENDERS["adamw"])
    return made


def test_records_hold_what_a_number_needs(campaign):
    rows = scoreboard.rows_of(BOARD, campaign.out)
    assert {frozenset(row) for row in rows} == {frozenset(FIELDS)}
    for row in rows:
        final = row["phase"] == "final"
        assert (row["test_loss"] is not None) == final == (row["seed"] >= 2000)
        assert [point["step"] for point in row["curve"]] == list(range(2, 25, 2))
        assert row["curve"][-1]["loss"] == row["validation_loss"]
        assert 0 < row["kernel_state_bytes"] < row["state_bytes"]


def test_a_campaign_that_was_killed_goes_on(campaign, tmp_path):
    path = campaign.out / f"{BOARD.name}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    copy = tmp_path / path.name
    copy.write_text("".join(lines[:-3]) + lines[-3][:40])
    again = scoreboard.Campaign(tmp_path, lambda board: DATA, 16)
    again._programs = campaign._programs
    assert again.complete(BOARD, CONTENDERS["adamw"])
    rows, old = (
        scoreboard.rows_of(BOARD, tmp_path),
        scoreboard.rows_of(BOARD, campaign.out),
    )
    assert len(rows) == len(old)
    for one, other in zip(rows, old, strict=True):
        assert one["seed"] == other["seed"]
        assert one["test_loss"] == pytest.approx(other["test_loss"], abs=1e-4)


def test_tuning_never_sees_test_data(campaign, tmp_path):
    poisoned = (*DATA[:2], DATA[2]._replace(inputs=DATA[2].inputs[::-1]))
    other = scoreboard.Campaign(tmp_path, lambda board: poisoned, 16)
    other._programs = campaign._programs
    other.complete(BOARD, CONTENDERS["adamw"])
    rows, old = (
        scoreboard.rows_of(BOARD, tmp_path),
        scoreboard.rows_of(BOARD, campaign.out),
    )
    for one, two in zip(rows, old, strict=True):
        same = [one[name] == two[name] for name in ("curve", *Run._fields)]
        assert all(same)
        if one["phase"] == "final":
            assert one["test_loss"] != two["test_loss"]


def test_no_stage_begins_when_time_is_up(tmp_path):
    late = scoreboard.Campaign(tmp_path, lambda board: DATA, 16, seconds=-1)
    assert not late.complete(BOARD, CONTENDERS["adamw"])
    assert not list(tmp_path.iterdir())


def test_images_follow_one_another(tmp_path):
    board = boards.dry(BOARDS["fashion_cnn"])
    data = jax.device_put(boards.random_parts(board.task))
    program = sweep.build(board.task, CONTENDERS["muon_6bit"], 2, data)
    rows = sweep.train(program, RUNS[:2], 4, data, test=True)
    (alone,) = sweep.train(program, RUNS[1:2], 4, data, test=True)
    assert rows[1]["test_loss"] == pytest.approx(alone["test_loss"], abs=1e-5)
    assert rows[0]["test_loss"] != rows[1]["test_loss"]


# Report, files and command line.


def row(contender, seed, loss, **changes):
    end = math.nan if loss is None else loss
    curve = [{"step": 10, "loss": end + 1}, {"step": 20, "loss": end}]
    made = {"contender": contender, "phase": "final", "seed": seed, "curve": curve}
    made |= {"rate": 0.02, "aux_rate": 0.01, "decay": 0.1, "kernel_state_bytes": 100}
    return {**made, "validation_loss": loss, "test_loss": loss, **changes}


def test_the_report_says_what_the_records_say(tmp_path):
    rows = [row("muon", seed, 2 + 0.1 * seed) for seed in range(3)]
    rows += [row("soap", s, 1.5 + 0.1 * s, kernel_state_bytes=25) for s in range(3)]
    rows += [row("adamw", 0, 3.0), row("adamw", 1, None)]
    rows += [row("muon", 1000, 3, phase="rates", rate=rate) for rate in (0.01, 0.04)]
    records.append(tmp_path / f"{BOARD.name}.jsonl", rows)
    text = scoreboard.report(BOARD, tmp_path)
    *_, first, second, third = text.splitlines()
    assert first.startswith("| soap | 1.6000 | -0.5000 [-0.5000, -0.5000] |  | 25.0 %")
    assert "| 15 | 0.02*, 0.01*, 0.1* | 0 |" in first
    assert second.startswith("| muon | 2.1000 |  |")
    assert "| 0.02, 0.01*, 0.1* | 2 |" in second
    assert third.startswith("| adamw | nan | diverged |")


def test_texts_are_cut_by_position(tmp_path):
    text = "".join(chr(97 + i // 100) for i in range(2000))
    (tmp_path / "sotu.txt").write_text(text)
    train, validation, test = boards.load("sotu", tmp_path)
    assert [part.length for part in (train, validation, test)] == [1800, 100, 100]
    letters = [np.unique(p.inputs[: p.length]) for p in (validation, test)]
    assert [len(found) for found in letters] == [1, 1]
    assert letters[0] + 1 == letters[1]
    with pytest.raises(boards.DataError, match=r"input\.txt"):
        boards.load("shakespeare", tmp_path)


def test_lines_that_a_kill_cut_off_are_passed_over(tmp_path):
    path = tmp_path / "records.jsonl"
    records.append(path, [{"a": math.nan}])
    path.write_text(path.read_text() + '{"a": 1')
    records.append(path, [{"a": 2}])
    assert records.read_lines(path) == [{"a": None}, {"a": 2}]
    assert json.loads(path.read_text().splitlines()[-1]) == {"a": 2}


def test_the_entry_needs_nothing_but_the_stack():
    code = (
        "import sys, benchmarks.scoreboard\n"
        "names = 'typer', 'matfree', 'PIL', 'sklearn', 'matplotlib', 'orbax'\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scoreboard.main(["--dry"])
    scoreboard.main(["--dry", "--out", str(tmp_path), "--minutes", "0"])
    assert "no time left" in capsys.readouterr().out
    scoreboard.main(["--list", "--only", "muon"])
    assert "optax.contrib.muon" in capsys.readouterr().out
    scoreboard.main(["--report", "--out", str(tmp_path)])
    missing = ["--workload", "gpt_d128_b24", "--only", "muon", "--out", str(tmp_path)]
    scoreboard.main([*missing, "--data", str(tmp_path)])
    assert "input.txt" in capsys.readouterr().out
