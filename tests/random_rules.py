"""Random recurrences: declarations as text, of every kind of operand and function of the language.

A rule is drawn through `pick`, which chooses one of several things: Hypothesis does (and shrinks),
or a generator of random numbers does. The simplest choice comes first. Most rules are legal and
lowered, and contract their states (a state that grows would pass rounding off as an error); the
others must be refused in words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from chunkwise import dsl
from chunkwise.dsl.declaration import Declaration
from hypothesis import strategies as st

from tests.mirror import mirror
from tests.random_vocabulary import KIND_OF, NAMES, PARAMS, REFUSED, STATICS
from tests.random_writer import Pick, Writer, words_of


@dataclass(frozen=True)
class Rule:
    """A recurrence as text; what a failing draw prints."""

    states: tuple[str, ...]  # "S: State"
    lines: tuple[str, ...]
    names: tuple[tuple[str, str], ...] = ()  # operands that are called otherwise
    mirrored: bool = False  # Keys and Values exchanged, and so the axes of states

    @property
    def params(self) -> dict[str, float]:
        """The run-time floats of a call."""
        return {n: x for n, (_, x) in PARAMS.items() if n in words_of(self.lines)}

    @property
    def source(self) -> str:
        """The declaration."""
        used = words_of(self.lines)
        operands = [f"{n}: {kind}" for n, kind in KIND_OF.items() if n in used]
        keywords = [f"{n}: {kind}" for n, (kind, _) in PARAMS.items() if n in used]
        keywords += [f"{n}: {kind}" for n, kind in STATICS.items() if n in used]
        signature = ", ".join([*self.states, *operands, *(["*"] if keywords else []), *keywords])
        body = "\n".join(f"    {line}" for line in self.lines)
        source = f"def rule({signature}):\n{body}\n"
        return _renamed(mirror(source) if self.mirrored else source, dict(self.names))

    def declare(self) -> Declaration:
        """What the compiler takes."""
        names: dict[str, object] = {n: getattr(dsl, n) for n in dsl.__all__}
        exec(compile(self.source, "<random rule>", "exec"), names)
        function = names["rule"]
        assert callable(function)
        return Declaration(function)


def _renamed(source: str, names: dict[str, str]) -> str:
    if not names:
        return source
    return re.sub(r"\b(" + "|".join(names) + r")\b", lambda m: names[m[0]], source)


_SHAPES = (
    *("one", "one", "one", "one", "normalised", "normalised", "micro", "micro", "two", "vector"),
    *("two vectors", "mixed", "mixed", "refused", "cascade", "cascade", "vector first", "three"),
    *("unlike", "turned", "turned", "turned by reads", "turned late", "turned vectors"),
)
_MATRICES: dict[str, list[str]] = {
    **{shape: ["S", "M"] for shape in ("two", "cascade")},
    **{shape: [] for shape in ("vector", "two vectors")},
    "three": ["S", "M", "N"],
    "turned": ["S", "M"],
    "turned by reads": ["N", "S", "M"],
    "turned late": ["S", "M", "N", "L"],
    "turned vectors": [],
}
_VECTORS = {
    **{shape: ["z_"] for shape in ("normalised", "vector", "vector first")},
    "two vectors": ["z_", "y_"],
    "turned vectors": ["z_", "y_"],
}


def rule(pick: Pick) -> Rule:
    """A recurrence, most often legal and lowered."""
    writer = Writer(pick, depth=pick((1, 1, 2)))
    shape = pick(_SHAPES)
    matrices = _MATRICES.get(shape, ["S"])
    vectors = _VECTORS.get(shape, [])
    lines: list[str] = []
    if shape == "vector first":
        lines += [*writer.normaliser("z_"), *writer.reads("z_", vector=True)]
    elif shape == "turned vectors":
        lines += writer.turned_vectors(*vectors)
    if shape == "mixed":
        matrices = list("SMN"[: pick((2, 2, 3))])
        lines += [x for _ in range(pick((1, 1, 1, 2))) for x in writer.group(matrices)]
    elif shape.startswith("turned"):
        if shape == "turned by reads":
            lines += [*writer.update("N"), *writer.reads("N", vector=False)]
        late = "NL" if shape == "turned late" else ""
        if matrices:
            lines += [x for _ in range(pick((1, 1, 2))) for x in writer.turned("S", "M", late)]
    else:
        for S in matrices:
            lines += writer.micro(S) if shape == "micro" else writer.update(S)
            if shape in ("cascade", "three") and matrices[-1] != S:
                lines += writer.reads(S, vector=False)
    if shape == "unlike":  # the state again and again, each time another way
        lines = [x for _ in range(pick((1, 1, 2))) for x in writer.update("S")] + lines
    if shape not in ("vector first", "turned vectors"):
        for z in vectors:
            lines += writer.normaliser(z)
    if shape == "refused":
        lines += writer.output(matrices, vectors)
        lines.append(pick(REFUSED))
    else:
        over = pick(("Key", "Key", "Value"))
        lines += writer.output(matrices, vectors, over=over)
    mirrored = not vectors and pick((False, False, True))
    states = [*matrices, *vectors]
    lines.append(
        f"return ({', '.join(states)}), o" if len(states) > 1 else f"return {states[0]}, o"
    )
    kept = _without_unused(lines)
    declared = [*(f"{S}: State" for S in matrices), *(f"{z}: KeyState" for z in vectors)]
    return Rule(tuple(declared), tuple(kept), _names(pick, kept), mirrored)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """The same, drawn and shrunk by Hypothesis."""
    return rule(lambda options: draw(st.sampled_from(options)))


def _without_unused(lines: Sequence[str]) -> list[str]:
    """Without the names of moments and reads that nothing uses."""
    named = re.compile(r"^(\w+[01]|(?:S|M|N|z_)[vks]) = ")
    kept = [
        line
        for line in lines
        if (m := named.match(line)) is None or m[1] in words_of([x for x in lines if x != line])
    ]
    return kept if len(kept) == len(lines) else _without_unused(kept)


def _names(pick: Pick, lines: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Other names for operands, now and then."""
    if pick((True, True, True, False)):
        return ()
    used = words_of(lines)
    taken = set(KIND_OF) | used | set(dsl.__all__)
    free = [n for n in NAMES if n not in taken]
    chosen = []
    for name in (n for n in KIND_OF if n in used):
        other = pick(free)
        free.remove(other)
        chosen.append((name, other))
    return tuple(chosen)
