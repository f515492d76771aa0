"""Offline compilation of printed kernels: registers, spills and shared memory without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..buffers import BufferId
from ..interface import Dtype, Role, Signature
from .kernel import STAGES, TritonKernel

_POINTER = {Dtype.FLOAT32: "*fp32", Dtype.BFLOAT16: "*bf16", Dtype.FLOAT16: "*fp16"}


class Target(Enum):
    """GPUs that every kernel must compile for, and the shared memory a program may use there."""

    SM80 = ("cuda", 80, 32, 163 * 1024)
    SM90 = ("cuda", 90, 32, 227 * 1024)
    SM100 = ("cuda", 100, 32, 227 * 1024)
    SM120 = ("cuda", 120, 32, 99 * 1024)
    GFX942 = ("hip", "gfx942", 64, 64 * 1024)

    @property
    def triton(self) -> GPUTarget:
        backend, arch, warp, _ = self.value
        return GPUTarget(backend, arch, warp)

    @property
    def shared_limit(self) -> int:
        *_, limit = self.value
        return int(limit)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes. `registers`, `spills` (bytes): None where not reported."""

    kernel: str
    target: Target
    shared: int
    registers: int | None
    spills: int | None

    @property
    def fits(self) -> bool:
        return self.shared <= self.target.shared_limit


def compile_kernel(
    module: ModuleType,
    kernel: TritonKernel,
    buffers: Mapping[BufferId, Dtype],
    signature: Signature,
    target: Target,
    *,
    packed: bool,
) -> Resources:
    """Compile `kernel` of the imported `module` for `target` and read what it takes.

    With fewer stages than configured where it would not fit.

    `buffers`: the dtype of every buffer of its program.

    Raises whatever Triton raises for a kernel that does not compile.
    """
    function = getattr(module, kernel.name)
    types, constants = _arguments(kernel, buffers, signature, packed)
    names = function.arg_names
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name.endswith(("_sb", "_st", "_sh"))
    }
    for stages in range(
        kernel.config.stages, 0, -1
    ):  # as runtime/triton/launch_plan.py launches it
        if STAGES in names:
            types[STAGES], constants[STAGES] = "constexpr", stages
        ordered = {n: types[n] for n in names}
        source = ASTSource(function, ordered, constants, attributes)
        options = kernel.config.options(stages)
        compiled = triton.compile(source, target=target.triton, options=options)
        if compiled.metadata.shared <= target.shared_limit:
            break
    registers, spills = usage(compiled.asm.get("cubin"))
    return Resources(kernel.name, target, compiled.metadata.shared, registers, spills)


def _arguments(
    kernel: TritonKernel, buffers: Mapping[BufferId, Dtype], signature: Signature, packed: bool
) -> tuple[dict[str, str], dict[str, object]]:
    types: dict[str, str] = {}
    constants: dict[str, object] = {**dict(kernel.constants), "PACKED": packed}
    for p in kernel.parameters:
        if p.role is Role.OPERAND:
            types[p.name] = _POINTER[signature.of(str(p.of))]
        elif isinstance(p.of, BufferId):
            types[p.name] = _POINTER[buffers[p.of]]
        elif p.role in (Role.INITIAL, Role.FINAL):
            types[p.name] = "*fp32"
        elif p.role is Role.PARAM:
            types[p.name] = "fp32"
        elif p.role is Role.GROUP:
            types[p.name] = "constexpr"
            constants[p.name] = 1
        else:
            types[p.name] = "i32"
    tables = ["cu_seqlens", "chunk_offsets", "chunk_table"]
    if kernel.segments:
        tables.append("segment_table")
        types["SEGMENT"] = "i32"
    for name in tables:
        types[name] = "*i32" if packed else "constexpr"
        if not packed:
            constants[name] = None
    types |= {"TOKENS": "i32", "chunks": "i32", "HV": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    return types, constants


def usage(cubin: bytes | None) -> tuple[int | None, int | None]:
    """Registers and local-memory bytes, read off the machine code by NVIDIA's cuobjdump."""
    if cubin is None:
        return None, None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [os.fspath(tool), "--dump-resource-usage", os.fspath(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)
