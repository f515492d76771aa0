"""Proof that the tiles of a chunk and of its adjoint mean the declared step and its gradient.

`dsl.prove` shows with symbols that the chunk form equals the step. This module shows the same of
the tiles: TileIR as derived, its adjoint, and both as `factor` leaves them to the engines. They are
evaluated over two chunks, the second one shorter where it can be, at random points, with 50 digits.
Nothing of the chunk form or of differentiation is on the other side: the step runs token by token,
and its gradient is a difference quotient. With so many digits that is exact but for the numbers
that normalisation computes in float64 (the logarithm of a constant decay, say).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

import numpy as np

from ..dsl import prove as forms
from ..dsl.declaration import Declaration
from ..dsl.elementwise import many_digits
from ..dsl.errors import NotLowered, ProofFailed
from ..dsl.ir import Kind, Node, Op, Per, bounds_of, promises_of
from ..dsl.normal_form import NormalForm, Operand, has_entries_apart
from ..dsl.step import Step, operand_leaf, output_names, param_leaf, state_leaf
from ..dsl.turns import log_decays
from .buffers import BufferId, gradient
from .chunk import ChunkProgram, derive
from .differentiate import GRADIENT, Adjoint, differentiate
from .evaluate import CHANNELS, ZERO, Numbers, Sizes, evaluate, evaluate_step
from .factor import factor_adjoint, factor_chunk
from .lower import kind_axes
from .tile import Axis, Tile, TileOp
from .token import row_names

_KEY, _VALUE = 2, 3
_SCALES = (1, 4)  # of operands, one per point: maximum, abs and the like take either branch
_TOLERANCE = Decimal("1e-12")  # relative to the larger of 1 and the expected number
_CHANGE = Decimal("1e-20")  # of a difference quotient, whose relative error is its square
_LARGEST = Decimal(10**6)  # of results: a state that grows takes the digits of a quotient
_DRAWS = 48  # of a point, before it is given up

_Values = Mapping[str, Numbers]


def prove(what: Declaration, chunk: int = 3) -> forms.Proof:
    """Prove the chunk form of a declaration, the tiles of its chunk, and those of its gradient.

    `chunk`: the longest chunk: of tokens in the form, of rows (a token's micro-steps) in tiles.
    A declaration without tiles is proved as a form. Raises NotLowered if neither proof covers it;
    ProofFailed, with the output, state or operand's gradient that differs.
    """
    proof = forms.prove(what, chunk)
    try:
        claims = prove_tiles(what, chunk)
    except NotLowered as refusal:
        reason = f"no tiles, and no gradient: {refusal.headline.removeprefix(f'{what.name}: ')}"
        return replace(proof, left_out=(reason,))
    return replace(proof, claims=(*proof.claims, *claims))


def prove_tiles(what: Declaration, chunk: int = 3) -> tuple[str, ...]:
    """Prove the tiles of chunks of 2 to `chunk` rows, and of their gradient; returns the claims.

    Raises NotLowered where there are none, or no point to look at them; ProofFailed.
    """
    micro = what.default_micro
    step, form = what.step(micro), what.normal_form(micro)
    variants, rows = tuple(_variants(form)), len(form.micro_steps)
    with many_digits():
        resets = _resets(step, form)
        for length in range(2, chunk + 1):
            tokens = max(2, (2 * length - 1) // rows)
            for scale in _SCALES:
                _prove_at(_point(step, tokens, scale, {}), variants, length, form)
            if resets:
                _prove_at(_point(step, tokens, 1, resets), variants, length, form)
    names = [*(o.name for o in step.operands), *(f"the initial {s.name}" for s in step.states)]
    at_reset = f"and so they do where {', '.join(f'{n} = {x}' for n, x in resets.items())}"
    return (
        "the tiles of two chunks in a row equal the step: outputs and final states",
        f"the tiles of their adjoint equal its gradient: {', '.join(names)}",
        *([at_reset] if resets else []),
    )


@dataclass(frozen=True, slots=True)
class _Variant:
    """A chunk and its adjoint, as an engine may run them."""

    name: str
    body: ChunkProgram
    adjoint: Adjoint


def _variants(form: NormalForm) -> Iterator[_Variant]:
    for hoist in (False, True):
        body = derive(form, hoist_products=hoist)
        adjoint = differentiate(body)
        name = "reassociated" if hoist else "derived"
        yield _Variant(name, body, adjoint)
        yield _Variant(f"{name} and factored", factor_chunk(body), factor_adjoint(adjoint))


# ---------------------------------------------------------------- a point


@dataclass(frozen=True, slots=True)
class _Point:
    """A call, the cotangents of its results, and directions in which gradients are compared.

    `values`, `directions`: of operands and initial states; operands of tokens have these along I,
    micro operands the micro-steps of each. `cotangents`: of the output and final states.
    """

    step: Step
    tokens: int
    values: _Values
    params: _Values
    cotangents: _Values
    directions: _Values

    def moved(self, name: str, by: Decimal) -> _Point:
        """The point `by` further along the direction of one operand or initial state."""
        x = self.values[name] + by * self.directions[name]
        return replace(self, values={**self.values, name: x})


def _resets(step: Step, form: NormalForm) -> dict[str, Decimal]:
    """Operands of tokens that are a decay or its logarithm, with the value that resets a state.

    Empty if something else that the step makes of them does not exist there.
    """
    resets = {}
    for _, log in log_decays(form):
        if log.op is Op.OPERAND:
            resets[str(log.attrs[0])] = -Decimal("Infinity")
        elif log.op is Op.LOG and log.args[0].op is Op.MAXIMUM:
            factor, _ = log.args[0].args  # and the least one, of dsl.decay
            if factor.op is Op.WITHIN and factor.args[0].op is Op.OPERAND:
                resets[str(factor.args[0].attrs[0])] = Decimal(0)
    of_tokens = {o.name for o in step.operands if o.per is Per.TOKEN}
    resets = {n: x for n, x in resets.items() if n in of_tokens}
    return resets if resets and _drawn(step, 2, 1, resets) is not None else {}


def _point(step: Step, tokens: int, scale: int, resets: Mapping[str, Decimal]) -> _Point:
    """As `_drawn`. Raises NotLowered if there is none."""
    point = _drawn(step, tokens, scale, resets)
    if point is None:
        raise NotLowered(
            f"{step.name}: no random operands were found that keep its promises and results small",
            f"{_DRAWS} draws were tried",
            "promise what operands themselves lie within, or compare with dsl.oracle.run",
        )
    return point


def _drawn(step: Step, tokens: int, scale: int, resets: Mapping[str, Decimal]) -> _Point | None:
    """A random point where the step stays small and keeps its promises; None if none is found.

    `resets`: values of operands in the second of their rows.
    """
    draw = random.Random(scale)

    def fraction() -> Decimal:
        return Decimal(draw.randint(100, 900)) / 1000

    def either() -> Decimal:
        return fraction() * draw.choice((-1, 1))

    def numbers(pick: Callable[[], Decimal], rows: int, kind: Kind) -> Numbers:
        shape = Sizes(rows, _KEY, _VALUE).shape((Axis.I, *kind_axes(kind)))
        return np.array([pick() for _ in range(math.prod(shape))], dtype=object).reshape(shape)

    promises = promises_of(*step.roots)
    layouts = {o.name: (_rows(o, step.micro, tokens), o.kind) for o in step.operands}
    states = {s.name: (1, s.kind) for s in step.states}
    point = _Point(
        step,
        tokens,
        values={n: numbers(either, *layout) for n, layout in states.items()},
        params={p.name: numbers(fraction, 1, Kind.SCALAR) for p in step.params},
        cotangents={
            n: numbers(either, *layout)
            for n, layout in {**states, **_outputs(step, tokens)}.items()
        },
        directions={n: numbers(either, *layout) for n, layout in {**states, **layouts}.items()},
    )
    for attempt in range(_DRAWS):
        # some functions want positive operands, some decays small ones
        free = fraction if attempt % 2 else either
        width = Decimal(scale) / 2 ** (attempt // 8)
        drawn = {
            n: numbers(_within(promises.get(n), width, free, fraction), *layout)
            for n, layout in layouts.items()
        }
        for n, value in resets.items():
            drawn[n][1:2] = value
        candidate = replace(point, values={**point.values, **drawn})
        if _is_sound(candidate):
            return candidate
    return None


def _outputs(step: Step, tokens: int) -> dict[str, tuple[int, Kind]]:
    """The outputs by name, with their rows and kinds."""
    names = output_names(len(step.outputs))
    return {name: (tokens, n.kind) for name, n in zip(names, step.outputs, strict=True)}


def _rows(o: Operand, micro: int, tokens: int) -> int:
    if o.per is Per.HEAD:
        return 1
    return tokens * micro if o.micro else tokens


def _within(
    bounds: tuple[float, float] | None,
    width: Decimal,
    free: Callable[[], Decimal],
    fraction: Callable[[], Decimal],
) -> Callable[[], Decimal]:
    """A generator of numbers within `bounds`, no further than `width` where these are open."""
    low, high = (Decimal(x) for x in bounds or (-math.inf, math.inf))
    if low.is_finite():
        span = high - low if high.is_finite() else width
        return lambda: low + span * fraction()
    if high.is_finite():
        return lambda: high - width * fraction()
    return lambda: width * free()


def _is_sound(point: _Point) -> bool:
    for token in _run(point):
        results = (*token.outputs.values(), *token.states.values())
        if not all(abs(x) <= _LARGEST for xs in results for x in xs.flat):  # nor is NaN
            return False
        for n, xs in token.known.items():
            if n.op is Op.WITHIN:
                low, high = bounds_of(n)
                if not all(low <= x <= high for x in xs.flat):
                    return False
    return True


# ---------------------------------------------------------------- the step


@dataclass(frozen=True, slots=True)
class _Token:
    """The results of the step for one token: outputs, the states after it, all other values."""

    outputs: _Values
    states: _Values
    known: Mapping[Node, Numbers]


def _run(point: _Point) -> Iterator[_Token]:
    """The declared step, token by token."""
    step, micro = point.step, point.step.micro
    states = {s.name: point.values[s.name] for s in step.states}
    for t in range(point.tokens):
        leaves = {state_leaf(s): states[s.name] for s in step.states}
        leaves |= {param_leaf(p): point.params[p.name] for p in step.params}
        for o in step.operands:
            x = point.values[o.name]
            if o.micro:
                leaves |= {operand_leaf(o, m): x[[t * micro + m]] for m in range(micro)}
            else:
                leaves[operand_leaf(o)] = x if o.per is Per.HEAD else x[[t]]
        known = evaluate_step(step.roots, leaves)
        states = {s.name: known[n] for s, n in zip(step.states, step.next_states, strict=True)}
        outputs = dict(zip(_outputs(step, 1), (known[n] for n in step.outputs), strict=True))
        yield _Token(outputs, states, known)


def _results(point: _Point) -> _Values:
    """The outputs of every token and the final states, by the step."""
    tokens = list(_run(point))
    outputs = {n: np.concatenate([t.outputs[n] for t in tokens]) for n in tokens[0].outputs}
    return {**tokens[-1].states, **outputs}


def _product(x: _Values, y: _Values) -> Decimal:
    """The inner product of `x` with the values of the same names in `y`."""
    return sum((np.sum(a * y[n]) for n, a in x.items()), Decimal(0))


def _slope(point: _Point, name: str) -> Decimal:
    """The derivative of cotangents · results along an operand's direction."""
    after, before = (
        _product(point.cotangents, _results(point.moved(name, by))) for by in (_CHANGE, -_CHANGE)
    )
    return (after - before) / (2 * _CHANGE)


# ---------------------------------------------------------------- the tiles


def _prove_at(point: _Point, variants: tuple[_Variant, ...], length: int, form: NormalForm) -> None:
    """Compare every variant with the step at a point, in chunks of `length` rows."""
    rows, apart = len(form.micro_steps), has_entries_apart(form)
    expected = _results(point)
    slopes = {n: _slope(point, n) for n in point.directions}
    states = {s.name for s in point.step.states}
    for variant in variants:
        chunks = _Chunks(point, length, rows, apart=apart, transposed=variant.body.transposed)
        where = f"of tiles {variant.name}, in chunks of {length} rows"
        for n, ours in chunks.results(variant.body).items():
            what = f"the final {n}" if n in states else "the output"
            for a, b in zip(ours.flat, np.broadcast_to(expected[n], ours.shape).flat, strict=True):
                _agree(point, f"{what} {where}", a, b)
        for n, ours in chunks.gradients(variant.adjoint).items():
            what = f"the gradient of {'the initial ' if n in states else ''}{n}"
            slope = _product({n: ours}, point.directions)
            _agree(point, f"{what} {where}", slope, slopes[n])


def _agree(point: _Point, what: str, ours: Decimal, expected: Decimal) -> None:
    difference = abs(ours - expected)
    if not difference <= _TOLERANCE * max(Decimal(1), abs(expected)):  # NaN is no agreement
        raise ProofFailed(point.step.name, what, f"{ours - expected:.6g}, of {expected:.6g}")


class _Chunks:
    """A point in rows (micro-steps of tokens), cut into chunks, as the engines run it."""

    def __init__(
        self, point: _Point, length: int, each: int, *, apart: bool, transposed: bool
    ) -> None:
        step = point.step
        self._transposed = transposed
        self._point, self._each = point, each
        end = point.tokens * each
        channels = (_VALUE, _KEY) if transposed else (_KEY, _VALUE)
        self._sizes = [Sizes(length, *channels, first, end) for first in range(0, end, length)]
        self._starts: list[_Values] = []  # the states as each chunk begins
        self._apart = apart
        rows: dict[str, Numbers] = {}
        for o in step.operands:
            x = point.values[o.name]
            if o.micro and apart:
                names = row_names(o, step.micro)
                rows |= {name: x[m :: step.micro] for m, name in enumerate(names)}
            elif o.per is Per.TOKEN:
                rows[o.name] = _entries(x, step.micro, each) if o.micro else x.repeat(each, axis=0)
        for name in _outputs(step, point.tokens):
            rows[GRADIENT + name] = point.cotangents[name].repeat(each, axis=0)
            rows[GRADIENT + name][np.arange(end) % each != each - 1] = ZERO
        beyond = ((0, -end % length), (0, 0), (0, 0), (0, 0))
        self._rows = {n: np.pad(x, beyond, constant_values=ZERO) for n, x in rows.items()}

    def _evaluate(self, roots: list[Tile], carries: _Values, sizes: Sizes) -> list[Numbers]:
        def leaf(t: Tile) -> Numbers:
            name = str(t.attrs[0])
            if t.op is TileOp.TOKEN:
                return self._turned(self._rows[name][sizes.first : sizes.first + sizes.rows])
            return self._turned(
                {
                    TileOp.HEAD: self._point.values,
                    TileOp.PARAM: self._point.params,
                    TileOp.CARRY: carries,
                }[t.op][name]
            )

        return list(map(self._turned, evaluate(roots, leaf, sizes)))

    def _turned(self, x: Numbers) -> Numbers:
        """A value between the declaration's axes and those of tiles that hold states transposed."""
        return x.swapaxes(*CHANNELS) if self._transposed else x

    def results(self, body: ChunkProgram) -> _Values:
        """The outputs and the final states, and keeps the states as each chunk begins."""
        names = [c.name for c in body.carried]
        roots = [*(t for _, t in body.outputs), *(c.end for c in body.carried)]
        carries = {n: self._point.values[n] for n in names}
        outputs: dict[str, list[Numbers]] = {n.of: [] for n, _ in body.outputs}
        self._starts = []
        for sizes in self._sizes:
            self._starts.append(carries)
            found = self._evaluate(roots, carries, sizes)
            for own, x in zip(outputs.values(), found, strict=False):
                own.append(x)
            carries = dict(zip(names, found[len(outputs) :], strict=True))
        last = slice(self._each - 1, self._sizes[0].end, self._each)
        return {**carries, **{n: np.concatenate(own)[last] for n, own in outputs.items()}}

    def gradients(self, adjoint: Adjoint) -> _Values:
        """The gradients of all operands and initial states, by the chunks of the last `results`."""
        step = self._point.step
        names = [c.name for c in adjoint.carried]
        roots = [*(t for _, t in adjoint.outputs), *(c.end for c in adjoint.carried)]
        carries = {GRADIENT + s.name: self._point.cotangents[s.name] for s in step.states}
        parts: dict[BufferId, list[Numbers]] = {n: [] for n, _ in adjoint.outputs}
        for sizes, starts in zip(reversed(self._sizes), reversed(self._starts), strict=True):
            found = self._evaluate(roots, {**starts, **carries}, sizes)
            for own, x in zip(parts.values(), found, strict=False):
                own.insert(0, x)
            carries = dict(zip(names, found[len(parts) :], strict=True))
        result = {s.name: carries[GRADIENT + s.name] for s in step.states}
        for o in step.operands:
            like = self._point.values[o.name]
            if o.micro and self._apart:
                whole = np.empty_like(like)
                for m, name in enumerate(row_names(o, step.micro)):
                    own = like[m :: step.micro]
                    whole[m :: step.micro] = self._collected(o, own, parts.get(gradient(name)))
                result[o.name] = whole
            else:
                result[o.name] = self._collected(o, like, parts.get(gradient(o.name)))
        return result

    def _collected(self, o: Operand, like: Numbers, parts: list[Numbers] | None) -> Numbers:
        """The gradient of an operand from those of its rows in every chunk; 0 if it has none."""
        if parts is None:
            return np.full_like(like, ZERO)
        if o.per is Per.HEAD:
            return sum(parts)
        rows = np.concatenate(parts)[: self._sizes[0].end]
        if o.micro and not self._apart:
            return _entries(rows, self._each, self._point.step.micro)
        return rows.reshape(-1, self._each, *like.shape[1:]).sum(axis=1)


def _entries(x: Numbers, of: int, to: int) -> Numbers:
    """`x` with `to` rows a token, not `of`: no row reads those cut off, or the zeros added."""
    y = x.reshape(-1, of, *x.shape[1:])[:, :to]
    wider = np.pad(
        y, ((0, 0), (0, to - y.shape[1]), *((0, 0),) * (y.ndim - 2)), constant_values=ZERO
    )
    return wider.reshape(-1, *x.shape[1:])
