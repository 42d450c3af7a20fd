"""What a step is made of, read off its program: no accelerator is needed for that.

The program of `update` for six blocks has the matrix products and factorisations of
that for two, on every platform: kernels alike are one array. How many operations of a
kind there may be is written down, and what is planted against that is noticed.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from versions import x64

import dsbp_optax
from dsbp_optax import Sketch

WIDTH, RANK = 64, 8
PLATFORMS = ("cuda", "tpu")
RECIPES: dict[str, Callable[..., Any]] = {
    "dsbp_muon": dsbp_optax.dsbp_muon,
    "dsbp_adamw": dsbp_optax.dsbp_adamw,
    "dsbp_sgd": dsbp_optax.dsbp_sgd,
    "subspace_muon": dsbp_optax.subspace_muon,
}
#: Operations whose number is that of stacks; and what a step on a device never has.
HEAVY = {"dot_general", "while", "case", "custom_call", "sort"}
NEVER = ("callback", "f64", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv")
#: How many there may be for the three stacks of a block, at any depth. A new
#: bound needs a reason.
MOST = {
    "convert": {"dsbp_muon": 60, "dsbp_adamw": 66, "dsbp_sgd": 96, "subspace_muon": 62},
    "while": {"dsbp_muon": 5, "dsbp_adamw": 2, "dsbp_sgd": 2, "subspace_muon": 5},
    "dot_general": {
        "dsbp_muon": 36,
        "dsbp_adamw": 30,
        "dsbp_sgd": 32,
        "subspace_muon": 35,
    },
    "transpose": dict.fromkeys(RECIPES, 11),
    "custom_call": dict.fromkeys(RECIPES, 6),
    "case": dict.fromkeys(RECIPES, 6),  # Four of them tell the platform.
    "sort": dict.fromkeys(RECIPES, 0),
}


def make_params(blocks: int) -> Any:
    shapes = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    shapes |= dict.fromkeys("qkvo", (WIDTH, WIDTH))
    block = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for name, shape in shapes.items()
    }
    return {f"block{i}": block for i in range(blocks)}


def statistics_of(params: Any) -> Any:
    sizes = {
        f"{block}/{name}/kernel": layer["kernel"].shape[0]
        for block, layers in params.items()
        for name, layer in layers.items()
    }

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {
        path: Sketch(array(d, 1, RANK), array(1, 1, 1), array(1, 1, 1))
        for path, d in sizes.items()
    }


def program(
    make: Callable[..., Any], blocks: int, platform: str, **keywords: Any
) -> str:
    """StableHLO of `update`, as it is lowered for a platform."""
    tx, params = make(0.01, rank=RANK, **keywords), make_params(blocks)
    state = jax.eval_shape(tx.init, params)

    def update(grads: Any, state: Any, params: Any, statistics: Any) -> Any:
        return tx.update(grads, state, params, statistics=statistics)

    exported = export.export(jax.jit(update), platforms=[platform])
    return exported(params, state, params, statistics_of(params)).mlir_module()


def count(text: str) -> Counter[str]:
    return Counter(re.findall(r"\bstablehlo\.(\w+)", text))


def complaints(name: str, text: str) -> list[str]:
    """What a program has that it must not have, or too much of."""
    found = count(text)
    told = [f"{kind} {found[kind]}" for kind in MOST if found[kind] > MOST[kind][name]]
    return told + [word for word in NEVER if word in text]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_depth_adds_neither_products_nor_factorisations(name, platform) -> None:
    few, many = (program(RECIPES[name], n, platform) for n in (2, 6))
    ours, theirs = count(many), count(few)
    assert {k: ours[k] for k in HEAVY} == {k: theirs[k] for k in HEAVY}
    assert theirs["dot_general"] > 3 and theirs["case"] >= 2
    # What is left grows: kernels are gathered, scattered and checked one by one.
    assert sum(ours.values()) < 1.5 * sum(theirs.values())
    assert complaints(name, few) == complaints(name, many) == []


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_unrolled_update_would_be_noticed(platform) -> None:
    """Planted: each block by an optimizer of its own."""

    def apart(rate: float, **keywords: Any) -> Any:
        def label(params: Any) -> Any:
            return {
                block: jax.tree.map(lambda _, b=block: b, part)
                for block, part in params.items()
            }

        each = {f"block{i}": dsbp_optax.dsbp_muon(rate, **keywords) for i in range(8)}
        return optax.partition(each, label)

    few, many = (program(apart, n, platform) for n in (1, 4))
    assert count(many)["dot_general"] > 3 * count(few)["dot_general"]
    told = {x.partition(" ")[0] for x in complaints("dsbp_muon", many)}
    assert told == {"convert", "while", "dot_general", "transpose", "case"}


def unrolled_solver(operator: Any, basis: Any, iterations: Any) -> Any:
    """Planted: a refresh whose iterations are written out."""
    del iterations
    for _ in range(5):
        pairs = dsbp_optax.power_iteration(operator, basis, 1)
        basis = pairs.basis
    return pairs


def planted(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`dsbp_adamw` behind a change of each gradient."""

    def make(rate: float, **keywords: Any) -> Any:
        changed = optax.stateless(lambda grads, _: jax.tree.map(change, grads))
        return optax.chain(changed, dsbp_optax.dsbp_adamw(rate, **keywords))

    return make


def test_a_refresh_that_is_written_out_is_noticed() -> None:
    basis = dsbp_optax.Basis(solver=unrolled_solver)
    text = program(RECIPES["dsbp_adamw"], 2, "cuda", basis=basis)
    told = {x.partition(" ")[0] for x in complaints("dsbp_adamw", text)}
    assert told >= {"dot_general", "custom_call"}


def test_needless_conversions_are_noticed() -> None:
    change = planted(lambda g: g.astype(jnp.bfloat16).astype(jnp.float32))
    text = program(change, 2, "tpu")
    assert [x.partition(" ")[0] for x in complaints("dsbp_adamw", text)] == ["convert"]


def test_what_the_host_would_do_is_noticed() -> None:
    """By jax itself: a program for another platform holds no function of this one."""

    def told(g: Any) -> Any:
        jax.debug.callback(lambda x: None, g.sum())
        return g

    with pytest.raises(ValueError, match="backend cpu is different"):
        program(planted(told), 1, "cuda")


def test_double_precision_is_noticed() -> None:
    def doubled(g: Any) -> Any:
        return (g.astype(jnp.float64) * 2).astype(jnp.float32)

    with x64(True):
        assert "f64" in complaints("dsbp_adamw", program(planted(doubled), 1, "cuda"))


# Precision, and memory that is used again.


#: Products of Newton-Schulz: wide and tall matrices may share them.
_OF_MUON = 6, 9


def products(text: str) -> list[str]:
    return [line for line in text.splitlines() if "stablehlo.dot_general" in line]


@pytest.mark.parametrize("name", RECIPES)
def test_products_with_a_basis_have_the_highest_precision(name) -> None:
    """All but the three of Newton-Schulz for each shape."""
    lines = products(program(RECIPES[name], 2, "cuda"))
    lax = [line for line in lines if "precision = [HIGHEST, HIGHEST]" not in line]
    assert len(lax) in (_OF_MUON if "muon" in name else (0,)), lax


def test_newton_schulz_in_half_precision_is_asked_for() -> None:
    def make(rate: float, dtype: Any = None, **keywords: Any) -> Any:
        direction = dsbp_optax.orthogonalize(dtype=dtype)
        metric = dsbp_optax.scale_by_activation_metric(direction, **keywords)
        return optax.chain(metric, optax.scale_by_learning_rate(rate))

    whole, half = (
        products(program(make, 1, "cuda", dtype=x)) for x in (None, "bfloat16")
    )
    assert sum("bf16" in line for line in whole) == 0
    assert sum("bf16" in line for line in half) in _OF_MUON


@pytest.mark.parametrize("name", RECIPES)
def test_a_donated_step_puts_its_results_in_the_place_of_its_arguments(name) -> None:
    tx, params = RECIPES[name](0.01, rank=RANK), make_params(2)
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, grads: Any, statistics: Any) -> Any:
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    args = params, state, params, statistics_of(params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*args)
    aliased = lowered.compile().memory_analysis().alias_size_in_bytes
    leaves = jax.tree.leaves((params, state))
    assert aliased == sum(x.size * x.dtype.itemsize for x in leaves)


def test_factorisations_are_one_batch_on_accelerators() -> None:
    """On a CPU they follow one another: batches of them wait for threads there."""
    sizes = {}
    for platform in ("cuda", "cpu"):
        text = program(dsbp_optax.dsbp_muon, 3, platform)
        found = re.findall(
            r"custom_call @\w*(?:geqrf|syevd)\w*\(.*?-> \(?(\S+?)[,)]", text
        )
        sizes[platform] = {kind.count("x") for kind in found}
    assert sizes == {"cuda": {3}, "cpu": {2}}


def test_init_is_a_few_programs(caplog) -> None:
    """Outside of `jax.jit` each operation on its own would be one."""
    shapes = {"a": (40, 24), "b": (24, 40), "c": (40, 40), "d": (3, 24, 40)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    axes = {"d*": dsbp_optax.Axes((1,), (2,), (0,))}
    tx = dsbp_optax.dsbp_muon(0.02, rank=5, basis=dsbp_optax.Basis(axes=axes))
    with jax.log_compiles():
        tx.init(params)
    compiled = [x for x in caplog.messages if x.startswith("Compiling ")]
    assert 2 <= len(compiled) <= 6, compiled
