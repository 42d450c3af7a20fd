"""What `test_faults` runs on eight devices: a checkpoint of one, read and written.

Torn ones are read here too: what orbax leaves of them ends with this process.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dsbp_optax
from benchmarks.checkpoints import Checkpoints, digests
from benchmarks.workloads import WORKLOADS
from dsbp_optax.core.state import find_states

jax.config.update("jax_num_cpu_devices", 8)


def shapes_on(shape: tuple[int, int]) -> Any:
    """Parameters and state of the digits' network, sharded over both axes."""
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    workload = WORKLOADS["digits_cnn"]
    tx = dsbp_optax.dsbp_muon(lambda count: 0.01 * count)

    def placed(x: Any) -> Any:
        axes = ("data", "model") if x.ndim > 1 else ()
        lengths = zip(axes, x.shape[-2:], mesh.devices.shape, strict=False)
        fits = [axis if n % size == 0 else None for axis, n, size in lengths]
        spec = PartitionSpec(*(None,) * (x.ndim - len(fits)), *fits)
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    params = jax.tree.map(placed, jax.eval_shape(lambda: workload.init(0)))
    state = jax.eval_shape(tx.init, params)
    places = dsbp_optax.state_shardings(state, params)
    return params, jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places
    )


def read_torn(folders: list[Path]) -> None:
    rows = []
    for folder in folders:
        with (
            Checkpoints(folder) as checkpoints,
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            newest = checkpoints.steps()[-1]
            found = checkpoints.restore(shapes_on((2, 4)))
            row = {"step": found.step, "steps": checkpoints.steps(), **found.notes}
            row["said"] = [str(one.message) for one in said]
            row["written"] = checkpoints.save(found._replace(step=newest))
            rows.append(row)
    print(json.dumps(rows))


def main(one: Path, other: Path) -> None:
    with Checkpoints(one) as checkpoints:
        first = checkpoints.restore(shapes_on((2, 4)))
    with Checkpoints(other) as checkpoints:
        checkpoints.save(first)
        second = checkpoints.restore(shapes_on((4, 2)))
    bases = [find_states(saved.arrays[1])[0].basis for saved in (first, second)]
    found = {
        "digests": [digests(saved.arrays) for saved in (first, second)],
        "specs": [
            {p: tuple(b.sharding.spec) for p, b in each.items()} for each in bases
        ],
        "meshes": [
            dict(next(iter(each.values())).sharding.mesh.shape) for each in bases
        ],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    folders = [Path(argument) for argument in arguments]
    read_torn(folders) if what == "torn" else main(*folders)
