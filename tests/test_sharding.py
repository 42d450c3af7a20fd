"""States on meshes of eight devices: the same numbers, in their places, for good."""

import functools
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
from dsbp_optax.core.state import find_states
from dsbp_optax.rules.moments import FactoredAdam

ROUTES = ("subspace", "whole", "inside")
KINDS = ("auto", "explicit")
CASES = [f"{route} {kind}" for route in ROUTES for kind in KINDS]


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
    others = [alone[route] for route in ROUTES if route != case.split()[0]]
    for other in others:
        assert not np.allclose(losses, other, rtol=1e-3), "each rule has its way down"


@pytest.mark.parametrize("case", CASES)
def test_types_stay_and_replicas_are_identical(found, case) -> None:
    assert found["mesh"][case]["same_types"]
    assert found["mesh"][case]["replicas"]


def test_arrays_are_sharded_along_what_they_share_with_their_kernel(found) -> None:
    fsdp, tensor = (found["mesh"][f"subspace {kind}"] for kind in KINDS)
    assert fsdp["basis"] == {
        "up/kernel": [None, "data", None],
        "down/kernel": [None, "model", None],
    }
    assert fsdp["moments"] == {
        "up/kernel": {"whole": [None, None, "model"]},
        "down/kernel": {"whole": [None, None, "data"]},
    }
    assert all(spec == [None] * 3 for spec in tensor["basis"].values())
    for moment in tensor["moments"].values():
        assert moment == {"whole": [None, None, "model"]}
    for route in ("whole", "inside"):
        fsdp, tensor = (found["mesh"][f"{route} {kind}"] for kind in KINDS)
        assert fsdp["basis"]["up/kernel"] == [None, "data", None]
        assert fsdp["moments"]["up/kernel"] == {
            "plane 0": [None, "data", "model"],
            "plane 1": [None, "data", "model"],
            "scale": [None, None, "model"],
            "rows": [None, "data", None],
        }
        for moment in tensor["moments"].values():
            assert moment == {
                "plane 0": [None, None, "model"],
                "plane 1": [None, None, "model"],
                "scale": [None, None, "model"],
                "rows": [None, None, None],
            }
    for case in found["mesh"].values():
        assert case["bytes_here"] < 0.52 * case["bytes"]


def test_updates_on_an_explicit_mesh(found) -> None:
    """Kernels and bases sharded on both axes; the worker compares types itself."""
    gaps = found["updates"]
    names = {"dsbp_sgd", "dsbp_adamw", "dsbp_muon", "subspace_muon", "dsbp"}
    assert set(gaps) == names
    assert max(gaps.values()) < 5e-3, "a level of the coarse part may flip"
    assert gaps["dsbp"] < 1e-5


def test_sharpness_aware_wrappers_on_an_explicit_mesh(found) -> None:
    """Parameters in training and those to evaluate; the worker compares types."""
    cases = found["sharpness aware"]
    assert set(cases) == {"subspace_sam", "subspace_msam"}
    assert max(case["gap"] for case in cases.values()) < 1e-5
    ends = [case["first"] for case in cases.values()]
    assert all(
        not np.allclose(one, two, rtol=1e-3)
        for place, one in enumerate(ends)
        for two in ends[:place]
    ), "two rules, two ends"


def test_coordinates_lie_along_the_outputs_of_their_kernel(found) -> None:
    cases = found["coordinates"]
    model, data = [None, "model", None], [None, "data", None]
    assert cases["taken"] == {"up": model, "down": model}
    assert cases["projected"] == {"up": model, "down": data}
    assert cases["gap"] < 1e-5


def test_an_nnx_optimizer_on_a_mesh(found) -> None:
    alone, sharded = found["nnx"]["losses"]
    np.testing.assert_allclose(sharded, alone, rtol=1e-4)
    assert found["nnx"]["basis"][:2] == [None, "data"]


def test_statistics_inside_of_a_shard_map_are_those_of_the_whole_batch(found) -> None:
    assert len(found["mapped"]) == 4 and max(found["mapped"]) < 1e-5


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
        (held,) = find_states(places(length, spec))
        assert held.basis["w"].spec[1] == spec[0]


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
    assert shapes[0].inner["w"][0].trace.shape == (1, 16, 64)
    assert tuple(inside.inner["w"][0].trace.spec) == (None, None, "model")
    assert tuple(inside.basis["w"].spec) == (None, "data", None)
    assert tuple(beside.trace["w"].spec) == ("data", "model")


def test_bases_of_square_kernels_lie_along_their_own_side() -> None:
    mesh = mesh_of({"data": 2, "model": 4})
    place = NamedSharding(mesh, P("data", "model"))
    params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place)}
    for side, axis, other in (("input", "data", "model"), ("output", "model", "data")):
        basis = dsbp_optax.Basis(side=side)
        tx = dsbp_optax.scale_by_spectral_projection(
            optax.trace(0.9), rank=4, basis=basis
        )
        places = dsbp_optax.state_shardings(jax.eval_shape(tx.init, params), params)
        assert tuple(places.basis["w"].spec) == (None, axis, None)
        assert tuple(places.inner["w"][0].trace.spec) == (None, None, other)


def test_a_stack_lies_as_most_of_its_kernels_do() -> None:
    mesh = mesh_of({"data": 2, "model": 4})
    specs = [P("data", None), P("data", None), P(None, "model")]
    params = {
        f"layer_{i}": {
            "kernel": jax.ShapeDtypeStruct(
                (64, 128), jnp.float32, sharding=NamedSharding(mesh, spec)
            )
        }
        for i, spec in enumerate(specs)
    }
    tx = dsbp_optax.dsbp_muon(0.1, rank=4)
    shapes = jax.eval_shape(tx.init, params)
    (held,) = find_states(dsbp_optax.state_shardings(shapes, params))
    assert set(held.basis) == {"layer_0/kernel"}
    assert tuple(held.basis["layer_0/kernel"].spec) == (None, "data", None)


@pytest.mark.filterwarnings("ignore:the axes of kernels were guessed")
def test_kernels_of_one_by_one_convolutions_are_sharded_as_others() -> None:
    """Their window axes of length 1 are no stack of matrices."""
    mesh = mesh_of({"data": 2})
    place = NamedSharding(mesh, P(None, None, None, "data"))
    in_coordinates = dsbp_optax.subspace_muon(0.1, rank=4, residual="int6")
    in_bits = dsbp_optax.dsbp_muon(0.1, rank=4, moment_dtype="int6")
    beside = dsbp_optax.scale_by_quantized_adam(bits=6)
    cases = [(tx, n) for tx in (in_coordinates, in_bits, beside) for n in (1, 3)]
    for tx, window in cases:
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
        if tx is in_coordinates:
            assert specs[1, 4, 128] == (None, None, "data")
        for width in (4, 2):
            plane = (1, window * window * 64 * width // 8, 128)
            assert specs[plane] == (None, None, "data")


@pytest.mark.parametrize("bits", [5, 8, 32])
def test_moments_in_few_bits_are_sharded_as_their_kernel(bits) -> None:
    """With a basis and without one, stacked, and as long as the kernel itself."""
    mesh = mesh_of({"data": 2, "model": 4})
    specs = {"w": P("data", "model"), "scan": P(None, "data", "model")}
    shapes = {"w": (64, 128), "scan": (3, 64, 128)}
    params = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name, shape in shapes.items()
    }
    moments = dsbp_optax.scale_by_quantized_adam(bits=bits)
    axes = {"scan": dsbp_optax.Axes((1,), (2,), (0,))}
    metric = functools.partial(
        dsbp_optax.scale_by_activation_metric, rank=4, basis=dsbp_optax.Basis(axes=axes)
    )
    for tx in (moments, optax.chain(moments, metric()), metric(inner=moments)):
        held = jax.eval_shape(tx.init, params)
        places = dsbp_optax.state_shardings(held, params)
        stacks = next(s.inner for s in find_states(places) if _all_of(s.inner))
        for name in shapes:
            (found,) = _all_of(stacks[name])
            rows, columns = ("data", None), (None, "model")
            assert tuple(found.rows.spec)[-2:] == rows
            assert tuple(found.columns.spec)[-2:] == columns
            if bits == 32:
                assert tuple(found.mu.spec)[-2:] == ("data", "model")
                continue
            for plane in found.mu.codes:
                assert tuple(plane.spec)[-2:] == ("data", "model")
            assert tuple(found.mu.scale.spec)[-2:] == columns
            assert tuple(found.mu.rows.spec)[-2:] == rows


def _all_of(tree: Any) -> list[Any]:
    """The moments of `scale_by_quantized_adam` in it."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, FactoredAdam))
    return [x for x in nodes if isinstance(x, FactoredAdam)]


def test_a_parameter_at_the_root_is_not_taken_for_its_namesakes() -> None:
    mesh = AbstractMesh((2,), ("x",))

    def split(*spec: str | None) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place)

    params = {"kernel": split("x"), "head": {"kernel": split(None, "x")}}
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    mu = dsbp_optax.state_shardings(state, params)[0].mu
    assert mu["head"]["kernel"].spec == P(None, "x")
    assert mu["kernel"].spec == P("x", None)
