"""From a normal form to one file of the Gluon kernels that its configuration asks for."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache

from ...dsl.normal_form import NormalForm
from ..config import Config, Printer
from ..interface import Signature
from ..programs import backward_program, forward_program
from .kernel import GluonKernel, print_gluon

HEAD = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

# Triton 3.6, 3.7 and 3.9 call the same things by different names
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
is_new = hasattr(tma, "async_load")
async_load = tma.async_load if is_new else tma.async_copy_global_to_shared
async_store = tma.async_store if is_new else tma.async_copy_shared_to_global
"""


@dataclass(frozen=True, slots=True)
class Emitted:
    """The source of a module, the kernels in it, and why others that were asked for are not."""

    source: str
    kernels: tuple[GluonKernel, ...]
    refused: tuple[tuple[str, str], ...]


@lru_cache(maxsize=512)
def emit(
    form: NormalForm, signature: Signature, config: Config, *, segments: bool = False
) -> Emitted | None:
    """The kernels of `form` for which `config` names Gluon; None if it names it for none."""
    programs = (
        forward_program(form, config.forward, segments=segments),
        backward_program(form, config.backward, segments=segments),
    )
    asked = [k for p in programs for k in p.kernels if config.of(k.name).printer is Printer.GLUON]
    if not asked:
        return None
    printed = {k.name: print_gluon(k, signature, config) for k in asked}
    kernels = tuple(p for p in printed.values() if not isinstance(p, str))
    refused = tuple((name, p) for name, p in printed.items() if isinstance(p, str))
    dims = signature.dims
    head = (
        f'"""{form.name}: scans in Gluon, generated. Normal form {form.digest}.\n\n'
        f"dimensions  K={dims.K} V={dims.V}, products in {signature.dtype.value}\n"
        f'chunk       {config.chunk} tokens\n"""'
    )
    source = "\n\n".join(x.strip("\n") for x in (head, HEAD, *(k.source for k in kernels))) + "\n"
    ast.parse(source)
    return Emitted(source, kernels, refused)
