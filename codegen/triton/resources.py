"""Offline compilation of printed kernels: registers, spills, shared memory and instructions."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..buffers import BufferId
from ..interface import Dtype, Parameter, Role, Signature
from .kernel import STAGES, TritonKernel

HEADS = 16  # of calls that kernels are compiled for: a constant of a kernel, like all of a model
SERIALISED = "ptxas serialises its WGMMA"
_INSTRUCTION = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)"  # as nvdisasm prints it
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


class Instructions(NamedTuple):
    """Instructions in the text of machine code, loops counted once.

    Attributes:
        lines: all of them.
        wgmma: of products by a warpgroup (sm_90), and `waits` for those.
        local: loads and stores of registers that were spilled.
        barriers: at which all warps of a program meet.
        serialised: whether every product by a warpgroup is waited for before the next begins,
            although the program asks for fewer waits (ptxas C7510 to C7514).
    """

    lines: int
    wgmma: int
    waits: int
    local: int
    barriers: int
    serialised: bool


class Usage(NamedTuple):
    """Registers and bytes of spills, and instructions; None where no tool reports them."""

    registers: int | None = None
    spills: int | None = None
    instructions: Instructions | None = None

    @property
    def is_serialised(self) -> bool:
        return self.instructions is not None and self.instructions.serialised


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes."""

    kernel: str
    target: Target
    shared: int
    usage: Usage

    @property
    def fits(self) -> bool:
        return self.shared <= self.target.shared_limit

    @property
    def registers(self) -> int | None:
        return self.usage.registers

    @property
    def spills(self) -> int | None:
        """Bytes."""
        return self.usage.spills


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
        if kind.startswith("*") or name.endswith("_sb")
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
    return Resources(kernel.name, target, compiled.metadata.shared, usage(compiled.asm))


def _arguments(
    kernel: TritonKernel, buffers: Mapping[BufferId, Dtype], signature: Signature, packed: bool
) -> tuple[dict[str, str], dict[str, object]]:
    types: dict[str, str] = {}
    constants: dict[str, object] = {**dict(kernel.constants), "HV": HEADS, "PACKED": packed}
    constants["EVEN"] = not packed
    for p in kernel.parameters:
        known = type_of(p, buffers, signature)
        if known is not None:
            types[p.name] = known
        elif p.role is Role.SLOTS:
            types |= {p.name: "*i64", "SLOTS": "i32", "WIDTH": "i32"}
        elif p.role is Role.GROUP:
            constants[p.name] = 1
        else:
            constants[p.name] = _stride(p, kernel)
    tables = ["cu_seqlens", "chunk_offsets", "chunk_table"]
    if kernel.segments:
        tables.append("segment_table")
        types["SEGMENT"] = "i32"
    for name in tables:
        types[name] = "*i32" if packed else "constexpr"
        if not packed:
            constants[name] = None
    types |= {"TOKENS": "i32", "chunks": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    return types, constants


def type_of(p: Parameter, buffers: Mapping[BufferId, Dtype], signature: Signature) -> str | None:
    """The type, as Triton writes it, of what a launch gives in each call; None: a constant."""
    if p.role is Role.OPERAND:
        return _POINTER[signature.of(str(p.of))]
    if isinstance(p.of, BufferId):
        return _POINTER[buffers[p.of]]
    if p.role in (Role.INITIAL, Role.FINAL, Role.POOL):
        return "*fp32"
    return {Role.PARAM: "fp32", Role.STRIDE_BATCH: "i32"}.get(p.role)


def _stride(p: Parameter, kernel: TritonKernel) -> int:
    """Along tokens or heads of a dense [B, T, HEADS, channels], heads or keys of a dense pool."""
    size = dict(kernel.constants)
    if (Role.POOL, p.of) in [(q.role, q.of) for q in kernel.parameters]:
        strides = {Role.STRIDE_HEAD: size["K"] * size["V"], Role.STRIDE_KEY: size["V"]}
        return strides.get(p.role, 1)
    channels = 1 if p.channels is None else size[p.channels.value.upper()]
    return channels if p.role is Role.STRIDE_HEAD else HEADS * channels


@cache
def _tool(name: str) -> Path | None:
    """One of NVIDIA's tools, which Triton brings."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return path if path.exists() else None


def usage(asm: Mapping[str, Any]) -> Usage:
    """What NVIDIA's cuobjdump and nvdisasm read off the machine code of a compiled kernel."""
    cubin = asm.get("cubin")
    if cubin is None:
        return Usage()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        summary = _run("cuobjdump", "--dump-resource-usage", path)
        found = re.search(r"REG:(\d+) STACK:(\d+)", summary)
        text = _run("nvdisasm", "-c", path)
    registers, spills = (int(found[1]), int(found[2])) if found else (None, None)
    return Usage(registers, spills, instructions(text, asm["ptx"]) if text else None)


def _run(name: str, option: str, path: Path) -> str:
    """The output of a tool; empty without it."""
    tool = _tool(name)
    if tool is None:
        return ""
    command = [os.fspath(tool), option, os.fspath(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str, ptx: str) -> Instructions:
    """Count them in a disassembly; `ptx`: what it was assembled from."""
    names = Counter(re.findall(_INSTRUCTION, sass, re.M))

    def count(*stems: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(stems))

    wgmma, waits = count("HGMMA"), count("WARPGROUP.DEPBAR")
    asked, waited = ptx.count("wgmma.mma_async"), ptx.count("wgmma.wait_group")
    return Instructions(
        lines=names.total(),
        wgmma=wgmma,
        waits=waits,
        local=count("LDL", "STL"),
        barriers=count("BAR.SYNC"),
        serialised=0 < wgmma <= waits and waited < asked,
    )
