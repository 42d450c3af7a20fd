"""Paths of parameters: flat dicts, choices by path, groups of paths."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import optax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from dsbp_optax.core.layout import Coordinates, Shape
from dsbp_optax.linalg.types import PyTree

T = TypeVar("T")
#: Per-path choice: one value, a mapping from glob pattern to value, or a callable.
PerPath: TypeAlias = T | Mapping[str, T] | Callable[[str, Shape], T]
Groups: TypeAlias = tuple[tuple[str, ...], ...]


def flatten(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Any], Any]:
    """A flat dict path -> leaf, in tree order, and the tree's structure.

    `Coordinates` are leaves: they stand for an array.

    Raises:
      ValueError: where two leaves have one path, as keys "a/b" and "a" -> "b" do.
    """

    def is_one(node: Any) -> bool:
        return isinstance(node, Coordinates) or bool(is_leaf and is_leaf(node))

    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_one)
    children = defaultdict(set)
    for keys, _ in leaves:
        for place, key in enumerate(keys):
            children[keys[:place]].add(key)
    found: dict[str, Any] = {}
    for keys, leaf in leaves:
        if (path := path_string(keys, len(children[keys[:-1]]) == 1)) in found:
            raise ValueError(
                f"parameters: got two of the path '{path}', expected paths that differ "
                "when their keys are joined by '/'. Remedy: rename a key that has a "
                "'/' in it."
            )
        found[path] = leaf
    return found, treedef


def path_string(keys: Sequence[Any], alone: bool = True) -> str:
    """``"Dense_0/kernel"``; the box around a Linen or NNX value leaves no trace.

    Args:
      keys: of a leaf.
      alone: whether its node holds nothing else, as a box does.
    """
    if alone and keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return "/".join(_key_string(key) for key in keys)


def _key_string(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
    return str(key)


def resolve(choice: PerPath[T], path: str, shape: Shape, default: T) -> T:
    """What a per-path choice says of one parameter: the first pattern that matches."""
    if callable(choice):
        return choice(path, shape)
    if isinstance(choice, Mapping):
        return next((v for k, v in choice.items() if matches(path, k)), default)
    return choice


def matches(path: str, pattern: str) -> bool:
    """Whether a glob `pattern` ("*/query/kernel") covers `path`."""
    return fnmatch.fnmatchcase(path, pattern)


class KnownPaths(NamedTuple):
    """Paths of a tree that is partly hidden by a mask.

    Attributes:
      all: of every leaf, and of every branch or leaf that is hidden.
      hidden: the latter; what lies below them is not known.
    """

    all: list[str]
    hidden: list[str]

    def may_have(self, path: str) -> bool:
        """Whether there is such a leaf, or may be below a hidden branch."""
        return path in self.all or any(path.startswith(f"{p}/") for p in self.hidden)

    def may_hide(self, pattern: str) -> bool:
        """Whether a glob pattern may match something below a hidden branch."""
        start = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        branches = [f"{path}/" for path in self.hidden]
        return any(start.startswith(b) or b.startswith(start) for b in branches)


def known_paths(tree: PyTree) -> KnownPaths:
    """Paths of all leaves, those included that a mask hides from here."""
    flat, _ = flatten(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    hidden = [path for path, x in flat.items() if isinstance(x, optax.MaskedNode)]
    return KnownPaths(list(flat), hidden)


def check_groups(share: Any) -> Groups:
    """`share` as tuples of strings, or an error that shows the form."""
    form = (
        "expected groups of two paths or more, such as [('*/query/kernel', "
        "'*/key/kernel', '*/value/kernel')]"
    )
    if isinstance(share, str) or not isinstance(share, Sequence):
        raise TypeError(f"share: got {share!r}, {form}.")
    for group in share:
        if isinstance(group, str) or not isinstance(group, Sequence):
            raise TypeError(f"share: got the group {group!r}, {form}.")
        if not all(isinstance(pattern, str) for pattern in group):
            raise TypeError(f"share: got the group {group!r}, {form}.")
        if len(group) < 2 or len(set(group)) < len(group):
            raise ValueError(f"share: got the group {group!r}, {form}, each once.")
        if len({pattern.count("*") for pattern in group}) > 1:
            raise ValueError(
                f"share: got the group {group!r}, expected as many '*' in each of its "
                "patterns: paths belong together where these parts are equal."
            )
    return tuple(tuple(group) for group in share)


def captured(path: str, pattern: str) -> tuple[str, ...] | None:
    """The parts of `path` in the places of each ``*``, or None if it does not match."""
    expression = "(.*)".join(map(re.escape, pattern.split("*")))
    found = re.fullmatch(expression, path, re.DOTALL)
    return None if found is None else found.groups()


def resolve_groups(share: Groups, paths: Iterable[str]) -> Groups:
    """Groups of the `paths` that share a basis, each in the order of its patterns.

    Args:
      share: groups of patterns.
      paths: of the parameters that may have a basis; a group of which only one is
        left shares nothing.

    Raises:
      ValueError: for a path in two groups.
    """
    known = list(paths)
    groups: list[tuple[str, ...]] = []
    for patterns in share:
        together = defaultdict(list)
        for pattern in patterns:
            for path in known:
                if (parts := captured(path, pattern)) is not None:
                    together[parts].append(path)
        groups += [tuple(found) for found in together.values() if len(found) > 1]
    members = [path for group in groups for path in group]
    for path in members:
        if members.count(path) > 1:
            raise ValueError(
                f"share: '{path}' is in more than one group, or twice in one: "
                f"{[g for g in groups if path in g]}. Remedy: name each path once."
            )
    return tuple(groups)
