"""Which kernels are called with one and the same input; knows no framework.

Names do not tell (the query of cross-attention has another input than key and value),
values do not exist while a loss is traced. The object that enters a layer does: two
layers that are handed one object, and read samples off it alike, see the same
activations. A copy of an input counts as another input.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_optax import _spectral, _tap
from dsbp_optax._layout import Shape
from dsbp_optax._rider import LinearMap
from dsbp_optax._share import Groups
from dsbp_optax._types import PyTree


class Call(NamedTuple):
    """One call of a layer, kept so that no object takes the place of another.

    Attributes:
      x: what entered.
      reading: the layer's linear map for one output, a jaxpr: patches and paddings.
      kernel: shape of the kernel inside of the transformations around it.
      inputs: number of its leading axes that the input decides.
    """

    x: Any
    reading: Any
    kernel: Shape
    inputs: int

    @property
    def key(self) -> tuple[Any, ...]:
        consts = tuple(id(x) for x in self.reading.consts)
        return id(self.x), str(self.reading), consts


class Calls:
    """The calls of some layers during one trace.

    Args:
      watched: paths of the kernels to take notes of.
    """

    def __init__(self, watched: Collection[str]) -> None:
        self.watched = frozenset(watched)
        self.found: dict[str, list[Call]] = defaultdict(list)

    def note(
        self, path: str, linear: LinearMap, kernel: Shape, args: Any, kwargs: Any
    ) -> None:
        """Take note of one call; the first argument is the input.

        Args:
          path: of the kernel.
          linear: how the layer acts through it.
          kernel: its shape in this call.
          args: of the call.
          kwargs: of the call.
        """
        if path in self.watched:
            x = _tap.first_argument(args, kwargs)
            inputs = linear.batch + linear.inputs
            reading = jax.make_jaxpr(linear.apply)(
                jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32),
                jax.ShapeDtypeStruct((*kernel[:inputs], 1), jnp.float32),
            )
            self.found[path].append(Call(x, reading, tuple(kernel), inputs))

    def groups(self, leaves: Mapping[str, Any]) -> Groups:
        """Paths whose calls all coincide and that one basis fits, in tree order.

        Args:
          leaves: path -> parameter, or its shape.
        """
        together: dict[Any, list[str]] = defaultdict(list)
        for path, leaf in leaves.items():
            if path in self.found:
                together[self._input(path), *self._form(path, leaf)].append(path)
        return tuple(tuple(paths) for paths in together.values() if len(paths) > 1)

    def check(self, shared: Mapping[str, Collection[str]]) -> None:
        """Raise where a kernel uses a basis of activations that it does not see."""
        for owner, members in shared.items():
            for path in members:
                if owner in self.found and self._input(path) != self._input(owner):
                    calls = len(self.found.get(path, ()))
                    told = "with another input" if calls else "by no known layer"
                    raise ValueError(
                        f"share: '{path}' uses the basis of '{owner}' but was called "
                        f"{told} ({calls} calls and {len(self.found[owner])}). Remedy: "
                        "take it out of share=, or pass what find_shared_inputs of the "
                        "adapter returns; strict=False skips this check."
                    )

    def _input(self, path: str) -> tuple[Any, ...]:
        return tuple(sorted(call.key for call in self.found.get(path, ())))

    def _form(self, path: str, leaf: Any) -> tuple[Any, ...]:
        """What the shape of a basis depends on, stacks by transformations included."""
        call = self.found[path][0]
        stack = math.prod(leaf.shape) // max(1, math.prod(call.kernel))
        return call.kernel[: call.inputs], len(leaf.shape), stack, leaf.dtype


def shared_in(opt_state: PyTree) -> dict[str, list[str]]:
    """Owner -> the kernels that use its basis, in all states of `opt_state`."""
    found: dict[str, list[str]] = defaultdict(list)
    for state in _spectral.find_states(opt_state):
        for owner, members in state.shared.items():
            found[owner] += members
    return dict(found)


def members_of(shared: Mapping[str, Collection[str]]) -> set[str]:
    """Every path in some group, owners included."""
    return {*shared, *(path for members in shared.values() for path in members)}


def trace(function: Callable[..., Any], *trees: PyTree) -> None:
    """Call `function` on shapes: arrays become tracers, all else stays as it is."""
    leaves, treedef = jax.tree.flatten(trees)
    arrays = [
        i for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")
    ]

    def run(values: list[Any]) -> None:
        filled = {**dict(enumerate(leaves)), **dict(zip(arrays, values, strict=True))}
        function(*jax.tree.unflatten(treedef, filled.values()))

    jax.eval_shape(run, [leaves[i] for i in arrays])
