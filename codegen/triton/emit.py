"""From a normal form to one readable file of Triton kernels, for given dimensions and plans."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...dsl.normal_form import NormalForm
from ...dsl.step import Step
from ..buffers import BufferId
from ..config import Config
from ..interface import Dtype, Signature
from ..programs import backward_program, forward_program
from ..token import token_kernel
from . import library as triton_library
from .defaults import token_config
from .kernel import TritonKernel, print_triton
from .together import launches

_Kernels = tuple[TritonKernel, ...]


@dataclass(frozen=True, slots=True)
class Emitted:
    """The source of a module and the kernels in it, in the order in which they are launched."""

    source: str
    forward: _Kernels
    backward: _Kernels

    def buffers(self, kernel: TritonKernel) -> dict[BufferId, Dtype]:
        """The dtype of every buffer of the program that `kernel` belongs to."""
        program = self.forward if kernel in self.forward else self.backward
        return {b.name: b.dtype for k in program for b in k.stores}


@lru_cache(maxsize=512)
def emit(
    form: NormalForm, signature: Signature, config: Config, *, segments: bool = False
) -> Emitted:
    """The Triton module of `form`; byte-identical for identical arguments.

    `segments`: its scans run on segments of a sequence at once, which `transition_of` must allow.
    """
    forward, backward = (
        tuple(launches(program.kernels, signature, config, together=plan.together))
        for plan, program in (
            (config.forward, forward_program(form, config.forward, segments=segments)),
            (config.backward, backward_program(form, config.backward, segments=segments)),
        )
    )
    head = _header(form, signature, config, segments=segments)
    return _module(head, forward, backward)


@lru_cache(maxsize=512)
def emit_token(step: Step, signature: Signature, *, pooled: bool = False) -> Emitted:
    """The Triton module of `step` one token at a time: a forward alone.

    `pooled`: states are read from a pool and written there, after each token.
    """
    form = token_kernel(step, pooled=pooled)
    kernel = print_triton(form, signature, token_config(form, signature.dims))
    dims, tiles = signature.dims, kernel.config
    head = (
        f"{step.name}: one token at a time, generated. Step {step.digest}.",
        "",
        f"dimensions  K={dims.K} V={dims.V}, values in {signature.dtype.value}",
        f"kernel      BV={tiles.v_tile} warps={tiles.warps} stages={tiles.stages}",
        f"regenerate  chunkwise emit {step.name} --stage token {_options(signature)}",
    )
    return _module(head, (kernel,), ())


def _module(head: Sequence[str], forward: _Kernels, backward: _Kernels) -> Emitted:
    """One file: `head` as its docstring, the functions that kernels call, and the kernels."""
    kernels = (*forward, *backward)
    used = set().union(*(k.functions for k in kernels))
    text = "\n".join(head)
    imports = "import triton\nimport triton.language as tl"
    parts = [f'"""{text}\n"""', imports, triton_library.sources(used), *(k.source for k in kernels)]
    source = "\n\n".join(p.strip("\n") for p in parts if p) + "\n"
    ast.parse(source)
    return Emitted(source, forward, backward)


def _options(signature: Signature) -> str:
    dims = signature.dims
    return f"--dims K={dims.K},V={dims.V} --dtype {signature.dtype.value}"


def _header(form: NormalForm, signature: Signature, config: Config, *, segments: bool) -> list[str]:
    dims = signature.dims
    kernels = ", ".join(
        f"{name}: BV={k.v_tile} warps={k.warps} stages={k.stages}" for name, k in config.kernels
    )
    k = config.default
    return [
        f"{form.name}: chunkwise kernels, generated. Normal form {form.digest}.",
        "",
        f"dimensions  K={dims.K} V={dims.V}, products in {signature.dtype.value}",
        f"chunk       {config.chunk} tokens",
        f"forward     {config.forward.label}",
        f"backward    {config.backward.label}",
        f"kernels     BV={k.v_tile} warps={k.warps} stages={k.stages}; {kernels}".rstrip("; "),
        f"regenerate  chunkwise emit {form.name} {_options(signature)}{' --segments' * segments}",
    ]
