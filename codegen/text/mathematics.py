"""TileIR as mathematics: one assignment a line, axes as indices, for `explain` and for debugging.

`x[i,j] = Σ_k q[i,k]·k[j,k]` is a product; i and j run over the n tokens of a chunk, k and v over
the channels; `[i > j]` is 1 where it holds and 0 elsewhere. Marks show the facts that
planning goes by: [s] depends on the scan's carry, [n] is needed by its next carry. Floors of
log-decays and flushes to 0 are not shown: they change no number that float32 can hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...dsl.ir import Op
from ...dsl.latex import LATEX, Equation
from ...dsl.notation import Level, Notation, Text
from .. import tile
from ..buffers import BufferId
from ..chunk import Carried, ChunkProgram, Named
from ..differentiate import GRADIENT, Adjoint
from ..expressions import Names, identifier
from ..plan import Kernel, Loop, Program
from ..tile import ALIASES, LEAVES, NUMBERS, POINTWISE, TIMES, Axes, Axis, Tile, TileOp, Which

_NOTATION = Notation({Op.ADD: " + ", Op.SUB: " − ", Op.MUL: "·", Op.DIV: "/"}, "−")
_COMPARISON = {Which.LOWER: "≥", Which.STRICT: ">", Which.DIAGONAL: "="}
_ALIASES = (*ALIASES, TileOp.FLOOR, TileOp.FLUSH)
_ELEMENTWISE = tuple(op for op in POINTWISE if op not in _ALIASES)
_SUMS = (TileOp.DOT, TileOp.SUM)
_NEVER_ASSIGNED = (*_ALIASES, *NUMBERS)
_LONGEST = 58  # an inlined expression longer than this is hard to read
_WRAP = 96


@dataclass(frozen=True, slots=True)
class _View:
    """The letters of the axes where a tile is printed, and the notation."""

    letters: Mapping[Axis, str]
    notation: Notation

    def renamed(self, axes: Axes, letter: str) -> _View:
        """The view where `axes` have another letter."""
        return _View({**self.letters, **dict.fromkeys(axes, letter)}, self.notation)

    def indices(self, axes: Axes) -> list[str]:
        """The letters of `axes`: of times, then of Keys and Values."""
        times = [self.letters[a] for a in axes if a in TIMES]
        return [*times, *sorted(self.letters[a] for a in axes if a not in TIMES)]


_PLAIN = _View({axis: axis.value for axis in Axis}, _NOTATION)


def _view(notation: Notation = _NOTATION, *, transposed: bool) -> _View:
    """Letters as users know the axes: k of Keys, also where states are held transposed."""
    letters = dict(_PLAIN.letters)
    if transposed:
        letters |= {Axis.K: Axis.V.value, Axis.V: Axis.K.value}
    return _View(letters, notation)


@dataclass(frozen=True, slots=True)
class _Line:
    """An assignment: `value` is None where the left side names a leaf (a value stored as it is)."""

    tile: Tile
    left: str
    right: str


class _Printer:
    """Names the tiles below `roots`, inlines what is used once, and prints the rest as lines.

    `named` are leaves besides the operands: tiles that an earlier kernel stored, by buffer name.
    Outputs keep their names; the ends of carries are called like them, with `_next`.
    """

    def __init__(
        self,
        outputs: Named,
        carried: Iterable[Carried],
        named: Mapping[Tile, BufferId],
    ) -> None:
        wanted = {_shown(t): n.label for n, t in outputs}
        wanted |= {_shown(c.end): f"{c.name}_next" for c in carried}
        self._roots = list(wanted)
        self._order = tile.topological(*self._roots, stop=frozenset(named))
        self._names = Names(())
        self.known: dict[Tile, str] = {}
        for t in self._order:
            if t in named:
                self.known[t] = self._names.fresh(named[t].label)
            elif t.op in LEAVES:
                self.known[t] = self._names.fresh(identifier(_leaf_name(t)))
        self._wanted = {
            t: self._names.fresh(name) for t, name in wanted.items() if t not in self.known
        }
        # operands, carries and stored tiles, in order of use
        self.leaves = [t for t in self.known if t.op is not TileOp.PARAM]
        self._uses: Counter[Tile] = Counter(self._roots)
        self._users: dict[Tile, list[tuple[Tile, bool]]] = {}
        for t in self._order:
            if t not in self.known and t.op not in _ALIASES:
                for a in t.args:
                    shown = _shown(a, self.known)
                    self._uses[shown] += 1
                    self._users.setdefault(shown, []).append((t, _renames(a)))

    def leaf(self, t: Tile, view: _View = _PLAIN) -> str:
        """A leaf with its axes."""
        return view.notation.symbol(self.known[t], view.indices(t.axes))

    def lines(self, view: _View = _PLAIN) -> list[_Line]:
        """The assignments, each before its uses."""
        leaves = dict(self.known)
        lines = []
        for t in self._order:
            if t in leaves or t.op in _NEVER_ASSIGNED or self._inlined(t):
                continue
            right = self._expression(t, view).text
            self.known[t] = self._wanted.get(t) or self._names.fresh(t.hint or "x")
            lines.append(_Line(t, self.leaf(t, view), right))
        return lines

    def name(self, t: Tile) -> str:
        """A root: the name it was given, or the number it is."""
        t = _shown(t, self.known)
        return self.known[t] if t in self.known else self._text(t, _PLAIN).text

    def _inlined(self, t: Tile) -> bool:
        """Whether `t` is printed within the line of its only user, by its length as plain text."""
        if self._uses[t] > 1 or t in self._roots:
            return False
        ((user, _),) = self._users[t]
        if user.op in (TileOp.INVERSE, TileOp.SUBSTITUTE):  # of a matrix with a name
            return False
        if t.op in _SUMS and self._clashes(t):
            return False
        if t.op not in (*_ELEMENTWISE, *_SUMS):
            return False
        return len(self._expression(t, _PLAIN).text) <= _LONGEST

    def _clashes(self, t: Tile) -> bool:
        """Whether the index that `t` sums over might meet itself in the expression around it."""
        bound = set(tile.summed_axes(t))
        while self._uses[t] == 1 and t not in self._roots:
            ((user, renamed),) = self._users[t]
            if user.op not in _ELEMENTWISE:
                return True
            if renamed or bound & set(user.axes):
                return True
            t = user
        return False

    # ---- expressions -----------------------------------------------------------------------------

    def _text(self, x: Tile, view: _View) -> Text:
        while x.op in _ALIASES and x not in self.known:
            if x.op is TileOp.RENAME:
                view = view.renamed(TIMES, view.letters[x.attr(Axis)])
            (x,) = x.args
        if x in self.known:
            return Text(self.leaf(x, view))
        if x.op is TileOp.CONST:
            return view.notation.number(x.value)
        if x.op is TileOp.EXTENT:
            return Text(view.letters[x.attr(Axis)].upper())
        return self._expression(x, view)

    def _expression(self, x: Tile, view: _View) -> Text:
        notation, row = view.notation, view.letters[Axis.I]
        if x.op is TileOp.MAP:
            return self._map(x, view)
        if x.op is TileOp.STEP:
            return notation.positive(self._text(x.args[0], view))
        if x.op is TileOp.ROUND:
            return notation.nearest(self._text(x.args[0], view))
        if x.op is TileOp.ROWS:
            return notation.where(self._factor(x.args[0], view), f"{row} < n")
        if x.op is TileOp.PHASE:
            micro_step, count = x.attrs
            condition = f"{row} mod {count} = {micro_step}"
            return notation.where(self._factor(x.args[0], view), condition)
        if x.op is TileOp.MASK:
            return notation.where(self._factor(x.args[0], view), _condition(x))
        if x.op is TileOp.CUMSUM:
            return self._cumsum(x, view)
        late = view.renamed((Axis.I,), "t")
        if x.op is TileOp.DECAY:
            last = "<" if x.attrs[-1] else "≤"
            span = f"{view.letters[Axis.J]}<t{last}{row}"
            decay = notation.series(span, self._factor(x.args[0], late))
            return notation.where(notation.function(Op.EXP, [decay]).text, _condition(x))
        if x.op is TileOp.DECAYED_CROSSING:
            last = ">" if x.attrs[-1] else "≥"
            factors = [self._factor(a, late) for a in x.args[:3]]
            return notation.series(
                f"t{last}{row}>j", notation.product([*factors, self._relative(x.args[-3:-1], late)])
            )
        if x.op is TileOp.PRODUCT:
            letters = ((row, "l"), ("l", view.letters[Axis.J]))
            factors = []
            for a, (first, second), transposed in zip(x.args, letters, x.attrs, strict=True):
                i, j = (second, first) if transposed else (first, second)
                factors.append(self._factor(a, view.renamed((Axis.I,), i).renamed((Axis.J,), j)))
            return notation.series("l", notation.product(factors))
        if x.op is TileOp.SUBSTITUTE:
            *matrix, given = x.args
            scaled = notation.product([notation.symbol(self.name(a)) for a in matrix[::-1]])
            entry = ("l", row) if x.attrs[0] else (row, "l")
            solved = notation.unit_inverse(scaled, entry).text
            of_row = self._factor(given, view.renamed((Axis.I,), "l"))
            return notation.series("l", notation.product([solved, of_row]))
        if x.op is TileOp.INVERSE:
            lower = notation.symbol(self.name(x.args[0]))
            return notation.unit_inverse(lower, view.indices((Axis.I, Axis.J)))
        return notation.series(",".join(view.indices(tile.summed_axes(x))), self._summand(x, view))

    def _summand(self, x: Tile, view: _View) -> str:
        product = view.notation.product
        if x.op in (TileOp.SUM, TileOp.DOT):
            return product([self._factor(a, view) for a in x.args])
        assert x.op in (TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY), f"no text for {x.op.name}"
        factors = [self._factor(a, view) for a in x.args[:2]]
        factors.append(self._relative(x.args[2:4], view))
        return view.notation.where(product(factors), "i > j").text

    def _relative(self, logs: Sequence[Tile], view: _View) -> str:
        """exp of the difference of two logs."""
        difference = view.notation.binary(Op.SUB, *(self._text(a, view) for a in logs))
        return view.notation.function(Op.EXP, [difference]).text

    def _map(self, x: Tile, view: _View) -> Text:
        fn = x.attr(Op)
        notation, args = view.notation, [self._text(a, view) for a in x.args]
        if fn is Op.ADD and args[1].text.startswith(notation.minus):  # a + −b + c is a − b + c
            positive = args[1].text.removeprefix(notation.minus)
            return Text(f"{args[0].text}{notation.signs[Op.SUB]}{positive}", Level.SUM)
        if fn in notation.signs:
            return notation.binary(fn, *args)
        return notation.negative(*args) if fn is Op.NEG else notation.function(fn, args)

    def _factor(self, x: Tile, view: _View) -> str:
        return self._text(x, view).at(Level.QUOTIENT)

    def _cumsum(self, x: Tile, view: _View) -> Text:
        reverse, exclusive = x.attrs
        sign = {(False, False): "≤", (False, True): "<", (True, False): "≥", (True, True): ">"}
        bound = f"t{sign[bool(reverse), bool(exclusive)]}{view.letters[Axis.I]}"
        return view.notation.series(bound, self._factor(x.args[0], view.renamed((Axis.I,), "t")))


def _shown(x: Tile, known: Container[Tile] = ()) -> Tile:
    """The tile that a reader sees for `x`: aliases are left out, except for `known` ones."""
    while x.op in _ALIASES and x not in known:
        (x,) = x.args
    return x


def _condition(x: Tile) -> str:
    return f"i {_COMPARISON[x.attr(Which)]} j"


def _renames(x: Tile) -> bool:
    while x.op in _ALIASES:
        if x.op is TileOp.RENAME:
            return True
        (x,) = x.args
    return False


def _leaf_name(t: Tile) -> str:
    name, *micro = t.attrs
    return str(name) if not micro or micro[0] is None else f"{name}_{micro[0]}"


# ---- pages ---------------------------------------------------------------------------------------


def print_chunk(body: ChunkProgram) -> str:
    """The chunk of a recurrence: its assignments in order, with their marks."""
    printer = _Printer(body.outputs, body.carried, {})
    view = _view(transposed=body.transposed)
    lines = printer.lines(view)
    starts = frozenset(c.start for c in body.carried)
    head = [
        f"carries  {', '.join(printer.leaf(c.start, view) for c in body.carried)}",
        f"reads    {_operands(printer, starts, view)}",
    ]
    marked = _marked(lines, starts, body.carried)
    notes = _ends(printer, body.outputs, body.carried)
    return "\n".join(head + _aligned(lines, marked, notes))


def chunk_equations(body: ChunkProgram) -> tuple[Equation, ...]:
    """The same in LaTeX, each row with where its value goes."""
    printer = _Printer(body.outputs, body.carried, {})
    lines = printer.lines(_view(LATEX, transposed=body.transposed))
    notes = _ends(printer, body.outputs, body.carried)
    return tuple(Equation(x.left, x.right, notes.get(x.tile, "")) for x in lines)


def print_adjoint(adjoint: Adjoint) -> str:
    """The chunk of the reversed scan: recomputed tiles first, then those that carry a gradient."""
    printer = _Printer(adjoint.outputs, adjoint.carried, {})
    view = _view(transposed=adjoint.transposed)
    lines = printer.lines(view)
    starts = frozenset(c.start for c in adjoint.carried)
    saved = frozenset(adjoint.saved)
    incoming = starts | {t for t in printer.leaves if _is_gradient(t)}
    dependent = _dependent([x.tile for x in lines], incoming)
    again = [x for x in lines if x.tile not in dependent]
    rest = [x for x in lines if x.tile in dependent]
    carries = ", ".join(printer.leaf(c.start, view) for c in adjoint.carried)
    head = [
        f"carries  {carries}, from the last chunk to the first",
        f"reads    {_operands(printer, starts | saved, view)}",
        f"saved    {', '.join(printer.leaf(t, view) for t in printer.leaves if t in saved)}",
    ]
    marked = _marked(lines, starts, adjoint.carried)
    notes = _ends(printer, adjoint.outputs, adjoint.carried)
    pages = ["recomputed", *_aligned(again, marked, {})] if again else []
    pages += ["gradients", *_aligned(rest, marked, notes)]
    return "\n".join(head + pages)


def print_program(program: Program) -> str:
    """The kernels of a plan, each with its inputs, assignments and results."""
    return "\n\n".join(print_kernel(k) for k in program.kernels)


def print_kernel(kernel: Kernel) -> str:
    """One kernel: its inputs, assignments and results."""
    printer = _Printer(kernel.stores, kernel.carried, kernel.buffers)
    view = _view(transposed=kernel.transposed)
    lines = printer.lines(view)
    starts = frozenset(c.start for c in kernel.carried)
    buffers = kernel.buffers
    head = [f"{kernel.name}: {kernel.loop.value}{' of a segment' if kernel.segments else ''}"]
    if kernel.loop is not Loop.PARALLEL:
        carries = (printer.leaf(c.start, view) for c in kernel.carried)
        head.append(f"  carries  {', '.join(carries)}")
    operands = [t for t in printer.leaves if t not in starts and t not in buffers]
    head.append(f"  reads    {' '.join(printer.leaf(t, view) for t in operands)}")
    if kernel.segments is not None:
        head.append(f"  starts   {kernel.segments.start.value}")
    if buffers:
        loads = (printer.leaf(t, view) for t in printer.leaves if t in buffers)
        head.append(f"  loads    {' '.join(loads)}")
    notes = _ends(printer, kernel.stores, kernel.carried, "stored")
    stored = [name for name, t in kernel.stores if _shown(t) in (*starts, *buffers)]
    head += [f"  stores   {name.label}, as each chunk begins" for name in stored]
    if kernel.segments is not None and kernel.segments.ends:
        head.append(f"  stores   {', '.join(c.name for c in kernel.carried)}, as the segment ends")
    return "\n".join(head + _aligned(lines, {}, notes))


def _operands(printer: _Printer, starts: frozenset[Tile], view: _View) -> str:
    return " ".join(printer.leaf(t, view) for t in printer.leaves if t not in starts)


def _is_gradient(t: Tile) -> bool:
    return t.op in (TileOp.TOKEN, TileOp.CARRY) and str(t.attrs[0]).startswith(GRADIENT)


def _ends(
    printer: _Printer,
    outputs: Named,
    carried: Iterable[Carried],
    verb: str = "output",
) -> dict[Tile, str]:
    """Where a value goes, by tile: out, or into the next carry."""
    notes: dict[Tile, str] = {}
    for name, t in outputs:
        given = "" if name.label == printer.name(t) else f" {name.label}"
        notes[_shown(t)] = f"→ {verb}{given}"
    for c in carried:
        before = notes.get(_shown(c.end), "")
        notes[_shown(c.end)] = f"{before} → next {c.name}".strip()
    return notes


def _marked(
    lines: list[_Line], starts: frozenset[Tile], carried: tuple[Carried, ...]
) -> dict[Tile, str]:
    dependent = _dependent([x.tile for x in lines], starts)
    needed = set(tile.topological(*(c.end for c in carried)))
    return {
        x.tile: ("[s]" if x.tile in dependent else "   ") + ("[n]" if x.tile in needed else "   ")
        for x in lines
    }


def _dependent(tiles: list[Tile], on: frozenset[Tile]) -> set[Tile]:
    found = set(on)
    for t in tile.topological(*tiles):
        if any(a in found for a in t.args):
            found.add(t)
    return found


def _aligned(lines: list[_Line], marks: Mapping[Tile, str], notes: Mapping[Tile, str]) -> list[str]:
    left = max((len(x.left) for x in lines), default=0)
    right = min(max((len(x.right) for x in lines), default=0), 60)
    printed = []
    for x in lines:
        tail = f"{marks.get(x.tile, '')} {notes.get(x.tile, '')}".rstrip()
        text = f"  {x.left:<{left}} = {x.right:<{right}}"
        if tail and len(text) + len(tail) + 2 > _WRAP:
            text = text.rstrip()
        printed.append(f"{text}  {tail}".rstrip() if tail else text.rstrip())
    return printed
