"""What `benchmarks.ablation` found: effects, tables, a section, a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import ablation, effects, report_rules
from benchmarks.effects import Effect
from benchmarks.found import Found, Record, Section, titled
from benchmarks.markdown import Provenance
from benchmarks.plot_effects import plot_effects

FOLDER = ablation.RESULTS.name
PICTURE = "ABLATION.png"
#: Of a run that was lost: that of guessing among ten classes.
_CHANCE_ACCURACY, _CHANCE_LOSS = 0.1, float(np.log(10))
#: Below them a share of errors, and a training loss, are as good as zero.
_LEAST_ERROR, _LEAST_LOSS = 1e-3, 1e-4

_WORDS = f"""Momentum SGD; every level of every factor with every other, at rank
{ablation.RANK} and period {ablation.PERIOD}. Rates: {len(ablation.RATES)} for each cell
from a seed of its own, a third of the length, judged on validation samples, one more
beyond where the best is at an edge; then {{seeds}} paired seeds.

{ablation.WORDS}

Effects: what a level does against the first of its factor, averaged over all levels
of the others, seed by seed (a linear model with main effects and all pairwise
interactions; 95 % t interval over the seeds). "a x b": what the effect of a gains where
b is the level. Both figures as factors: test error is 1 - accuracy, training loss the
mean of the last twelfth of the steps. A run that was lost counts as guessing."""


def has_grid(record: Record) -> bool:
    """Whether every cell of the grid is there."""
    known = {ablation.cell_of(cell) for cell in record["cells"]}
    return known >= {*ablation.GRID}


def errors(cell: Record) -> np.ndarray:
    """Decimal logarithms of every seed's share of errors, 1 - test accuracy."""
    found = [_CHANCE_ACCURACY if x is None else x for x in cell["accuracy"]]
    return np.log10(np.maximum(1 - np.asarray(found), _LEAST_ERROR))


def losses(cell: Record) -> np.ndarray:
    """Decimal logarithms of every seed's training loss."""
    found = [_CHANCE_LOSS if x is None else x for x in cell["train_loss"]]
    return np.log10(np.maximum(found, _LEAST_LOSS))


def effects_of(cells: Sequence[Record]) -> tuple[list[Effect], list[Effect]]:
    """Of the crossed factors: on test error and training loss, in decades."""
    grid = [cell for cell in cells if ablation.cell_of(cell).on_grid]
    on_error, on_loss = (
        effects.effects(ablation.FACTORS, grid, np.stack([*map(values, grid)]))
        for values in (errors, losses)
    )
    return on_error, on_loss


def known_effects(found: Sequence[Found]) -> dict[str, tuple[list[Effect], ...]]:
    """Workload -> effects, of the records that have the whole grid."""
    return {
        one.record["workload"]: effects_of(one.record["cells"])
        for one in found
        if one.path.parts[0] == FOLDER and has_grid(one.record)
    }


def sections(found: Sequence[Found], origin: Provenance) -> list[Section]:
    """One section for all workloads, where there is a record."""
    here = [one for one in found if one.path.parts[0] == FOLDER]
    if not here:
        return []
    known = known_effects(here)
    seeds = ", ".join(sorted({str(one.record["seeds"]) for one in here}))
    parts = ["## Ablation: which part does the work", _WORDS.format(seeds=seeds)]
    if known:
        parts += [f"![Effects of the parts]({PICTURE})"]
        parts += [titled(report_rules.effects_table("", known), "Effects (95 %)")]
    for one in here:
        name, steps = one.record["workload"], one.record["steps"]
        for title, cells in _groups(one.record["cells"]):
            table = report_rules.ablation_table("", cells)
            parts += [titled(table, f"{name}, {steps} steps: {title}")]
        parts += [origin.line(one.runs)]
    return [Section("\n\n".join(parts), frozenset(one.path for one in here))]


def _groups(cells: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The grid, best first; then every corner, by rank and period."""
    grid = [cell for cell in cells if ablation.cell_of(cell).on_grid]
    grid.sort(key=lambda cell: errors(cell).mean())
    found = [("the grid, best first", grid)]
    rest = [cell for cell in cells if not ablation.cell_of(cell).on_grid]
    for corner in dict.fromkeys(map(_levels, rest)):
        here = [cell for cell in cells if _levels(cell) == corner]
        here.sort(key=lambda cell: (cell["rank"], cell["period"]))
        found.append((f"rank and period of {', '.join(corner)}", here))
    return found


def _levels(cell: Record) -> tuple[str, ...]:
    return tuple(cell[name] for name in ablation.FACTORS)


def write_picture(page: Path, found: Sequence[Found]) -> list[Path]:
    """The picture beside the page; none without a whole grid."""
    known = known_effects(found)
    if not known:
        return []
    path = page.with_name(PICTURE)
    against = ", ".join(f"{n}: {levels[0]}" for n, levels in ablation.FACTORS.items())
    plot_effects(known, f"Effects against {against}; 95 % intervals", path)
    return [path]
