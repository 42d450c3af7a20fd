"""Which kernels are told to share one basis: groups of paths out of glob patterns."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Groups: TypeAlias = tuple[tuple[str, ...], ...]


def check_share(share: Any) -> Groups:
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


def covers(path: str, pattern: str) -> bool:
    """Whether a pattern of a group matches `path`."""
    return capture(path, pattern) is not None


def capture(path: str, pattern: str) -> tuple[str, ...] | None:
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
                if (parts := capture(path, pattern)) is not None:
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
