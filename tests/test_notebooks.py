"""Every notebook runs from top to bottom, and is stored without outputs."""

import ast
import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import sys
import tomllib

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.usefixtures("optimized")
ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 600
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel that is this interpreter, whether or not one is registered."""
    folder = tmp_path / "kernels" / "this"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "this", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    return "this"


def execute(notebook, kernel: str) -> None:
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name=kernel,
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    client.execute()


def code_cells(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def stored_outputs(notebook) -> list[str]:
    return [
        cell.id
        for cell in notebook.cells
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count)
    ]


def project_address() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    return tomllib.loads(text)["project"]["urls"]["Homepage"]


def test_there_are_notebooks():
    assert {"quickstart_linen", "quickstart_nnx"} <= {path.stem for path in NOTEBOOKS}


@each
def test_runs(path, kernel):
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, kernel)
    assert all(cell.get("execution_count") for cell in notebook.cells if is_code(cell))


def is_code(cell) -> bool:
    return cell.cell_type == "code"


def test_a_wrong_claim_fails(kernel):
    cells = [nbformat.v4.new_code_cell("import sys; sys.executable"), claim("1 == 2")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        execute(notebook, kernel)
    (output,) = notebook.cells[0].outputs
    assert output.data["text/plain"] == repr(sys.executable)
    assert stored_outputs(notebook)


def claim(text: str):
    return nbformat.v4.new_code_cell(f"assert {text}")


@each
def test_is_valid_and_stripped(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert stored_outputs(notebook) == []


@each
def test_claims_end_in_asserts(path):
    source = "\n".join(code_cells(nbformat.read(path, as_version=4)))
    asserts = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Assert)]
    assert len(asserts) >= 8


@each
def test_badge_leads_to_this_notebook(path):
    first = nbformat.read(path, as_version=4).cells[0]
    colab = project_address().replace(
        "https://github.com/", "https://colab.research.google.com/github/"
    )
    assert first.cell_type == "markdown"
    assert f"]({colab}/blob/main/notebooks/{path.name})" in first.source


def install(path, monkeypatch, absent: set[str]) -> list[list[str]]:
    """What the first code cell would run where these modules cannot be found."""
    calls: list[list[str]] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    monkeypatch.setattr(subprocess, "check_call", calls.append)
    exec(code_cells(nbformat.read(path, as_version=4))[0], {})
    return calls


@each
def test_installs_nothing_that_is_here(path, monkeypatch):
    assert install(path, monkeypatch, set()) == []


@each
def test_installs_what_is_missing_and_keeps_jax(path, monkeypatch):
    ((*command, ours),) = install(path, monkeypatch, {"dsbp_optax"})
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert ours == f"dsbp-optax @ git+{project_address()}"
    pins = pathlib.Path(command[command.index("--constraint") + 1]).read_text()
    for name in ("jax", "jaxlib"):
        assert f"{name}=={importlib.metadata.version(name)}\n" in pins
