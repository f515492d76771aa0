"""Orders a step's products, which run while their warp group computes: what is issued when.

A product is issued as soon as its factors are there, those first on which most others depend, and
waited for when a factor is made of it: the step never waits for a product that nothing needs yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...dsl.ir import Op
from .. import tile, tiled
from ..tile import Tile


@dataclass(frozen=True, slots=True)
class Issue:
    """A product begins."""

    product: tiled.Product


@dataclass(frozen=True, slots=True)
class Await:
    """All but the last `outstanding` products are over; `values`: what that makes known."""

    outstanding: int
    values: tuple[Tile, ...]


Event = Issue | Await
_NONE: frozenset[Tile] = frozenset()


def subtracted(statements: Iterable[tiled.Statement]) -> tuple[tiled.Statement, ...]:
    """`statements`, where x - a·b is a product of -a added to x: no tile waits to be subtracted."""
    made = list(statements)
    uses = Counter(u.value for s in made for u in tiled.uses(s))
    products = {
        s.value: s for s in made if isinstance(s, tiled.Product) and s.start is None and not s.adds
    }
    for s in tuple(made):
        if not (isinstance(s, tiled.Compute) and s.value.is_map(Op.SUB)):
            continue
        start, taken = s.args
        product = products.get(taken.value)
        if product is None or uses[taken.value] != 1 or start.axes != taken.axes:
            continue
        x = product.left.value
        minus = tile.neg(x)
        args = (tiled.Use(x, x.axes),)
        left = product.left._replace(value=minus)
        at = made.index(s)
        made[at : at + 1] = [
            tiled.Compute(minus, args, s.dtype),
            replace(product, value=s.value, left=left, start=start),
        ]
        made.remove(product)
    return tuple(made)


class Schedule:
    """The events of one step."""

    def __init__(self, statements: tuple[tiled.Statement, ...]) -> None:
        """Schedule the products of `statements`; `uses` counts how often each value is used."""
        self.uses = Counter(u.value for s in statements for u in tiled.uses(s))
        self._made = {
            s.value: s for s in statements if isinstance(s, tiled.Compute | tiled.Product)
        }
        self._products = [s for s in statements if isinstance(s, tiled.Product)]
        self._below: dict[Tile, frozenset[Tile]] = {}  # the products that a value is made of
        for x, s in self._made.items():
            if isinstance(s, tiled.Product):
                self._below[x] = frozenset((x,))
            else:
                self._below[x] = _NONE.union(*(self._below.get(u.value, _NONE) for u in s.args))
        self.events = tuple(self._events())

    def _onto(self, s: tiled.Product) -> Tile | None:
        """The product that `s` adds to while that may not be over: its sums serve nothing else."""
        x = None if s.start is None else s.start.value
        is_product = isinstance(self._made.get(x), tiled.Product) if x is not None else False
        return x if is_product and x is not None and self.uses[x] == 1 else None

    def _needs(self, s: tiled.Product) -> frozenset[Tile]:
        """The products that must be over before `s` begins."""
        used = [s.left.value, s.right.value]
        if s.start is not None and self._onto(s) is None:
            used.append(s.start.value)
        return _NONE.union(*(self._below.get(x, _NONE) for x in used))

    def _height(self, s: tiled.Product) -> int:
        """The most products that follow one after the other from `s`, each waiting for the last."""
        after = (p for p in self._products if s.value in self._needs(p))
        return max((1 + self._height(p) for p in after), default=0)

    def _events(self) -> Iterable[Event]:
        todo = sorted(self._products, key=self._height, reverse=True)
        issued: list[Tile | None] = []  # in flight, oldest first; None: others add to its sums
        over: set[Tile] = set()
        started: set[Tile] = set()
        while todo:
            possible = [s for s in todo if (x := self._onto(s)) is None or x in started]
            ready = [s for s in possible if self._needs(s) <= over]
            if not ready:
                soon = next(s for s in possible if self._needs(s) <= started)
                needed = self._needs(soon)
                last = max(n for n, x in enumerate(issued) if x in needed)
                values = tuple(x for x in issued[: last + 1] if x is not None)
                del issued[: last + 1]
                over.update(values)
                yield Await(len(issued), values)
                ready = [soon]
            s = ready[0]
            onto = self._onto(s)
            if onto in issued:
                issued[issued.index(onto)] = None
            todo.remove(s)
            started.add(s.value)
            issued.append(s.value)
            yield Issue(s)
        if issued:
            yield Await(0, tuple(x for x in issued if x is not None))
