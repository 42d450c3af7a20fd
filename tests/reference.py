"""`dsbp_optax/REFERENCE.md` from the docstrings: ``python tests/reference.py``.

Each public name with its signature, its first line, and what the sections of its
docstring say of shapes, errors and costs. Arguments are in `pydoc`.
"""

import inspect
import pathlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import dsbp_optax
import dsbp_optax.linen
import dsbp_optax.nnx
import dsbp_optax.plotting

FILE = pathlib.Path(dsbp_optax.__file__).parent / "REFERENCE.md"

#: Sections of a docstring that are shown.
SHOWN = ("Attributes", "Returns", "Raises", "Cost", "Reference")
SECTION = re.compile(r"^(Args|Example|" + "|".join(SHOWN) + r"):", re.MULTILINE)
#: The comment above an alias, which cannot carry a docstring.
COMMENT = r"((?:^#: .*\n)+)^{name}: TypeAlias"

INTRODUCTION = """\
# Reference

Every public name: signature, what it is, what it returns and raises. Written from the
docstrings by `python tests/reference.py`; a test compares. What each argument means is
in the docstring itself: `python -m pydoc dsbp_optax.dsbp_muon`.

Shapes are told in one glossary: `n` samples, `d` the length of the side that carries
the basis, `m` the other side, `k` the rank. For the input side `d` is fan in and `m`
fan out. `q` of every `p` steps refresh a basis.
"""

#: Heading -> names of `dsbp_optax`, in the order in which people meet them.
GROUPS: Mapping[str, Sequence[str]] = {
    "Optimizers": ("dsbp_muon", "dsbp_adamw", "dsbp_sgd", "dsbp"),
    "Optimizers of gradients in coordinates": ("subspace_muon", "subspace_adamw"),
    "Flat minima": (
        "subspace_sam",
        "subspace_msam",
        "evaluation_params",
        "add_spectral_sharpness",
    ),
    "Your own rule": (
        "scale_by_activation_metric",
        "scale_by_quantized_momentum",
        "scale_by_quantized_adam",
        "scale_by_spectral_projection",
        "scale_by_orthogonalization",
        "clip_by_norm_growth",
        "orthogonalize",
        "whiten",
        "complement",
        "residual_momentum",
        "residual_adam",
        "normalize_residual",
        "scale_residual",
        "Residual",
    ),
    "Rank, interval, axes": ("RankFraction", "AutoRank", "AutoInterval", "Axes"),
    "Statistics and gradients": (
        "Activations",
        "Covariance",
        "Sketch",
        "Statistic",
        "add_statistics",
        "sum_statistics",
        "tap",
        "put_statistics",
        "project_gradients",
        "Coordinates",
    ),
    "Checkpoints and meshes": ("check_checkpoint", "state_shardings"),
    "Eigensolvers": ("power_iteration", "eigh", "Solver", "Operator", "Eigenpairs"),
    "States": (
        "ActivationMetricState",
        "SpectralProjectionState",
        "SpectralSharpnessState",
        "Spectrum",
        "Schedule",
        "SubspaceSamState",
        "SubspaceMsamState",
        "QuantizedMomentumState",
        "QuantizedAdamState",
        "ClipByNormGrowthState",
    ),
}
MODULES = (
    dsbp_optax.linen,
    dsbp_optax.capture,
    dsbp_optax.nnx,
    dsbp_optax.diagnostics,
    dsbp_optax.plotting,
)


def sections(text: str) -> tuple[list[str], dict[str, str]]:
    """A docstring's paragraphs before its sections, and the sections by name."""
    prose, *parts = SECTION.split(text)
    named = dict(zip(parts[::2], parts[1::2], strict=True))
    return prose.strip("\n").split("\n\n"), named


def one_line(text: str) -> str:
    """Prose of a docstring as Markdown."""
    return " ".join(text.split()).replace("``", "`")


def signature(name: str, value: Any) -> str:
    """How it is called, without types: those are told in words."""
    found = inspect.signature(value)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    call = found.replace(parameters=bare, return_annotation=found.empty)
    plain = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", f"{name}{call}")
    return textwrap.fill(plain, 84, subsequent_indent="    ")


def is_callable(value: Any) -> bool:
    """Whether people call it themselves; protocols are only looked at."""
    if inspect.isclass(value):
        return not getattr(value, "_is_protocol", False)
    return inspect.isfunction(value)


def body(value: Any) -> Iterator[str]:
    """The paragraphs below a name."""
    (first, *others), named = sections(inspect.getdoc(value) or "")
    yield one_line(first)
    if others and others[0].startswith("    "):
        yield f"```text\n{textwrap.dedent(others[0])}\n```"
    for title in SHOWN:
        if title == "Attributes" and title in named:
            items = re.split(r"\n(?=\w)", textwrap.dedent(named[title]).strip("\n"))
            fields = (re.sub(r"^(\w+):", r"`\1`:", one_line(item)) for item in items)
            yield "\n".join(f"- {field}" for field in fields)
        elif title in named:
            yield f"{title}: {one_line(named[title])}"


def alias(module: ModuleType, name: str) -> str:
    """What the comment above an alias says."""
    own = pathlib.Path(inspect.getfile(module))
    others = [*FILE.parent.glob("_*.py"), *FILE.parent.glob("capture/*.py")]
    files = [own, *sorted(others)]
    pattern = COMMENT.format(name=name)
    found = [re.search(pattern, file.read_text(), re.MULTILINE) for file in files]
    return one_line(next(x for x in found if x)[1].replace("#: ", ""))


def entry(module: ModuleType, name: str) -> str:
    """One public name."""
    value = getattr(module, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return f"### {name}\n\n{alias(module, name)}\n"
    call = f"```text\n{signature(name, value)}\n```\n\n" if is_callable(value) else ""
    return f"### {name}\n\n{call}" + "\n\n".join(body(value)) + "\n"


def reference() -> str:
    """The whole file."""
    parts = [INTRODUCTION]
    for heading, names in GROUPS.items():
        parts.append(f"## {heading}\n")
        parts += [entry(dsbp_optax, name) for name in names]
    for module in MODULES:
        paragraphs, _ = sections(inspect.getdoc(module) or "")
        parts.append(f"## {module.__name__}\n\n{one_line(paragraphs[0])}\n")
        parts += [entry(module, name) for name in module.__all__]
    return "\n".join(parts)


if __name__ == "__main__":
    FILE.write_text(reference())
