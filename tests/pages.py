"""Markdown pages as code: their fences, and what running them prints."""

import contextlib
import io
import itertools
import pathlib
import re
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


class Example(NamedTuple):
    """A block of Python, and what it prints, where a text block follows."""

    code: str
    printed: str | None


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def examples(text: str) -> list[Example]:
    found, fences = [], [*FENCE.findall(text), ("", "")]
    for (kind, body), (after, printed) in itertools.pairwise(fences):
        if kind == "python":
            found.append(Example(body, printed if after == "text" else None))
    return found


def run(code: str, name: str, names: dict[str, Any] | None = None) -> str:
    """What a block prints; `names` are those of the blocks before it."""
    printed = io.StringIO()
    names = {"__name__": "page"} if names is None else names
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), names)
    return printed.getvalue()


def before_and_after(diff: str) -> tuple[str, str]:
    lines = diff.splitlines()
    assert all(line[:1] in ("+", "-", " ") for line in lines), "not a diff"
    before = "\n".join(line[1:] for line in lines if line[0] != "+")
    after = "\n".join(line[1:] for line in lines if line[0] != "-")
    return before, after


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h).lower() for h in headings)
    return {re.sub(r"[^\w\- ]", "", h).strip().replace(" ", "-") for h in plain}


def broken_links(page: pathlib.Path) -> list[str]:
    """Relative links of a page to files, or headings in them, that are not there."""
    found = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            found.append(link)
            continue
        if anchor and anchor not in anchors(target.read_text()):
            found.append(link)
    return found
