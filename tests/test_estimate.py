"""The formulas of the estimate against arrays and compiled programs."""

import math
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest
from test_subspace_gradient import compiled
from typer.testing import CliRunner

import dsbp_optax
from benchmarks import estimate, optimizers
from benchmarks.cli import app

D, M, K = 512, 768, 16
SCALE = pathlib.Path(estimate.__file__).parent / "SCALE.md"
REAL = {
    "adamw": optax.adamw(1.0),
    "muon": optimizers.CONTENDERS["muon"].factory(1.0),
    "galore": optimizers.CONTENDERS["galore"].factory(1.0, rank=K),
    "dsbp_muon": dsbp_optax.dsbp_muon(1.0, rank=K),
    "dsbp_adamw": dsbp_optax.dsbp_adamw(1.0, rank=K),
    "projected_muon": optimizers.projected_muon(1.0, rank=K),
    "subspace_adamw": dsbp_optax.subspace_adamw(1.0, rank=K),
}


def test_every_rule_has_a_real_optimizer_to_be_held_against() -> None:
    assert set(REAL) == set(estimate.RULES)


@pytest.mark.parametrize("name", list(REAL))
@pytest.mark.parametrize("shape", [(D, M), (M, D)])
def test_state_bytes_are_those_of_the_arrays(name, shape) -> None:
    """Within 2 %, counters and spectra apart."""
    rule = estimate.RULES[name]
    state = jax.eval_shape(REAL[name].init, {"kernel": jnp.zeros(shape)})
    large = [x for x in jax.tree.leaves(state) if x.size > 8 * K]
    held = sum(x.size * x.dtype.itemsize for x in large)
    expected = rule.kernel_bytes(*shape, K) + rule.basis_bytes(*shape, K)
    assert held == pytest.approx(expected, rel=0.02)
    assert held != pytest.approx(rule.kernel_bytes(*shape, 2 * K) * 2, rel=0.02)


def test_gradient_flops_are_those_that_the_compiler_counts() -> None:
    """The first of six layers has no gradient of its input to take."""
    width, samples = 512, 2048
    layers = estimate.Kernel("layer", width, width, 6, "layer before")
    found = compiled(width, samples, K, scanned=False)
    first = 2.0 * width * width * samples
    for way, subspace in (("plain", False), ("short", True)):
        flops = estimate.gradient_flops(layers, samples, K, subspace) - first
        # A sketch is counted as if it were taken in every step.
        sketches = 4.0 * width * K * samples * 6 if subspace else 0.0
        assert found[way]["flops"] == pytest.approx(flops + sketches, rel=0.01)


def test_orthogonalisation_costs_what_the_compiler_counts() -> None:
    direction = dsbp_optax.orthogonalize()
    program = jax.jit(lambda x: direction(x, D, M)).lower(jnp.zeros((D, M))).compile()
    costs = program.cost_analysis()
    counted = (costs[0] if isinstance(costs, list) else costs)["flops"]
    assert counted == pytest.approx(estimate.newton_schulz_flops(D, M), rel=0.02)


def test_models_have_their_published_sizes() -> None:
    for name, billions in (("llama-7b", 6.74), ("llama-70b", 68.98)):
        model = estimate.MODELS[name]
        assert (model.projected + model.others) / 1e9 == pytest.approx(
            billions, abs=0.01
        )


def test_what_follows_for_seven_billion_parameters() -> None:
    """State, gradients and traffic fall as the shapes say they must."""
    model, machine = estimate.MODELS["llama-7b"], estimate.Machine(256)
    costs = {
        name: estimate.estimate(model, rule, machine, rank=128, tokens=2**22)
        for name, rule in estimate.RULES.items()
    }
    adamw, short = costs["adamw"], costs["subspace_adamw"]
    assert adamw.state == 8 * (model.projected + model.others)
    assert 0.66 < (short.flops / adamw.flops) < 0.72
    kernels = sum(128 * kernel.outputs * kernel.count for kernel in model.kernels)
    assert short.gradient == 4 * kernels + 2 * model.others
    assert short.sent < 0.1 * adamw.sent
    assert all(math.isfinite(x) and x > 0 for cost in costs.values() for x in cost)
    shared = estimate.state_bytes(
        model, estimate.RULES["subspace_adamw"], 128, share=True
    )
    width, hidden, layers = model.width, model.hidden, model.layers
    assert short.state - shared == 2 * 128 * layers * 3 * width
    assert hidden > width


def test_the_tables_are_those_that_the_command_writes(tmp_path) -> None:
    path = tmp_path / "SCALE.md"
    result = CliRunner().invoke(app, ["estimate", "--write", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_text() == SCALE.read_text()
    wrong = CliRunner().invoke(app, ["estimate", "--model", "llama-8b"])
    assert wrong.exit_code == 2 and "llama-7b" in wrong.output
