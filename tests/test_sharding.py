"""States on meshes of eight devices: the same numbers, in their places, for good."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsbp_optax

CASES = ["subspace auto", "subspace explicit", "whole auto", "whole explicit"]


@pytest.fixture(scope="module")
def found(request):
    """What `mesh_worker` prints; this process has one device only."""
    command = [sys.executable, str(request.path.parent / "mesh_worker.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_device(found, case) -> None:
    losses, alone = found["mesh"][case]["losses"], found["alone"]
    np.testing.assert_allclose(losses, alone[case.split()[0]], rtol=1e-4)
    other = alone["whole" if case.startswith("subspace") else "subspace"]
    assert not np.allclose(losses, other, rtol=1e-3), "two rules, two ways down"


@pytest.mark.parametrize("case", CASES)
def test_types_stay_and_replicas_are_identical(found, case) -> None:
    assert found["mesh"][case]["same_types"]
    assert found["mesh"][case]["replicas"]


def test_arrays_are_sharded_along_what_they_share_with_their_kernel(found) -> None:
    fsdp, tensor = (found["mesh"][f"subspace {kind}"] for kind in ("auto", "explicit"))
    assert fsdp["basis"] == {
        "up/kernel": ["data", None, None],
        "down/kernel": ["model", None, None],
    }
    assert fsdp["moments"] == {
        "up/kernel": [None, "model"],
        "down/kernel": [None, "data"],
    }
    assert all(spec == [None] * 3 for spec in tensor["basis"].values())
    assert all(spec == [None, "model"] for spec in tensor["moments"].values())
    for case in found["mesh"].values():
        assert case["bytes_here"] < 0.52 * case["bytes"]


def test_updates_on_an_explicit_mesh(found) -> None:
    """Kernels and bases sharded on both axes; the worker compares types itself."""
    gaps = found["updates"]
    assert set(gaps) == {"dsbp_sgd", "dsbp_adamw", "dsbp_muon", "dsbp"}
    assert max(gaps.values()) < 5e-3, "a level of the coarse part may flip"
    assert gaps["dsbp"] < 1e-5


def test_an_nnx_optimizer_on_a_mesh(found) -> None:
    alone, sharded = found["nnx"]["losses"]
    np.testing.assert_allclose(sharded, alone, rtol=1e-4)
    assert found["nnx"]["basis"][:1] == ["data"]


def test_parameters_without_a_mesh_are_named() -> None:
    params = {"dense": {"kernel": jnp.ones((64, 64))}}
    state = jax.eval_shape(dsbp_optax.dsbp_muon(0.1).init, params)
    with pytest.raises(ValueError, match=r"'dense/kernel'.*NamedSharding.*Remedy"):
        dsbp_optax.state_shardings(state, params)
