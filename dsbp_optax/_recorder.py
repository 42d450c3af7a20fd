"""What an adapter notes while a loss is traced; knows no framework."""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp

from dsbp_optax import _inputs, _origin, _reading, _tap
from dsbp_optax._layout import Shape
from dsbp_optax._origin import Origin
from dsbp_optax._reading import Misread
from dsbp_optax._rider import LinearMap, Rider, parameter_path

T = TypeVar("T")


class Facts(NamedTuple):
    """What had to be found out about a loss before its layers could be tapped.

    Attributes:
      origins: what the arrays are that layers use as kernels, see `_origin`; None where
        nobody has asked.
      misread: kernels that have no riders, since these would not fit; None likewise.
    """

    origins: Mapping[str, Origin | None] | None = None
    misread: Mapping[str, Misread] | None = None

    def fitting(self, riders: Mapping[str, Rider]) -> dict[str, Rider]:
        """The riders on kernels that were not misread."""
        misread = self.misread or {}
        return {k: r for k, r in riders.items() if parameter_path(k) not in misread}


class Recorder:
    """The rules of one trace, and what happened to the riders in it.

    Attributes:
      rules: layer type -> rule.
      probe: takes note of the kernels that could be held, see `_tap.observe`; None
        outside of a probing trace.
      facts: what earlier traces found out.
      calls: what entered the watched layers.
      riders: those that came into the loss, by key.
      whole: all riders of the state, by key, which tell how kernels are read.
      kernels: path -> parameter.
      tapped: keys of the riders that were used.
      seen: paths of kernels whose layer was called, or that no rule speaks of.
      doubtful: paths of kernels for which some array was used that is shaped like them
        and may be another.
      misread: path -> how a kernel was read otherwise than its layer uses it.
    """

    def __init__(
        self,
        rules: Mapping[type, Callable[[Any], LinearMap | None]],
        watched: Collection[str],
        probe: set[str] | None = None,
        facts: Facts | None = None,
    ) -> None:
        self.rules, self.probe, self.facts = rules, probe, facts or Facts()
        self.calls = _inputs.Calls(watched)
        self.riders: Mapping[str, Rider] = {}
        self.whole: Mapping[str, Rider] = {}
        self.kernels: Mapping[str, Any] = {}
        self.tapped: set[str] = set()
        self.seen: set[str] = set()
        self.doubtful: set[str] = set()
        self.misread: dict[str, Misread] = dict(self.facts.misread or {})

    def fitting(
        self, riders: Mapping[str, Rider], linear: LinearMap, inner: Shape
    ) -> dict[str, Rider]:
        """Those of a layer's riders that fit its kernel; takes note of the others."""
        fits = {p: self.compare(p, linear, inner) for p in map(parameter_path, riders)}
        found = {k: r for k, r in riders.items() if fits[parameter_path(k)]}
        self.tapped.update(found)
        return found

    def compare(self, path: str, linear: LinearMap, inner: Shape) -> bool:
        """Whether a kernel is read as its layer, which sees `inner` of it, uses it."""
        for key, rider in self.whole.items():
            if parameter_path(key) == path:
                kernel = jnp.shape(self.kernels[path])
                wrong = _reading.compare(rider, linear, inner, kernel)
                if wrong is not None:
                    self.misread[path] = wrong
                    return False
        return True

    def finish(
        self,
        riders: Mapping[str, Rider],
        strict: bool,
        shared: Mapping[str, Collection[str]],
    ) -> None:
        """Raise or warn, if `strict`, where a rider did not come into its layer.

        Of kernels that were misread it warns in any case.
        """
        if self.misread:
            warnings.warn(_reading.tell(self.misread), stacklevel=3)
        if not strict:
            return
        self.calls.check(shared)
        known = {*self.seen, *self.doubtful, *self.misread}
        for key in _tap.check_tapped(riders, self.tapped, known):
            path = parameter_path(key)
            if path not in self.misread:
                doubt = path in self.doubtful and path not in self.seen
                tell = _tap.another if doubt else _tap.no_rule
                warnings.warn(tell(key), stacklevel=3)


def settle(
    attempt: Callable[[Facts], T],
    trace_origins: Callable[[], Mapping[str, Origin | None]],
    find_misread: Callable[[Facts], Mapping[str, Misread]] | None = None,
) -> T:
    """The result of `attempt`, with the facts that it turns out to need.

    Args:
      attempt: traces the loss; raises `Unsettled` where it needs origins.
      trace_origins: finds them; its failure settles that nothing is known.
      find_misread: finds the kernels whose riders fit none of their layers' stacks, on
        which an attempt fails; None where it cannot.
    """
    facts = Facts()
    while True:
        try:
            return attempt(facts)
        except _origin.Unsettled:
            if facts.origins is not None:
                raise
        except Exception:
            if facts.misread is not None or find_misread is None:
                raise
            facts = _with_misread(facts, find_misread)
            if not facts.misread:
                raise
            continue
        try:
            facts = facts._replace(origins=trace_origins())
        except Exception:  # The attempt raises it too, if it is the loss's own.
            facts = facts._replace(origins={})


def _with_misread(
    facts: Facts, find_misread: Callable[[Facts], Mapping[str, Misread]]
) -> Facts:
    try:
        return facts._replace(misread=find_misread(facts))
    except Exception:  # That of the attempt tells more.
        return facts._replace(misread={})
