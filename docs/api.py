"""Writes docs/reference/api.md: every public name, from its docstring and its signature.

griffe parses the docstrings. `make docs` rewrites the page; a test compares without writing.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chunkwise as cw
import griffe
from chunkwise.dsl import functions, kinds
from chunkwise.integrations import causal_conv1d, mamba_ssm, transformers
from chunkwise.runtime.documentation import Annotation, short

PAGE = Path(__file__).resolve().parent / "reference" / "api.md"
_HEAD = """# The API

<!-- written by docs/api.py from the docstrings; do not edit -->

Every public name, with its parameters, shapes, results and errors. Sizes have one letter
everywhere: B sequences of T tokens, H key heads, HV value heads (a multiple of H), K and V channels
of a head, n micro-steps; N is B, or the number of sequences that `cu_seqlens` packs into one. The
language itself is explained [word by word](language.md).
"""
_PARTS = griffe.DocstringSectionKind
_TITLES = {
    _PARTS.parameters: "Parameters",
    _PARTS.attributes: "Attributes",
    _PARTS.returns: "Returns",
    _PARTS.raises: "Raises",
}


def page() -> str:
    """The whole page."""
    parts = [
        _HEAD,
        "## Declaring and calling\n",
        _entry("chunkwise.recurrence", cw.recurrence),
        *_of_class("chunkwise.Recurrence", cw.Recurrence),
        *_of_class("chunkwise.EngineName", cw.EngineName),
        "## Kinds\n",
        *(f"### `chunkwise.{n}`\n\n{_text(_doc(kind))}\n" for n, kind in kinds._ALIASES.items()),
        "## Functions of a step\n",
        *(_entry(f"chunkwise.{n}", getattr(cw, n)) for n in functions.__all__),
        "## `chunkwise.library`\n",
        *_library(),
        "## `chunkwise.nn`\n",
        _text(_doc(cw.nn)) + "\n",
        *_of_module("chunkwise.nn", cw.nn),
        "## `chunkwise.errors`\n",
        *_errors(),
        "## `chunkwise.fla`\n",
        _text(_doc(cw.fla)) + "\n",
        *_of_module("chunkwise.fla", cw.fla),
        *_integrations(),
    ]
    return "\n".join(parts)


def _integrations() -> Iterator[str]:
    for module in (transformers, mamba_ssm, causal_conv1d):
        name = module.__name__
        yield f"## `{name}`\n"
        yield _text(_doc(module)) + "\n"
        yield from _of_module(name, module)


def _of_module(path: str, module: Any) -> Iterator[str]:
    for name in module.__all__:
        x = getattr(module, name)
        yield from (
            _of_class(f"{path}.{name}", x) if inspect.isclass(x) else [_entry(f"{path}.{name}", x)]
        )


def _of_class(path: str, cls: type) -> Iterator[str]:
    yield _entry(path, cls)
    if members := getattr(cls, "__members__", None):
        yield "\n".join(f"- `{n}`: {_text(str(m.value))}" for n, m in members.items()) + "\n"
    for name, x in vars(cls).items():
        called = name == "__call__" and (x.__doc__ or "").strip()
        shown = inspect.isfunction(x) or isinstance(x, property)
        if shown and (called or not name.startswith("_")):
            yield _entry(f"{path}.{name}", x, level=4)


def _library() -> Iterator[str]:
    yield _text(_doc(cw.library)) + "\n"
    yield _entry("chunkwise.library.names", cw.library.names)
    for name in cw.library.names():
        op = getattr(cw.library, name)
        given = op.__signature__.parameters.values()
        operands = [
            f"{p.name} `{p.annotation}`" for p in given if isinstance(p.annotation, Annotation)
        ]
        numbers = [f"{p.name} `float`" for p in op.declaration.params]
        said = short(op.declaration).partition("): ")[2].rstrip(">")
        yield f"### `chunkwise.library.{name}`\n"
        listed = ", ".join([*operands, *numbers])
        yield f"{_text(op.declaration.doc)}\n\nOperands: {listed}. Class: {said}.\n"


def _errors() -> Iterator[str]:
    yield "[What is refused](refusals.md) shows each that a step or a call can meet.\n"
    yield from _of_class("chunkwise.errors.ChunkwiseError", cw.errors.ChunkwiseError)
    rows = []
    for name, x in sorted(vars(cw.errors).items()):
        if isinstance(x, type) and issubclass(x, Exception) and x is not cw.errors.ChunkwiseError:
            rows.append(f"- `{name}`: {_line(_doc(x))}")
    yield "\n".join(rows) + "\n"


def _entry(path: str, x: Any, *, level: int = 3) -> str:
    """A heading, the signature, the text and the sections of a docstring."""
    name = path.removesuffix(".__call__").rpartition(".")[2]
    name = f"op.{name}" if path.startswith("chunkwise.Recurrence.") else name
    lines = [f"{'#' * level} `{path}`", ""]
    bare = inspect.isclass(x) and (hasattr(x, "__members__") or issubclass(x, Exception))
    if callable(x) and not bare:
        lines += ["```text", f"{name.removesuffix('.Recurrence')}{_signature(x)}", "```", ""]
    sections = griffe.Docstring(_doc(x), parser="google").parse(
        warnings=False, returns_multiple_items=False
    )
    for section in sections:
        if section.kind is _PARTS.text:
            lines += [_text(section.value), ""]
        elif section.kind is _PARTS.returns:
            lines += [f"*Returns:* {_line(section.value[0].description)}", ""]
        else:
            rows = [_row(r, section.kind) for r in section.value]
            lines += [f"*{_TITLES[section.kind]}:*", "", *rows, ""]
    return "\n".join(lines)


def _row(r: Any, kind: griffe.DocstringSectionKind) -> str:
    name = r.annotation if kind is _PARTS.raises else r.name
    return f"- `{name}`: {_line(r.description)}"


def _signature(x: Any) -> str:
    """As Python writes it, a parameter a line where it is long; annotations as in the source."""
    found = inspect.signature(x)
    parameters = [
        p.replace(annotation=_plain(p.annotation))
        for p in found.parameters.values()
        if p.name != "self"
    ]
    returned = found.return_annotation if not inspect.isclass(x) else inspect.Signature.empty
    text = str(found.replace(parameters=parameters, return_annotation=_plain(returned)))
    if len(text) <= 90:
        return text
    inner, arrow, end = text.rpartition(") -> ") if ") -> " in text else (text[:-1], ")", "")
    rows = re.split(r", (?=[*/]|\w+[:=]|\w+,|\w+$)", inner[1:])
    return "(\n" + "".join(f"    {row},\n" for row in rows) + f"{arrow}{end}"


def _plain(annotation: Any) -> Any:
    return Annotation(annotation) if isinstance(annotation, str) else annotation


def _doc(x: Any) -> str:
    return inspect.getdoc(x) or ""


def _text(docstring: str) -> str:
    """A docstring as Markdown: stars outside code are stars."""
    parts = re.split(r"(`[^`]*`)", docstring)
    parts[::2] = [p.replace("*", r"\*").replace("<", r"\<") for p in parts[::2]]
    return "".join(parts)


def _line(docstring: str) -> str:
    """The same as one line."""
    return re.sub(r"\s+", " ", _text(docstring))


def main() -> int:
    """Write the page; 0."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
