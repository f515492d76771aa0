"""The site's configuration, for Sphinx: `make docs` builds docs/*.md into out/site.

Nothing in a built page comes from a network: no remote font or script; equations are MathML.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as _version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "chunkwise"
author = "the authors of chunkwise"
release = version = _version("chunkwise")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "mathml"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 3
exclude_patterns = ["_*"]
# entries of the navigation whose pages come later
suppress_warnings = ["toc.empty_glob"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "chunkwise"
html_static_path = ["_static"]
html_css_files = ["chunkwise.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = "$ "
