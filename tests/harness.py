"""Inputs for any recurrence, and its results on an engine and in the float64 token loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

import chunkwise as cw
import torch
from chunkwise.autotune import tolerance
from chunkwise.dsl import oracle
from chunkwise.dsl.ir import Kind, Per
from chunkwise.dsl.normal_form import Operand
from chunkwise.runtime.inputs import (
    Extremes,
    contracted,
    draw,
    draw_states,
    kinds_only,
    ranges,
    usual_params,
)
from torch import Tensor


class Gates(Enum):
    """How hard the gates are."""

    USUAL = "a typical initialisation"
    HARD = "-20 per token, mixed with almost 0; steps of 0, 1 and 2; keys that repeat"


class Layout(Enum):
    """How operands lie in memory."""

    CONTIGUOUS = "contiguous"
    # the last axis contiguous: the kernels take the view; a read beyond it is NaN
    VIEWS = "views of larger tensors that hold NaN"
    COPIED = "transposed, so that the last axis has a stride"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a call; `lengths` packs sequences into one row of T = their sum."""

    B: int = 2
    T: int = 19
    H: int = 2
    HV: int = 2
    K: int = 8
    V: int = 8
    micro: int = 2
    lengths: tuple[int, ...] | None = None
    initial: bool = False
    dtype: torch.dtype = torch.float64
    gate_dtype: torch.dtype | None = None  # of per-head operands, Scalars and Key gates
    device: str = "cpu"
    gates: Gates = Gates.USUAL
    layout: Layout = Layout.CONTIGUOUS

    @property
    def N(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)

    @property
    def letters(self) -> dict[str, int]:
        """By the letters of axes."""
        of_call = {"B": self.B, "T": self.T, "n": self.micro, "N": self.N}
        return {**of_call, "H": self.H, "HV": self.HV, "K": self.K, "V": self.V}

    @property
    def extremes(self) -> Extremes:
        """What hard gates are: df is d(log f) / f, and d(log f) a difference of what is large."""
        return Extremes(2.0, 2e-9 if self.dtype is torch.float64 else 0.01)

    def packed(self, *lengths: int) -> Sizes:
        return replace(self, B=1, T=sum(lengths), lengths=lengths)


@dataclass(slots=True)
class Inputs:
    """The arguments of one call, all leaves that require gradients."""

    operands: dict[str, Tensor]
    initial: tuple[Tensor | None, ...] | None
    cu_seqlens: Tensor | None
    params: dict[str, float] = field(default_factory=dict)

    def micro_of(self, op: cw.Recurrence) -> int:
        """The length of tuples."""
        return next((self.operands[x.name].shape[2] for x in op.declaration.operands if x.micro), 1)

    @property
    def leaves(self) -> dict[str, Tensor]:
        given = enumerate(self.initial or ())
        states = {f"initial {i}": s for i, s in given if s is not None}
        return {**self.operands, **states}

    def copied(self, device: str, dtype: torch.dtype) -> Inputs:
        def copy(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype, copy=True).requires_grad_()

        return Inputs(
            {n: copy(x) for n, x in self.operands.items()},
            None
            if self.initial is None
            else tuple(x if x is None else copy(x) for x in self.initial),
            None if self.cu_seqlens is None else self.cu_seqlens.to(device),
            self.params,
        )

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments of a call."""
        initial: object = self.initial
        if self.initial is not None and len(self.initial) == 1:
            initial = self.initial[0]
        return {"initial_state": initial, "cu_seqlens": self.cu_seqlens, **self.params}


def make_inputs(op: cw.Recurrence, sizes: Sizes, seed: int = 0) -> Inputs:
    """Operands in their usual ranges: gates below 0, steps in (0, 1), keys of unit length."""
    random, d, hard = torch.Generator().manual_seed(seed), op.declaration, sizes.gates is Gates.HARD
    micro = sizes.micro if d.has_micro else 1
    # a step that only the reference engine runs has no normal form
    form = None if d.any_step else d.normal_form(micro)
    params = {} if form is None else usual_params(form)
    found = kinds_only(d) if form is None else ranges(form, params)
    drawn = draw(d, found, sizes.letters, random, sizes.extremes if hard else None)
    states = draw_states(d, found, sizes.letters, random) if sizes.initial else None
    cu_seqlens = None
    if sizes.lengths is not None:
        cu_seqlens = torch.tensor([0, *sizes.lengths]).cumsum(0).to(sizes.device, torch.int32)
    if form is not None:
        repeat, at = hard and sizes.T > 3, (sizes.letters, cu_seqlens)
        drawn = contracted(form, found, drawn, params, *at, repeating=repeat)
    gates = {name for name, _ in found.gates}
    operands = {}
    for x in op.declaration.operands:
        gate = x.kind is Kind.SCALAR or x.per is Per.HEAD or x.name in gates
        dtype = sizes.gate_dtype if gate and sizes.gate_dtype is not None else sizes.dtype
        operands[x.name] = _laid_out(drawn[x.name].to(sizes.device, dtype), sizes.layout, x)
    initial = None
    if states is not None:
        dtype = sizes.dtype if sizes.dtype is torch.float64 else torch.float32
        initial = tuple(x.to(sizes.device, dtype).requires_grad_() for x in states)
    return Inputs(operands, initial, cu_seqlens)


def _laid_out(value: Tensor, layout: Layout, x: Operand) -> Tensor:
    if x.per is Per.TOKEN and layout is Layout.COPIED:
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
        if value.ndim == 4:
            value = torch.stack((value, value), dim=-1)[..., 0]
    if x.per is Per.TOKEN and layout is Layout.VIEWS:
        padded = value.new_full([n + 3 for n in value.shape], torch.nan)
        view = padded[tuple(slice(1, n + 1) for n in value.shape)]
        value = view.copy_(value)
    return value.requires_grad_()


def wobbled(inputs: Inputs, seed: int = 2) -> Inputs:
    """The operands in float64, each number off by up to half a unit in its last place.

    Zeros, which may lie at a corner, too: by what float64 keeps of a sum with it.
    """
    random, signs = (torch.Generator().manual_seed(seed + n) for n in (0, 1000))

    def moved(x: Tensor) -> Tensor:
        y = tolerance.wobbled(x, random)
        sides = torch.randint(2, y.shape, generator=signs).to(y.device) * 2.0 - 1.0
        return torch.where(y == 0, 1e-12 * sides, y).requires_grad_()

    operands = {n: moved(x) for n, x in inputs.operands.items()}
    initial = inputs.initial
    if initial is not None:
        initial = tuple(x if x is None else moved(x) for x in initial)
    return replace(inputs, operands=operands, initial=initial)


Laid = Callable[[Tensor], Tensor]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def results(
    o: Tensor,
    finals: tuple[Tensor, ...],
    inputs: Inputs,
    seed: int = 1,
    dtype: torch.dtype | None = None,
    laid: Laid = _as_it_is,
) -> dict[str, Tensor]:
    """The output, the final states, and the gradients of a random loss of both.

    `dtype`: that of the output whose gradient is compared with this one, if not o's own: the
    gradient of o is given in it, to both. `laid`: lays cotangents out in memory.
    """
    random = torch.Generator().manual_seed(seed)
    outputs = {"o": o, **{f"final {i}": s for i, s in enumerate(finals)}}
    # an output that nothing reaches (T = 0, no initial state) has no gradient to take
    reached = [y for y in outputs.values() if y.requires_grad]
    weights = {
        n: torch.randn(y.shape, generator=random, dtype=torch.float64) for n, y in outputs.items()
    }
    weights["o"] = weights["o"].to(dtype or o.dtype)
    grads = dict.fromkeys(inputs.leaves)
    if reached:
        taken = torch.autograd.grad(
            reached,
            list(inputs.leaves.values()),
            [laid(weights[n].to(y)) for n, y in outputs.items() if y.requires_grad],
            allow_unused=True,
        )
        grads = dict(zip(inputs.leaves, taken, strict=True))
    zeros = {n: torch.zeros_like(x) for n, x in inputs.leaves.items()}
    named = {f"d{n}": zeros[n] if g is None else g for n, g in grads.items()}
    return {n: y.detach().cpu() for n, y in {**outputs, **named}.items()}


def oracle_results(op: cw.Recurrence, inputs: Inputs, laid: Laid = _as_it_is) -> dict[str, Tensor]:
    """The same of the float64 token loop on the CPU, from the same numbers."""
    values = (x.name for x in op.declaration.operands if x.kind is Kind.VALUE)
    lead = next((inputs.operands[n].dtype for n in values), None)
    inputs = inputs.copied("cpu", torch.float64)
    micro = inputs.micro_of(op)
    o, finals = oracle.run(
        op.declaration.step(micro),
        inputs.operands,
        inputs.params,
        inputs.initial,
        inputs.cu_seqlens,
    )
    return results(o, finals, inputs, dtype=lead, laid=laid)


def engine_results(
    op: cw.Recurrence, inputs: Inputs, engine: str, laid: Laid = _as_it_is
) -> dict[str, Tensor]:
    """The same of a call."""
    o, finals = op(**inputs.operands, **inputs.options, engine=engine, output_final_state=True)
    if isinstance(o, tuple):  # side by side, as the oracle has them
        o = oracle.joined(o, op.declaration.step(inputs.micro_of(op)))
    states = finals if isinstance(finals, tuple) else (finals,)
    return results(o, states, inputs, laid=laid)
