"""Every row of the tables of elementwise functions: the columns agree, and so does every engine."""

from __future__ import annotations

import builtins
import inspect
import itertools
from decimal import Decimal
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, State, Value
from chunkwise.codegen import evaluate, tile
from chunkwise.codegen.elementwise import FUNCTIONS
from chunkwise.codegen.padding import Padding, padding
from chunkwise.codegen.tile import Axis, Tile
from chunkwise.dsl import oracle
from chunkwise.dsl.bounds import interval
from chunkwise.dsl.elementwise import ELEMENTWISE, at_zeros, many_digits
from chunkwise.dsl.ir import Kind, Node, Op
from chunkwise.dsl.traced import Traced, build

from tests.harness import Inputs

OPS = pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: op.name)
NUMBERS = (-3.5, -0.75, -0.25, 0.375, 1.25, 4.0)
CLOSE, FAR = (1e-9, -1e-9), (-60.0, 60.0)
ATTRS = {Op.WITHIN: (-99.0, 99.0)}  # the bounds of the promise; no other op has attributes


def points(op: Op, *more: float) -> list[tuple[float, ...]]:
    """Arguments, no two alike, where the function is a finite number."""
    wanted = itertools.permutations((*NUMBERS, *more), op.arity)
    return [xs for xs in wanted if exact(op, *map(Decimal, xs)).is_finite()]


def exact(op: Op, *xs: Decimal) -> Decimal:
    with many_digits():
        return Decimal(ELEMENTWISE[op].value(*xs))


def node(op: Op, *args: Node) -> Node:
    return Node(op, args, ATTRS.get(op, ()), args[0].kind)


def leaves(op: Op) -> list[Node]:
    return [Node(Op.OPERAND, (), (name, None), Kind.SCALAR) for name in "xy"[: op.arity]]


def test_every_function_has_its_rows() -> None:
    from chunkwise.codegen.tir import math

    others = {Op.SUM, Op.SCALE, Op.OUTER, Op.READ, Op.READ_VALUE}
    assert set(ELEMENTWISE) == {op for op in Op if op.arity} - others
    assert set(FUNCTIONS) == set(ELEMENTWISE) - {Op.WITHIN}  # a promise leaves no tile
    assert set(math.FUNCTIONS) == set(FUNCTIONS)
    for op, f in FUNCTIONS.items():
        assert (
            bool(f.triton) == bool(f.torch) == (op not in (Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.NEG))
        )


@OPS
def test_torch_computes_the_value(op: Op) -> None:
    args = leaves(op)
    for xs in points(op, *CLOSE, *FAR):
        env = {a: torch.tensor(x, dtype=torch.float64) for a, x in zip(args, xs, strict=True)}
        (found,) = oracle.evaluate([node(op, *args)], env)
        assert float(found) == pytest.approx(float(exact(op, *map(Decimal, xs))), rel=1e-12), xs


@OPS
def test_the_interval_holds_the_values(op: Op) -> None:
    """Of arguments between two neighbours, for each pair of neighbours."""
    args = leaves(op)
    for low, high in itertools.pairwise(sorted((*NUMBERS, *CLOSE, *FAR))):
        promised = [Node(Op.WITHIN, (a,), (low, high), a.kind) for a in args]
        found = interval(node(op, *promised))
        for xs in itertools.product((low, (low + high) / 2, high), repeat=op.arity):
            value = exact(op, *map(Decimal, xs))
            if value.is_finite():
                slack = 1e-12 * (1 + abs(float(value)))
                assert found.lo - slack <= float(value) <= found.hi + slack, xs


@pytest.mark.parametrize("op", FUNCTIONS, ids=lambda op: op.name)
def test_the_gradient_is_the_difference_quotient(op: Op) -> None:
    args = [tile.head(name, ()) for name in "xy"[: op.arity]]
    gradients = FUNCTIONS[op].gradient(tile.fmap(op, *args), tile.const(3.0))
    assert [x for x, _ in gradients] == args
    step = Decimal("1e-20")
    for xs in points(op):
        at = dict(zip(args, map(Decimal, xs), strict=True))
        with many_digits():

            def leaf(t: Tile, at: dict[Tile, Decimal] = at) -> evaluate.Numbers:
                return evaluate.number(0.0) + at[t]

            found = evaluate.evaluate([g for _, g in gradients], leaf, evaluate.Sizes(1, 1, 1))
            for x, g in zip(args, found, strict=True):
                after, before = (
                    exact(op, *({**at, x: at[x] + by}[a] for a in args)) for by in (step, -step)
                )
                slope = 3 * (after - before) / (2 * step)
                assert abs(g.item() - slope) <= Decimal("1e-15") * (1 + abs(slope)), xs


@pytest.mark.parametrize("op", FUNCTIONS, ids=lambda op: op.name)
def test_padding_says_what_becomes_of_zeros(op: Op) -> None:
    args = [tile.token(name, (Axis.K,)) for name in "xy"[: op.arity]]
    found = padding(tile.fmap(op, *args), Axis.K)
    value = at_zeros(op)
    if not value.is_finite():
        assert found is Padding.UNSAFE
    else:
        assert found is (Padding.ZERO if value == 0 else Padding.FINITE)


def test_padding_of_what_is_used_twice_is_asked_for_once() -> None:
    """Otherwise a hundred squares of squares would take 2 ** 100 questions."""
    x = tile.token("x", (Axis.I, Axis.K))
    for _ in range(100):
        x = tile.fmap(Op.MUL, x, x)
    assert padding(x, Axis.K) is Padding.ZERO


def declared(op: Op) -> cw.Recurrence:
    """The function of Values, which are written, and of Keys, whose padding must not be summed."""

    def of(*xs: Traced) -> Traced:
        return build(op, *xs[: op.arity], attrs=ATTRS.get(op, ()))

    def every(
        S: State, q: Key, k: Key, v: Value, x: Value, y: Value, z: Key, w: Key
    ) -> tuple[Traced, Traced]:
        if op.arity == 1:
            y, w = 0 * y, 0 * w
        S = S + cw.outer(k, of(x, y) + 0 * y)
        return S, q @ S + v * cw.sum(of(z, w) + 0 * w)

    return cw.recurrence(every)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets 0 / 0 in padding
@OPS
def test_every_engine_computes_it(op: Op, engine: str, kit: Any) -> None:
    """On tokens of one sequence each, with arguments that are equal too: values and gradients."""
    chosen = [*points(op)[:: 1 if op.arity == 1 else 3], (1.25,) * op.arity]
    n = len(chosen)
    options = {"dtype": kit.engine.dtype, "device": kit.engine.device}
    first, *rest = (torch.tensor(xs, **options) for xs in zip(*chosen, strict=True))
    second = rest[0] if rest else first
    ones = torch.ones(1, **options)
    q = torch.nn.functional.pad(ones, (0, n - 1))
    given = {"q": q, "k": q, "v": first, "x": first, "y": second, "z": first, "w": second}
    operands = {name: x.expand(2, 1, 1, n).clone().requires_grad_() for name, x in given.items()}
    inputs = Inputs(operands, None, None)
    made = declared(op)
    expected = kit.oracle_results(made, inputs)
    kit.assert_agree(kit.engine_results(made, inputs, engine), expected, kit.tolerance)


def test_public_functions_are_listed() -> None:
    """The list of the language's functions is whole: hints in errors and the top names go by it."""
    from chunkwise.dsl import functions

    own = inspect.getmembers(functions, inspect.isfunction)
    public = [n for n, f in own if f.__module__ == functions.__name__ and n[0] != "_"]
    assert sorted(functions.__all__) == sorted(public)
    assert all(getattr(cw, n) is getattr(functions, n) for n in public)
    # a star import leaves Python's own names in place
    assert {n for n in public if not hasattr(builtins, n)} <= set(cw.__all__)
