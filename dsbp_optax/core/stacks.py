"""Kernels alike as one array of matrices, so that a program does not grow with depth.

A *stack* holds the kernels that are read alike, of one rank and dtype: ``(n, d, m)``.
Their bases lie in a stack too, together with those of all kernels of the same ``d`` and
rank: ``(n, d, k)``. Kernels that are stacked already (scanned layers, experts) are a
stack of their own, sharded along their first axis like the kernel. A stack bears the
path of its first kernel.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_optax.core import layout
from dsbp_optax.core.plan import Kernel
from dsbp_optax.linalg.types import Array, PyTree, is_traced

T = TypeVar("T")

#: Numbers of a stack that are worked on at once: few launches where matrices are small,
#: the temporaries of one matrix where they are large.
_AT_ONCE = 2**20


class Stack(NamedTuple):
    """Kernels alike.

    Attributes:
      name: path of the first.
      kernels: in the order of their matrices.
    """

    name: str
    kernels: tuple[Kernel, ...]

    @property
    def first(self) -> Kernel:
        """What all of them are like."""
        return self.kernels[0]

    @property
    def matrices(self) -> int:
        """Number of matrices."""
        return len(self.kernels) * self.first.view.matrices

    def rows(self, path: str) -> slice:
        """Where the matrices of a kernel lie."""
        index = [one.path for one in self.kernels].index(path)
        each = self.first.view.matrices
        return slice(index * each, (index + 1) * each)


@functools.lru_cache(maxsize=512)
def of_kernels(kernels: tuple[Kernel, ...]) -> tuple[Stack, ...]:
    """The stacks of all kernels, with a basis or without."""
    return _grouped(kernels, lambda one: (one.view, one.side, one.rank, one.dtype))


@functools.lru_cache(maxsize=512)
def of_bases(kernels: tuple[Kernel, ...]) -> tuple[Stack, ...]:
    """The stacks of bases, of the kernels that own one."""
    owners = tuple(one for one in kernels if one.rank and one.owner == one.path)
    return _grouped(owners, lambda one: (one.view.size, one.rank, one.dtype))


def _grouped(
    kernels: Sequence[Kernel], alike: Callable[[Kernel], Any]
) -> tuple[Stack, ...]:
    found: dict[Any, list[Kernel]] = defaultdict(list)
    for one in kernels:
        found[alike(one), one.path if one.view.batch else ""].append(one)
    return tuple(Stack(group[0].path, tuple(group)) for group in found.values())


@functools.lru_cache(maxsize=512)
def _places(stack: Stack, bases: tuple[Stack, ...]) -> tuple[str, tuple[int, ...]]:
    """The stack of bases that a stack of kernels uses, and which of them."""
    home = next(
        one for one in bases for k in one.kernels if k.path == stack.first.owner
    )
    index = [
        i for k in stack.kernels for i in range(*home.rows(k.owner).indices(10**9))
    ]
    return home.name, tuple(index)


def of_stack(stack: Stack, bases: tuple[Stack, ...], held: Mapping[str, T]) -> T:
    """What belongs to each matrix of a stack out of what the stacks of bases hold.

    Args:
      stack: of kernels.
      bases: all stacks of bases.
      held: name of a stack of bases -> tree of arrays ``(n, ...)``.
    """
    name, index = _places(stack, bases)
    length = next(one.matrices for one in bases if one.name == name)
    if index == tuple(range(length)):
        return held[name]
    rows: Any = np.asarray(index)
    if index == tuple(range(index[0], index[0] + len(index))):
        rows = slice(index[0], index[-1] + 1)
    taken: T = jax.tree.map(lambda x: x[rows], held[name])
    return taken


def _rows_of(part: Stack, all_stacks: tuple[Stack, ...]) -> np.ndarray | None:
    """Which matrices of its stack a part is; None for all of them."""
    whole = next(one for one in all_stacks if one.name == part.name)
    if whole == part:
        return None
    index = np.arange(whole.matrices)
    return np.concatenate([index[whole.rows(one.path)] for one in part.kernels])


def part(tree: T, some: Stack, all_stacks: tuple[Stack, ...]) -> T:
    """What belongs to some kernels of a stack, out of arrays ``(n, ...)``."""
    rows = _rows_of(some, all_stacks)
    return tree if rows is None else jax.tree.map(lambda x: x[rows], tree)


def put_part(tree: T, new: T, some: Stack, all_stacks: tuple[Stack, ...]) -> T:
    """`tree` with `new` in the places of some kernels of a stack."""
    rows = _rows_of(some, all_stacks)
    if rows is None:
        return new
    put: T = jax.tree.map(lambda x, y: jnp.asarray(x).at[rows].set(y), tree, new)
    return put


def gather(leaves: Mapping[str, Any], stack: Stack) -> Array:
    """The kernels of a stack as matrices ``(n, d, m)`` of its dtype."""
    parts = [
        jnp.asarray(leaves[one.path]).astype(stack.first.dtype) for one in stack.kernels
    ]
    whole = parts[0][None] if len(parts) == 1 else jnp.stack(parts)
    return layout.to_matrices(whole, stack.first.view)


def scatter(matrices: Array, stack: Stack) -> dict[str, Array]:
    """Path -> kernel, the inverse of `gather`."""
    whole = layout.from_matrices(matrices, stack.first.view)
    return {one.path: whole[i] for i, one in enumerate(stack.kernels)}


def each(
    function: Callable[[Any, Any], Any], changed: PyTree, fixed: PyTree, stack: Stack
) -> PyTree:
    """`function` of every matrix: ``(changed, fixed) -> changed``.

    Small matrices are worked on together. Large ones in a loop over a few at a time,
    which writes each result where its argument lay: the temporaries are those of one
    launch. The few lie as far apart as they can: a stacking axis that is split over
    devices stays where it is.

    Args:
      function: of the parts of one matrix; keeps the shapes and dtypes of `changed`.
      changed: tree of arrays ``(n, ...)``.
      fixed: another.
      stack: the matrices.
    """
    view, count = stack.first.view, stack.matrices
    together = jax.vmap(function)
    least = math.gcd(count, jax.device_count()) if view.batch else 1
    most = least * max(1, _AT_ONCE // (view.size * view.other * least))
    size = max(n for n in range(least, most + 1, least) if count % n == 0)
    if size >= count or not is_traced((changed, fixed)):
        return together(changed, fixed)

    def cut(x: Array, i: Array) -> Any:
        return jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)

    def body(i: Array, changed: PyTree) -> PyTree:
        parts = [jax.tree.map(lambda x: cut(x, i), tree) for tree in (changed, apart)]
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 1),
            changed,
            together(*parts),
        )

    changed, apart = jax.tree.map(
        lambda x: jnp.reshape(x, (size, count // size, *x.shape[1:])), (changed, fixed)
    )
    changed = jax.lax.fori_loop(0, count // size, body, changed)
    return jax.tree.map(lambda x: jnp.reshape(x, (count, *x.shape[2:])), changed)


def one_by_one(function: Callable[..., T], *trees: PyTree) -> T:
    """`function` of the parts of every matrix; on a CPU one after the other.

    For factorisations: on a CPU those of a whole batch wait for threads of XLA's pool,
    and two of them at once on a machine of two cores wait for each other for good. On
    accelerators they are a few launches for the whole batch.
    """
    if is_traced(trees):
        mapped: T = jax.lax.platform_dependent(
            trees,
            cpu=lambda trees: jax.lax.map(lambda parts: function(*parts), trees),
            default=lambda trees: jax.vmap(function)(*trees),
        )
        return mapped
    count = len(jax.tree.leaves(trees)[0])
    found = [
        function(*jax.tree.map(lambda x, i=i: jnp.asarray(x)[i], trees))
        for i in range(count)
    ]
    done: T = jax.tree.map(lambda *x: jnp.stack(x), *found)
    return done
