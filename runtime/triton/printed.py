"""From printed kernels to what launches have to know of them."""

from __future__ import annotations

from ...codegen import interface
from ...codegen.buffers import BufferId, BufferKind
from ...codegen.gluon.memory import GluonKernel
from ...codegen.interface import Parameter, Role
from ...codegen.plan import Loop
from ...codegen.triton.kernel import TritonKernel
from ..printed import TORCH
from .kernels import Buffer, Kernel, Source

_AXES = {
    Role.STRIDE_BATCH: 0,
    Role.STRIDE_TOKEN: 1,
    Role.STRIDE_HEAD: 2,
    Role.STRIDE_KEY: 3,
    Role.STRIDE_VALUE: 4,
}
_SOURCES = {
    Role.OPERAND: "operand",
    Role.INITIAL: "initial",
    Role.PARAM: "param",
    Role.BUFFER: "buffer",
    Role.FINAL: "final",
    Role.POOL: "operand",
    Role.SLOTS: "operand",
}


def kernel_of(printed: TritonKernel | GluonKernel) -> Kernel:
    """What launches have to know of a printed kernel."""
    parameters = printed.parameters
    programs = "chunks" if printed.loop is Loop.PARALLEL else "sequences"
    return Kernel(
        printed.name,
        "segments" if printed.segments else programs,
        printed.v_programs,
        dict(printed.constants),
        printed.options,
        {p.name: _source(p) for p in parameters if p.role in _SOURCES},
        {p.name: (str(p.of), _AXES[p.role]) for p in parameters if p.role in _AXES},
        {p.name: str(p.of) for p in parameters if p.role is Role.GROUP},
        tuple(buffer_of(b) for b in printed.stores if not b.is_saved),
        dict(printed.blocks),
        persistent=printed.persistent,
    )


def _source(p: Parameter) -> Source:
    """What a parameter is given; tiles that are saved come with the call, like operands."""
    is_saved = isinstance(p.of, BufferId) and p.of.kind is BufferKind.SAVED
    return "operand" if is_saved else _SOURCES[p.role], str(p.of)


def buffer_of(b: interface.Buffer) -> Buffer:
    """A buffer as launches make it."""
    whole = b.name.kind is BufferKind.GRADIENT and not b.is_partial
    return Buffer(
        str(b.name),
        b.shape,
        TORCH[b.dtype],
        b.name.of if whole else None,
        zeroed=b.is_partial,
        scratch=not b.is_result,
    )
