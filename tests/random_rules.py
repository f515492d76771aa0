"""Hypothesis strategies for recurrences within the lowered classes, written out as declarations.

A drawn rule is source text, so that a failure shows, shrunk, the declaration that fails. Operands
are drawn small and decays lie in (0, 1]: a state that grows would pass rounding off as an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from chunkwise import dsl
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.ir import Kind, Per
from hypothesis import strategies as st
from torch import Tensor

_KINDS = {
    **dict.fromkeys(("q", "k", "p", "a", "w"), "Key"),
    **dict.fromkeys(("v", "z"), "Value"),
    **dict.fromkeys(("g", "beta", "c"), "Scalar"),
    **dict.fromkeys(("h", "d"), "HeadScalar"),
    "u": "HeadKey",
    "y": "HeadValue",
}

# the simplest of each come first: that is where shrinking ends
DECAYS_SCALAR = (
    "exp(g)",
    "sigmoid(g)",
    "exp(-softplus(g + h))",
    "(1 - sigmoid(g))",
    "exp(-exp(h) * softplus(g))",
    "exp(-softplus(h))",
    "0.75",
    "within(sigmoid(g) * 0.5 + 0.4, 0.0, 1.0)",
    "(sigmoid(g) * exp(-abs(c)))",
)
DECAYS_KEY = (
    "exp(w)",
    "sigmoid(w)",
    "exp(-softplus(w + u))",
    "exp(-0.6 * sigmoid(w))",
    "(1 - sigmoid(w))",
    "(sigmoid(g) * exp(w))",
    "exp(-softplus(u))",
    "exp(maximum(w, -2.0))",
    "exp(expm1(w))",
)
KEYS = ("k", "l2norm(k)", "silu(k)", "u * k", "tanh(k)", "k * rsqrt(1 + dot(k, k))", "(1 - k) * p")
VALUES = (
    "v",
    "beta * v",
    "silu(v)",
    "y * v",
    "v * sigmoid(z)",
    "v / (1 + exp(c))",
    "v * dot(k, p)",
)
QUERIES = ("q", "l2norm(q)", "q * u", "scale * q", "relu(q) + 0.1", "q * dot(q, k)")
STEPS = ("sigmoid(beta)", "0.5", "sigmoid(beta) / (1 + dot(k, k))", "minimum(exp(c), 0.8)")
OUTPUTS = (
    "o",
    "tanh(o)",
    "o * sigmoid(z)",
    "o / (1 + abs(o))",
    "o + d * v",
    "c * o - dot(q, k) * v",
)


@dataclass(frozen=True)
class Rule:
    """A recurrence as text; what a failing example prints."""

    lines: tuple[str, ...]
    normalised: bool

    @property
    def source(self) -> str:
        """The declaration."""
        body = "\n".join(f"    {line}" for line in self.lines)
        operands = [n for n in _KINDS if self._uses(n)]
        states = ["S: State", *(["n: KeyState"] if self.normalised else [])]
        signature = ", ".join([*states, *(f"{n}: {_KINDS[n]}" for n in operands)])
        if self._uses("scale"):
            signature += ", *, scale: float = 0.7"
        return f"def rule({signature}):\n{body}\n"

    def _uses(self, name: str) -> bool:
        words = "".join(c if c.isalnum() or c == "_" else " " for c in " ".join(self.lines))
        return name in words.split()

    def declare(self) -> Declaration:
        """What the compiler takes."""
        names: dict[str, object] = {n: getattr(dsl, n) for n in dsl.__all__}
        exec(compile(self.source, "<random rule>", "exec"), names)
        function = names["rule"]
        assert callable(function)
        return Declaration(function)


@st.composite
def rules(draw: st.DrawFn, low_rank: bool, vector: bool | None = None) -> Rule:
    """A rule with or without a correction by what is recalled; `vector`: the kind of its decay."""
    if vector is None:
        vector = draw(st.booleans())
    decay = draw(st.sampled_from(DECAYS_KEY if vector else (*DECAYS_SCALAR, "")))
    key, value = draw(st.sampled_from(KEYS)), draw(st.sampled_from(VALUES))
    # one column more of the same state; where keys are corrected it would need a solve of its own
    normalised = not low_rank and draw(st.sampled_from((False, False, False, True)))
    lines = ["S0 = S", *([f"S = {decay} * S"] if decay else []), "S1 = S"]
    write = f"outer({key}, {value})"
    if low_rank:
        lines += _correction(draw, key, value)
    else:
        lines.append(f"S = S + {write}")
        if normalised:
            lines.append(f"n = {decay} * n + {key}" if decay else f"n = n + {key}")
        elif draw(st.sampled_from((False, False, True))):  # a second write, of another key
            lines.append(f"S = S - 0.5 * outer({draw(st.sampled_from(('p', 'l2norm(p)')))}, v)")
    lines += _output(draw, key, value, normalised)
    lines.append("return (S, n), o" if normalised else "return S, o")
    unused = [f"{x} = S" for x in ("S0", "S1") if not any(x in y for y in lines if y[:2] != x)]
    return Rule(tuple(x for x in lines if x not in unused), normalised)


def _correction(draw: st.DrawFn, key: str, value: str) -> list[str]:
    """One low-rank term: the delta rule, one that reads the undecayed state, or a general one."""
    step = draw(st.sampled_from(STEPS))
    kind = draw(st.sampled_from(("delta", "apart", "undecayed", "general", "general undecayed")))
    if kind == "delta":  # one write, symmetric
        normal = draw(st.sampled_from(("l2norm(k)", "0.6 * l2norm(k)")))
        return [f"k_ = {normal}", f"S = S + {step} * outer(k_, v - k_ @ S1)"]
    recalled = draw(st.sampled_from(("l2norm(p)", "l2norm(p) * sigmoid(a)", "l2norm(k)")))
    if kind == "apart":  # one write, read with another key, and a value that is not v
        return [f"S = S + {step} * outer(l2norm(k), {value} - {recalled} @ S1)"]
    write = f"outer({key}, {value})"
    if kind == "undecayed":
        return [f"S = S - {step} * outer(l2norm(k), {recalled} @ S0) + {write}"]
    seen = "S1" if kind == "general" else "S0"
    return [f"S = S - {step} * outer(l2norm(a), {recalled} @ {seen}) + {write}"]


def _output(draw: st.DrawFn, key: str, value: str, normalised: bool) -> list[str]:
    query = draw(st.sampled_from(QUERIES))
    moment = draw(st.sampled_from(("S", "S1", "S0", "bonus")))
    seen = moment if moment != "bonus" else f"(S0 + outer(u * {key}, {value}))"
    lines = [f"o = ({query}) @ {seen}"]
    if draw(st.sampled_from((False, False, True))):
        lines.append(f"o = o + p @ {draw(st.sampled_from(('S', 'S0')))}")
    if normalised:
        lines.append(f"o = o / (1 + abs(dot({query}, n)))")
    final = draw(st.sampled_from(OUTPUTS))
    return lines if final == "o" else [*lines, f"o = {final}"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a call; `lengths` packs (else `batch` sequences of `tokens`)."""

    batch: int
    tokens: int
    lengths: tuple[int, ...] | None
    heads: int
    group: int
    K: int
    V: int
    initial: bool


def shapes(around: int, longest: int) -> st.SearchStrategy[Shape]:
    """Lengths mix small ones with those around a chunk's end, `around`, up to `longest`."""
    edges = [n for n in (around - 1, around, around + 1, 2 * around) if n <= longest]
    length = st.one_of(st.integers(1, 9), st.sampled_from(edges))
    # no engine sees a call without a token, but each sees sequences without one
    packed = st.lists(st.one_of(length, st.just(0)), min_size=1, max_size=3).map(tuple)
    packing = st.one_of(st.none(), packed.filter(any))
    small = st.integers(1, 5)
    return st.builds(
        Shape,
        st.integers(1, 2),
        length,
        packing,
        st.integers(1, 2),
        st.integers(1, 2),
        small,
        small,
        st.booleans(),
    )


def operands_of(
    declaration: Declaration, shape: Shape, dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[Tensor, ...] | None, Tensor | None]:
    """Operands, initial states and boundaries; log-decays (g, w) lie in [-4, 0], some at 0."""
    random = torch.Generator().manual_seed(7)
    T = shape.tokens if shape.lengths is None else sum(shape.lengths)
    B = shape.batch if shape.lengths is None else 1
    N = B if shape.lengths is None else len(shape.lengths)
    HV = shape.heads * shape.group
    tails = {Kind.SCALAR: (), Kind.KEY: (shape.K,), Kind.VALUE: (shape.V,)}

    def draw(*size: int) -> Tensor:
        return 0.7 * torch.randn(size, generator=random, dtype=torch.float64)

    operands = {}
    for x in declaration.operands:
        heads = shape.heads if x.kind is Kind.KEY and x.per is Per.TOKEN else HV
        front = (B, T) if x.per is Per.TOKEN else ()
        value = draw(*front, heads, *tails[x.kind])
        if x.name in ("g", "w"):
            value = -(2 * value).abs().clamp(0.3, 4.3) + 0.3
        operands[x.name] = value.to(dtype).requires_grad_()
    initial = None
    if shape.initial:
        initial = tuple(
            draw(N, HV, shape.K, *((shape.V,) if s.kind is Kind.STATE else ()))
            .to(dtype)
            .requires_grad_()
            for s in declaration.states
        )
    bounds = None
    if shape.lengths is not None:
        bounds = torch.tensor([0, *shape.lengths]).cumsum(0)
    return operands, initial, bounds
