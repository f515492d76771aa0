"""Describes a compiled declaration as text: its chunk form, its kernels' costs, its engines."""

from __future__ import annotations

from ..dsl.declaration import Declaration
from ..dsl.errors import NotLowered
from .engines import EngineName


def sections(declaration: Declaration) -> dict[str, str]:
    """The sections by name, in order; a step that is not lowered has only its engines."""
    from ..codegen.programs import chunk_program
    from ..codegen.text.summary import chunk_form, costs

    if declaration.any_step:
        return {"engines": _only_reference("it was declared for it")}
    form = declaration.normal_form(declaration.default_micro)
    try:
        chunk_program(form)
    except NotLowered as refusal:
        return {"engines": _only_reference(f"{refusal.headline}: {refusal.why}")}
    return {
        "chunk": chunk_form(form),
        "costs": costs(form),
        "engines": f"engines  {', '.join(e.value for e in EngineName)}",
    }


def _only_reference(why: str) -> str:
    return f"engines  {EngineName.REFERENCE.value} only: {why}"
