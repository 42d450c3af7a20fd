"""What was found: flat minima, robust ones."""

from benchmarks import (
    flatness,
    report,
    robustness,
)
from benchmarks.campaign import RESULTS
from benchmarks.commands.shared import (
    DataDir,
    Json,
    OptimizerNames,
    Quick,
    Quiet,
    Records,
    Seeds,
    Steps,
    WorkloadName,
    app,
    console,
    entrants,
    measured,
    save,
)


@app.command("flatness")
def flatness_command(
    workload: WorkloadName,
    optimizer: OptimizerNames = None,
    data_dir: DataDir = None,
    steps: Steps = None,
    seeds: Seeds = 3,
    json: Json = None,
    quick: Quick = False,
    tuned: Records = RESULTS,
    quiet: Quiet = False,
) -> None:
    """Train, then take the curvature of the training loss: eigenvalues, trace, rise."""
    chosen, entered = entrants(workload, optimizer, steps, quick, tuned)
    found = measured(flatness.compare, chosen, entered, data_dir, seeds, quiet)
    save(json, {"records": found}, quiet)
    if not quiet:
        console.print(report.flatness_table(f"{workload}: curvature", found))


@app.command("robustness")
def robustness_command(
    workload: WorkloadName,
    optimizer: OptimizerNames = None,
    data_dir: DataDir = None,
    steps: Steps = None,
    seeds: Seeds = 3,
    json: Json = None,
    quick: Quick = False,
    tuned: Records = RESULTS,
    quiet: Quiet = False,
) -> None:
    """Train, then attack and corrupt the test images."""
    chosen, entered = entrants(workload, optimizer, steps, quick, tuned)
    found = measured(robustness.compare, chosen, entered, data_dir, seeds, quiet)
    save(json, {"records": found}, quiet)
    if not quiet:
        console.print(report.robustness_table(f"{workload}: accuracy, %", found))
