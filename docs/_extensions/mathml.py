"""Equations as MathML, which browsers typeset themselves: no script and no remote font."""

from __future__ import annotations

import re

from chunkwise.dsl.latex import mathml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

_TAG = re.compile(r"\\tag\{(.*?)\}")


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), display=False))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    text = node.astext()
    tag = _TAG.search(text)
    number = f'<span class="eqno">({tag[1]})</span>' if tag else ""
    equation = mathml(_TAG.sub("", text).strip())
    self.body.append(f'<div class="equation">{equation}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the two writers of equations under the name that `html_math_renderer` takes."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
