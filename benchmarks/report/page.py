"""The page of results, and the pictures beside it: functions of the records alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks import cli
from benchmarks.core import records
from benchmarks.core.records import RESULTS, Record
from benchmarks.optimizers import CONTENDERS
from benchmarks.report import claims, tables
from benchmarks.report.entries import Entry, control_entries, entries
from benchmarks.report.found import DATA_SETS, Found
from benchmarks.report.tables import markdown, table
from benchmarks.studies import finetune
from benchmarks.studies.scoreboard import BOARDS
from benchmarks.tasks import WORKLOADS

PAGE = Path(__file__).parents[1] / "RESULTS.md"
#: Of pictures: the board, and the workloads.
BOARD = "gpt_d128_b24"
_AGAINST_STATE = {
    "shakespeare_gpt": "small GPT on Tiny Shakespeare",
    "fashion_mnist_cnn": "small CNN on Fashion-MNIST",
}
_HEAD = """# Results

Written by `python -m benchmarks results` from the records in `results/`. What the
numbers mean, and what was tried without success, is in [FINDINGS.md](FINDINGS.md).

Rates are tuned alike for all on validation samples, from a seed of their own; results
are of test samples, mean ± standard deviation over seeds. Differences are paired by
seed, with a 95 % t interval; ratios of times have 95 % bootstrap intervals. *kernels*
is the state of the kernels, *temp* what the step needs beside its arguments."""
_SCOREBOARD = """![Test loss against the state of kernels](SCOREBOARD.png)

Less is better. Each rule of this package is held against the plain optimizer whose
place it takes and its own controls, tuned alike: without the metric (`_none`), with
random directions and the energies that activations have along them (`_random`), or
with the eigenvalues of the activations (`_random_true`). A star: a setting at the edge
of what was tried. Where weight decay is 0 for all, the two rates alone were tuned."""
_PAPER = """Test accuracy in percent, mean ± standard deviation (seeds); short runs of
small networks, so no level is the paper's. Runs are those of the campaign, else those
whose minima were looked at."""
_CLAIMS = """The claims of [arXiv 2505.23369](https://arxiv.org/abs/2505.23369), each
with what was measured here of `dsbp`, its literal rule, or, where it is said, of rules
near it. A difference counts where its 95 % interval, paired by seed, excludes zero."""
_ADAPTIVE = """The best of nine fixed ranks and intervals first. What adapted is gone
from the package; the records name a commit that has it."""
_EFFECTS = """![Effects of the parts](ABLATION.png)

What a level does against the first of its factor, averaged over all levels of the
others, as a factor of the test error and of the training loss; "a x b": what the effect
of a gains where b is the level. A run that was lost counts as guessing. Levels are
explained in `studies/ablation.py`."""
#: Studies with a record of their own: its title and table.
_ALONE: Mapping[str, Any] = {
    "communication": tables.communication,
    "transport": lambda one: tables.transport(one["rows"]),
    "speed": lambda one: tables.speed(one["rows"]),
    "faults": tables.faults,
}


def document(found: Found) -> str:
    """The whole page."""
    return "\n\n".join([_HEAD, *_parts(found)]) + "\n"


def _parts(found: Found) -> Iterator[str]:
    if found.boards:
        yield f"## Scoreboard\n\n{_SCOREBOARD}"
    for name, rows in found.boards.items():
        board = BOARDS[name]
        yield _titled(f"{name}: {board.summary}", tables.scoreboard(rows, board.judge))
    pictures = found.pictures
    if any(pictures.values()):
        rows = []
        for name in CONTENDERS:
            cells = {
                title: f"{tables.mean(one)} ({tables.runs(one)})"
                for title, workload in DATA_SETS.items()
                if (one := pictures[workload].get(name))
            }
            rows += [{"optimizer": name, **cells}] if cells else []
        yield f"## The paper's comparison\n\n{_PAPER}\n\n{markdown(table(rows))}"
    heads = "claim", "here", "verdict"
    lines = [line for judge in claims.CLAIMS for line in judge(found)]
    rows = [dict(zip(heads, line, strict=True)) for line in lines]
    yield f"## The paper's claims\n\n{_CLAIMS}\n\n{markdown(table(rows))}"
    for name, some in found.campaign.items():
        yield _of_campaign(name, some)
        for rule in ("projected_muon", "dsbp_sgd"):
            both = control_entries(WORKLOADS[name], rule, found.root)
            if len(both) > 1:
                yield _titled(f"Controls of {rule}", tables.controls(both))
    for name, some in found.full.items():
        yield _of_campaign(name, some, ", full length")
    adaptive = [one for one in found.of("adaptive") if one["phase"] == "final"]
    for name in dict.fromkeys(one["workload"] for one in adaptive):
        mine = [one for one in adaptive if one["workload"] == name]
        yield f"## Adaptive rank and interval: {name}\n\n{_ADAPTIVE}"
        yield markdown(tables.controls(entries(WORKLOADS[name].metric, mine)))
    for name, some in found.finetuned.items():
        task = finetune.TASKS[name]
        told = f"{task.workload.summary}; {task.workload.steps} steps."
        if any(one.name == finetune.PEER for one in some):
            told += f" LoRA of rank {task.lora_rank}, coordinates in {task.rank} "
            told += f"directions, {finetune.WIDE} in {task.wide_rank}."
        for one in records.read(
            found.root / f"finetune/{name}.jsonl", study="pretraining"
        ):
            told += f" Before: {one['there']:.4f} there, {one['here']:.4f} here."
        yield f"## Fine-tuning: {name}\n\n{told}\n\n{markdown(tables.finetuning(some))}"
    for name, looked in found.minima.items():
        yield f"## Minima: {name}"
        for title, shown in tables.minima(WORKLOADS[name], looked).items():
            yield _titled(title, shown)
    effects = found.effects
    if effects:
        columns = {f"{w}: {k}": e for k, ws in effects.items() for w, e in ws.items()}
        yield f"## Ablation: which part does the work\n\n{_EFFECTS}"
        yield markdown(tables.effects(columns))
    for shots, some in found.fewshot.items():
        if some:
            yield f"## Few-shot episodes, {shots} shot(s)"
            yield markdown(tables.fewshot(some))
    yield from _alone(found)
    yield f"## Records\n\n{markdown(_files(found))}"


def _of_campaign(name: str, some: Sequence[Entry], more: str = "") -> str:
    first, workload = some[0].records[0], WORKLOADS[name]
    told = f"{first['steps']} steps, batch {first['batch_size']}"
    title = f"## {name}{more}\n\n{workload.summary}; {told}."
    return f"{title}\n\n{markdown(tables.campaign(some))}"


def _titled(title: str, shown: pd.DataFrame) -> str:
    return f"### {title}\n\n{markdown(shown)}"


def _alone(found: Found) -> Iterator[str]:
    """Records that stand alone, the newest of each kind and workload last."""
    for study, make in _ALONE.items():
        for one in found.of(study):
            told = ", ".join(
                str(x) for x in (one.get("workload"), one["date"][:10]) if x
            )
            yield f"## {study.capitalize()} ({told})\n\n{markdown(make(one))}"
    if stable := sorted(found.of("stability"), key=lambda one: str(one["date"])):
        told = f"{stable[-1]['workload']}, {stable[-1]['steps']} steps"
        newest = {}  # of each contender at each rate
        for row in (row for one in stable for row in one["rows"]):
            newest[row["contender"], row["learning_rate"]] = row
        shown = tables.stability(list(newest.values()))
        yield f"## Stability ({told})\n\n{markdown(shown)}"
    for one in found.of("coordinates"):
        yield f"## Coordinates ({one['workload']}, {one['date'][:10]})"
        for title, shown in tables.coordinates(one).items():
            yield _titled(title, shown)
    if rows := found.of("constrained"):
        yield f"## One core and little memory\n\n{markdown(tables.constrained(rows))}"
    for one in found.of("cost"):
        shown = [row for row in one["rows"] if not row["figure"].startswith("loss_")]
        yield f"## Cost of a step ({one['date'][:10]}), and ratios to the plain one's"
        yield markdown(tables.cost(shown))
    for one in found.of("distributed"):
        yield (
            f"## Distributed\n\n{one['optimizer']} on {one['workload']} in "
            f"{one['processes']} processes of {one['devices']} devices: losses differ "
            f"from one process by {one['gap']:.1e} of themselves at most."
        )


def _files(found: Found) -> pd.DataFrame:
    """Where the records lie, and where they come from."""
    rows = []
    for file in dict.fromkeys(one["file"] for one in found.every):
        some = [one for one in found.every if one["file"] == file]
        dates = sorted(str(one["date"])[:10] for one in some)
        machines = [one["machine"] for one in some if one["machine"]]
        commits = sorted({str(x["commit"])[:7] for x in some if x["commit"]})
        hours = sum(one.get("seconds") or 0 for one in some if "phase" in one) / 3600
        told = {
            f"{m['processor']}, {m['cores']} cores, {m['device']}" for m in machines
        }
        row = {
            "file": f"`results/{file}`",
            "records": f"{len(some)}",
            "dates": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
            "hours": f"{hours:.1f}",
            "commits": f"{len(commits)}" if len(commits) > 3 else ", ".join(commits),
            "machines": "; ".join(sorted(told)) or "not recorded",
        }
        rows.append(row)
    return table(rows)


def write(page: Path, root: Path = RESULTS) -> list[Path]:
    """The page, and beside it its pictures, where there is something to draw."""
    from benchmarks.report import plots

    found, drawn = Found(root), [page]
    page.write_text(document(found), encoding="utf-8", newline="\n")

    def picture(name: str, draw: Any, *told: Any) -> None:
        if all(len(one) for one in told):
            draw(*told, page.with_name(f"{name}.png"))
            drawn.append(page.with_name(f"{name}.png"))

    rows: Sequence[Record] = found.boards.get(BOARD, ())
    picture("SCOREBOARD", plots.scoreboard, rows, f"test_{BOARDS[BOARD].judge}")
    states = {
        t: found.campaign[n] for n, t in _AGAINST_STATE.items() if n in found.campaign
    }
    picture("RESULTS", plots.against_state, states)
    looked = [
        (WORKLOADS[name], some)
        for name, some in found.minima.items()
        if any("hessian_eigenvalues" in run for run in some)
    ]
    picture("MINIMA", plots.minima, looked)
    effects = found.effects
    if effects:
        picture("ABLATION", plots.effects, effects)
    return drawn


@cli.app.command("results")
def command(
    out: cli.Out = RESULTS,
    write_to: Annotated[
        Path, typer.Option("--write", help="its pictures lie beside it")
    ] = PAGE,
) -> None:
    """Write RESULTS.md and the pictures of the README from the records alone."""
    with cli.bars(True):
        cli.written(*write(write_to, out))
