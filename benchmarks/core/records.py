"""Records: one JSON object a line, one file a workload or study.

Each line has the fields of `REQUIRED`, those of a training run also the fields of
`RUN`. Figures of validation and test samples are named so: ``validation_accuracy``,
``test_loss``. What is not finite is null.

To import this takes the standard library alone.
"""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

#: Version of the form of a line.
SCHEMA = 1
PROVENANCE = ("date", "commit", "clean", "machine", "versions")
REQUIRED = ("schema", "study", *PROVENANCE)
RUN = (
    *("workload", "optimizer", "phase", "learning_rate", "seed", "steps", "metric"),
    *("train_loss", "diverged", "state_bytes", "seconds"),
)
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def provenance(commit: str | None = None) -> Record:
    """Date, commit, machine and versions of what is run now.

    Of a copy that is no checkout, or an older one, the given `commit` tells.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    copied = {} if commit is None else {"commit": commit, "clean": None}
    return {"date": now, **_surroundings(), **copied}


@functools.cache
def _surroundings() -> Record:
    import jax

    import dsbp_optax

    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        **git(),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": _processor(),
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
            "backend": device.platform,
            "device": device.device_kind,
        },
        "versions": {
            "python": platform.python_version(),
            **versions,
            "dsbp_optax": dsbp_optax.__version__,
        },
    }


def git(root: Path = ROOT) -> Record:
    """``commit``, and whether the work tree is ``clean``; None outside a checkout."""

    def ask(*args: str) -> str:
        asked = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=True
        )
        return asked.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "clean": not ask("status", "-s")}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": None}


def append(path: Path, study: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a file in one go, with provenance where they have none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"schema": SCHEMA, "study": study}
    lines = [
        json.dumps(_plain({**head, **row, **_missing(row)}), allow_nan=False) + "\n"
        for row in rows
    ]
    with path.open("a+b") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            lines.insert(0, "\n")  # What a kill cut off stays on a line of its own.
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _missing(row: Mapping[str, Any]) -> Record:
    return {} if "date" in row else provenance()


def read(path: Path, **wanted: Any) -> list[Record]:
    """Records of a file, those whose fields are as wanted; none without a file.

    A line that a kill cut off is passed over; any other that is no record is refused.
    """
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            from benchmarks.tasks.base import DataError

            raise DataError(
                f"{path}: got a line that is no record of schema {SCHEMA}. Remedy: "
                "take the line out; its run is made again."
            )
        if all(row.get(key) == value for key, value in wanted.items()):
            rows.append(row)
    return rows


def read_all(folder: Path = RESULTS) -> list[Record]:
    """Every record below a folder, with its ``file``."""
    paths = sorted(folder.rglob("*.jsonl"), key=lambda path: path.as_posix())
    return [
        {"file": path.relative_to(folder).as_posix(), **row}
        for path in paths
        for row in read(path)
    ]


def problems(record: Mapping[str, Any]) -> list[str]:
    """What a record lacks of the schema."""
    wanted = [*REQUIRED, *(RUN if "phase" in record else ())]
    if record.get("study") == "scoreboard":  # Its settings have names of their own.
        wanted[wanted.index("learning_rate")] = "rate"
        wanted.remove("metric")
    lacking = [f"no {key}" for key in wanted if key not in record]
    names = [key for key in record if key in ("val_loss", "validation_value")]
    if "phase" in record:
        judged = f"{'test' if record['phase'] == 'final' else 'validation'}_"
        if not any(key.startswith(judged) for key in record):
            lacking.append(f"no {judged}* figure")
    return lacking + [f"the old name {key}" for key in names]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text("utf-8").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
