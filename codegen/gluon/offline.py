"""Offline compilation of printed Gluon kernels for Hopper: what they take, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from ..buffers import BufferId
from ..config import Dims
from ..interface import Dtype, Role, Signature
from ..triton.resources import HEADS, Resources, Target, type_of, usage
from .memory import GluonKernel


def compile_kernel(
    module: ModuleType,
    kernel: GluonKernel,
    buffers: Mapping[BufferId, Dtype],
    signature: Signature,
    *,
    packed: bool = False,
) -> Resources:
    """Compile `kernel` of the imported `module` for sm_90 and read what it takes.

    `buffers`: the dtype of every buffer of its program.

    Raises whatever Triton raises for a kernel that does not compile.
    """
    function = getattr(module, kernel.name)
    types = dict.fromkeys(("TOKENS", "chunks", "items", "SEQUENCES"), "i32")
    constants: dict[str, object] = {**dict(kernel.constants), "HV": HEADS}
    constants |= {"PACKED": packed, "EVEN": not packed}
    tables = ("cu_seqlens", "chunk_offsets", "chunk_table")
    if packed:
        types |= dict.fromkeys(tables, "*i32")
    else:
        constants |= dict.fromkeys(tables)
    constants["STAGES"] = kernel.config.stages
    blocks = dict(kernel.blocks)
    sizes = Dims(*(dict(kernel.constants)[n] for n in ("K", "V")))
    for p in kernel.parameters:
        if p.name in blocks:
            types[p.name] = _descriptor(blocks[p.name])
        elif (known := type_of(p, buffers, signature)) is not None:
            types[p.name] = known
        elif p.role is Role.GROUP:
            constants[p.name] = 1
        else:
            channels = 1 if p.channels is None else getattr(sizes, p.channels.value.upper())
            constants[p.name] = channels * (1 if p.role is Role.STRIDE_HEAD else HEADS)
    types |= dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(function, {n: types[n] for n in names}, values, aligned)
    compiled = triton.compile(source, target=Target.SM90.triton, options=kernel.options)
    return Resources(kernel.name, Target.SM90, compiled.metadata.shared, usage(compiled.asm))


def _descriptor(block: tuple[int, int]) -> str:
    """The type of a descriptor of bfloat16, as Triton writes it."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return f"tensordesc<bf16{list(block)},{layout!r}>"
