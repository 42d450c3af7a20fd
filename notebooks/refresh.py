"""Bring the notebooks up to date: their first cells, and their stored outputs.

python notebooks/refresh.py            write badges and setup cells
python notebooks/refresh.py --run      execute all as well, and store what they show
python notebooks/refresh.py --run port_your_script

Where the project is published is said in one place, ``[tool.dsbp.published]`` of
``pyproject.toml``. As long as an entry is empty no notebook shows its badge or installs
from it: whoever owned that name could run code on the machines of users.
"""

import argparse
import ast
import json
import os
import pathlib
import re
import tempfile
import time
import tomllib
from typing import Any, NamedTuple

import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent
PACKAGE = "dsbp_optax"
#: Modules that notebooks import -> packages that have them.
PACKAGES = {
    "jax": "jax",
    "optax": "optax",
    "flax": "flax",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "qwix": "qwix",
    "matfree": "matfree",
}
#: What notebooks need beside what they import themselves.
UNSEEN = {"flat_minima": {"matfree"}}
SECONDS = 900
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
SETUP = '''\
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

INDEX, REPOSITORY = {index}, {repository}  # Empty: not published there.
NEEDED = {needed}


def is_here(module):
    return importlib.util.find_spec(module) is not None


def install(*packages):
    """Run pip, but leave a JAX that is here as it is."""
    found = {{d.name: d.version for d in importlib.metadata.distributions()}}
    pins = [f"{{k}}=={{v}}\\n" for k, v in found.items() if k.startswith("jax")]
    constraints = pathlib.Path(tempfile.mkdtemp()) / "constraints.txt"
    constraints.write_text("".join(pins))
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.check_call([*pip, "--constraint", str(constraints), *packages])
    importlib.invalidate_caches()


def wheels():
    return sorted(pathlib.Path().glob("dsbp_optax-*.whl"))


def install_dsbp_optax():
    """From the package index, the repository or a wheel file: the first that works."""
    for source in [INDEX, REPOSITORY and f"dsbp-optax @ git+{{REPOSITORY}}"]:
        try:
            if source:
                install(source)
                return
        except subprocess.CalledProcessError:
            print(f"{{source}} could not be installed.")
    remedy = (
        "dsbp_optax is not here. Build its wheel in a checkout with "
        "`pip install build && python -m build`, put dist/dsbp_optax-*.whl beside "
        "this notebook and run this cell again."
    )
    if "google.colab" in sys.modules and not wheels():
        print(remedy)
        sys.modules["google.colab"].files.upload()  # Asks for the file.
    if not wheels():
        raise ModuleNotFoundError(remedy)
    install(str(wheels()[-1].resolve()))


missing = [package for module, package in NEEDED.items() if not is_here(module)]
if missing:
    install(*missing)
if not is_here("dsbp_optax"):
    if pathlib.Path("../dsbp_optax/__init__.py").exists():  # A checkout.
        sys.path.insert(0, str(pathlib.Path("..").resolve()))
    else:
        install_dsbp_optax()
'''


class Published(NamedTuple):
    """Where the project can be had; empty where it cannot.

    Attributes:
      index: its name on the package index.
      repository: the address of its repository.
    """

    index: str = ""
    repository: str = ""


def published() -> Published:
    """What `pyproject.toml` says."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return Published(**tomllib.loads(text)["tool"]["dsbp"]["published"])


def setup_cell(modules: list[str], where: Published) -> str:
    """The source of the first code cell."""
    lines = [f'    "{module}": "{PACKAGES[module]}",' for module in modules]
    needed = "\n".join(["{", *lines, "}"])
    index, repository = (json.dumps(x) for x in where)
    return SETUP.format(index=index, repository=repository, needed=needed).rstrip()


def badge(name: str, where: Published) -> str:
    """A link that opens a notebook in Colab; nothing while there is no address."""
    if not where.repository:
        return ""
    path = where.repository.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{path}/blob/main/notebooks"
    return f"[![Open in Colab]({BADGE})]({colab}/{name}.ipynb)\n\n"


def modules_of(notebook: Any, name: str) -> list[str]:
    """What a notebook imports, of `PACKAGES`."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    found = set(UNSEEN.get(name, ()))
    for node in ast.walk(ast.parse("\n".join(code[1:]))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return [module for module in PACKAGES if module in found]


def write_first_cells(notebook: Any, name: str, where: Published) -> None:
    """The badge below the title, and the setup cell."""
    title = notebook.cells[0]
    heading, _, rest = title.source.partition("\n\n")
    rest = re.sub(r"^\[!\[Open in Colab\].*\n+", "", rest)
    title.source = f"{heading}\n\n{badge(name, where)}{rest}"
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = setup_cell(modules_of(notebook, name), where)


def execute(notebook: Any) -> None:
    """Run all cells beside the notebook, on a kernel that is this interpreter."""
    import sys

    import nbclient

    with tempfile.TemporaryDirectory() as folder:
        kernel = pathlib.Path(folder) / "kernels" / "this"
        kernel.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f"]
        spec = {
            "argv": [*command, "{connection_file}"],
            "display_name": "Python 3",
            "language": "python",
        }
        (kernel / "kernel.json").write_text(json.dumps(spec))
        os.environ |= {"JUPYTER_PATH": folder, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        os.environ.pop("MPLBACKEND", None)
        nbclient.NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="this",
            record_timing=False,
            resources={"metadata": {"path": str(FOLDER)}},
        ).execute()


def strip(notebook: Any) -> None:
    """Leave out what tells of a machine: warnings, folders, moments of time."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type != "code":
            continue
        cell.outputs = [
            output
            for output in cell.outputs
            if output.output_type != "stream" or output.name != "stderr"
        ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of notebooks; all if none is given")
    parser.add_argument("--run", action="store_true", help="execute, store outputs")
    asked = parser.parse_args()
    for path in sorted(FOLDER.glob("*.ipynb")):
        if asked.names and path.stem not in asked.names:
            continue
        notebook = nbformat.read(path, as_version=4)
        write_first_cells(notebook, path.stem, published())
        if asked.run:
            begun = time.perf_counter()
            execute(notebook)
            print(f"{path.stem}: {time.perf_counter() - begun:.0f} s", flush=True)
        strip(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
