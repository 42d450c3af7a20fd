"""The architecture, as rules over the source. Each rule is shown to be able to fail."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

import pytest

import dsbp_optax

Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]

PACKAGE = "dsbp_optax"
ROOT = pathlib.Path(dsbp_optax.__file__).parent

#: A module imports from lower levels only. Arrays at the bottom, people at the top.
LEVELS = {
    "_types": 0,
    "_basis": 1,
    "_checks": 1,
    "_convolution": 1,
    "_layout": 1,
    "_orthogonal": 1,
    "_precision": 1,
    "_probe": 1,
    "_quantization": 1,
    "_share": 1,
    "_schedule": 1,
    "_subspace": 1,
    "_checkpoint": 2,
    "_clip": 2,
    "_batches": 1,
    "_curvature": 2,
    "_statistics": 2,
    "_known": 2,
    "_transport": 2,
    "_eigenbasis": 3,
    "_plan": 3,
    "_filter": 3,
    "_residual": 3,
    "_adapt": 4,
    "_gate": 6,
    "_metric": 7,
    "_momentum": 7,
    "_moments": 8,
    "_spectral": 4,
    "_coordinates": 6,
    "_refresh": 5,
    "_infer": 2,
    "_sharding": 5,
    "_rule": 6,
    "_sharpness": 7,
    "capture.origin": 2,
    "capture.tap": 6,
    "capture.coordinates": 7,
    "capture.einsum": 7,
    "capture.inspection": 7,
    "capture.state": 7,
    "capture.linen_layers": 8,
    "capture.linen_scope": 0,
    "capture.nnx_layers": 8,
    "capture.recorder": 8,
    "capture.plain": 9,
    "capture.__init__": 10,
    "_perturb": 6,
    "_snapshot": 5,
    "_surface": 3,
    "_pac_bayes": 7,
    "diagnostics": 8,
    "plotting": 8,
    "linen": 11,
    "nnx": 11,
    "_combine": 7,
    "_inner": 7,
    "_msam": 7,
    "_sam": 7,
    "_resize": 8,
    "_update": 8,
    "_project": 9,
    "_recipes": 10,
    "__init__": 12,
}
KERNELS = ("_basis", "_convolution", "_subspace")
#: Adapter -> what is not its framework.
ADAPTERS = {
    "linen": "flax.nnx",
    "capture.linen_layers": "flax.nnx",
    "nnx": "flax.linen",
    "capture.nnx_layers": "flax.linen",
}
TRANSFORMATIONS = ("_project", "_sharpness", "_recipes")


def read_sources() -> dict[str, str]:
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("capture/*.py")])
    return {_name(path): path.read_text() for path in paths}


def _name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_names(source: str) -> Iterator[str]:
    """Every module, or name out of a module, that an import statement mentions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{PACKAGE}." * bool(node.level) + (node.module or "")
            base = base.rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def internal_imports(source: str, modules: Mapping[str, object]) -> set[str]:
    parts = [name.split(".") for name in imported_names(source)]
    found = {".".join(p[1:n]) for p in parts if p[0] == PACKAGE for n in (2, 3)}
    return found & {*modules}


def rule_every_module_has_a_level(sources: Sources) -> list[str]:
    return [f"{name}: not in LEVELS" for name in sources if name not in LEVELS]


def rule_imports_point_down(sources: Sources) -> list[str]:
    return [
        f"{name} (level {LEVELS[name]}) imports {other} (level {LEVELS[other]})"
        for name, source in sources.items()
        for other in sorted(internal_imports(source, LEVELS))
        if name in LEVELS and LEVELS[other] >= LEVELS[name]
    ]


def rule_core_imports_no_flax(sources: Sources) -> list[str]:
    return [
        f"{name} imports {imported}"
        for name, source in sources.items()
        if name not in ADAPTERS
        for imported in imported_names(source)
        if imported.split(".")[0] == "flax"
    ]


def rule_core_imports_no_adapter(sources: Sources) -> list[str]:
    return [
        f"{name} imports the adapter {other}"
        for name, source in sources.items()
        if name not in ADAPTERS
        for other in sorted(internal_imports(source, ADAPTERS))
    ]


def rule_adapters_know_one_framework_and_no_optimizer(sources: Sources) -> list[str]:
    found = []
    for name, foreign in ADAPTERS.items():
        source = sources.get(name, "")
        found += [
            f"{name} imports {imported}"
            for imported in imported_names(source)
            if imported == foreign or imported.startswith(foreign + ".")
        ]
        found += [
            f"{name} imports the transformation {other}"
            for other in sorted(internal_imports(source, LEVELS))
            if other in TRANSFORMATIONS
        ]
    return found


def rule_kernels_know_no_pytrees(sources: Sources) -> list[str]:
    found = []
    for name in KERNELS:
        for node in ast.walk(ast.parse(sources.get(name, ""))):
            attribute = isinstance(node, ast.Attribute) and node.attr in (
                "tree",
                "tree_util",
            )
            imported = isinstance(node, ast.Import | ast.ImportFrom) and any(
                "tree" in f"{getattr(node, 'module', '')}.{alias.name}"
                for alias in node.names
            )
            if attribute or imported:
                found.append(f"{name}, line {node.lineno}: a pytree in a kernel")
    return found


def rule_init_only_exports(sources: Sources) -> list[str]:
    """`__init__` holds imports, `__version__`, `__all__` and the lazy adapters."""
    allowed = ast.Import | ast.ImportFrom | ast.Assign | ast.Expr
    return [
        f"__init__, line {node.lineno}: {type(node).__name__}"
        for node in ast.parse(sources.get("__init__", "")).body
        if not isinstance(node, allowed)
        and getattr(node, "name", "") not in ("__getattr__", "__dir__")
    ]


#: Each rule beside sources that break it.
PLANTED: dict[Rule, Sources] = {
    rule_every_module_has_a_level: {"_stray": ""},
    rule_imports_point_down: {"_basis": "from dsbp_optax import _plan"},
    rule_core_imports_no_flax: {"_plan": "def f():\n    import flax.linen as nn"},
    rule_core_imports_no_adapter: {
        "capture.tap": "from dsbp_optax.linen import TrainState"
    },
    rule_adapters_know_one_framework_and_no_optimizer: {
        "nnx": "from flax import linen"
    },
    rule_kernels_know_no_pytrees: {"_subspace": "import jax\nf = jax.tree.map"},
    rule_init_only_exports: {"__init__": "def helper(): pass"},
}
RULES = list(PLANTED)
#: More ways to break a rule than the one above.
ALSO_PLANTED: list[tuple[Rule, Sources]] = [
    (rule_imports_point_down, {"_basis": "import dsbp_optax._subspace"}),
    (rule_imports_point_down, {"_types": "from ._basis import eigh"}),
    (rule_imports_point_down, {"_types": "from . import _basis"}),
    (rule_core_imports_no_flax, {"__init__": "from flax import nnx"}),
    (rule_core_imports_no_adapter, {"__init__": "from dsbp_optax import nnx"}),
    (
        rule_adapters_know_one_framework_and_no_optimizer,
        {"linen": "from dsbp_optax import _project"},
    ),
    (rule_kernels_know_no_pytrees, {"_basis": "from jax import tree_util"}),
    (rule_kernels_know_no_pytrees, {"_basis": "import jax.tree_util"}),
    (rule_kernels_know_no_pytrees, {"_basis": "from jax.tree import map"}),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert rule(read_sources()) == []


@pytest.mark.parametrize(
    ("rule", "sources"),
    [*PLANTED.items(), *ALSO_PLANTED],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_rule_can_fail(rule, sources):
    assert rule(sources)


def test_rules_see_the_sources():
    sources = read_sources()
    assert set(LEVELS) == set(sources)
    assert internal_imports(sources["_recipes"], LEVELS) >= {"_project", "_types"}
    assert internal_imports(sources["_types"], LEVELS) == set()


def loaded_by(statement: str) -> set[str]:
    """Top-level and `flax.*` modules that a fresh interpreter holds afterwards."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_does_not_load_flax():
    loaded = loaded_by("import dsbp_optax, dsbp_optax.diagnostics")
    assert "dsbp_optax._recipes" in loaded
    assert not {name for name in loaded if name.split(".")[0] == "flax"}


def test_flax_is_seen_when_it_is_loaded():
    assert "flax" in loaded_by("import dsbp_optax; dsbp_optax.linen")
