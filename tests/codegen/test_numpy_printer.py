"""Kernels as data say everything: a printer that chooses nothing computes what the engines do."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunkwise import library
from chunkwise.codegen.buffers import gradient, output
from chunkwise.codegen.config import Dims, Precision, Space, Tiles
from chunkwise.codegen.differentiate import GRADIENT
from chunkwise.codegen.interface import Dtype, Signature, Storage, stored
from chunkwise.codegen.plan import Kernel, Plan, backward_plans, forward_plans
from chunkwise.codegen.programs import (
    backward_program,
    chunk_program,
    forward_program,
    transition_of,
)
from chunkwise.codegen.tile import Axis
from chunkwise.codegen.tiling import tile
from chunkwise.codegen.token import row_names, token_kernel
from chunkwise.dsl.ir import Kind, Per
from chunkwise.dsl.normal_form import Operand, has_entries_apart
from torch import Tensor
from torch.nn.functional import pad

from tests.classes import costly
from tests.codegen import numpy_printer
from tests.codegen.test_agreement import NAMES
from tests.harness import Inputs, Sizes, engine_results, make_inputs, results, wobbled
from tests.tolerances import assert_agree

C = 16
OUTPUT = output("o")
_STORAGE = Storage(wide=False, transposed=False)
# tails of sequences and of channels, parts of V and loops over it or K, groups of heads
PACKED = Sizes(H=1, HV=2, K=20, V=18, initial=True, dtype=torch.float32).packed(C + 3, 0, 5)
DENSE = Sizes(B=2, T=C, H=2, HV=2, K=16, V=16, dtype=torch.float32)


@dataclass(frozen=True)
class Call:
    """Kernels of both directions for one call over rows."""

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    operands: tuple[str, ...]  # then come the states
    states: tuple[str, ...]
    given: bool  # whether the call gives initial states
    numbers: Mapping[str, float]
    heads: frozenset[str]  # operands that are per head
    sizes: Mapping[str, int]
    sequences: tuple[tuple[int, int, int], ...]
    segment: int
    in_memory: bool = False

    def run(
        self, kernels: tuple[Kernel, ...], operands: dict[str, Any], states: dict[str, Any]
    ) -> numpy_printer.Memory:
        sizes, C = dict(self.sizes), self.sizes["C"]
        counts = [-(-length // C) for _, _, length in self.sequences]
        sizes["chunks"] = sum(counts)
        sizes["segments"] = sum(max(1, -(-n // max(self.segment, 1))) for n in counts)
        memory = numpy_printer.Memory(
            sizes["HV"], list(self.sequences), operands, self.numbers, states, self.segment
        )
        signature = Signature(Dims(sizes["K"], sizes["V"]), Dtype.FLOAT32, (), Precision.IEEE)
        for kernel in kernels:
            for buffer in stored(kernel, signature, _STORAGE):
                room = np.full([sizes[n] for n in buffer.shape], np.nan, buffer.dtype.value)
                memory.buffers[buffer.name] = buffer, room
            for c in kernel.carried:
                names = "VK" if kernel.transposed else "KV"  # of the channels of a state
                size = {axis: sizes[n] for axis, n in zip((Axis.K, Axis.V), names, strict=True)}
                axes = c.start.axes[::-1] if kernel.transposed else c.start.axes
                channels = [size[a] for a in axes]
                shape = [len(self.sequences), sizes["HV"], *channels]
                memory.final[c.name] = np.full(shape, np.nan, np.float32)
            self.launch(kernel, signature, memory)
        return memory

    def launch(self, kernel: Kernel, signature: Signature, memory: numpy_printer.Memory) -> None:
        """Run one kernel, whose buffers and last states are there."""
        C = self.sizes["C"]
        tiles = Tiles(C, v=6, space=Space.MEMORY) if self.in_memory else Tiles(C, v=16, k=16)
        numpy_printer.run(tile(kernel, signature, tiles), memory)


class Numpy(torch.autograd.Function):
    """What an engine does: the output and final states of rows, and gradients."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = [x.detach().numpy() for x in tensors]
        count = len(call.operands)
        operands = dict(zip(call.operands, arrays, strict=False))
        states = dict(zip(call.states, arrays[count:], strict=True))
        given = states if call.given else dict.fromkeys(states)
        memory = call.run(call.forward, operands, given)
        ctx.saved = call, operands, given
        o = memory.buffers[output("o")][1].reshape([call.sizes[n] for n in ("B", "T", "HV", "V")])
        return (torch.from_numpy(o), *(torch.from_numpy(memory.final[s]) for s in call.states))

    @staticmethod
    def backward(ctx: Any, do: Tensor, *dfinals: Tensor) -> tuple[Tensor | None, ...]:
        call, operands, states = ctx.saved
        starts = {GRADIENT + s: d.numpy() for s, d in zip(call.states, dfinals, strict=True)}
        inputs = {**operands, GRADIENT + "o": do.numpy()}
        memory = call.run(call.backward, inputs, {**states, **starts})
        found: list[Tensor | None] = [None]
        for name, x in operands.items():
            if gradient(name) not in memory.buffers:
                found.append(torch.zeros(x.shape))
                continue
            g = memory.buffers[gradient(name)][1]
            if name in call.heads:
                g = g.sum(0)
            else:
                B, T, HV, *channels = g.shape
                g = g.reshape(B, T, x.shape[2], HV // x.shape[2], *channels).sum(3)
            found.append(torch.from_numpy(g))
        return (*found, *(torch.from_numpy(memory.final[GRADIENT + s]) for s in call.states))


def _rows(o: Operand, x: Tensor, n: int) -> Tensor:
    """An operand as rows, `n` for each token."""
    if o.micro:
        return pad(x, (*(0, 0) * (x.ndim - 3), 0, n - x.shape[2])).flatten(1, 2)
    return x if n == 1 or o.per is Per.HEAD else x.repeat_interleave(n, dim=1)


def _computed(
    op: Any,
    sizes: Sizes,
    inputs: Inputs,
    plans: tuple[Plan, Plan],
    *,
    segments: bool,
    in_memory: bool,
) -> dict[str, Tensor]:
    """Outputs, states and gradients, by kernels that NumPy runs."""
    declared = op.declaration
    form = declared.normal_form(sizes.micro if declared.has_micro else 1)
    n = len(form.micro_steps)
    lengths = [n * length for length in sizes.lengths or ()]
    starts = np.cumsum([0, *lengths]).tolist()
    packed = tuple((0, a, length) for a, length in zip(starts, lengths, strict=False))
    states = inputs.initial or tuple(
        torch.zeros(sizes.N, sizes.HV, sizes.K, *((sizes.V,) if s.kind is Kind.STATE else ()))
        for s in form.states
    )
    tensors = dict(inputs.operands)
    if has_entries_apart(form):
        for o in declared.operands:
            if o.micro:
                x = tensors.pop(o.name)
                tensors |= dict(zip(row_names(o, sizes.micro), x.unbind(2), strict=True))
    call = Call(
        forward=forward_program(form, plans[0], segments=segments).kernels,
        backward=backward_program(form, plans[1], segments=segments).kernels,
        operands=tuple(tensors),
        states=tuple(s.name for s in form.states),
        given=inputs.initial is not None,
        numbers={p.name: p.default for p in declared.params},
        heads=frozenset(o.name for o in form.operands if o.per is Per.HEAD),
        sizes={
            **{"B": sizes.B, "T": sizes.T * n, "HV": sizes.HV, "C": C},
            **{"K": sizes.K, "V": sizes.V},
        },
        sequences=packed or tuple((b, 0, sizes.T * n) for b in range(sizes.B)),
        segment=int(segments),
        in_memory=in_memory,
    )
    apart = {n: x for n, x in tensors.items() if n not in inputs.operands}
    whole = {o.name: _rows(o, tensors[o.name], n) for o in form.operands if o.name in tensors}
    rows = [{**apart, **whole}[name] for name in tensors]
    o, *finals = Numpy.apply(call, *rows, *states)
    return results(o[:, n - 1 :: n], tuple(finals), inputs)


# slots that hold almost the same; logarithms of what may be near 0
ILL_CONDITIONED = {"abc", "preconditioned_delta", "preconditioned_kda"}


def _check(
    name: str, sizes: Sizes, plan: int, *, segments: bool = False, in_memory: bool = False
) -> None:
    op = getattr(library, name)
    declared = op.declaration
    body = chunk_program(declared.normal_form(sizes.micro if declared.has_micro else 1))
    plans = forward_plans(body)[plan], backward_plans(body)[plan]
    inputs = make_inputs(op, sizes)
    with np.errstate(divide="ignore", invalid="ignore"):  # in padding, which is cleaned
        got = _computed(op, sizes, inputs, plans, segments=segments, in_memory=in_memory)
    near = engine_results(op, wobbled(inputs), "eager") if name in ILL_CONDITIONED else None
    assert_agree(got, engine_results(op, inputs, "eager"), torch.float32, near=near)


@pytest.mark.parametrize("plan", [0, -1])
@pytest.mark.parametrize("name", costly(NAMES))
def test_packed_with_states_and_groups_of_heads(name: str, plan: int) -> None:
    _check(name, PACKED, plan)


@pytest.mark.parametrize("name", costly(NAMES))
def test_dense(name: str) -> None:
    _check(name, DENSE, 1)


@pytest.mark.parametrize("plan", [0, -1])
@pytest.mark.parametrize("name", costly(NAMES))
def test_tiles_in_memory(name: str, plan: int) -> None:
    _check(name, PACKED, plan, in_memory=True)


def _is_scanned_in_segments(name: str) -> bool:
    declared = getattr(library, name).declaration
    form = declared.normal_form(declared.default_micro)
    return transition_of(form, Dims(PACKED.K, PACKED.V)) is not None


@pytest.mark.parametrize("name", [n for n in NAMES if _is_scanned_in_segments(n)])
def test_scans_of_segments(name: str) -> None:
    _check(name, PACKED, 1, segments=True)


@pytest.mark.parametrize("name", costly(NAMES))
def test_one_token_at_a_time(name: str) -> None:
    op = getattr(library, name)
    declared, sizes = op.declaration, Sizes(B=2, T=3, H=1, HV=2, K=20, V=18, dtype=torch.float32)
    micro = sizes.micro if declared.has_micro else 1
    step = declared.step(micro)
    inputs = make_inputs(op, sizes)
    operands = {}
    for o in step.operands:
        x = inputs.operands[o.name].detach()
        for m, row in enumerate(row_names(o, micro)):
            operands[row] = (x[:, :, m] if o.micro else x).numpy()
    call = Call(
        forward=(token_kernel(step),),
        backward=(),
        operands=tuple(operands),
        states=tuple(s.name for s in step.states),
        given=False,
        numbers={p.name: p.default for p in declared.params},
        heads=frozenset(),
        sizes={"B": 2, "T": 3, "HV": 2, "C": 1, "K": 20, "V": 18},
        sequences=((0, 0, 3), (1, 0, 3)),
        segment=0,
    )
    memory = call.run(call.forward, operands, dict.fromkeys(call.states))
    o, finals = op(**inputs.operands, engine="reference", output_final_state=True)
    finals = finals if isinstance(finals, tuple) else (finals,)
    want = {"o": o.detach(), **{s: x.detach() for s, x in zip(call.states, finals, strict=True)}}
    got = {"o": memory.buffers[output("o")][1].reshape(o.shape), **memory.final}
    assert_agree({n: torch.from_numpy(x) for n, x in got.items()}, want, torch.float32)


def test_it_sees_nothing_but_the_data() -> None:
    source = Path(numpy_printer.__file__).read_text()
    assert source.count("\n") < 270
    imported = {
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    ours = {x for x in imported if x.startswith(("chunkwise", "tests", "torch", "triton"))}
    assert ours == {"chunkwise.codegen.interface", "chunkwise.codegen.tiled"}
