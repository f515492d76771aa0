"""Reads of one state that an output adds up: one read, by the sum of their keys."""

from __future__ import annotations

import functools
from dataclasses import replace

from ..dsl import algebra
from ..dsl.ir import Node, Op
from ..dsl.normal_form import NormalForm, expressions, results_of
from .coordinates import Coordinates, Seen


def added_up(
    form: NormalForm, coordinates: Coordinates, node: Node
) -> tuple[list[Seen], Node | None] | None:
    """Reads of which `node` is the sum, those of one state as one, and what else it is the sum of.

    None where no two are of one state, so that there is nothing to join.
    """
    terms, others = _terms(node)
    rest = algebra.total(x if sign > 0 else algebra.neg(x) for sign, x in others)
    elsewhere = results_of(*expressions(form), *(x for x in form.outputs if x != node))
    elsewhere += [] if rest is None else results_of(rest)
    if {n for _, n in terms} & {*elsewhere} or len({n for _, n in terms}) < len(terms):
        return None
    joined: dict[Seen, list[Seen]] = {}
    for sign, n in terms:
        for seen in coordinates.reads(form.reads[n]):
            if seen.factor is not None:
                return None
            signed = seen if sign > 0 else seen.with_keys(algebra.neg)
            of = replace(seen, read=replace(seen.read, key=algebra.ONE), own=None)
            joined.setdefault(of, []).append(signed)
    if all(len(parts) == 1 for parts in joined.values()):
        return None
    return [functools.reduce(Seen.joined, parts) for parts in joined.values()], rest


def _terms(node: Node, sign: int = 1) -> tuple[list[tuple[int, int]], list[tuple[int, Node]]]:
    """The results that are added up, by number, and the other summands, each with its sign."""
    if node.op is Op.RESULT:
        return [(sign, results_of(node)[0])], []
    if node.op in (Op.ADD, Op.SUB, Op.NEG):
        signs = (sign, sign if node.op is Op.ADD else -sign) if len(node.args) == 2 else (-sign,)
        found = [_terms(x, s) for x, s in zip(node.args, signs, strict=True)]
        return [x for own, _ in found for x in own], [x for _, other in found for x in other]
    return [], [(sign, node)]
