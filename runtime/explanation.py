"""Describes a compiled declaration as text: its chunk form, its kernels' costs, its engines."""

from __future__ import annotations

from ..dsl.declaration import Declaration
from .engines import EngineName


def sections(declaration: Declaration) -> dict[str, str]:
    """The sections by name, in order; a step that is not lowered has only its engines."""
    from ..codegen.text.summary import chunk_form, costs
    from .engine import chunk_refusal

    if declaration.any_step:
        return {"engines": _only_reference("it was declared for it")}
    form = declaration.normal_form(declaration.default_micro)
    refused = chunk_refusal(form)
    if refused is not None:
        return {"engines": _only_reference(refused)}
    return {
        "chunk": chunk_form(form),
        "costs": costs(form),
        "engines": f"engines  {', '.join(e.value for e in EngineName)}",
    }


def _only_reference(why: str) -> str:
    return f"engines  {EngineName.REFERENCE.value} only: {why}"
