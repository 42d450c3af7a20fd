"""What users see: names, docstrings, examples that run, and what the wheel ships."""

import dataclasses
import doctest
import importlib
import importlib.metadata
import inspect
import pathlib
import pkgutil
import pydoc
import re
import tomllib

import pytest
from public import MODULES

import dsbp_optax

ROOT = pathlib.Path(dsbp_optax.__file__).parent
#: Functions that people call first; their docstrings say more.
MAIN = (
    dsbp_optax.scale_by_activation_metric,
    dsbp_optax.scale_by_quantized_momentum,
    dsbp_optax.scale_by_quantized_adam,
    dsbp_optax.scale_by_spectral_projection,
    dsbp_optax.add_spectral_sharpness,
    dsbp_optax.dsbp,
    dsbp_optax.dsbp_sgd,
    dsbp_optax.dsbp_adamw,
    dsbp_optax.dsbp_muon,
    dsbp_optax.subspace_adamw,
    dsbp_optax.subspace_muon,
    dsbp_optax.subspace_sam,
    dsbp_optax.subspace_msam,
    dsbp_optax.linen.value_and_grad,
    dsbp_optax.nnx.value_and_grad,
)
MAIN_SECTIONS = ("Args", "Returns", "Raises", "Cost", "Example")
#: Modules of dataclasses that users make themselves.
FIELDS = ("dsbp_optax.core.plan", "dsbp_optax.core.statistics")
#: A docstring may send its reader to the one that lists the fields.
ELSEWHERE = "fields as in `"


def public_objects() -> dict[str, object]:
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in MODULES
        for name in module.__all__
    }


def documented() -> dict[str, object]:
    """Public objects that can carry a docstring: type aliases cannot."""
    return {
        name: value
        for name, value in public_objects().items()
        if inspect.isclass(value)
        or inspect.isfunction(value)
        or inspect.ismodule(value)
    }


def functions() -> dict[str, object]:
    return {n: f for n, f in documented().items() if inspect.isfunction(f)}


def all_modules() -> list[str]:
    found = pkgutil.walk_packages([str(ROOT)], "dsbp_optax.")
    return ["dsbp_optax", *(info.name for info in found)]


def missing_sections(function, sections) -> list[str]:
    text = inspect.getdoc(function) or ""
    return [s for s in sections if not re.search(rf"^{s}:", text, re.MULTILINE)]


def undocumented_arguments(function) -> list[str]:
    """Parameters of `function` that its docstring's ``Args:`` does not list."""
    text = inspect.getdoc(function) or ""
    found = re.search(r"^Args:\n((?:(?:  .*)?\n)+)", text + "\n", re.MULTILINE)
    listed = set(re.findall(r"^  \**(\w+):", found[1] if found else "", re.MULTILINE))
    return [p for p in inspect.signature(function).parameters if p not in listed]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_all_is_sorted_and_resolves(module):
    names = module.__all__
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert all(hasattr(module, name) for name in names)


@pytest.mark.parametrize("name", documented())
def test_has_a_docstring(name):
    value = documented()[name]
    text = value.__doc__ or ""
    assert text.strip(), f"{name} has no docstring"
    # What NamedTuple and dataclasses write by themselves does not count.
    assert not text.startswith(f"{getattr(value, '__name__', '')}("), name


@pytest.mark.parametrize("name", functions())
def test_function_documents_arguments_and_result(name):
    function = functions()[name]
    sections = ("Args", "Returns") if inspect.signature(function).parameters else ()
    assert missing_sections(function, sections) == []
    assert undocumented_arguments(function) == []


@pytest.mark.parametrize("function", MAIN, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_main_functions_document_the_rest(function):
    assert missing_sections(function, MAIN_SECTIONS) == []


@pytest.mark.parametrize("name", documented())
def test_fields_are_documented(name):
    value = documented()[name]
    fields = getattr(value, "_fields", ())
    if dataclasses.is_dataclass(value) and value.__module__ in FIELDS:
        fields = [field.name for field in dataclasses.fields(value)]
    text = value.__doc__ or ""
    missing = [f for f in fields if f"{f}: " not in text]
    assert ELSEWHERE in text or missing == []


def test_docstring_checks_can_fail():
    def silent(x, *args, y=1, **kwargs):
        """One line.

        Args:
          x: told.
          *args: told.
        """

    assert undocumented_arguments(silent) == ["y", "kwargs"]
    assert missing_sections(silent, ("Args", "Returns")) == ["Returns"]


@pytest.mark.parametrize("name", all_modules())
def test_examples_run(name):
    results = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert results.failed == 0


def test_examples_are_found():
    """Doctest looks into objects that were imported nowhere else but defined here."""
    finder = doctest.DocTestFinder()
    found = {
        test.name.rpartition(".")[2]
        for name in all_modules()
        for test in finder.find(importlib.import_module(name))
        if test.examples
    }
    assert {function.__name__ for function in MAIN} <= found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_pydoc_renders(module):
    text = pydoc.plain(pydoc.render_doc(module))
    assert all(name in text for name in module.__all__)


@pytest.mark.parametrize("name", functions())
def test_signature_names_its_types(name):
    """Aliases spelt out would fill a page: `pydoc` is to be read."""
    text = str(inspect.signature(functions()[name]))
    assert "Union[" not in text
    assert "jaxlib" not in text


def test_version_matches_metadata_and_changelog():
    version = dsbp_optax.__version__
    assert importlib.metadata.version("dsbp-optax") == version
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_package_ships_types_and_changelog():
    assert (ROOT / "py.typed").is_file()
    assert (ROOT / "CHANGELOG.md").is_file()


def test_lazy_adapters_are_the_modules():
    assert dsbp_optax.linen is importlib.import_module("dsbp_optax.linen")
    assert dsbp_optax.nnx is importlib.import_module("dsbp_optax.nnx")
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = dsbp_optax.torch


def test_declared_versions_agree():
    """The oldest pins that are tested are the lower bounds that are declared."""
    top = ROOT.parent
    project = tomllib.loads((top / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["flax"]
    lines = (top / ".ci" / "oldest.txt").read_text().splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    assert {bound.replace(">=", "==") for bound in declared} <= pins
