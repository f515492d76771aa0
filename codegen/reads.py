"""Reads of one state that an output adds up: one read, by the sum of their keys."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

from ..dsl import algebra
from ..dsl.ir import Node, Op, constant, topological
from ..dsl.normal_form import NormalForm, expressions, results_of
from .coordinates import Coordinates, Seen


def added_up(
    form: NormalForm, coordinates: Coordinates, node: Node
) -> tuple[list[Seen], Node | None] | None:
    """Reads of which `node` is the sum, those of one state as one, and what else it is the sum of.

    None where no two are of one state, so that there is nothing to join.
    """
    terms, others = _terms(node)
    rest = algebra.total(algebra.mul(constant(float(n)), x) for n, x in others)
    elsewhere = results_of(*expressions(form), *(x for x in form.outputs if x != node))
    elsewhere += [] if rest is None else results_of(rest)
    if {n for _, n in terms} & {*elsewhere} or any(abs(sign) != 1 for sign, _ in terms):
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


def _terms(node: Node) -> tuple[list[tuple[int, int]], list[tuple[int, Node]]]:
    """The results that are added up, by number, and the other summands, each with its factor.

    Each part of the sum is looked at once, however often it is added.
    """
    order = topological(node)
    counts = Counter({node: 1})
    for x in reversed(order):
        if x.op in (Op.ADD, Op.SUB, Op.NEG) and x in counts:
            count = counts.pop(x)
            signs = (count, count if x.op is Op.ADD else -count)
            for a, n in zip(x.args, signs if len(x.args) == 2 else (-count,), strict=True):
                counts[a] += n
    found = [(counts[x], x) for x in order if x in counts]
    terms = [(n, results_of(x)[0]) for n, x in found if x.op is Op.RESULT]
    return terms, [(n, x) for n, x in found if x.op is not Op.RESULT]
