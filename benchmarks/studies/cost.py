"""What a training step costs to compile and to run on a CPU, against plain optimizers.

Each figure comes from a process of its own, `cost_worker`, with whatever version of the
library is asked for.
"""

import json as json_module
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import cli
from benchmarks.core import device, records
from benchmarks.core.records import ROOT, Record
from benchmarks.report import tables
from benchmarks.studies.cost_worker import ALONE, RECIPES, Found

#: What ratios are taken to. `muon` orthogonalises arrays of two axes alone, embeddings
#: among them, and leaves Flax's attention to Adam; `muon_kernels` is told the kernels.
PLAIN: Mapping[str, str] = {
    "dsbp_muon": "muon",
    f"dsbp_muon{ALONE}": "muon",
    "dsbp_adamw": "adamw",
    "dsbp_sgd": "sgd",
    "muon_kernels": "muon",
}
TOLD = ("dsbp_muon", "muon", "muon_kernels", "dsbp_adamw", "adamw")
TRAINED = (*TOLD, f"dsbp_muon{ALONE}")
#: Figure -> its contenders, and whether it is measured once: constant, or long.
FIGURES: Mapping[str, tuple[Sequence[str], bool]] = {
    "train": (TRAINED, False),
    "update": (TRAINED, False),
    "temporaries": ((*TOLD, "dsbp_sgd", "sgd"), True),
    "turns": ((), False),
    "losses": ((), True),
    "caps": (("dsbp_muon", "muon"), True),
}
#: What the variables begin with that workers do not inherit.
DEFAULTS = ("JAX_", "XLA_")
_WORKER = Path(__file__).with_name("cost_worker.py")


def ask(
    root: Path, task: str, settings: Mapping[str, Any], *wrap: str, **env: str
) -> Found:
    """What a worker finds with the library of `root`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(DEFAULTS)}
    environment = {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), **env}
    command = [*wrap, sys.executable, "-P", str(_WORKER), task]
    command.append(json_module.dumps(settings))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"worker {task} {settings}: {done.stderr[-2000:]}")
    found = json_module.loads(done.stdout.splitlines()[-1])
    if Path(found["library"]) != root.resolve():
        raise RuntimeError(f"got the library of {found['library']}, expected {root}")
    answer: Found = found["found"]
    return answer


def caps(root: Path, settings: Record) -> Found:
    """The smallest RLIMIT_DATA, on one core, under which compiled steps train."""
    name, told = settings["name"], {**settings, "steps": 8, "text": False}
    with tempfile.TemporaryDirectory() as cache:

        def attempt(kib: int | str) -> dict[str, Any]:
            script = f'ulimit -d {kib}; exec taskset -c 0 "$@"'
            wrap = "sh", "-c", script, "sh"
            return ask(root, "train", told, *wrap, **device.cached(cache))[name]

        def works(cap: int) -> bool:
            try:
                return bool(attempt(cap // 1024)["fell"])
            except RuntimeError:
                return False

        attempt("unlimited")  # It compiles.
        guess = int(attempt("unlimited")["data_mib"] * device.MIB)
        cap = device.smallest(works, guess, 4 * device.MIB, 2**14 * device.MIB)
    return {name: {"cap_mib": cap and cap / device.MIB}}


def measure(
    figure: str, roots: Mapping[str, Path], repeats: int, gpt: Record, wide: int
) -> list[Record]:
    """Rows of a figure: medians, and their ratios to the plain optimizer.

    The libraries of all `roots` are measured in turns; where a plain optimizer has a
    process of its own, it has so with the first alone. The growth is that of the GPT to
    three times as many blocks.
    """
    (names, once), few = FIGURES[figure], gpt["blocks"]
    settings: Mapping[str, list[Record]] = {
        "update": [gpt, {**gpt, "blocks": 3 * few}],
        "temporaries": [{"wide": wide, "stack": stack} for stack in (0, 8)],
        "turns": [{**gpt, "names": TRAINED}],
        "losses": [{}],
    }
    first = next(iter(roots))
    values: dict[Any, list[float | None]] = {}
    told = [
        (one if name is None else {**one, "name": name}, library)
        for one in settings.get(figure, [gpt])
        for name in names or (None,)
        for library in roots
        if library == first or name in (None, *RECIPES)
    ]
    for one, library in told * (1 if once else repeats):
        root = roots[library]
        found = caps(root, one) if figure == "caps" else ask(root, figure, one)
        for name, figures in found.items():
            for key, value in figures.items():
                values.setdefault((key, name, library), []).append(value)
    middle: dict[Any, Any] = {
        k: None if None in v else statistics.median(v) for k, v in values.items()
    }
    start, end = (f"update_both_cpu_s, {n} blocks" for n in (few, 3 * few))
    for key, *whose in list(middle):
        if key == start:
            grown = middle[(end, *whose)] / middle[(start, *whose)]
            middle[("growth of update_both_cpu_s", *whose)] = grown
    rows = []
    for (key, name, library), value in middle.items():
        base = middle.get((key, PLAIN.get(name), library))
        base = base or middle.get((key, PLAIN.get(name), first))
        ratio = value / base if value is not None and base else None
        row = {"figure": key, "contender": name, "library": library, "value": value}
        spread = values.get((key, name, library), [])
        rows.append({**row, "ratio": ratio, "values": spread})
    return rows


@cli.app.command("cost")
def command(
    figure: Annotated[
        list[str] | None, typer.Option(help="repeat it; default: all but caps")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="a checkout of another version, in turns")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="of each process")] = 3,
    width: Annotated[int, typer.Option(min=4, help="of the GPT")] = 128,
    blocks: Annotated[int, typer.Option(min=1, help="of the GPT")] = 4,
    wide: Annotated[int, typer.Option(min=1, help="of the update alone")] = 768,
    json: cli.Save = None,
) -> None:
    """What a step costs to compile and run on a CPU, each figure a process of its own.

    With --against, the library of another checkout is measured beside this one.
    """
    chosen = figure or [name for name in FIGURES if name != "caps"]
    cli.several(FIGURES, chosen, "--figure")
    roots = {"against": against.resolve()} if against else {}
    roots["here"] = ROOT
    gpt = {"width": width, "blocks": blocks}
    record: Record = {**gpt, "wide": wide, "repeats": repeats, "rows": []}
    record["libraries"] = {name: records.git(root) for name, root in roots.items()}
    with cli.bars() as progress:
        advance = cli.bar(progress, "figures", len(chosen))
        for name in dict.fromkeys(chosen):
            record["rows"] += measure(name, roots, repeats, gpt, wide)
            advance()
    cli.save(json, "cost", [record])
    cli.show(("what a step costs", tables.cost(record["rows"])))
