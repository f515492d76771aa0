"""Proof on small symbolic sizes: the chunk form of a declaration equals its step.

Two independent derivations meet here. One side runs the traced step token by token on symbols. The
other takes the normal form and applies (3) to (6) of docs/explanation/mathematics.md to a whole
chunk: scores between tokens, the unit-triangular inverse, prefixes of the decays. The decays are
symbols themselves (multipliers, not logarithms), so that everything is polynomial and `expand`
decides equality.
Functions without a polynomial (exp, sigmoid, a division) are symbols, equal where their arguments
are equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]

from . import algebra, errors
from .decay import SMALLEST
from .declaration import Declaration
from .elementwise import ELEMENTWISE
from .ir import Kind, Node, Op, Per, topological
from .normal_form import (
    Level,
    NormalForm,
    Phase,
    Read,
    StateDecl,
    Update,
    groups_of,
    levels_of,
    result_leaf,
)
from .step import Step, state_leaf

_Expr: TypeAlias = Any  # SymPy carries no types
_Array = tuple[_Expr, ...]  # a Scalar has one entry, a vector its channels, a state K*V in rows
_ZERO: _Expr = sympy.Integer(0)
_ONE: _Expr = sympy.Integer(1)
_ROWS, _COLUMNS = 2, 1  # columns of the state do not mix, so one stands for all


@dataclass(frozen=True, slots=True)
class Proof:
    """The claims that were shown, the sizes, and the claims left out, with the reason."""

    name: str
    chunks: tuple[int, ...]
    key: int
    value: int
    claims: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = ", ".join(str(c) for c in self.chunks)
        head = f"{self.name}: proved for chunks of {sizes} tokens, K = {self.key}, V = {self.value}"
        return "\n".join(
            [head, *(f"  ✓ {c}" for c in self.claims), *(f"  – {c}" for c in self.left_out)]
        )


def prove(what: Declaration, chunk: int = 3) -> Proof:
    """Prove that the step is affine in its state, and that its chunk form equals it.

    Every output and the final state agree, from a symbolic state, for chunks of 2 to `chunk`
    tokens; `chunk` counts micro-steps, of each level of a cascade, but 2 tokens at least are taken.
    Raises NotLowered for declarations for the reference engine only; ProofFailed if an identity
    does not hold.
    """
    if what.any_step:
        raise errors.NotLowered(
            f"{what.name}: there is no chunk form to prove",
            "it was declared for the reference engine only, so it was not normalised",
            'declare it without engine="reference"',
        )
    micro = what.default_micro
    step, form = what.step(micro), what.normal_form(micro)
    levels = levels_of(form)
    _prove_affine(step, levels)
    # polynomials grow with the micro-steps of a chunk and the levels of a cascade, so more of those
    # make for fewer tokens
    longest = max(2, math.ceil(chunk / (len(form.micro_steps) * len(levels))))
    chunks = tuple(range(2, longest + 1))
    for length in chunks:
        _prove_chunk(step, form, length)
    claims = (
        "every returned state is a polynomial of degree 1 in the incoming state",
        "the outputs of the chunk form (mathematics, (3) to (5)) equal those of the step",
        "the final state of the chunk form (6) equals that of the step",
    )
    return Proof(what.name, chunks, *_sizes(form), claims)


def _sizes(form: NormalForm) -> tuple[int, int]:
    """K and V: two channels on the axis that decays and is recalled."""
    return (_COLUMNS, _ROWS) if form.transposed else (_ROWS, _COLUMNS)


# ---------------------------------------------------------------- symbols


class _Symbols:
    """Values of expressions: polynomials in symbols; one symbol per opaque function of equal
    arguments."""

    def __init__(self, form: NormalForm) -> None:
        self._per_token = {o.name for o in form.operands if o.per is Per.TOKEN}
        self.key, self.width = _sizes(form)
        self._opaque: dict[tuple[object, ...], _Expr] = {}

    def leaf(self, node: Node, token: int) -> _Array:
        name = "_".join(str(a) for a in node.attrs if a is not None)
        if node.op is Op.OPERAND and node.attrs[0] in self._per_token:
            name += f"_{token}"
        size = {Kind.KEY: self.key, Kind.VALUE: self.width}.get(node.kind, 1)
        return tuple(sympy.Symbol(f"{name}__{i}", real=True) for i in range(size))

    def opaque(self, name: str, *args: _Expr) -> _Expr:
        key = (name, *(sympy.expand(a) for a in args))
        if key not in self._opaque:
            self._opaque[key] = sympy.Symbol(f"{name}__{len(self._opaque)}", positive=True)
        return self._opaque[key]

    def opaque_over(self, symbols: Sequence[_Expr]) -> bool:
        """Whether an opaque function was taken of something that holds one of `symbols`."""
        seen = set(symbols)
        arguments = (a for key in self._opaque for a in key[1:])
        return any(isinstance(a, sympy.Expr) and a.free_symbols & seen for a in arguments)

    def value(self, node: Node, token: int, env: dict[Node, _Array]) -> _Array:
        """The value of an expression at a token; `env` holds known values and receives new ones."""
        for n in topological(node):
            if n not in env:
                env[n] = self._compute(n, token, [env[a] for a in n.args])
        return env[node]

    def _compute(self, node: Node, token: int, args: list[_Array]) -> _Array:
        op = node.op
        if op in (Op.OPERAND, Op.PARAM):
            return self.leaf(node, token)
        if op is Op.CONST:
            return (_rational(algebra.number(node)),)
        if op is Op.SUM:
            return (sympy.Add(*args[0]),)
        if op is Op.OUTER:
            return tuple(k * v for k in args[0] for v in args[1])
        if op is Op.READ:
            return _read(args[0], args[1])
        if op is Op.READ_VALUE:
            return _read(args[1], _transposed(args[0], self.key))
        if op is Op.SCALE:
            return _scaled(args[0], args[1], node.args[1].kind)
        size = max(len(a) for a in args)
        wide = [a * size if len(a) == 1 else a for a in args]
        return tuple(self._elementwise(op, xs) for xs in zip(*wide, strict=True))

    def _elementwise(self, op: Op, xs: Sequence[_Expr]) -> _Expr:
        if op in _POLYNOMIAL:
            return ELEMENTWISE[op].value(*xs)
        if op is Op.DIV:
            return xs[0] * self.reciprocal(xs[1])
        return self.opaque(op.name.lower(), *xs)

    def reciprocal(self, x: _Expr) -> _Expr:
        return 1 / x if x.is_number else self.opaque("reciprocal", x)

    def multiplier(self, log: Node, token: int, env: dict[Node, _Array]) -> _Array:
        """e^log, undoing the rules of `decay` so that it is the polynomial that the user wrote."""
        value = algebra.number(log)
        if value is not None:
            return (_rational(math.exp(value)),)
        if log.op is Op.ADD:
            parts = [self.multiplier(a, token, env) for a in log.args]
            size = max(len(p) for p in parts)
            wide = [p * size if len(p) == 1 else p for p in parts]
            return tuple(a * b for a, b in zip(*wide, strict=True))
        if log.op is Op.LOGSIGMOID:
            inner = log.args[0]
            if inner.op is Op.NEG:
                xs = self.value(inner.args[0], token, env)
                return tuple(1 - self.opaque("sigmoid", x) for x in xs)
            return tuple(self.opaque("sigmoid", x) for x in self.value(inner, token, env))
        if log.op is Op.LOG and log.args[0].op is Op.MAXIMUM:
            f, floor = log.args[0].args
            if algebra.number(floor) == SMALLEST:
                return self.value(f, token, env)
        if log.op is Op.MUL and algebra.number(log.args[0]) == 0.5:
            # sqrt(f) became half of log f: the square root of its multiplier
            halves = self.multiplier(log.args[1], token, env)
            return tuple(self.opaque("sqrt", x) for x in halves)
        return tuple(self.opaque("exp", x) for x in self.value(log, token, env))


def _rational(value: float | None) -> _Expr:
    """A constant as a rational, rounded so that log and exp of it come back to the same one."""
    if value is None:
        raise errors.InvalidIR("a constant without a number")
    fraction = Fraction(value).limit_denominator(10**9)
    return sympy.Rational(fraction.numerator, fraction.denominator)


_POLYNOMIAL = (Op.ADD, Op.SUB, Op.MUL, Op.NEG, Op.WITHIN)


def _read(key: _Array, state: _Array) -> _Array:
    """keyᵀ S, for S in rows of equal length, one per channel of the key."""
    width = len(state) // len(key)
    return tuple(
        sympy.Add(*(k * state[i * width + j] for i, k in enumerate(key))) for j in range(width)
    )


def _transposed(state: _Array, rows: int) -> _Array:
    width = len(state) // rows
    return tuple(state[i * width + j] for j in range(width) for i in range(rows))


def _scaled(state: _Array, factor: _Array, kind: Kind) -> _Array:
    """A state times a Scalar, its rows times a Key, or its columns times a Value."""
    n = len(factor)
    if kind is Kind.VALUE:
        return tuple(factor[i % n] * x for i, x in enumerate(state))
    width = len(state) // n
    return tuple(factor[i // width] * x for i, x in enumerate(state))


def _state_symbols(state: StateDecl, symbols: _Symbols) -> _Array:
    size = symbols.key * (symbols.width if state.kind is Kind.STATE else 1)
    return tuple(sympy.Symbol(f"{state.name}0__{i}", real=True) for i in range(size))


# ---------------------------------------------------------------- the step is affine


def _prove_affine(step: Step, levels: Sequence[Level]) -> None:
    """Degree 1 in the states of a level and of later ones, seen by SymPy alone: nothing of `affine`
    or `normalise` is used."""
    form_like = NormalForm(step.name, step.operands, step.params, step.states, (), (), step.output)
    new = dict(zip((s.name for s in step.states), step.next_states, strict=True))
    for n, level in enumerate(levels):
        symbols = _Symbols(form_like)
        incoming = {state_leaf(s): _state_symbols(s, symbols) for s in step.states}
        later = {name for other in levels[n:] for name in other.states}
        flat = [x for leaf, xs in incoming.items() if leaf.attrs[0] in later for x in xs]
        env = dict(incoming)
        for name in level.states:
            for entry in symbols.value(new[name], 0, env):
                poly = sympy.Poly(sympy.expand(entry), *flat)
                hidden = any(c.free_symbols & set(flat) for c in poly.coeffs())
                if poly.total_degree() > 1 or hidden:
                    raise errors.ProofFailed(step.name, f"the next {name} is not affine", entry)
        # a function of the state has been given a symbol that hides it: only what is made of reads
        # may hold one
        if symbols.opaque_over(flat):
            raise errors.ProofFailed(step.name, "a function is taken of the state", "")


# ---------------------------------------------------------------- the chunk form


def _prove_chunk(step: Step, form: NormalForm, length: int) -> None:
    symbols = _Symbols(form)
    start = {s.name: _state_symbols(s, symbols) for s in form.states}
    # token by token
    states = {state_leaf(s): start[s.name] for s in step.states}
    outputs: list[_Array] = []
    for t in range(length):
        env = dict(states)
        outputs.append(symbols.value(step.output, t, env))
        new = [symbols.value(n, t, env) for n in step.next_states]
        states = {
            leaf: tuple(sympy.expand(x) for x in xs) for leaf, xs in zip(states, new, strict=True)
        }
    # a chunk at once
    known: list[dict[Node, _Array]] = [{} for _ in range(length)]  # of each token
    chunks: dict[str, _Chunk] = {}
    for level in levels_of(form):
        for names in groups_of(form, level.states):
            own = {n: start[n] for n in names}
            chunks |= dict.fromkeys(names, _Chunk(symbols, form, own, known))
        for n in level.reads:
            read = form.reads[n]
            for t, env in enumerate(known):
                env[result_leaf(form, n)] = chunks[read.state].read(read, t)
    for name in (s.name for s in step.states):
        leaf = next(x for x in states if x.attrs[0] == name)
        for ours, theirs in zip(chunks[name].final(name), states[leaf], strict=True):
            _agree(form, f"the final {name} of {length} tokens", ours, theirs)
    for t, env in enumerate(known):
        for ours, theirs in zip(symbols.value(form.output, t, env), outputs[t], strict=True):
            _agree(form, f"output {t} of {length} tokens", ours, theirs)


def _agree(form: NormalForm, what: str, ours: _Expr, theirs: _Expr) -> None:
    difference = sympy.expand(ours - theirs)
    if difference != 0:
        raise errors.ProofFailed(form.name, what, difference)


class _Chunk:
    """A group of states over a chunk, by (3) to (6): every write of every token is one row of one
    triangular system, with n micro-steps of n rows a token. From time to time the states pass by a
    small matrix: decays, and the factors by which they mix. A transposed form is the same with the
    states transposed: their rows are the axis that decays and is recalled."""

    def __init__(
        self,
        symbols: _Symbols,
        form: NormalForm,
        start: dict[str, _Array],
        known: list[dict[Node, _Array]],
    ) -> None:
        self._symbols = symbols
        self._n = len(form.micro_steps)
        self._transposed = form.transposed
        self._updates = [{u.state: u for u in m.updates} for m in form.micro_steps]
        self._rows = _ROWS
        self._start = {
            n: _transposed(x, symbols.key) if form.transposed else x for n, x in start.items()
        }
        (self._width,) = {len(x) // _ROWS for x in start.values()}
        self._env = known
        self._times = range(len(known) * self._n)
        self._decays = [{n: self._decay(n, time) for n in start} for time in self._times]
        self._passed: dict[tuple[int, int, str], dict[str, _Array]] = {}
        self._written = self._solve()

    def _update(self, name: str, time: int) -> Update:
        return self._updates[time % self._n][name]

    def _at(self, node: Node, time: int) -> _Array:
        token = time // self._n
        return self._symbols.value(node, token, self._env[token])

    def _per_row(self, x: _Array) -> _Array:
        return x * self._rows if len(x) == 1 else x

    def _decay(self, name: str, time: int) -> _Array:
        log = self._update(name, time).log_decay
        if log is None:
            return (_ONE,) * self._rows
        token = time // self._n
        return self._per_row(self._symbols.multiplier(log, token, self._env[token]))

    def _left(self, after: int, until: int, to: str) -> dict[str, _Array]:
        """What `to` after the time `until` has, per row, of each state after the time `after`."""
        if after == until:
            return {to: (_ONE,) * self._rows}
        at = (after, until, to)
        if at not in self._passed:
            update = self._update(to, until)
            found = _times(self._decays[until][to], self._left(after, until - 1, to))
            for mix in update.mixes:
                factor = self._per_row(self._at(mix.factor, until))
                for of, x in _times(factor, self._left(after, until - 1, mix.state)).items():
                    found[of] = (
                        tuple(map(sum, zip(found[of], x, strict=True))) if of in found else x
                    )
            self._passed[at] = found
        return self._passed[at]

    def _seen(self, after: int, time: int, phase: Phase, to: str) -> dict[str, _Array]:
        """The same of `to` at a phase of `time`."""
        if phase is Phase.AFTER:
            return self._left(after, time, to)
        before = self._left(after, time - 1, to)
        return before if phase is Phase.BEFORE else _times(self._decays[time][to], before)

    def _score(self, x: _Array, y: _Array, left: _Array) -> _Expr:
        triples = zip(x, y, left, strict=True)
        return sympy.Add(*(a * b * decay for a, b, decay in triples))

    def _recalled(self, key: _Array, time: int, phase: Phase, to: str) -> _Array:
        """(key e^G)ᵀ S_0, by what is left of the states at the start."""
        parts = [
            _read(tuple(k * x for k, x in zip(key, left, strict=True)), self._start[of])
            for of, left in self._seen(-1, time, phase, to).items()
        ]
        return tuple(map(sum, zip(*parts, strict=True)))

    def _solve(self) -> list[tuple[int, str, _Array, _Array]]:
        """U = (I + L)^-1 X: for every write its time, state, key and written value."""
        writes = [
            (time, n, w)
            for time in self._times
            for n in self._start
            for w in self._update(n, time).writes
        ]
        keys = [self._at(w.key, time) for time, _, w in writes]
        lower = sympy.zeros(len(writes), len(writes))
        known: list[_Array] = []
        for i, (time, _, w) in enumerate(writes):
            own = (_ZERO,) * self._width if w.value is None else self._at(w.value, time)
            if w.correction is not None:
                (scale,) = self._at(w.correction.scale, time)
                key, to = self._at(w.correction.key, time), w.correction.state
                phase = Phase.DECAYED if w.correction.decayed else Phase.BEFORE
                seen = self._recalled(key, time, phase, to)
                own = tuple(v + scale * s for v, s in zip(own, seen, strict=True))
                for j, (earlier, of, _) in enumerate(writes):
                    left = self._seen(earlier, time, phase, to) if earlier < time else {}
                    if of in left:
                        lower[i, j] = -scale * self._score(key, keys[j], left[of])
            known.append(own)
        if not writes:
            return []
        solved = _unit_lower_inverse(lower) * sympy.Matrix([list(x) for x in known])
        columns = range(self._width)
        return [
            (time, n, keys[i], tuple(sympy.expand(solved[i, j]) for j in columns))
            for i, (time, n, _) in enumerate(writes)
        ]

    def read(self, read: Read, token: int) -> _Array:
        """(5): the chunk's start, read with the prefix, plus scores times the written values."""
        time, phase = token * self._n + read.micro_step, read.phase
        key = self._at(read.key, time)
        if read.other_axis is not self._transposed:  # contracts the columns: the state itself
            return _read(key, _transposed(self._state(time, phase, read.state), self._rows))
        result = self._recalled(key, time, phase, read.state)
        for written, values, left in self._visible(time, phase, read.state):
            score = self._score(key, written, left)
            result = tuple(r + score * v for r, v in zip(result, values, strict=True))
        return result

    def final(self, name: str) -> _Array:
        """A state at the chunk's end, in declared axes."""
        state = self._state(len(self._times) - 1, Phase.AFTER, name)
        return _transposed(state, self._rows) if self._transposed else state

    def _visible(self, time: int, phase: Phase, to: str) -> Iterator[tuple[_Array, _Array, _Array]]:
        """Keys and values of the writes that `to` has seen, and what is left of them."""
        last = time if phase is Phase.AFTER else time - 1
        for earlier, of, key, values in self._written:
            left = self._seen(earlier, time, phase, to) if earlier <= last else {}
            if of in left:
                yield key, values, left[of]

    def _state(self, time: int, phase: Phase, to: str) -> _Array:
        """(6): the chunk's start and the writes before a time, by what is left of them."""
        parts = [
            _scaled(self._start[of], left, Kind.KEY)
            for of, left in self._seen(-1, time, phase, to).items()
        ]
        result = [sympy.Add(*xs) for xs in zip(*parts, strict=True)]
        for key, values, left in self._visible(time, phase, to):
            for i, j in itertools.product(range(self._rows), range(self._width)):
                result[i * self._width + j] += key[i] * left[i] * values[j]
        return tuple(result)


def _times(factor: _Array, left: dict[str, _Array]) -> dict[str, _Array]:
    return {of: tuple(f * x for f, x in zip(factor, xs, strict=True)) for of, xs in left.items()}


def _unit_lower_inverse(lower: sympy.Matrix) -> sympy.Matrix:
    """(I + L)^-1 by the finite Neumann series: L is nilpotent."""
    size = lower.rows
    result = sympy.eye(size)
    power = sympy.eye(size)
    for _ in range(1, size):
        power = -(power * lower)
        if power.is_zero_matrix:
            break
        result += power
    return result
