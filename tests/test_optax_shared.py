"""Optax's own shared tests for contributed optimizers, run on ours.

The installed wheel ships ``optax/contrib/_common_test.py``. Its source is read where
it lies and executed with our optimizers in the place of its own.
"""

import importlib.util
import pathlib
from typing import Any

import pytest

import dsbp_optax

#: One of its parameters is an array of three axes without a name.
pytestmark = pytest.mark.filterwarnings("ignore:the axes of kernels were guessed")

_MARK = "class ContribTest"

#: "sgd" is a name for which the file passes ``value=`` on, which
#: `reduce_on_plateau` needs.
_FACTORIES = {
    "dsbp": dsbp_optax.dsbp,
    "dsbp_sgd": dsbp_optax.dsbp_sgd,
    "dsbp_adamw": dsbp_optax.dsbp_adamw,
    "dsbp_muon": dsbp_optax.dsbp_muon,
    "subspace_adamw": dsbp_optax.subspace_adamw,
    "sgd": dsbp_optax.dsbp_sgd,
}


def _entry(name: str, rate: float, wrapper: str | None = None, **wrapped: Any) -> Any:
    return {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": rate},
        "wrapper_name": wrapper,
        "wrapper_kwargs": None if wrapper is None else wrapped,
    }


_BARE = [
    _entry("dsbp", 1e-3),
    _entry("dsbp_sgd", 1e-3),
    _entry("dsbp_adamw", 1e-3),
    _entry("dsbp_muon", 1e-3),
]
#: The only kernel there that is worth a projection: 2 x 2, Adam's moments, rank 1.
_PROJECTED = _entry("subspace_adamw", 1e-3)
_PROJECTED["opt_kwargs"] = {"learning_rate": 1e-3, "rank": 1, "residual": 0.5}
_WRAPPED = [
    _entry("dsbp_sgd", 1e-1, "mechanize", weight_decay=0.0),
    _entry("dsbp_sgd", 1e-2, "schedule_free", learning_rate=1e-2),
    _entry("sgd", 1e-3, "reduce_on_plateau"),
]
_MAIN = (*_BARE, _PROJECTED, *_WRAPPED)
_ALL = (
    *_MAIN,
    _entry("dsbp", 1.0, "mechanize", weight_decay=0.0),
    _entry("dsbp_adamw", 1.0, "mechanize", weight_decay=0.0),
)


def _source() -> tuple[str, pathlib.Path]:
    spec = importlib.util.find_spec("optax.contrib")
    path = pathlib.Path(spec.origin).with_name("_common_test.py")
    if not path.exists():
        pytest.skip(f"this optax has no {path.name}", allow_module_level=True)
    return path.read_text(), path


def _contrib_test() -> type:
    text, path = _source()
    if _MARK not in text:
        pytest.skip(f"no '{_MARK}' in {path}", allow_module_level=True)
    if "'rank'" not in text:  # before Optax had a static rank of its own
        text = text.replace("'clip_value_fn'", "'clip_value_fn', 'rank'")
    setup, tests = text.split(_MARK)
    names: dict[str, Any] = {"__name__": __name__, "__file__": str(path)}
    exec(compile(setup, str(path), "exec"), names)
    for replaced in ("_ALL_OPTIMIZERS_UNDER_TEST", "_MAIN_OPTIMIZERS_UNDER_TEST"):
        assert names[replaced], replaced
    names["_ALL_OPTIMIZERS_UNDER_TEST"] = _ALL
    names["_MAIN_OPTIMIZERS_UNDER_TEST"] = _MAIN
    assert callable(names["_get_opt_factory"])
    names["_get_opt_factory"] = _FACTORIES.__getitem__
    lines = "\n" * setup.count("\n")
    exec(compile(lines + _MARK + tests, str(path), "exec"), names)
    return names["ContribTest"]


ContribTest = _contrib_test()


def test_the_shared_tests_are_ours_and_many():
    methods = [name for name in vars(ContribTest) if name.startswith("test_")]
    convergence = [
        name
        for name in methods
        if name.startswith("test_optimizers") and name[15:].isdigit()
    ]
    assert len(convergence) == 4 * len(_ALL)
    assert len(methods) > 12 * len(_MAIN)


def test_the_projected_entry_projects():
    import jax.numpy as jnp

    tx = _FACTORIES[_PROJECTED["opt_name"]](**_PROJECTED["opt_kwargs"])
    held = dsbp_optax.by_path(tx.init(jnp.zeros((2, 2))))
    assert held[""].basis.shape == (2, 1)
