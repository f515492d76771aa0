"""From a normal form to one file of the Gluon kernels that its configuration asks for."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from ...dsl.normal_form import NormalForm
from ..config import Config, KernelConfig, Printer
from ..interface import Signature
from ..plan import Loop
from ..programs import backward_program, forward_program
from .kernel import print_gluon
from .library import sources
from .memory import GluonKernel

_IMPORTS = """
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


_NONE: Mapping[str, KernelConfig] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Emitted:
    """The source of a module, the kernels in it, and why others that were asked for are not."""

    source: str
    kernels: tuple[GluonKernel, ...]
    refused: tuple[tuple[str, str], ...]


def in_gluon(
    form: NormalForm,
    config: Config,
    tiles: KernelConfig | None,
    but: frozenset[str] = frozenset(),
    chunks: Mapping[str, KernelConfig] = _NONE,
) -> Config:
    """`config` that names Gluon, with these tiles, for all scans over chunks but those in `but`.

    `tiles`: None for scans in Triton. `chunks`: tiles by name of kernels parallel over chunks.
    """
    programs = (forward_program(form, config.forward), backward_program(form, config.backward))
    own: dict[str, KernelConfig] = {}
    for kernel in (k for p in programs for k in p.kernels if k.name not in but):
        asked = chunks.get(kernel.name) if kernel.loop is Loop.PARALLEL else tiles
        if asked is not None:
            own[kernel.name] = replace(asked, printer=Printer.GLUON)
    rest = tuple((n, k) for n, k in config.kernels if n not in own)
    return replace(config, kernels=(*rest, *own.items()))


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
        f'"""{form.name}: kernels in Gluon, generated. Normal form {form.digest}.\n\n'
        f"dimensions  K={dims.K} V={dims.V}, products in {signature.dtype.value}\n"
        f'chunk       {config.chunk} tokens\n"""'
    )
    return Emitted(module(kernels, head), kernels, refused)


def module(kernels: Iterable[GluonKernel], head: str = "") -> str:
    """One file: `head`, imports, what kernels call, and kernels."""
    kernels = tuple(kernels)
    called = sources(f for k in kernels for f in k.functions)
    parts = (x.strip("\n") for x in (head, _IMPORTS, *called, *(k.source for k in kernels)))
    source = "\n\n".join(x for x in parts if x) + "\n"
    ast.parse(source)
    return source
