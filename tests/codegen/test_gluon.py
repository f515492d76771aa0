"""Printed Gluon: what it computes (emulated), what it takes on Hopper (compiled), what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from chunkwise import library
from chunkwise.codegen.buffers import BufferId
from chunkwise.codegen.config import Config, Dims, Precision
from chunkwise.codegen.gluon.emit import Emitted, emit
from chunkwise.codegen.gluon.kernel import GluonKernel
from chunkwise.codegen.interface import Dtype, Role, Signature
from chunkwise.codegen.plan import Kernel
from chunkwise.codegen.programs import backward_program, forward_program
from chunkwise.codegen.tile import Axis
from chunkwise.codegen.triton.fit import H100_SHARED, untuned_config
from chunkwise.dsl.ir import Kind, Per
from chunkwise.dsl.normal_form import NormalForm

from tests.codegen import gluon_emulator, numpy_printer
from tests.codegen.test_numpy_printer import Call, Numpy
from tests.gluon import in_gluon
from tests.harness import Sizes, engine_results, make_inputs, results
from tests.tolerances import assert_agree

SIZES = Sizes(B=2, T=192, H=1, HV=2, K=64, V=128, initial=True, dtype=torch.float32)
_STRIDES = (Role.STRIDE_BATCH, Role.STRIDE_TOKEN, Role.STRIDE_HEAD)


def _form(name: str) -> NormalForm:
    declared = getattr(library, name).declaration
    form: NormalForm = declared.normal_form(declared.default_micro)
    return form


def _emitted(name: str, dims: Dims, v_tile: int, stages: int = 2) -> tuple[Emitted, Config]:
    form = _form(name)
    wide = [o.name for o in form.operands if o.kind is Kind.SCALAR or o.per is Per.HEAD]
    dtypes = tuple((n, Dtype.FLOAT32) for n in wide)
    signature = Signature(dims, Dtype.BFLOAT16, dtypes, Precision.TF32X3)
    config = in_gluon(untuned_config(form, dims, Dtype.BFLOAT16, H100_SHARED), v_tile, stages)
    made = emit(form, signature, config)
    assert made is not None
    return made, config


@dataclass(frozen=True)
class _Call(Call):
    """A call whose scans are emulated; NumPy computes the other kernels."""

    emitted: Emitted | None = None

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
        given |= {"TOKENS": sizes["T"], "HV": sizes["HV"], "chunks": sizes["T"] // sizes["C"]}
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
        programs = sizes["B"] * sizes["HV"] * kernel.v_programs
        gluon_emulator.run(source, kernel.name, programs, given)
        for x, copy in copies.values():
            x.copy_(copy.mT)


@pytest.mark.parametrize(
    ("name", "v_tile", "stages"),
    [
        ("linear_attention", 64, 3),
        ("simple_gla", 64, 2),
        ("retention", 128, 2),
        ("delta_rule", 128, 1),
        ("gated_delta_rule", 64, 2),
    ],
)
def test_it_computes_what_eager_does(name: str, v_tile: int, stages: int) -> None:
    """States that are given, groups of heads, several chunks, fewer slots than chunks."""
    op, sizes, form = getattr(library, name), SIZES, _form(name)
    inputs = make_inputs(op, sizes)
    emitted, config = _emitted(name, Dims(sizes.K, sizes.V), v_tile, stages)
    assert not emitted.refused
    call = _Call(
        forward=forward_program(form, config.forward).kernels,
        backward=backward_program(form, config.backward).kernels,
        operands=tuple(o.name for o in form.operands),
        states=tuple(s.name for s in form.states),
        given=True,
        numbers={},
        heads=frozenset(o.name for o in form.operands if o.per is Per.HEAD),
        sizes={"B": sizes.B, "T": sizes.T, "HV": sizes.HV, "C": 64, "K": sizes.K, "V": sizes.V},
        sequences=tuple((b, 0, sizes.T) for b in range(sizes.B)),
        segment=0,
        emitted=emitted,
    )
    assert inputs.initial is not None
    o, *finals = Numpy.apply(call, *inputs.operands.values(), *inputs.initial)
    got = results(o, tuple(finals), inputs)
    assert_agree(got, engine_results(op, inputs, "eager"), torch.float32)
