"""How Sphinx makes the site from these pages: `make docs`.

Nothing is asked of a network, neither while it is made nor while it is read: fonts are those of the
reader's system, and there is no script but the theme's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nf4_pipeline

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "nf4-pipeline"
author = copyright = "The nf4-pipeline authors"
version = release = nf4_pipeline.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "accessible",
    "command_examples",
    "json_schema",
]
exclude_patterns = ["_ext"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 4  # the anchors of headings, as GitHub has them, so that links work in both
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_use_ivar = True

highlight_language = "none"  # what has no language is what a program said
smartquotes = False  # "--" is an option more often than a dash

html_theme = "furo"
html_title = "nf4-pipeline"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
