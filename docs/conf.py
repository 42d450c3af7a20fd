"""How Sphinx builds the site: `sphinx-build -W docs build/site`."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import dsbp_optax  # noqa: E402 - of this checkout, which has to be found first

project = "dsbp_optax"
author = "The dsbp_optax authors"
project_copyright = author
version = release = dsbp_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "py:obj"

# Prose.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # The tests execute every example and every notebook.

# Pages.
html_theme = "sphinx_book_theme"
html_title = "dsbp_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Docstrings.
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False

_SECTION = re.compile(r"^\w+:( |$)")


def _literal_formulas(lines: list[str]) -> list[str]:
    """Indented paragraphs of a docstring's prose as blocks of literal text."""
    found: list[str] = []
    inside, prose = False, True
    for number, line in enumerate(lines):
        prose = prose and not (_SECTION.match(line) and number > 0)
        deep = line.startswith("    ")
        if prose and deep and not inside and number and not lines[number - 1].strip():
            found += [".. code-block:: text", ""]
            inside = True
        elif line.strip() and not deep:
            inside = False
        found.append(line)
    return found


def _process(
    app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = _literal_formulas(lines)


#: What links in the repository lead to on the site.
_PAGES = {
    "](../benchmarks/RESULTS.md": "](results.md",
    "](FINDINGS.md)": "](findings.md)",
}


def _link_pages(app: Any, where: Any, *rest: Any) -> None:
    """Links to files that are pages of the site lead to these."""
    content = rest[-1]
    for file, page in _PAGES.items():
        content[0] = content[0].replace(file, page)


def _copy_notebooks() -> None:
    """The notebooks beside the pages, with the outputs that they are stored with."""
    target = HERE / "notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, target)


_copy_notebooks()


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("source-read", _link_pages)
    app.connect("include-read", _link_pages)
