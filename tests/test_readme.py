"""Everything in the README that can be executed is executed."""

import ast
import contextlib
import inspect
import io
import pathlib
import re
import tomllib

import optax
import pytest

import dsbp_optax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIGURATION["project"]
PUBLISHED = CONFIGURATION["tool"]["dsbp"]["published"]
COLAB = "https://colab.research.google.com/github"
MOST_INSERTED_LINES = 5
COMMANDS = [
    'pip install -e ".[all]" && python -m benchmarks demo',
    'pip install -e ".[all]" && pytest',
]

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def examples(text: str) -> dict[str, tuple[str, str | None]]:
    """Heading -> Python block and, where a text block follows, what it prints."""
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, fences = section.partition("\n")[0], FENCE.findall(section)
        for i, (kind, body) in enumerate(fences):
            after = fences[i + 1] if i + 1 < len(fences) else ("", "")
            if kind == "python":
                assert heading not in found, f"two Python blocks under '{heading}'"
                found[heading] = (body, after[1] if after[0] == "text" else None)
    return found


def run(code: str, name: str) -> str:
    """What a block prints, run on its own."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"README.md: {name}", "exec"), {"__name__": "readme"})
    return printed.getvalue()


def before_and_after(diff: str) -> tuple[str, str]:
    lines = diff.splitlines()
    assert all(line[:1] in ("+", "-", " ") for line in lines), "not a diff"
    before = "\n".join(line[1:] for line in lines if line[0] != "+")
    after = "\n".join(line[1:] for line in lines if line[0] != "-")
    return before, after


@pytest.mark.parametrize("heading", examples(README))
def test_example_runs(heading):
    code, expected = examples(README)[heading]
    printed = run(code, heading)
    if expected is not None:
        assert printed == expected


def test_examples_are_found():
    assert {"Flax Linen", "Flax NNX", "Your own layer"} <= set(examples(README))
    assert len(examples(README)) == len(blocks(README, "python"))


def test_first_examples_use_the_recommended_recipe():
    first, second = list(examples(README).items())[:2]
    assert [first[0], second[0]] == ["Flax Linen", "Flax NNX"]
    assert "dsbp_adamw(" in first[1][0]
    assert "dsbp_adamw(" in second[1][0]


def test_a_wrong_example_fails():
    text = "## A\n```python\nprint(1)\n```\n```text\n2\n```\n"
    code, expected = examples(text)["A"]
    assert run(code, "A") == "1\n" != expected
    with pytest.raises(NameError):
        run("undefined", "A")


@pytest.mark.parametrize("diff", blocks(README, "diff"), ids=["linen", "nnx"])
@pytest.mark.parametrize("which", [0, 1], ids=["before", "after"])
def test_ported_script_runs(diff, which):
    run(before_and_after(diff)[which], "diff")


@pytest.mark.parametrize("diff", blocks(README, "diff"), ids=["linen", "nnx"])
def test_port_is_short(diff):
    inserted = sum(line.startswith("+") for line in diff.splitlines())
    assert 0 < inserted <= MOST_INSERTED_LINES


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
    calls = calls_of_the_migration(README)
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


def test_two_commands():
    section = README.split("\n## Two commands\n")[1].split("\n## ")[0]
    code = [line for block in blocks(section, "bash") for line in block.splitlines()]
    assert code == COMMANDS


def test_commands_are_what_ci_does():
    script = (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        assert all(part in script for part in command.split(" && "))


def test_every_notebook_is_linked():
    notebooks = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    found = set(re.findall(r"\(notebooks/([^)]+\.ipynb)\)", README))
    assert sorted(found) == notebooks


def test_badges_lead_to_published_addresses_alone():
    found = re.findall(rf"{re.escape(COLAB)}/([^/\s]+/[^/\s]+)/", README)
    published = PUBLISHED["repository"].removeprefix("https://github.com/")
    assert set(found) <= {published}
    assert PUBLISHED["repository"] or "unpublished" in README


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_files_to_change_exist():
    section = README.split("\n## What to change where\n")[1].split("\n## ")[0]
    names = set(re.findall(r"`((?:\w+/)?\w+\.py)`", section))
    assert len(names) > 10
    homes = [ROOT, ROOT / "dsbp_optax"]
    assert [n for n in names if not any((h / n).exists() for h in homes)] == []


def test_versions_match_the_declared_bounds():
    oldest = re.search(r"^\| oldest \| (.*) \|$", README, re.MULTILINE)[1].split(" | ")
    bounds = " ".join(
        PROJECT["dependencies"] + PROJECT["optional-dependencies"]["flax"]
    )
    expected = [PROJECT["requires-python"].removeprefix(">=")]
    for package in ("jax", "optax", "flax"):
        expected.append(re.search(rf"\b{package}>=([\d.]+)", bounds)[1])
    assert oldest == expected
