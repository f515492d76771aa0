"""Expressions on symbols: polynomials, and a symbol per opaque function of equal arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]

from . import algebra, errors
from .decay import SMALLEST
from .elementwise import ELEMENTWISE
from .ir import Kind, Node, Op, Per, topological
from .normal_form import Operand, StateDecl

Expr: TypeAlias = Any  # SymPy carries no types
Array = tuple[Expr, ...]  # a Scalar has one entry, a vector its channels, a state K*V in rows


class Symbols:
    """Values of expressions: polynomials in symbols; one symbol per opaque function of equal
    arguments."""

    def __init__(self, operands: Iterable[Operand], key: int, width: int) -> None:
        self._per_token = {o.name for o in operands if o.per is Per.TOKEN}
        self.key, self.width = key, width
        self._opaque: dict[tuple[object, ...], Expr] = {}

    def leaf(self, node: Node, token: int) -> Array:
        name = "_".join(str(a) for a in node.attrs if a is not None)
        if node.op is Op.OPERAND and node.attrs[0] in self._per_token:
            name += f"_{token}"
        size = {Kind.KEY: self.key, Kind.VALUE: self.width}.get(node.kind, 1)
        return tuple(sympy.Symbol(f"{name}__{i}", real=True) for i in range(size))

    def opaque(self, name: str, *args: Expr) -> Expr:
        key = (name, *(sympy.expand(a) for a in args))
        if name == "sqrt" and (exponent := self._exponent(key[1])) is not None:
            key = ("exp", sympy.expand(exponent / 2))  # written either way
        if key not in self._opaque:
            self._opaque[key] = sympy.Symbol(f"{name}__{len(self._opaque)}", positive=True)
        return self._opaque[key]

    def _exponent(self, x: Expr) -> Expr | None:
        """The logarithm of a product of powers of e; None of anything else."""
        known = {symbol: key[1] for key, symbol in self._opaque.items() if key[0] == "exp"}
        factors = x.as_powers_dict()
        if not factors or any(f not in known for f in factors):
            return None
        return sympy.Add(*(n * known[f] for f, n in factors.items()))

    def opaque_over(self, symbols: Sequence[Expr]) -> bool:
        """Whether an opaque function was taken of something that holds one of `symbols`."""
        seen = set(symbols)
        arguments = (a for key in self._opaque for a in key[1:])
        return any(isinstance(a, sympy.Expr) and a.free_symbols & seen for a in arguments)

    def value(self, node: Node, token: int, env: dict[Node, Array]) -> Array:
        """The value of an expression at a token; `env` holds known values and receives new ones."""
        for n in topological(node):
            if n not in env:
                env[n] = self._compute(n, token, [env[a] for a in n.args])
        return env[node]

    def _compute(self, node: Node, token: int, args: list[Array]) -> Array:
        op = node.op
        if op in (Op.OPERAND, Op.PARAM):
            return self.leaf(node, token)
        if op is Op.CONST:
            return (rational(algebra.number(node)),)
        if op is Op.SUM:
            return (sympy.Add(*args[0]),)
        if op is Op.OUTER:
            return tuple(k * v for k in args[0] for v in args[1])
        if op is Op.READ:
            return recalled(args[0], args[1])
        if op is Op.READ_VALUE:
            return recalled(args[1], transposed(args[0], self.key))
        if op is Op.SCALE:
            return scaled(args[0], args[1], node.args[1].kind)
        size = max(len(a) for a in args)
        wide = [a * size if len(a) == 1 else a for a in args]
        return tuple(self._elementwise(op, xs) for xs in zip(*wide, strict=True))

    def _elementwise(self, op: Op, xs: Sequence[Expr]) -> Expr:
        if op in _POLYNOMIAL:
            return ELEMENTWISE[op].value(*xs)
        if op is Op.DIV:
            return xs[0] * self.reciprocal(xs[1])
        return self.opaque(op.name.lower(), *xs)

    def reciprocal(self, x: Expr) -> Expr:
        return 1 / x if x.is_number else self.opaque("reciprocal", x)

    def multiplier(self, log: Node, token: int, env: dict[Node, Array]) -> Array:
        """e^log, undoing the rules of `decay` so that it is the polynomial that the user wrote."""
        value = algebra.number(log)
        if value is not None:
            return (rational(math.exp(value)),)
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


def rational(value: float | None) -> Expr:
    """A constant as a rational, rounded so that log and exp of it come back to the same one."""
    if value is None:
        raise errors.InvalidIR("a constant without a number")
    fraction = Fraction(value).limit_denominator(10**9)
    return sympy.Rational(fraction.numerator, fraction.denominator)


_POLYNOMIAL = (Op.ADD, Op.SUB, Op.MUL, Op.NEG, Op.WITHIN)


def recalled(key: Array, state: Array) -> Array:
    """keyᵀ S, for S in rows of equal length, one per channel of the key."""
    width = len(state) // len(key)
    return tuple(
        sympy.Add(*(k * state[i * width + j] for i, k in enumerate(key))) for j in range(width)
    )


def transposed(state: Array, rows: int) -> Array:
    width = len(state) // rows
    return tuple(state[i * width + j] for j in range(width) for i in range(rows))


def scaled(state: Array, factor: Array, kind: Kind) -> Array:
    """A state times a Scalar, its rows times a Key, or its columns times a Value."""
    n = len(factor)
    if kind is Kind.VALUE:
        return tuple(factor[i % n] * x for i, x in enumerate(state))
    width = len(state) // n
    return tuple(factor[i // width] * x for i, x in enumerate(state))


def state_symbols(state: StateDecl, symbols: Symbols) -> Array:
    size = symbols.key * (symbols.width if state.kind is Kind.STATE else 1)
    return tuple(sympy.Symbol(f"{state.name}0__{i}", real=True) for i in range(size))
