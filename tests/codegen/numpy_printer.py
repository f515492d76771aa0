"""A fourth target, to prove that TiledKernel says everything: kernels as plain NumPy loops.

A value has four axes, I, J, K and V, of length 1 where its tile has none. Nothing is chosen here:
loops, order, dtypes and masks are the kernel's. An index that no mask takes out must exist.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from chunkwise.codegen import interface, tiled

Numbers = Any
_AXES = "IJKV"
_FUNCTIONS: dict[str, Callable[..., Numbers]] = {
    "ADD": np.add, "SUB": np.subtract, "MUL": np.multiply, "DIV": np.divide, "NEG": np.negative,
    "MAXIMUM": np.maximum, "MINIMUM": np.minimum, "AT_LEAST": np.maximum, "AT_MOST": np.minimum,
    "EXP": np.exp, "LOG": np.log, "EXPM1": np.expm1, "LOG1P": np.log1p, "TANH": np.tanh,
    "SQRT": np.sqrt, "ABS": np.abs,
    "RSQRT": lambda x: 1 / np.sqrt(x), "SIGMOID": lambda x: 1 / (1 + np.exp(-x)),
    "SOFTPLUS": lambda x: np.logaddexp(x, 0), "LOGSIGMOID": lambda x: -np.logaddexp(-x, 0),
}  # fmt: skip
_KEPT = {"LOWER": np.greater_equal, "STRICT": np.greater, "DIAGONAL": np.equal}


@dataclass
class Memory:
    """The tensors of a call. `sequences`: batch, first token and length of each.

    Operands are [B,T,H,...] or [HV,...], states [N,HV,...], buffers as `Buffer.shape` says.
    """

    HV: int
    sequences: list[tuple[int, int, int]]
    operands: Mapping[str, Numbers]
    numbers: Mapping[str, float]
    initial: Mapping[str, Numbers | None]
    segment: int = 0  # chunks of a segment, where scans run on those
    final: dict[str, Numbers] = field(default_factory=dict)
    buffers: dict[object, tuple[interface.Buffer, Numbers]] = field(default_factory=dict)


def run(kernel: tiled.TiledKernel, memory: Memory) -> None:
    """All programs of a kernel, one after the other."""
    chunks = segments = 0
    for n, (_, _, length) in enumerate(memory.sequences):
        count = -(-length // kernel.chunk)
        parallel = kernel.scan.name == "PARALLEL"
        size = 1 if parallel else memory.segment if kernel.segments else max(count, 1)
        starts = range(0, count if parallel else max(count, 1), size)
        own = [range(m, min(m + size, count)) for m in starts]
        for m, h, part in itertools.product(*map(range, (len(own), memory.HV, kernel.v_parts))):
            _Program(kernel, memory, n, h, part, chunks, segments, m, len(own)).run(own[m])
        chunks, segments = chunks + count, segments + len(own)


@dataclass
class _Program:
    """One program: of a sequence, or its chunk or segment, a value head and a part of V."""

    kernel: tiled.TiledKernel
    memory: Memory
    n: int
    h: int
    part: int
    before: int  # chunks of the sequences before, and segments
    segments_before: int
    segment: int  # of `segments` of the sequence
    segments: int
    values: dict[object, Numbers] = field(default_factory=dict)

    def run(self, chunks: range) -> None:
        kernel, parallel = self.kernel, self.kernel.scan.name == "PARALLEL"
        self.backwards = kernel.scan.name == "REVERSE"
        self.sequence, self.first, self.length = self.memory.sequences[self.n]
        turns = range(kernel.turns) if parallel else chunks[::-1] if self.backwards else chunks
        inside = [((n, chunks[0]) if parallel else (0, n), kernel.inside) for n in turns]
        around = (0, chunks[0] if parallel else 0)
        for place, statements in [(around, kernel.before), *inside, (around, kernel.after)]:
            self.turn, self.chunk = place
            for s in statements:
                getattr(self, type(s).__name__.lower())(s)

    def positions(self, axis: Any, axes: Any) -> tuple[Numbers, Numbers]:
        """Of a tile's entries along an axis: where they lie, and whether they exist."""
        entries = np.arange(size := self.kernel.extents[axis])
        if axis.name == "J" and any(a.name == "I" for a in axes):  # columns, of as many rows
            return entries, entries >= 0
        if axis.name in "IJ":
            rows = self.chunk * size + entries
            return self.first + rows, rows < self.length
        part = self.part if axis.name == "V" else 0
        at = entries + size * (self.turn if axis is self.kernel.channels else part)
        return at, at < getattr(self.kernel.dims, axis.name)

    def cells(self, axes: Any, mask: Any) -> tuple[Any, Any]:
        """The indices of a tile's entries in the tile and in memory, but those masked out."""
        found = [self.positions(axis, axes) for axis in axes]
        kept = [ok if a in mask else ok | True for a, (_, ok) in zip(axes, found, strict=True)]
        outside = [at[ok] for (at, _), ok in zip(found, kept, strict=True)]
        return np.ix_(*map(np.flatnonzero, kept)), np.ix_(*outside)

    def shaped(self, axes: Any, x: Numbers) -> Numbers:
        """`x`, which has the axes of a tile, with all four."""
        lengths = {a.name: n for a, n in zip(axes, x.shape, strict=True)}
        return x.reshape([lengths.get(a, 1) for a in _AXES])

    def fetched(self, view: Numbers, axes: Any, mask: Any, dtype: Any) -> Numbers:
        tile = np.zeros([self.kernel.extents[a] for a in axes], dtype)
        inside, outside = self.cells(axes, mask)
        tile[inside] = view[outside]
        return self.shaped(axes, tile)

    def put(self, view: Numbers, axes: Any, mask: Any, x: Numbers) -> None:
        lengths = {a.name: self.kernel.extents[a] for a in axes}
        x = np.broadcast_to(x, [lengths.get(a, 1) for a in _AXES]).reshape([*lengths.values()])
        inside, outside = self.cells(axes, mask)
        view[outside] = x[inside]

    def buffer(self, name: object) -> Numbers:
        """The part of a buffer that belongs to this head: of the batch, or of this chunk."""
        buffer, x = self.memory.buffers[name]
        row = (self.sequence, slice(None)) if "T" in buffer.shape else (self.before + self.chunk,)
        return x[(*row, self.h, ...)]

    def load(self, s: tiled.Load) -> None:
        if s.source.name == "NUMBER":
            view = np.array(self.memory.numbers[s.of])
        elif s.source.name == "BUFFER":
            view = self.buffer(s.of)
        elif s.source.name == "HEADS":
            view = self.memory.operands[s.of][self.h, ...]
        else:
            view = self.memory.operands[s.of]
            view = view[self.sequence, :, self.h // (self.memory.HV // view.shape[2])]
            view = view[self.first + self.chunk, ...] if self.kernel.by_token else view
        self.values[s.value] = self.fetched(view, s.value.axes, s.mask, s.dtype.value)

    def zero(self, s: tiled.Zero) -> None:
        self.values[s.value] = np.float32(0)

    def store(self, s: tiled.Store) -> None:
        if not (s.once and self.part):
            self.put(self.buffer(s.buffer), s.axes, s.mask, self.use(s.use))

    def clean(self, s: tiled.Clean) -> None:
        self.values[s.value] = self.use(tiled.Use(s.value, s.value.axes, (s.axis,)))

    def compute(self, s: tiled.Compute) -> None:
        result = self.evaluate(s.value, [self.use(u) for u in s.args]).astype(np.float32)
        self.values[s.value] = self.values[s.value] + result if s.adds else result

    def product(self, s: tiled.Product) -> None:
        left, right = (self.use(u).astype(s.dtype.value) for u in (s.left, s.right))
        terms = left.astype(np.float32) * right.astype(np.float32)
        sums = terms.sum(_AXES.index(s.over.name), keepdims=True)
        start = self.values[s.value] if s.adds else self.use(s.start) if s.start else 0
        self.values[s.value] = start + sums

    def use(self, u: tiled.Use) -> Numbers:
        """A value in float32, its axes called as they are there, zero where it must be."""
        t = u.value
        if t.op.name in ("CONST", "EXTENT"):
            of = t.attrs[0] if t.op.name == "CONST" else getattr(self.kernel.dims, t.attrs[0].name)
            return np.full((1, 1, 1, 1), of, np.float32)
        x = self.values[t].astype(np.float32)
        x = x if x.ndim == 0 or u.axes[:1] == t.axes[:1] else x.swapaxes(0, 1)
        for axis in u.clean:
            _, exists = self.positions(axis, u.axes)
            x = np.where(self.shaped((axis,), exists), x, np.float32(0))
        return x

    def begin(self, s: tiled.Begin) -> None:
        given = self.memory.initial[s.value.attrs[0]] if s.from_call else None
        view = np.zeros([getattr(self.kernel.dims, a.name) for a in s.value.axes])
        view = np.identity(len(view)) if s.identity else view
        view = view if given is None else self.state(given)
        self.values[s.value] = self.fetched(view, s.value.axes, s.mask, np.float32)

    def state(self, x: Numbers) -> Numbers:
        """A sequence's and head's state in the call, as the kernel holds it."""
        own = x[self.n, self.h, ...]
        return own.T if self.kernel.transposed else own

    def ended(self, name: object, m: int) -> Numbers:
        """What segment `m` of the sequence ends with."""
        return self.memory.buffers[name][1][self.segments_before + m, self.h, ...]

    def arrive(self, s: tiled.Arrive) -> None:
        after = range(self.segments - 1, self.segment, -1)
        before = after if self.backwards else range(self.segment)
        for m, c in itertools.product(before, s.carries):
            axes, state = c.value.axes, self.values[c.value]
            end, factor = self.ended(c.end, m), self.ended(c.factor, m) if c.factor else None
            if c.is_matrix:
                factor = factor.T if self.backwards else factor
                state[0, 0, : len(factor)] = factor @ state[0, 0, : len(factor)]
            elif factor is not None:
                mask = tuple(a for a in c.mask if a in c.axes)
                state = state * np.exp(self.fetched(factor, c.axes, mask, np.float32))
            self.values[c.value] = state + self.fetched(end, axes, c.mask, np.float32)

    def advance(self, s: tiled.Advance) -> None:
        self.values |= {start: self.use(use) for start, use in s.ends}

    def finish(self, s: tiled.Finish) -> None:
        last = 0 if self.backwards else self.segments - 1
        if not ((s.once and self.part) or (s.last and self.segment != last)):
            final = None if s.end else self.state(self.memory.final[s.value.attrs[0]])
            view = self.ended(s.end, self.segment) if s.end else final
            self.put(view, s.value.axes, s.mask, self.values[s.value])

    def evaluate(self, t: Any, args: list[Numbers]) -> Numbers:
        x, attrs, size = args[0], t.attrs, self.kernel.chunk
        i, j, _, _ = np.ogrid[:size, :size, :1, :1]
        rows = self.chunk * size + i
        simple: dict[str, Callable[[], Numbers]] = {
            "MAP": lambda: _FUNCTIONS[attrs[0].name](*args),
            "STEP": lambda: x > 0,
            "ROUND": lambda: np.rint(x),
            "ROWS": lambda: np.where(rows < self.length, x, 0),
            "PHASE": lambda: np.where(rows % attrs[1] == attrs[0], x, 0),
            "MASK": lambda: np.where(_KEPT[attrs[0].name](i, j), x, 0),
            "SUM": lambda: x.sum(tuple(_AXES.index(a.name) for a in attrs[0]), keepdims=True),
            "CUMSUM": lambda: _sums(x, *attrs),
            "FLOOR": lambda: np.maximum(x, attrs[0]),
            "FLUSH": lambda: np.where(x < attrs[0], 0, x),
            "PRODUCT": lambda: np.einsum("abkv,bckv->ackv", *map(np.swapaxes, args, (0, 0), attrs)),
            "SUBSTITUTE": lambda: _substituted(*args, *attrs),
            "INVERSE": lambda: np.linalg.inv(np.eye(size) + x[..., 0, 0])[..., None, None],
        }
        if t.op.name in simple:
            return simple[t.op.name]()
        *factors, g = args if t.op.name == "DECAY" else (*args[:-3], args[-1])
        upper = i >= j if t.op.name == "DECAY" and attrs[0].name == "LOWER" else i > j
        decay = np.where(upper, np.exp(_sums(np.where(i > j, g, 0), False, attrs[-1])), 0)
        product = np.multiply.reduce(np.broadcast_arrays(decay, *factors[:3]))
        if t.op.name == "DECAYED_CROSSING":
            return np.where(i > j, _sums(product, True, attrs[-1]), 0).sum(1, keepdims=True)
        over = int(attrs[0].name == "I") if t.op.name == "DECAYED_APPLY" else 2
        return product if t.op.name == "DECAY" else product.sum(over, keepdims=True)


def _substituted(lower: Numbers, b: Numbers, x: Numbers, transposed: bool) -> Numbers:
    """U = x - b (L U) from the first row on, or U = x - L^T (b U) from the last."""
    u = np.array(np.broadcast_to(x, np.broadcast_shapes(x.shape, b.shape)))
    for n in range(len(u))[:: -1 if transposed else 1]:
        row = lower[n, :n].reshape(-1, 1, 1, 1)
        if transposed:
            u[:n] -= row * (b[n] * u[n])
        else:
            u[n] -= b[n] * (row * u[:n]).sum(0)
    return u


def _sums(x: Numbers, reverse: bool, exclusive: bool) -> Numbers:
    x = x[::-1] if reverse else x
    x = np.concatenate([np.zeros_like(x[:1]), x[:-1]]) if exclusive else x
    return np.cumsum(x, axis=0)[::-1] if reverse else np.cumsum(x, axis=0)
