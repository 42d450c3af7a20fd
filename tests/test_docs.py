"""The site: every example is executed, every public name has its place."""

import ast
import importlib.util
import inspect
import re
import tomllib

import optax
import pytest
from pages import (
    DOCS,
    FENCE,
    ROOT,
    anchors,
    before_and_after,
    blocks,
    broken_links,
    examples,
    run,
)
from public import MODULES

import dsbp_optax

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Notebooks are copied here when the site is built; they have tests of their own.
PAGES = sorted(p for p in DOCS.rglob("*.md") if "notebooks" not in p.parts[:-1])
NAMES = {str(page.relative_to(DOCS)): page for page in PAGES}
EXECUTED = [name for name, page in NAMES.items() if examples(page.read_text())]
DIFFS = [
    (name, number)
    for name, page in NAMES.items()
    for number, _ in enumerate(blocks(page.read_text(), "diff"))
]
MOST_INSERTED_LINES = 5
ENTRY = re.compile(r"^\.\. (?:auto\w+|py:data):: (\w+)$", re.MULTILINE)


# Examples.


@pytest.mark.parametrize("name", EXECUTED)
def test_examples_run(name):
    """The blocks of a page are one program."""
    names = {"__name__": "page"}
    for number, example in enumerate(examples(NAMES[name].read_text())):
        printed = run(example.code, f"{name}, block {number}", names)
        if example.printed is not None:
            assert printed == example.printed, f"{name}, block {number}"


def test_examples_are_found():
    assert {"getting_started.md", "how_to/own_layer.md"} <= set(EXECUTED)
    fences = [
        language for page in PAGES for language, _ in FENCE.findall(page.read_text())
    ]
    assert set(fences) <= {"python", "text", "diff", "bash"}


def test_a_wrong_example_fails():
    (example,) = examples("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    assert run(example.code, "page") == "1\n" != example.printed
    with pytest.raises(NameError):
        run("undefined", "page")


@pytest.mark.parametrize("which", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("name, number", DIFFS)
def test_ported_script_runs(name, number, which):
    diff = blocks(NAMES[name].read_text(), "diff")[number]
    run(before_and_after(diff)[which], name)


@pytest.mark.parametrize("name, number", DIFFS)
def test_port_is_short(name, number):
    diff = blocks(NAMES[name].read_text(), "diff")[number]
    inserted = sum(line.startswith("+") for line in diff.splitlines())
    assert 0 < inserted <= MOST_INSERTED_LINES


# The table from Optax's names to ours.


def calls_of_the_migration(text: str) -> list[tuple[object, ast.Call]]:
    """Functions of Optax and ours, and how the table calls them."""
    section = text.split("\n## From Optax\n")[1].split("\n## ")[0]
    found = []
    for code in re.findall(r"`([^`]+\(.+?\))`(?= |,|:|;|$)", section, re.MULTILINE):
        call = ast.parse(code).body[0]
        if isinstance(call, ast.Expr):
            name = ast.unparse(call.value.func).removeprefix("contrib.")
            homes = (dsbp_optax, optax, optax.contrib)
            (home,) = [home for home in homes if hasattr(home, name)]
            found.append((getattr(home, name), call.value))
    return found


def test_arguments_of_the_migration_exist():
    calls = calls_of_the_migration((DOCS / "port_your_script.md").read_text())
    assert len(calls) >= 10
    for function, call in calls:
        keywords = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(function).bind(*call.args, **keywords)


def test_a_wrong_migration_fails():
    text = "x\n## From Optax\n\n| `sgd(lr)` | `dsbp_sgd(lr, warmth=3)` |\n"
    (_, good), (function, call) = calls_of_the_migration(text)
    assert not good.keywords
    with pytest.raises(TypeError, match="warmth"):
        inspect.signature(function).bind(0.1, **{k.arg: None for k in call.keywords})


# The reference.


def documented() -> dict[str, list[str]]:
    """Module -> names that the pages of the reference show."""
    found: dict[str, list[str]] = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        text = page.read_text()
        modules = re.findall(r"^\.\. currentmodule:: ([\w.]+)$", text, re.MULTILINE)
        if page.stem != "index":
            found.setdefault(*modules, []).extend(ENTRY.findall(text))
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_public_name_is_documented_once(module):
    public = [n for n in module.__all__ if not inspect.ismodule(getattr(module, n))]
    assert sorted(documented()[module.__name__]) == public


# Links, pictures, tables that follow from other files.


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert broken_links(NAMES[name]) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b, c\n\n[x](#a-b-c) [y](#d) [z](no.md) [w](page.md#a-b-c)\n")
    assert anchors(page.read_text()) == {"a-b-c"}
    assert broken_links(page) == ["#d", "no.md"]


def test_every_page_is_in_the_contents():
    listed = set()
    for page in PAGES:
        for body in re.findall(
            r"^```\{toctree\}\n(.*?)^```$", page.read_text(), re.M | re.S
        ):
            entries = [line for line in body.split() if not line.startswith(":")]
            listed |= {(page.parent / entry).resolve() for entry in entries}
    missing = [p for p in PAGES if p.with_suffix("").resolve() not in listed]
    assert missing == [DOCS / "index.md"]


def test_pictures_are_those_of_the_script(tmp_path):
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    drawn = {path.name for path in pictures.write(tmp_path)}
    shown = set()
    for page in [*PAGES, ROOT / "README.md"]:
        shown |= set(re.findall(r"_static/pictures/([\w.]+)", page.read_text()))
    assert drawn == shown == {path.name for path in pictures.FOLDER.iterdir()}


def test_files_to_change_exist():
    page = (DOCS / "contributing.md").read_text()
    section = page.split("\n## What to change where\n")[1]
    names = set(re.findall(r"`((?:\w+/)?\w+\.py)`", section))
    assert len(names) > 10
    homes = [ROOT, ROOT / "dsbp_optax"]
    assert [n for n in names if not any((h / n).exists() for h in homes)] == []


def test_versions_match_the_declared_bounds():
    text = (DOCS / "limits.md").read_text()
    oldest = re.search(r"^\| oldest \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")
    bounds = " ".join(
        PROJECT["dependencies"] + PROJECT["optional-dependencies"]["flax"]
    )
    expected = [PROJECT["requires-python"].removeprefix(">=")]
    for package in ("jax", "optax", "flax"):
        expected.append(re.search(rf"\b{package}>=([\d.]+)", bounds)[1])
    assert oldest == expected


def test_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {dsbp_optax.__version__}\n" in text
