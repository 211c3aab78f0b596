"""Sphinx configuration of the documentation: ``make docs`` writes build/docs/index.html."""

from __future__ import annotations

import varstream

project = "varstream"
author = "The varstream authors"
copyright = "The varstream authors, Apache-2.0"
version = release = varstream.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
nitpicky = False  # torch's own types have no inventory offline

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"varstream {release}"
html_static_path: list[str] = []
