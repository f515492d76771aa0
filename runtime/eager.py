"""The eager engine: the derived chunkwise form in torch ops, on any device and in any float dtype.

Computes in float32 (float64 for float64 operands). Sequences are laid out in padded chunks,
[sequence x value head, chunk, token, channel]; the printed kernels do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codegen.buffers import OUTPUT, BufferId, gradient
from ..codegen.config import Dims, EagerConfig, padded
from ..codegen.differentiate import GRADIENT
from ..codegen.eager import library as eager_library
from ..codegen.eager.kernel import EagerKernel, print_eager
from ..codegen.plan import Hoist, Loop, Plan, Program
from ..codegen.programs import backward_program, chunk_program, forward_program
from ..codegen.tile import Axes, Axis, Tile, TileOp
from ..dsl.errors import NotLowered
from ..dsl.ir import Per
from ..dsl.normal_form import NormalForm
from . import reference
from .call import Call
from .engines import EngineName
from .micro_steps import coarse, coarse_gradients, refined, refined_cotangent
from .tuned.artifact import Key
from .tuned.selection import call_size_of, key_here, select_config, token_loop_wins

_LONGEST_CHUNK = 64  # where nothing was tuned


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A printed kernel, ready to run."""

    printed: EagerKernel
    loop: Loop
    run: Callable[..., tuple[Tensor | float, ...]]
    buffers: Mapping[Tile, BufferId]


def supports(call: Call) -> str | None:
    """Why this engine cannot serve the call; None if it can."""
    try:
        chunk_program(call.form)
    except NotLowered as refusal:
        return str(refusal)
    return None


def forward(call: Call, config: EagerConfig | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o [B,T,HV,V] in the call's dtype; final states [N,HV,K,V] (or [N,HV,K]) in float32/64.

    `config`: instead of the one that serves such calls. Sequences so short that the token loop
    was measured to be faster run token by token.
    """
    if config is None and token_loop_wins(_key(call), call_size_of(call)):
        return forward_by_token(call)
    rows = refined(call)
    run = _Run(rows, (config or _serving(call, rows.T)).chunk)
    finals = run.execute(_forward_kernels(call.form), run.initial())
    o = coarse(call, run.tokens_back(run.buffers[OUTPUT], call.HV, (call.V,)))
    return o.to(call.dtype), tuple(finals[s.name] for s in call.form.states)


def forward_by_token(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `forward` returns, by the token loop."""
    return reference.forward(call)


def backward(
    call: Call,
    do: Tensor,
    dfinals: tuple[Tensor | None, ...],
    config: EagerConfig | None = None,
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    """Gradients of every operand, in its shape and dtype, and of the initial states."""
    rows = refined(call)
    run = _Run(rows, (config or _serving(call, rows.T)).chunk)
    run.add_token(GRADIENT + "o", refined_cotangent(call, do))
    starts = run.initial()
    for state, dfinal in zip(call.form.states, dfinals, strict=True):
        shape = run.state_shape(state.name)
        zeros = torch.zeros(shape, dtype=run.dtype, device=call.device)
        starts[GRADIENT + state.name] = (
            zeros if dfinal is None else dfinal.to(run.dtype).reshape(shape)
        )
    ends = run.execute(_backward_kernels(call.form), starts)
    gradients = coarse_gradients(call, {name: run.gradient(name) for name in call.operands})
    initials = tuple(
        None if x is None else ends[GRADIENT + s.name].to(x.dtype)
        for s, x in zip(call.form.states, call.initial, strict=True)
    )
    return gradients, initials


def _serving(call: Call, rows: int) -> EagerConfig:
    """The chunk that was tuned, else 64; no longer than sequences of `rows` need."""
    config = select_config(
        EagerConfig, _key(call), call_size_of(call), lambda: EagerConfig(_LONGEST_CHUNK)
    )
    return EagerConfig(min(config.chunk, padded(rows, 1)))


def _key(call: Call) -> Key:
    return key_here(call.form, EngineName.EAGER, call.dtype, Dims(call.K, call.V), call.device)


@lru_cache(maxsize=256)
def _forward_kernels(form: NormalForm) -> tuple[_Compiled, ...]:
    return _compile(forward_program(form, Plan(Hoist.ALL)))


@lru_cache(maxsize=256)
def _backward_kernels(form: NormalForm) -> tuple[_Compiled, ...]:
    return _compile(backward_program(form, Plan(Hoist.ALL)))


def _compile(program: Program) -> tuple[_Compiled, ...]:
    compiled = []
    for kernel in program.kernels:
        printed = print_eager(kernel)
        namespace: dict[str, object] = {
            name: getattr(eager_library, name)
            for name in vars(eager_library)
            if not name.startswith("_")
        }
        namespace |= {"torch": torch, "F": F}
        exec(compile(printed.source, f"<chunkwise eager {kernel.name}>", "exec"), namespace)
        run = namespace[kernel.name]
        assert callable(run)
        compiled.append(_Compiled(printed, kernel.loop, run, kernel.buffers))
    return tuple(compiled)


class _Run:
    """One execution: operands laid out in chunks, and the buffers that kernels fill."""

    def __init__(self, call: Call, chunk: int) -> None:
        self._call = call
        self._chunk = chunk
        self.dtype = torch.float64 if call.dtype is torch.float64 else torch.float32
        self._params = {
            name: torch.full((), value, dtype=self.dtype, device=call.device)
            for name, value in call.params.items()
        }
        self._heads: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self.buffers: dict[BufferId, Tensor] = {}
        self._index, self._rows = self._layout()
        per = {o.name: o.per for o in call.form.operands}
        for name, x in call.operands.items():
            if per[name] is Per.HEAD:
                copies = (call.N, *(1 for _ in x.shape[1:]))
                self._heads[name] = x.to(self.dtype).repeat(copies)
            else:
                self.add_token(name, x)

    def _layout(self) -> tuple[Tensor, Tensor]:
        """For each slot of the padded chunks its flat token (B*T: none), and whether it has one.

        Shapes [N, chunks * C]. A packed batch is read on the host here.
        """
        call, device = self._call, self._call.device
        if call.cu_seqlens is None:
            starts = torch.arange(call.N, dtype=torch.int64, device=device) * call.T
            lengths = torch.full((call.N,), call.T, dtype=torch.int64, device=device)
            longest = call.T
        else:
            cu = call.cu_seqlens.to(torch.int64)
            starts, lengths = cu[:-1], cu.diff()
            longest = int(lengths.max()) if call.N else 0
        slots = -(-longest // self._chunk) * self._chunk
        offset = torch.arange(slots, dtype=torch.int64, device=device)
        valid = offset[None, :] < lengths[:, None]
        index = torch.where(valid, starts[:, None] + offset[None, :], call.B * call.T)
        return index, valid

    @property
    def _chunks(self) -> int:
        return self._index.shape[1] // self._chunk

    def add_token(self, name: str, x: Tensor) -> None:
        """[B,T,heads,...] as [N*HV, chunks, C, ...]; each head repeated for its value heads."""
        call = self._call
        flat = x.to(self.dtype).reshape(call.B * call.T, *x.shape[2:])
        flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        laid = flat[self._index].movedim(2, 1)  # [N, heads, slots, ...]
        laid = laid.repeat_interleave(call.HV // x.shape[2], 1)
        self._tokens[name] = laid.reshape(call.N * call.HV, self._chunks, self._chunk, *x.shape[3:])

    def tokens_back(self, x: Tensor, heads: int, channels: tuple[int, ...]) -> Tensor:
        """The inverse of `add_token`, value heads summed into `heads` groups."""
        call = self._call
        x = x.reshape(call.N, heads, call.HV // heads, -1, *channels).sum(2).movedim(1, 2)
        flat = x.new_zeros(call.B * call.T, heads, *channels)
        flat[self._index[self._rows]] = x[self._rows]
        return flat.reshape(call.B, call.T, heads, *channels)

    def state_shape(self, name: str) -> tuple[int, ...]:
        call = self._call
        kind = next(s.kind for s in call.form.states if s.name == name)
        sizes = {"K": call.K, "V": call.V}
        return (call.N * call.HV, *(sizes[a] for a in kind.value.rstrip("'")))

    def initial(self) -> dict[str, Tensor]:
        starts = {}
        for state, x in zip(self._call.form.states, self._call.initial, strict=True):
            shape = self.state_shape(state.name)
            starts[state.name] = (
                torch.zeros(shape, dtype=self.dtype, device=self._call.device)
                if x is None
                else x.to(self.dtype).reshape(shape)
            )
        return starts

    def execute(
        self, kernels: tuple[_Compiled, ...], starts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run the kernels in order; returns the last value of every carry, [N,HV,...]."""
        ends: dict[str, Tensor] = {}
        for kernel in kernels:
            if kernel.loop is Loop.PARALLEL:
                results = kernel.run(
                    *(self._argument(kernel, t, None, {}) for t in _tiles(kernel)),
                    *self._context(None),
                )
                for (name, t), x in zip(kernel.printed.stores, results, strict=True):
                    self.buffers[name] = self._filled(x, t.axes, self._chunks)
            else:
                ends |= self._scan(kernel, starts)
        call = self._call
        return {n: x.reshape(call.N, call.HV, *x.shape[1:]) for n, x in ends.items()}

    def _scan(self, kernel: _Compiled, starts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stored, carried = kernel.printed.stores, kernel.printed.ends
        tiles = [t for _, t in (*stored, *carried)]
        carry = {n: starts[n] for n, _ in carried}
        series: list[list[Tensor]] = [[] for _ in stored]
        steps = range(self._chunks)
        for n in steps if kernel.loop is Loop.FORWARD else reversed(steps):
            results = kernel.run(
                *(self._argument(kernel, t, n, carry) for t in _tiles(kernel)), *self._context(n)
            )
            full = [self._filled(x, t.axes) for t, x in zip(tiles, results, strict=True)]
            for own, x in zip(series, full[: len(stored)], strict=True):
                own.append(x)
            carry = {n: x for (n, _), x in zip(carried, full[len(stored) :], strict=True)}
        for (name, t), own in zip(stored, series, strict=True):
            ordered = own if kernel.loop is Loop.FORWARD else own[::-1]
            # of no chunks there is nothing to stack
            self.buffers[name] = (
                torch.stack(ordered, 1) if ordered else self._filled(0.0, t.axes, self._chunks)
            )
        return carry

    def _filled(self, x: Tensor | float, axes: Axes, *chunks: int) -> Tensor:
        """A kernel's result in full, `[N*HV, *chunks, *axes]`; a view where it is constant."""
        call = self._call
        size = {Axis.I: self._chunk, Axis.J: self._chunk, Axis.K: call.K, Axis.V: call.V}
        x = torch.as_tensor(x, dtype=self.dtype, device=call.device)
        return x.expand(call.N * call.HV, *chunks, *(size[a] for a in axes))

    def _context(self, n: int | None) -> tuple[object, ...]:
        call = self._call
        rows = self._rows.reshape(call.N, 1, self._chunks, self._chunk)
        rows = rows.expand(-1, call.HV, -1, -1).reshape(call.N * call.HV, self._chunks, -1)
        slots = self._index.shape[1]
        at = torch.arange(slots, dtype=torch.int64, device=call.device).reshape(self._chunks, -1)
        rows, at = (rows, at) if n is None else (rows[:, n], at[n])
        return (rows, at, call.K, call.V, self.dtype)

    def _argument(
        self, kernel: _Compiled, t: Tile, n: int | None, carry: Mapping[str, Tensor]
    ) -> Tensor:
        if t in kernel.buffers:
            x = self.buffers[kernel.buffers[t]]
            return x if n is None else x[:, n]
        name = str(t.attrs[0])
        if t.op is TileOp.PARAM:
            return self._params[name]
        if t.op is TileOp.HEAD:
            return self._heads[name][:, None] if n is None else self._heads[name]
        if t.op is TileOp.CARRY:
            return carry[name]
        return self._tokens[name] if n is None else self._tokens[name][:, n]

    def gradient(self, name: str) -> Tensor:
        """The gradient of an operand in its own shape, summed over what shares it."""
        call, x = self._call, self._call.operands[name]
        g = self.buffers.get(gradient(name))
        if g is None:
            return torch.zeros_like(x)
        if name in self._heads:
            g = g.reshape(call.N, call.HV, self._chunks, *x.shape[1:]).sum((0, 2))
        else:
            g = self.tokens_back(g, x.shape[2], x.shape[3:])
        return g.to(x.dtype)


def _tiles(kernel: _Compiled) -> list[Tile]:
    return [t for _, t in kernel.printed.arguments]
