"""What an adapter notes while a loss is traced; knows no framework."""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dsbp_optax import _inputs, _tap
from dsbp_optax._rider import LinearMap, Rider


class Recorder:
    """The rules of one trace, and what happened to the riders in it.

    Attributes:
      rules: layer type -> rule.
      probe: takes note of the kernels that could be held, see `_tap.observe`; None
        outside of a probing trace.
      calls: what entered the watched layers.
      tapped: keys of the riders that were used.
      seen: paths of kernels whose layer was called, or that no rule speaks of.
    """

    def __init__(
        self,
        rules: Mapping[type, Callable[[Any], LinearMap | None]],
        watched: Collection[str],
        probe: set[str] | None = None,
    ) -> None:
        self.rules, self.probe = rules, probe
        self.calls = _inputs.Calls(watched)
        self.tapped: set[str] = set()
        self.seen: set[str] = set()

    def finish(
        self,
        riders: Mapping[str, Rider],
        strict: bool,
        shared: Mapping[str, Collection[str]],
    ) -> None:
        """Raise or warn, if `strict`, where a rider did not come into its layer."""
        if not strict:
            return
        self.calls.check(shared)
        for key in _tap.check_tapped(riders, self.tapped, self.seen):
            warnings.warn(_tap.no_rule(key), stacklevel=3)
