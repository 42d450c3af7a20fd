"""The architecture, as rules over the source. Each rule is shown to be able to fail."""

import ast
import graphlib
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

#: A package, or a module beside them, imports from itself and from lower levels only:
#: those of one level know nothing of each other. Arrays at the bottom, people at the
#: top.
LEVELS = {
    "linalg": 0,
    "core": 1,
    "rules": 2,
    "recipes": 3,
    "sharpness": 3,
    "scale": 3,
    "capture": 3,
    "linen": 4,
    "nnx": 4,
    "instruments": 4,
    "diagnostics": 5,
    "plotting": 5,
    "__init__": 6,
}
#: Where protocols may speak of trees: the glossary, which all others share.
GLOSSARY = "linalg.types"
#: Adapter -> what is not its framework.
ADAPTERS = {
    "linen": "flax.nnx",
    "capture.linen_layers": "flax.nnx",
    "nnx": "flax.linen",
    "capture.nnx_layers": "flax.linen",
}
#: What makes optimizers; adapters know their states alone.
OPTIMIZERS = ("rules", "recipes", "sharpness")
#: The one module of `capture` that looks into a state.
READER = "capture.state"


def read_sources() -> dict[str, str]:
    return {_name(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def _name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def package_of(name: str) -> str:
    return name.split(".")[0]


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


def internal_imports(source: str) -> set[str]:
    """Modules of this package, and names out of them, by their place in it."""
    parts = [name.split(".") for name in imported_names(source)]
    found = {".".join(p[1:]) for p in parts if p[0] == PACKAGE and len(p) > 1}
    return {name for name in found if package_of(name) in LEVELS}


def rule_every_module_has_a_level(sources: Sources) -> list[str]:
    return [
        f"{name}: not in LEVELS" for name in sources if package_of(name) not in LEVELS
    ]


def rule_imports_point_down(sources: Sources) -> list[str]:
    return [
        f"{name} (level {LEVELS[own]}) imports {other} (level {LEVELS[theirs]})"
        for name, source in sources.items()
        for other in sorted(internal_imports(source))
        if (own := package_of(name)) in LEVELS
        and (theirs := package_of(other)) != own
        and LEVELS[theirs] >= LEVELS[own]
    ]


def rule_no_cycles_within_a_package(sources: Sources) -> list[str]:
    graph = {
        name: {
            other
            for other in internal_imports(source) & {*sources}
            if package_of(other) == package_of(name)
        }
        for name, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


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
        for other in sorted(internal_imports(source) & {*ADAPTERS})
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
            for other in sorted(internal_imports(source))
            if package_of(other) in OPTIMIZERS
        ]
    return found


def rule_one_module_of_capture_reads_states(sources: Sources) -> list[str]:
    readers = ("core.state", "core.stacks", "core.plan", "core.refresh")
    return [
        f"{name} imports {other}"
        for name, source in sources.items()
        if package_of(name) == "capture" and name != READER
        for other in sorted(internal_imports(source))
        if other.startswith(readers)
    ]


def rule_linear_algebra_knows_no_pytrees(sources: Sources) -> list[str]:
    found = []
    for name, source in sources.items():
        if package_of(name) != "linalg" or name == GLOSSARY:
            continue
        for node in ast.walk(ast.parse(source)):
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
        f"{name}, line {node.lineno}: {type(node).__name__}"
        for name, source in sources.items()
        if name.split(".")[-1] == "__init__"
        for node in ast.parse(source).body
        if not isinstance(node, allowed)
        and getattr(node, "name", "") not in ("__getattr__", "__dir__")
    ]


#: Each rule beside sources that break it.
PLANTED: dict[Rule, Sources] = {
    rule_every_module_has_a_level: {"stray": ""},
    rule_imports_point_down: {"linalg.subspace": "from dsbp_optax.core import plan"},
    rule_no_cycles_within_a_package: {
        "core.plan": "from dsbp_optax.core.stacks import Stack",
        "core.stacks": "from dsbp_optax.core.plan import Kernel",
    },
    rule_core_imports_no_flax: {"core.plan": "def f():\n    import flax.linen as nn"},
    rule_core_imports_no_adapter: {
        "capture.tap": "from dsbp_optax.capture.linen_layers import RULES"
    },
    rule_adapters_know_one_framework_and_no_optimizer: {
        "nnx": "from flax import linen"
    },
    rule_one_module_of_capture_reads_states: {
        "capture.recorder": "from dsbp_optax.core.state import find_states"
    },
    rule_linear_algebra_knows_no_pytrees: {
        "linalg.subspace": "import jax\nf = jax.tree.map"
    },
    rule_init_only_exports: {"__init__": "def helper(): pass"},
}
RULES = list(PLANTED)
#: More ways to break a rule than the one above.
ALSO_PLANTED: list[tuple[Rule, Sources]] = [
    (rule_every_module_has_a_level, {"extras.more": ""}),
    (rule_imports_point_down, {"core.plan": "import dsbp_optax.rules.metric"}),
    (rule_imports_point_down, {"scale.sharding": "from dsbp_optax import capture"}),
    (rule_imports_point_down, {"recipes": "from dsbp_optax.sharpness import sam"}),
    (rule_imports_point_down, {"rules.metric": "from . import recipes"}),
    (
        rule_no_cycles_within_a_package,
        {
            "core.a": "from dsbp_optax.core import b",
            "core.b": "from dsbp_optax.core import c",
            "core.c": "from dsbp_optax.core import a",
        },
    ),
    (rule_core_imports_no_flax, {"__init__": "from flax import nnx"}),
    (rule_core_imports_no_adapter, {"__init__": "from dsbp_optax import nnx"}),
    (
        rule_adapters_know_one_framework_and_no_optimizer,
        {"linen": "from dsbp_optax.rules import projection"},
    ),
    (
        rule_one_module_of_capture_reads_states,
        {"capture.plain": "from dsbp_optax.core import plan"},
    ),
    (
        rule_linear_algebra_knows_no_pytrees,
        {"linalg.quantize": "from jax import tree_util"},
    ),
    (rule_linear_algebra_knows_no_pytrees, {"linalg.quantize": "import jax.tree_util"}),
    (
        rule_linear_algebra_knows_no_pytrees,
        {"linalg.quantize": "from jax.tree import map"},
    ),
    (rule_init_only_exports, {"core.__init__": "class Helper: pass"}),
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
    assert {package_of(name) for name in sources} == {*LEVELS}
    assert {name.replace(".", "/") + ".py" for name in sources} == {
        path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")
    }
    assert internal_imports(sources["recipes"]) >= {
        "core.plan",
        "linalg.types",
        "rules.projection",
    }
    assert internal_imports(sources[GLOSSARY]) == set()
    assert {*ADAPTERS, GLOSSARY, READER} <= {*sources}


def loaded_by(statement: str) -> set[str]:
    """Top-level and `flax.*` modules that a fresh interpreter holds afterwards."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_does_not_load_flax():
    loaded = loaded_by("import dsbp_optax, dsbp_optax.diagnostics")
    assert "dsbp_optax.recipes" in loaded
    assert not {name for name in loaded if name.split(".")[0] == "flax"}


@pytest.mark.parametrize(
    "package, extra, statement",
    [
        ("flax", "flax", "dsbp_optax.linen"),
        ("flax", "flax", "from dsbp_optax.nnx import value_and_grad"),
        (
            "matfree",
            "instruments",
            "dsbp_optax.diagnostics.top_eigenvalues(lambda v: v, jax.numpy.ones(2), 1)",
        ),
        ("matplotlib", "instruments", "dsbp_optax.plotting._axes(None)"),
    ],
)
def test_a_package_that_is_missing_names_its_extra(package, extra, statement):
    code = f"import jax, sys, dsbp_optax; sys.modules['{package}'] = None; {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ModuleNotFoundError: {package} is not installed. Remedy")
    assert f"[{extra}]" in last


def test_flax_is_seen_when_it_is_loaded():
    assert "flax" in loaded_by("import dsbp_optax; dsbp_optax.linen")
