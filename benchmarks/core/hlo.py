"""An optimized program, read off its text: its computations, and what it launches."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"(body|to_apply|calls|called_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"(?:true|false)_computation=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
#: What is no work of the device: names of values, and the ends of what was begun.
_FREE = re.compile(
    "parameter|constant|(get-)?tuple(-element)?|bitcast|after-all|add-dependency|"
    "opt-barrier|(partition|replica)-id|.*-(done|update)"
)


class Launches(NamedTuple):
    """Kernels that a run of a program launches.

    Attributes:
      usual: where each branch is the one with fewer of them.
      most: where it is the one with more, as in a refresh.
      unknown_loops: loops whose number of trips is not known, counted once.
    """

    usual: int
    most: int
    unknown_loops: int


def computations(text: str) -> tuple[str, Mapping[str, Sequence[str]]]:
    """The name of the entry, and the instructions of each computation."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", list[str]()
    for line in text.splitlines():
        if found := _HEADER.match(line):
            current = bodies.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif " = " in line:
            current.append(line)
    return entry, bodies


def branches(line: str) -> list[str]:
    """The computations that a conditional chooses from."""
    names = ",".join(one or several for one, several in _BRANCHES.findall(line))
    return [name.strip().lstrip("%") for name in names.split(",") if name]


def launches(text: str) -> Launches:
    """Fusions, library calls and single operations of the text of a compiled program.

    Loops count with their trips; what lies inside of a fusion does not count.
    """
    entry, bodies = computations(text)

    def walk(name: str) -> Launches:
        usual = most = unknown = 0
        for line in bodies.get(name, ()):
            opcode = _OPCODE.search(f" {line.partition(' = ')[2]}")
            if opcode is None or _FREE.fullmatch(opcode[1]):
                continue
            inner, trips = [Launches(1, 1, 0)], 1
            called = dict(_CALLED.findall(line))
            if opcode[1] == "while":
                inner, known = [walk(called["body"])], _TRIPS.search(line)
                trips, unknown = int(known[1]) if known else 1, unknown + (not known)
            elif opcode[1] == "conditional":
                inner = [walk(name) for name in branches(line)]
            elif opcode[1] in ("call", "async-start"):
                inner = [walk(x) for x in called.values()]
            usual += trips * min(x.usual for x in inner)
            most += trips * max(x.most for x in inner)
            unknown += sum(x.unknown_loops for x in inner)
        return Launches(usual, most, unknown)

    return walk(entry)
