"""Everything in the README that can be executed is executed; it stays short."""

import re
import tomllib

import pytest
from pages import ROOT, before_and_after, blocks, broken_links, examples, run

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MOST_LINES = 250
MOST_INSERTED_LINES = 5
COMMANDS = [
    'pip install -e ".[all]" && python -m benchmarks demo',
    'pip install -e ".[all]" && pytest',
]
#: What the first examples may import: no more than the extra "flax" brings.
FIRST = {"flax", "jax", "optax", "dsbp_optax"}


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("framework", ["Linen", "NNX"])
def test_example_runs_and_learns(framework):
    (example,) = examples(section(f"Flax {framework}"))
    printed = run(example.code, f"README.md: {framework}")
    assert float(printed.removeprefix("loss ").split("(")[-1].rstrip(")\n")) < 1.0


def test_first_examples_use_the_recommended_recipe_and_flax_alone():
    found = examples(README)
    assert len(found) == 2
    for example in found:
        assert "dsbp_adamw(" in example.code
        imported = re.findall(r"^(?:import|from) (\w+)", example.code, re.MULTILINE)
        assert set(imported) <= FIRST


@pytest.mark.parametrize("which", [0, 1], ids=["before", "after"])
def test_ported_script_runs(which):
    (diff,) = blocks(README, "diff")
    run(before_and_after(diff)[which], "README.md: diff")


def test_port_is_short():
    (diff,) = blocks(README, "diff")
    inserted = sum(line.startswith("+") for line in diff.splitlines())
    assert 0 < inserted <= MOST_INSERTED_LINES


def test_two_commands():
    code = [line for block in blocks(README, "bash") for line in block.splitlines()]
    assert code == COMMANDS


def test_commands_are_what_ci_does():
    script = (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        assert all(part in script for part in command.split(" && "))


def test_tables_are_short():
    for heading in ("Should I use it?", "Results"):
        rows = [line for line in section(heading).splitlines() if line[:1] == "|"]
        assert len(rows) == 2 + 5
    assert section("Limits").count("\n- **") == 6


def test_every_result_names_its_control():
    rows = [line for line in section("Results").splitlines() if line[:1] == "|"]
    assert rows[0].endswith("| control |")
    assert all(row.split("|")[-2].strip() for row in rows[2:])


def test_linked_files_exist():
    assert broken_links(ROOT / "README.md") == []


def test_extras_that_it_names_exist():
    extras = set(re.findall(r'"\.\[(\w+)\]"', README))
    assert extras and extras <= set(PROJECT["optional-dependencies"])
