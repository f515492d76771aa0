"""How a state passes a stretch of tokens, which the op itself computes: scaled, or multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..codegen.config import Dims
from ..codegen.padding import Padding, padding
from ..codegen.programs import chunk_program, transition_of
from ..codegen.segments import segment_transitions
from ..codegen.tile import Axis
from ..dsl import errors
from ..dsl.ir import Node
from ..dsl.normal_form import NormalForm, results_of
from ..dsl.turns import log_decays
from .call import Call


@dataclass(frozen=True, slots=True)
class Kinds:
    """Of each state, in order: whether A is a matrix, and else the log-decays that it is made of.

    `transposed`: whether matrices multiply states from the right.
    """

    matrix: tuple[bool, ...]
    decays: tuple[tuple[Node, ...], ...]
    transposed: bool


def kinds_of(call: Call) -> Kinds:
    """The transitions of the states of a call; NotLowered where they are not derived."""
    names = tuple(s.name for s in call.declaration.states)
    return _kinds(call.form, names, Dims(max(call.K, 1), max(call.V, 1)))


@lru_cache(maxsize=512)
def _kinds(form: NormalForm, states: tuple[str, ...], dims: Dims) -> Kinds:
    program = chunk_program(form)
    found = segment_transitions(program.carried)
    if found is None or transition_of(form, dims) is None:
        raise errors.NotLowered(
            f"{form.name} on several ranks",
            "the transition of its states over a stretch of tokens is not derived (states that "
            "mix, gates of both axes, or a matrix of more than 128 channels)",
            "keep sequences whole: batch and heads may be split over ranks",
        )
    transitions = {c.name: p for c, p in zip(program.carried, found, strict=True)}
    ends = {c.name: c.end for c in program.carried}
    matrix, decays = [], []
    for state in states:
        p = transitions[state]
        matrix.append(p is not None and p.matrix)
        logs = [g for name, g in log_decays(form) if name == state]
        scales = p is not None and not p.matrix
        decays.append(tuple(logs) if scales else ())
        kept = padding(ends[state], Axis.V) is Padding.ZERO or not matrix[-1]
        if not kept or (scales and (not logs or any(map(results_of, logs)))):
            raise errors.NotLowered(
                f"{form.name} on several ranks",
                f"what is written to state {state} is not zero where its operands are",
                "keep sequences whole: batch and heads may be split over ranks",
            )
    return Kinds(tuple(matrix), tuple(decays), program.transposed)
