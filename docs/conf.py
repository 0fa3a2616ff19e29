"""How the pages are built: `make docs`."""

from sphinx.application import Sphinx

from keepstep import __version__

project = "keepstep"
author = "The keepstep authors"
copyright = author  # noqa: A001 - Sphinx asks for this name
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"keepstep {release}"
html_copy_source = False

# Docstrings write names in single backticks.
default_role = "code"


def _show_tree_as_drawn(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """A module's docstring may hold a drawing (the exception tree), which is no reStructuredText."""
    if what == "module":
        lines[:] = ["::", "", *("    " + line for line in lines), ""]


def setup(app: Sphinx) -> None:
    """Sphinx calls this by name."""
    app.connect("autodoc-process-docstring", _show_tree_as_drawn)
