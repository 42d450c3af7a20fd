"""Which paths a tree has, those included that a mask hides."""

import re
from typing import NamedTuple

import optax

from dsbp_optax import _layout
from dsbp_optax._types import PyTree


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
    flat, _ = _layout.flatten_with_paths(
        tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    hidden = [path for path, x in flat.items() if isinstance(x, optax.MaskedNode)]
    return KnownPaths(list(flat), hidden)
