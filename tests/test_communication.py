"""Only coordinates cross the devices: read off a compiled data-parallel step."""

import dataclasses
import json
import subprocess
import sys

import pytest

from benchmarks import communication, models
from benchmarks.workloads import WORKLOADS

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
from test_communication import SMALL
from benchmarks import communication
found = {
    route: communication.account(
        *communication.compile_step(SMALL, 4, route, 4)
    )
    for route in communication.ROUTES
}
print(json.dumps(found))
"""
SMALL = dataclasses.replace(
    WORKLOADS["shakespeare_gpt"], model=models.Gpt(width=48, layers=1, heads=2)
)


@pytest.fixture(scope="module")
def found(request):
    """Both routes, in a process that has four devices."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=request.path.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_of_projected_kernels_only_coordinates_are_sent(found) -> None:
    short = found["subspace"]
    sizes = {"qkv": (48, 144), "proj": (48, 48), "up": (48, 192), "down": (192, 48)}
    assert short["full"] == sum(d * m for d, m in sizes.values())
    assert short["coordinates"] == sum(4 * m for _, m in sizes.values())
    bound = sum(1.05 * 4 / d * d * m for d, m in sizes.values())
    assert 0 < short["coordinates"] <= bound
    assert not short["forbidden"] and not short["unknown"]
    assert short["scalars"] == 1, "the loss"
    assert "embed/embedding" in short["others"]
    wide = sum(4 * d for d, _ in sizes.values())
    assert 0 < short["refresh"] <= wide + 2 * len(sizes), "sketch, two numbers"


def test_whole_gradients_are_caught(found) -> None:
    """The account of a step that does send them must say so."""
    whole = found["whole"]
    assert whole["coordinates"] == 0
    sizes = sorted(([48, 144], [48, 48], [48, 192], [48, 192]))
    assert whole["forbidden"] == sizes
    assert set(whole["others"]) == set(found["subspace"]["others"])


def test_operands_are_read_off_the_text() -> None:
    text = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %r = (f32[3,4]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={}
  %c = f32[2] conditional(%p, %q), branch_computations={%one, %two}
}
%one (a: f32[8]) -> f32[8] {
  %s = bf16[5,6]{1,0} all-gather-start(%a), dimensions={0}
}
"""
    assert communication.sent(text) == [
        communication.Sent("all-reduce", (3, 4), False),
        communication.Sent("all-reduce", (), False),
        communication.Sent("all-gather", (5, 6), True),
    ]
