"""What a step is made of, read off its program: no accelerator is needed for that.

The program of `update` for six blocks has the matrix products and factorisations of
that for two, on every platform: kernels alike are one array.
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
NEVER = ("callback", "f64", "infeed", "outfeed")


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


def program(make: Callable[..., Any], blocks: int, platform: str) -> str:
    """StableHLO of `update`, as it is lowered for a platform."""
    tx, params = make(0.01, rank=RANK), make_params(blocks)
    state = jax.eval_shape(tx.init, params)

    def update(grads: Any, state: Any, params: Any, statistics: Any) -> Any:
        return tx.update(grads, state, params, statistics=statistics)

    exported = export.export(jax.jit(update), platforms=[platform])
    return exported(params, state, params, statistics_of(params)).mlir_module()


def count(text: str) -> Counter[str]:
    return Counter(re.findall(r"\bstablehlo\.(\w+)", text))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_depth_adds_neither_products_nor_factorisations(name, platform) -> None:
    few, many = (program(RECIPES[name], n, platform) for n in (2, 6))
    ours, theirs = count(many), count(few)
    assert {k: ours[k] for k in HEAVY} == {k: theirs[k] for k in HEAVY}
    assert theirs["dot_general"] > 3 and theirs["case"] >= 2
    # What is left grows: kernels are gathered, scattered and checked one by one.
    assert sum(ours.values()) < 1.5 * sum(theirs.values())
    for word in NEVER:
        assert word not in few, word


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

    few, many = (count(program(apart, n, platform)) for n in (1, 4))
    assert many["dot_general"] > 3 * few["dot_general"]


def test_factorisations_are_one_batch_on_accelerators() -> None:
    """On a CPU they follow one another: batches of them wait for threads there."""
    sizes = {}
    for platform in ("cuda", "cpu"):
        text = program(dsbp_optax.dsbp_muon, 3, platform)
        found = re.findall(r"custom_call @\w*(?:geqrf|syevd)\w*\(.*?-> \(?(\S+?)[,)]", text)
        sizes[platform] = {kind.count("x") for kind in found}
    assert sizes == {"cuda": {3}, "cpu": {2}}
