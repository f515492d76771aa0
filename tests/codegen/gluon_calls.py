"""Calls whose printed Gluon kernels are emulated; NumPy computes the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from chunkwise.codegen.buffers import BufferId
from chunkwise.codegen.gluon.emit import Emitted
from chunkwise.codegen.gluon.memory import GluonKernel
from chunkwise.codegen.interface import Role, Signature
from chunkwise.codegen.plan import Kernel
from chunkwise.codegen.tile import Axis
from chunkwise.runtime.packing import chunk_table

from tests.codegen import gluon_emulator, numpy_printer
from tests.codegen.test_numpy_printer import Call

_STRIDES = (Role.STRIDE_BATCH, Role.STRIDE_TOKEN, Role.STRIDE_HEAD)


@dataclass(frozen=True)
class GluonCall(Call):
    """A call whose scans are emulated; NumPy computes the other kernels."""

    emitted: Emitted | None = None
    packed: bool = False

    def launch(self, kernel: Kernel, signature: Signature, memory: numpy_printer.Memory) -> None:
        assert self.emitted is not None
        for printed in self.emitted.kernels:
            if printed.name == kernel.name:
                self._emulate(self.emitted.source, printed, memory)
                return
        super().launch(kernel, signature, memory)

    def _emulate(self, source: str, kernel: GluonKernel, memory: numpy_printer.Memory) -> None:
        sizes, blocks = self.sizes, dict(kernel.blocks)
        given: dict[str, Any] = {**dict(kernel.constants), "STAGES": kernel.config.stages}
        given |= {"TOKENS": sizes["T"], "HV": sizes["HV"], "chunks": -(-sizes["T"] // sizes["C"])}
        given |= {"cu_seqlens": None, "chunk_offsets": None, "chunk_table": None}
        given |= {"PACKED": self.packed, "EVEN": not self.packed and sizes["T"] % sizes["C"] == 0}
        programs, chunks = len(self.sequences), sizes["B"] * given["chunks"]
        if self.packed:
            lengths = torch.tensor([0, *(length for _, _, length in self.sequences)])
            bounds = lengths.cumsum(0)
            offsets, table = chunk_table(bounds, sizes["T"], sizes["C"])
            tables = {"cu_seqlens": bounds, "chunk_offsets": offsets, "chunk_table": table}
            given |= {n: gluon_emulator.Pointer(x.reshape(-1)) for n, x in tables.items()}
            given["SEQUENCES"], chunks = programs, len(table)
        given.setdefault("SEQUENCES", programs)
        copies: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of states, as [V, K]

        def tensor(of: BufferId | str) -> torch.Tensor:
            if isinstance(of, str):
                return torch.from_numpy(memory.operands[of])
            buffer, array = memory.buffers[of]
            x = torch.from_numpy(array)
            if buffer.axes != (Axis.K, Axis.V):
                return x
            copies[str(of)] = copies.get(str(of), (x, x.mT.contiguous()))
            return copies[str(of)][1]

        for p in kernel.parameters:
            of = str(p.of)
            if p.name in blocks:
                x = tensor(p.of)
                columns = x.stride(1) if x.shape[1] == sizes["T"] else x.shape[-1]
                given[p.name] = gluon_emulator.Descriptor(x.view(-1, columns), blocks[p.name])
            elif p.role in (Role.OPERAND, Role.BUFFER):
                given[p.name] = gluon_emulator.Pointer(tensor(p.of).reshape(-1))
            elif p.role is Role.GROUP:
                given[p.name] = sizes["HV"] // memory.operands[of].shape[2]
            elif p.role in (Role.INITIAL, Role.FINAL):
                states = memory.initial if p.role is Role.INITIAL else memory.final
                x = states[of]
                flat = None if x is None else torch.from_numpy(x).view(-1)
                given[p.name] = None if flat is None else gluon_emulator.Pointer(flat)
            else:
                given[p.name] = tensor(p.of).stride(_STRIDES.index(p.role))
        given["items"] = chunks * sizes["HV"]
        programs = 5 if kernel.persistent else programs * sizes["HV"] * kernel.v_programs
        gluon_emulator.run(source, kernel.name, programs, given)
        for x, copy in copies.values():
            x.copy_(copy.mT)
