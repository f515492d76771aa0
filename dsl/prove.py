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

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import sympy  # type: ignore[import-untyped]

from . import errors
from .declaration import Declaration
from .ir import Node
from .normal_form import (
    Level,
    NormalForm,
    Phase,
    Read,
    Update,
    groups_of,
    levels_of,
    result_leaf,
)
from .step import Step, state_leaf
from .symbols import Array, Symbols, scalar

_ZERO = sympy.Integer(0)
_ROWS, _COLUMNS = 2, 1  # columns of the state do not mix, so one stands for all
_ONES: Array = np.full((_ROWS, 1), sympy.Integer(1), dtype=object)
_expanded = np.frompyfunc(sympy.expand, 1, 1)


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
    longest = max(2, math.ceil(chunk / (max(step.micro, len(form.micro_steps)) * len(levels))))
    chunks = tuple(range(2, longest + 1))
    for length in chunks:
        _prove_chunk(step, form, length)
    claims = (
        "every returned state is a polynomial of degree 1 in the incoming state",
        "the outputs of the chunk form equal those of the step",
        "the final state of the chunk form equals that of the step",
    )
    return Proof(what.name, chunks, *_sizes(form), claims)


def _sizes(form: NormalForm) -> tuple[int, int]:
    """K and V: two channels on the axis that decays and is recalled."""
    return (_COLUMNS, _ROWS) if form.transposed else (_ROWS, _COLUMNS)


# ---------------------------------------------------------------- the step is affine


def _prove_affine(step: Step, levels: Sequence[Level]) -> None:
    """Degree 1 in the states of a level and of later ones, seen by SymPy alone: nothing of `affine`
    or `normalise` is used."""
    new = dict(zip((s.name for s in step.states), step.next_states, strict=True))
    for n, level in enumerate(levels):
        symbols = Symbols(step.operands, _ROWS, _COLUMNS)
        incoming = {state_leaf(s): symbols.named(f"{s.name}0", s.kind) for s in step.states}
        later = {name for other in levels[n:] for name in other.states}
        flat = [x for leaf, xs in incoming.items() if leaf.attrs[0] in later for x in xs.flat]
        env = dict(incoming)
        for name in level.states:
            for entry in symbols.value(new[name], 0, env).flat:
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
    symbols = Symbols(form.operands, *_sizes(form))
    start = {s.name: symbols.named(f"{s.name}0", s.kind) for s in form.states}
    # token by token
    states = {state_leaf(s): start[s.name] for s in step.states}
    outputs: list[list[Array]] = []
    for t in range(length):
        env = dict(states)
        outputs.append([symbols.value(n, t, env) for n in step.outputs])
        new = [_expanded(symbols.value(n, t, env)) for n in step.next_states]
        states = dict(zip(states, new, strict=True))
    # a chunk at once
    known: list[dict[Node, Array]] = [{} for _ in range(length)]  # of each token
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
        _agree(form, f"the final {name} of {length} tokens", chunks[name].final(name), states[leaf])
    for t, env in enumerate(known):
        for node, whole in zip(form.outputs, outputs[t], strict=True):
            _agree(form, f"output {t} of {length} tokens", symbols.value(node, t, env), whole)


def _agree(form: NormalForm, what: str, ours: Array, theirs: Array) -> None:
    for difference in _expanded(ours - theirs).flat:
        if difference != 0:
            raise errors.ProofFailed(form.name, what, difference)


class _Chunk:
    """A group of states over a chunk, by (3) to (6): every write of every token is one row of one
    triangular system, with n micro-steps of n rows a token. From time to time the states pass by a
    small matrix: decays, and the factors by which they mix. A transposed form is the same with the
    states transposed: their rows are the axis that decays and is recalled."""

    def __init__(
        self,
        symbols: Symbols,
        form: NormalForm,
        start: dict[str, Array],
        known: list[dict[Node, Array]],
    ) -> None:
        self._symbols = symbols
        self._n = len(form.micro_steps)
        self._transposed = form.transposed
        self._updates = [{u.state: u for u in m.updates} for m in form.micro_steps]
        self._start = {n: self._turned(x) for n, x in start.items()}
        self._env = known
        self._times = range(len(known) * self._n)
        self._decays = [{n: self._decay(n, time) for n in start} for time in self._times]
        self._passed: dict[tuple[int, int, str], dict[str, Array]] = {}
        self._written = self._solve()

    def _turned(self, x: Array) -> Array:
        """A value between declared axes and those of the chunk."""
        return x.T if self._transposed else x

    def _update(self, name: str, time: int) -> Update:
        return self._updates[time % self._n][name]

    def _at(self, node: Node, time: int) -> Array:
        token = time // self._n
        return self._turned(self._symbols.value(node, token, self._env[token]))

    def _decay(self, name: str, time: int) -> Array:
        """Of the rows, and of the one column."""
        update, token = self._update(name, time), time // self._n
        found = _ONES
        for log in (update.log_decay, update.columns):
            if log is not None:
                decay = self._symbols.multiplier(log, token, self._env[token])
                found = found * self._turned(decay)
        return found

    def _left(self, after: int, until: int, to: str) -> dict[str, Array]:
        """What `to` after the time `until` has, per row, of each state after the time `after`."""
        if after == until:
            return {to: _ONES}
        at = (after, until, to)
        if at not in self._passed:
            update = self._update(to, until)
            found = _times(self._decays[until][to], self._left(after, until - 1, to))
            for mix in update.mixes:
                factor = self._at(mix.factor, until)
                for of, x in _times(factor, self._left(after, until - 1, mix.state)).items():
                    found[of] = found.get(of, 0) + x
            self._passed[at] = found
        return self._passed[at]

    def _seen(self, after: int, time: int, phase: Phase, to: str) -> dict[str, Array]:
        """The same of `to` at a phase of `time`."""
        if phase is Phase.AFTER:
            return self._left(after, time, to)
        before = self._left(after, time - 1, to)
        return before if phase is Phase.BEFORE else _times(self._decays[time][to], before)

    def _recalled(self, key: Array, time: int, phase: Phase, to: str) -> Array:
        """(key e^G)ᵀ S_0, by what is left of the states at the start."""
        seen = self._seen(-1, time, phase, to)
        return sum(
            (key * left * self._start[of]).sum(0, keepdims=True) for of, left in seen.items()
        )

    def _solve(self) -> list[tuple[int, str, Array, Array]]:
        """U = (I + L)^-1 X: for every write its time, state, key and written value."""
        writes = [
            (time, n, w)
            for time in self._times
            for n in self._start
            for w in self._update(n, time).writes
        ]
        keys = [self._at(w.key, time) for time, _, w in writes]
        lower = sympy.eye(len(writes))
        known: list[Array] = []
        for i, (time, _, w) in enumerate(writes):
            own = scalar(_ZERO) if w.value is None else self._at(w.value, time)
            if w.correction is not None:
                scale = self._at(w.correction.scale, time)
                key, to = self._at(w.correction.key, time), w.correction.state
                phase = Phase.DECAYED if w.correction.decayed else Phase.BEFORE
                own = own + scale * self._recalled(key, time, phase, to)
                for j, (earlier, of, _) in enumerate(writes):
                    left = self._seen(earlier, time, phase, to) if earlier < time else {}
                    if of in left:
                        lower[i, j] = -(scale * key * keys[j] * left[of]).sum()
            known.append(own)
        if not writes:
            return []
        solved = lower.lower_triangular_solve(sympy.Matrix([x.item() for x in known]))
        return [
            (time, n, keys[i], scalar(sympy.expand(solved[i])))
            for i, (time, n, _) in enumerate(writes)
        ]

    def read(self, read: Read, token: int) -> Array:
        """(5): the chunk's start, read with the prefix, plus scores times the written values."""
        time, phase = token * self._n + read.micro_step, read.phase
        key = self._at(read.key, time)
        if read.other_axis is not self._transposed:  # contracts the columns: the state itself
            result = (self._state(time, phase, read.state) * key).sum(1, keepdims=True)
        else:
            result = self._recalled(key, time, phase, read.state)
            for written, value, left in self._visible(time, phase, read.state):
                result = result + (key * written * left).sum() * value
        return self._turned(result)

    def final(self, name: str) -> Array:
        """A state at the chunk's end, in declared axes."""
        return self._turned(self._state(len(self._times) - 1, Phase.AFTER, name))

    def _visible(self, time: int, phase: Phase, to: str) -> Iterator[tuple[Array, Array, Array]]:
        """Keys and values of the writes that `to` has seen, and what is left of them."""
        last = time if phase is Phase.AFTER else time - 1
        for earlier, of, key, value in self._written:
            left = self._seen(earlier, time, phase, to) if earlier <= last else {}
            if of in left:
                yield key, value, left[of]

    def _state(self, time: int, phase: Phase, to: str) -> Array:
        """(6): the chunk's start and the writes before a time, by what is left of them."""
        seen = self._seen(-1, time, phase, to)
        start = sum(self._start[of] * left for of, left in seen.items())
        return start + sum(k * left * value for k, value, left in self._visible(time, phase, to))


def _times(factor: Array, left: dict[str, Array]) -> dict[str, Array]:
    return {of: factor * x for of, x in left.items()}
