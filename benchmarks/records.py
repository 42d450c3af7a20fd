"""JSON records: everything that a published number needs beside itself."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import dsbp_optax
from benchmarks.data import DataError

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def environment() -> dict[str, Any]:
    """Date, machine, versions and commit of this run."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, **_surroundings()}


@functools.cache
def _surroundings() -> dict[str, Any]:
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "backend": device.platform,
            "device": device.device_kind,
        },
        "versions": {
            "python": platform.python_version(),
            **versions,
            "dsbp_optax": dsbp_optax.__version__,
        },
        "git": git(),
    }


def git(root: Path = _ROOT) -> dict[str, Any] | None:
    """Commit, and whether the work tree differs from it; None outside a checkout."""

    def ask(*args: str) -> str:
        answer = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Save a record, whole or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(record), indent=1, allow_nan=False)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A record that `write` saved.

    Raises:
      DataError: when it is no JSON object.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(_foreign(path, f"no JSON ({error})")) from error
    if not isinstance(record, dict):
        raise DataError(_foreign(path, "no JSON object"))
    return record


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a file of one a line, in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows]
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            lines.insert(0, "\n")  # What a kill cut off stays on a line of its own.
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records that `append` saved; lines that a kill cut off are passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _foreign(path: Path, got: str) -> str:
    return f"{path}: got {got}, expected a record. Remedy: delete it; it is made again."


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
