"""States on meshes of eight devices: the same numbers, in their places, for good."""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

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


def test_sharpness_aware_wrappers_on_an_explicit_mesh(found) -> None:
    """Parameters in training and those to evaluate; the worker compares types."""
    cases = found["sharpness aware"]
    assert set(cases) == {"subspace_sam", "every second", "subspace_msam"}
    assert max(case["gap"] for case in cases.values()) < 1e-5
    ends = [case["first"] for case in cases.values()]
    assert all(
        not np.allclose(one, two, rtol=1e-3)
        for place, one in enumerate(ends)
        for two in ends[:place]
    ), "three rules, three ends"


def test_coordinates_lie_along_the_outputs_of_their_kernel(found) -> None:
    cases = found["coordinates"]
    model, data = [None, "model", None], [None, "data", None]
    assert cases["taken"] == {"up": model, "down": model}
    assert cases["projected"] == {"up": model, "down": data}
    assert cases["gap"] < 1e-5


def test_an_nnx_optimizer_on_a_mesh(found) -> None:
    alone, sharded = found["nnx"]["losses"]
    np.testing.assert_allclose(sharded, alone, rtol=1e-4)
    assert found["nnx"]["basis"][:1] == ["data"]


def test_parameters_without_a_mesh_are_named() -> None:
    params = {"dense": {"kernel": jnp.ones((64, 64))}}
    state = jax.eval_shape(dsbp_optax.dsbp_muon(0.1).init, params)
    with pytest.raises(ValueError, match=r"'dense/kernel'.*NamedSharding.*Remedy"):
        dsbp_optax.state_shardings(state, params)


def mesh_of(shape: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(shape.values()), tuple(shape))


def test_a_mesh_that_does_not_divide_an_axis_is_an_error() -> None:
    mesh = mesh_of({"data": 2, "model": 4})
    tx = dsbp_optax.dsbp_muon(0.1)

    def places(length: int, spec: P) -> Any:
        place = NamedSharding(mesh, spec)
        kernel = jax.ShapeDtypeStruct((length, 64), jnp.float32, sharding=place)
        shapes = jax.eval_shape(tx.init, {"w": jnp.ones((length, 64))})
        return dsbp_optax.state_shardings(shapes, {"w": kernel})

    with pytest.raises(ValueError, match=r"'w' of shape \(60, 64\) with axis 0") as one:
        places(60, P(("data", "model"), None))
    message = str(one.value)
    assert "8 devices" in message and "{'data': 2, 'model': 4}" in message
    assert f"Remedy: leave that axis whole, {P(None, None)}, or" in message
    assert "64 long" in message
    for length, spec in ((64, P(("data", "model"), None)), (60, P("model", "data"))):
        basis = places(length, spec)[0].basis["w"]
        assert basis.spec[0] == spec[0]


def test_a_rank_as_long_as_an_axis_is_not_sharded() -> None:
    """Coordinates are as large as the kernel then; where they lie tells them apart."""
    mesh = mesh_of({"data": 2, "model": 4})
    place = NamedSharding(mesh, P("data", "model"))
    tx = dsbp_optax.scale_by_spectral_projection(
        optax.trace(0.9), rank=16, project="always"
    )
    params = {"w": jnp.ones((16, 64))}
    shapes = jax.eval_shape(optax.chain(tx, optax.trace(0.9)).init, params)
    kernel = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place)
    inside, beside = dsbp_optax.state_shardings(shapes, {"w": kernel})
    assert shapes[0].inner.trace["w"].shape == (16, 64)
    assert tuple(inside.inner.trace["w"].spec) == (None, "model")
    assert tuple(beside.trace["w"].spec) == ("data", "model")


@pytest.mark.filterwarnings("ignore:the axes of kernels were guessed")
def test_kernels_of_one_by_one_convolutions_are_sharded_as_others() -> None:
    """Their window axes of length 1 are no stack of matrices."""
    mesh, tx = mesh_of({"data": 2}), dsbp_optax.dsbp_muon(0.1, rank=4)
    place = NamedSharding(mesh, P(None, None, None, "data"))
    for window in (1, 3):
        shape = (window, window, 64, 128)
        held = jax.eval_shape(tx.init, {"w": jnp.ones(shape)})
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        places = dsbp_optax.state_shardings(held, {"w": kernel})
        specs = {
            leaf.shape: tuple(spec.spec)
            for leaf, spec in zip(
                jax.tree.leaves(held), jax.tree.leaves(places), strict=True
            )
        }
        assert specs[4, 128] == (None, "data")
        assert specs[window * window * 64 * 6 // 8, 128] == (None, "data")
