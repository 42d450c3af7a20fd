"""What `test_sharding` runs in a process that has eight devices; prints JSON."""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dsbp_optax
from dsbp_optax.core.state import find_states
from dsbp_optax.linalg.quantize import Quantized

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiles much, runs little

RECIPES = ("dsbp_sgd", "dsbp_adamw", "dsbp_muon", "subspace_muon", "dsbp")
FSDP = {"up": P("data", "model"), "down": P("model", "data")}
TENSOR = {"up": P(None, "model"), "down": P(None, "model")}


class Net(nn.Module):
    """A product over a sharded axis is ambiguous on an explicit mesh: gather first."""

    explicit: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = jnp.tanh(nn.Dense(128, name="up", use_bias=False)(x))
        h = jax.sharding.reshard(h, P("data", None)) if self.explicit else h
        y = nn.Dense(64, name="down", use_bias=False)(h)
        return jax.sharding.reshard(y, P("data", None)) if self.explicit else y


INPUTS = jax.random.normal(jax.random.key(0), (32, 64))
PARAMS = Net(False).init(jax.random.key(1), INPUTS)["params"]
#: What is compared to rounding is kept in float32.
WHOLE = {"moment_dtype": None, "basis": dsbp_optax.Basis(dtype="float32")}
ROUTES = {
    "subspace": (
        dsbp_optax.subspace_adamw(1e-2, rank=4, **WHOLE),
        dsbp_optax.linen.subspace_value_and_grad,
    ),
    "whole": (
        dsbp_optax.dsbp_muon(1e-2, rank=4),
        dsbp_optax.linen.value_and_grad,
    ),
    "inside": (
        dsbp_optax.dsbp_adamw(1e-2, rank=4),
        dsbp_optax.linen.value_and_grad,
    ),
}


def moments(spectral: Any) -> dict[str, dict[str, Any]]:
    """The first moments of kernels, by path and name of the array."""
    return {path: _moment(held) for path, held in spectral.inner.items()}


def _moment(held: Any) -> dict[str, Any]:
    nodes = jax.tree.leaves(held, is_leaf=lambda x: hasattr(x, "mu") or _coarse(x))
    first = next(x for x in nodes if hasattr(x, "mu") or _coarse(x))
    first = getattr(first, "mu", first)
    if not _coarse(first):
        return {"whole": first}
    planes = {f"plane {i}": plane for i, plane in enumerate(first.codes)}
    return {**planes, "scale": first.scale, "rows": first.rows}


def _coarse(node: Any) -> bool:
    return isinstance(node, Quantized)


def stepper(route: str, explicit: bool) -> Any:
    tx, differentiate = ROUTES[route]

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean((Net(explicit).apply({"params": params}, x) - x) ** 2)

    def step(params: Any, state: Any, x: Any) -> Any:
        loss, grads, seen = differentiate(loss_fn)(params, x, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=seen)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(step: Any, params: Any, state: Any, x: Any) -> tuple[Any, Any, list[float]]:
    losses = []
    for _ in range(8):
        params, state, loss = step(params, state, x)
        losses.append(float(loss))
    return params, state, losses


def identical_replicas(array: Any) -> bool:
    """Whether devices that hold the same part hold the same bits."""
    parts: dict[str, bytes] = {}
    return all(
        parts.setdefault(str(shard.index), np.asarray(shard.data).tobytes())
        == np.asarray(shard.data).tobytes()
        for shard in array.addressable_shards
    )


def on_mesh(route: str, kind: Any, specs: Any) -> dict[str, Any]:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    tx, _ = ROUTES[route]
    with jax.set_mesh(mesh):
        places = {k: {"kernel": NamedSharding(mesh, s)} for k, s in specs.items()}
        params = jax.device_put(PARAMS, places)
        shapes = jax.eval_shape(tx.init, params)
        held = dsbp_optax.state_shardings(shapes, params)
        state = jax.jit(tx.init, out_shardings=held)(params)
        x = jax.device_put(INPUTS, NamedSharding(mesh, P("data")))
        explicit = kind == AxisType.Explicit
        outs = None if explicit else (places, held, NamedSharding(mesh, P()))
        before = jax.tree.map(jax.typeof, state)
        step = jax.jit(stepper(route, explicit), out_shardings=outs)
        _, state, losses = train(step, params, state, x)
    (spectral,) = find_states(state)
    arrays = [a for a in jax.tree.leaves(state) if a.ndim]
    return {
        "losses": losses,
        "same_types": before == jax.tree.map(jax.typeof, state),
        "replicas": all(identical_replicas(a) for a in jax.tree.leaves(state)),
        "basis": {k: tuple(b.sharding.spec) for k, b in spectral.basis.items()},
        "moments": {
            path: {name: tuple(x.sharding.spec) for name, x in moment.items()}
            for path, moment in moments(spectral).items()
        },
        "bytes": sum(a.nbytes for a in arrays),
        "bytes_here": sum(a.addressable_shards[0].data.nbytes for a in arrays),
    }


def updates_on_explicit() -> dict[str, Any]:
    """Updates alone, kernels and bases sharded on both axes, eager and jitted."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    gaps = {}
    with jax.set_mesh(mesh):
        places = {k: {"kernel": NamedSharding(mesh, s)} for k, s in FSDP.items()}
        params = jax.device_put(PARAMS, places)
        for name in RECIPES:
            basis = dsbp_optax.Basis(side="input")
            settings = {"rank": 4, "update_every": 2, "basis": basis}
            tx = getattr(dsbp_optax, name)(0.1, **settings)
            state, plain = tx.init(PARAMS), tx.init(PARAMS)
            state = jax.device_put(state, dsbp_optax.state_shardings(state, params))
            types = jax.tree.map(jax.typeof, (params, state))
            seen = {"up/kernel": dsbp_optax.Activations(INPUTS)}
            for _ in range(3):
                updates, state = jax.jit(tx.update)(
                    params, state, params, statistics=seen
                )
                alone, plain = jax.jit(tx.update)(
                    PARAMS, plain, PARAMS, statistics=seen
                )
            assert types == jax.tree.map(jax.typeof, (updates, state)), name
            pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(alone), strict=True)
            gaps[name] = max(
                float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))
                for a, b in pairs
            )
    return gaps


def sharded(mesh: Any, tx: Any, specs: Any) -> tuple[Any, Any]:
    """`PARAMS` and their fresh state on a mesh."""
    places = {k: {"kernel": NamedSharding(mesh, s)} for k, s in specs.items()}
    params = jax.device_put(PARAMS, places)
    held = dsbp_optax.state_shardings(jax.eval_shape(tx.init, PARAMS), params)
    return params, jax.device_put(tx.init(PARAMS), held)


def sharpness_aware_on_explicit() -> dict[str, Any]:
    """Both wrappers, kernels and bases sharded on both axes, against one device."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    inner = dsbp_optax.subspace_adamw(1e-2, rank=4, update_every=2, **WHOLE)
    wrappers = {
        "subspace_sam": dsbp_optax.subspace_sam(inner, 0.5),
        "subspace_msam": dsbp_optax.subspace_msam(inner, 0.5),
    }
    seen = {"up/kernel": dsbp_optax.Activations(INPUTS)}

    def grad_fn(params: Any, _: Any) -> Any:
        return jax.tree.map(lambda p: p**3 + 0.1 * p, params)

    def run(tx: Any, params: Any, state: Any) -> Any:
        extra = {} if hasattr(state, "radius") else {"grad_fn": grad_fn}

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            grads = grad_fn(params, 0)
            updates, state = tx.update(grads, state, params, statistics=seen, **extra)
            return optax.apply_updates(params, updates), state

        types = jax.tree.map(jax.typeof, (params, state))
        for _ in range(4):
            params, state = step(params, state)
        assert types == jax.tree.map(jax.typeof, (params, state))
        return params, dsbp_optax.evaluation_params(state, params)

    found = {}
    for name, tx in wrappers.items():
        alone = run(tx, PARAMS, tx.init(PARAMS))
        with jax.set_mesh(mesh):
            together = run(tx, *sharded(mesh, tx, FSDP))
        pairs = zip(*map(jax.tree.leaves, (together, alone)), strict=True)
        found[name] = {
            "gap": max(float(np.abs(np.asarray(a) - b).max()) for a, b in pairs),
            "first": np.asarray(jax.tree.leaves(alone[0])[0]).ravel()[:4].tolist(),
        }
    return found


def coordinates_on_explicit() -> dict[str, Any]:
    """Where coordinates lie, taken directly and from whole gradients."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    tx, differentiate = ROUTES["subspace"]
    alone, found = dsbp_optax.project_gradients(PARAMS, tx.init(PARAMS)), {}

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean((Net(True).apply({"params": params}, x) - x) ** 2)

    def specs(grads: Any) -> Any:
        return {k: tuple(v["kernel"].values.sharding.spec) for k, v in grads.items()}

    with jax.set_mesh(mesh):
        params, state = sharded(mesh, tx, FSDP)
        grads = jax.jit(dsbp_optax.project_gradients)(params, state)
        found["projected"] = specs(grads)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(alone), strict=True)
        found["gap"] = max(float(np.abs(np.asarray(a) - b).max()) for a, b in pairs)
        params, state = sharded(mesh, tx, TENSOR)
        x = jax.device_put(INPUTS, NamedSharding(mesh, P("data")))
        collect = differentiate(loss_fn)
        found["taken"] = specs(
            jax.eval_shape(
                lambda params, state, x: collect(params, x, opt_state=state)[1],
                *(params, state, x),
            )
        )
    return found


def nnx_optimizer() -> dict[str, Any]:
    """An `nnx.Optimizer` whose state lies where the parameters lie."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up = nnx.Linear(64, 128, rngs=rngs)
            self.down = nnx.Linear(128, 64, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.down(jnp.tanh(self.up(x)))

    collect = dsbp_optax.nnx.value_and_grad(lambda m, x: jnp.mean((m(x) - x) ** 2))

    @nnx.jit
    def step(model: Any, opt: Any, x: Any) -> Any:
        loss, grads, seen = collect(model, x, opt_state=opt)
        opt.update(model, grads, statistics=seen)
        return loss

    losses = []
    for sharded in (False, True):
        model = Model(nnx.Rngs(0))
        opt = nnx.Optimizer(model, dsbp_optax.dsbp_muon(1e-2, rank=4), wrt=nnx.Param)
        x = INPUTS
        if sharded:
            for name, spec in FSDP.items():
                layer = getattr(model, name)
                for leaf, place in (("kernel", spec), ("bias", P())):
                    old = getattr(layer, leaf)
                    array = jax.device_put(old[...], NamedSharding(mesh, place))
                    setattr(layer, leaf, nnx.Param(array))
            params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            state = nnx.state(opt)
            places = dsbp_optax.state_shardings(state, params)
            nnx.update(opt, jax.device_put(state, places))
            x = jax.device_put(INPUTS, NamedSharding(mesh, P("data")))
        losses.append([float(step(model, opt, x)) for _ in range(6)])
    kernels = [
        leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(opt))
        if "basis" in str(keys) and "up/kernel" in str(keys)
    ]
    return {"losses": losses, "basis": tuple(kernels[0].sharding.spec)}


def mapped(route: str, check: bool) -> float:
    """The largest gap of statistics taken in a `jax.shard_map`, of the largest number.

    Where it keeps track of what varies, gradients and statistics come out summed.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx, differentiate = ROUTES[route]

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean((Net(False).apply({"params": params}, x) - x) ** 2)

    def collect(params: Any, state: Any, x: Any) -> Any:
        return differentiate(loss_fn, strict=True)(params, x, opt_state=state)[2]

    def local(params: Any, state: Any, x: Any) -> Any:
        found = collect(params, state, x)
        return found if check else jax.lax.psum(found, "data")

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": check}
    operands = PARAMS, tx.init(PARAMS), INPUTS
    alone = jax.jit(collect)(*operands)
    split = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(*operands)
    pairs = zip(*map(jax.tree.leaves, (split, alone)), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def main() -> None:
    found: dict[str, Any] = {"alone": {}, "mesh": {}}
    for route, (tx, _) in ROUTES.items():
        step = jax.jit(stepper(route, False))
        found["alone"][route] = train(step, PARAMS, tx.init(PARAMS), INPUTS)[2]
        found["mesh"][f"{route} auto"] = on_mesh(route, AxisType.Auto, FSDP)
        found["mesh"][f"{route} explicit"] = on_mesh(route, AxisType.Explicit, TENSOR)
    found["updates"] = updates_on_explicit()
    found["sharpness aware"] = sharpness_aware_on_explicit()
    found["coordinates"] = coordinates_on_explicit()
    found["nnx"] = nnx_optimizer()
    found["mapped"] = [
        mapped(r, c) for r in ("subspace", "whole") for c in (False, True)
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
