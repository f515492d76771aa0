"""Expressions on symbols: polynomials, and a symbol per opaque function of equal arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import sympy  # type: ignore[import-untyped]

from . import algebra, errors
from .decay import SMALLEST
from .elementwise import ELEMENTWISE, value_of
from .ir import Kind, Node, Op, Per, topological
from .normal_form import Operand

Expr: TypeAlias = Any  # SymPy carries no types
Array: TypeAlias = Any  # numpy's, of symbols, with the axes K and V: of length 1 where it lacks one


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
        return self.named(name, node.kind)

    def named(self, name: str, kind: Kind) -> Array:
        """A symbol for each entry of a value."""
        rows, columns = (
            n if a in kind.axes else 1 for a, n in (("K", self.key), ("V", self.width))
        )
        every = [sympy.Symbol(f"{name}__{i}", real=True) for i in range(rows * columns)]
        return np.array(every, dtype=object).reshape(rows, columns)

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
                env[n] = value_of(n, [env[a] for a in n.args], partial(self._entrywise, token))
        return env[node]

    def _entrywise(self, token: int, node: Node, args: Sequence[Array]) -> Array:
        if node.op in (Op.OPERAND, Op.PARAM):
            return self.leaf(node, token)
        if node.op is Op.CONST:
            return scalar(rational(algebra.number(node)))
        return self._each(lambda *xs: self._elementwise(node.op, xs), *args)

    def _each(self, function: Callable[..., Expr], *args: Array) -> Array:
        made: Array = np.frompyfunc(function, len(args), 1)(*args)
        return made

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
            return scalar(rational(math.exp(value)))
        if log.op is Op.ADD:
            a, b = (self.multiplier(a, token, env) for a in log.args)
            return a * b
        if log.op is Op.LOGSIGMOID:
            inner = log.args[0]
            negated = inner.op is Op.NEG
            x = self.value(inner.args[0] if negated else inner, token, env)
            factor = self._each(partial(self.opaque, "sigmoid"), x)
            return 1 - factor if negated else factor
        if log.op is Op.LOG and log.args[0].op is Op.MAXIMUM:
            f, floor = log.args[0].args
            if algebra.number(floor) == SMALLEST:
                return self.value(f, token, env)
        if log.op is Op.MUL and algebra.number(log.args[0]) == 0.5:
            # sqrt(f) became half of log f: the square root of its multiplier
            halves = self.multiplier(log.args[1], token, env)
            return self._each(partial(self.opaque, "sqrt"), halves)
        return self._each(partial(self.opaque, "exp"), self.value(log, token, env))


def scalar(x: Expr) -> Array:
    """A value without axes."""
    return np.array([[x]], dtype=object)


def rational(value: float | None) -> Expr:
    """A constant as a rational, rounded so that log and exp of it come back to the same one."""
    if value is None:
        raise errors.InvalidIR("a constant without a number")
    fraction = Fraction(value).limit_denominator(10**9)
    return sympy.Rational(fraction.numerator, fraction.denominator)


_POLYNOMIAL = (Op.ADD, Op.SUB, Op.MUL, Op.NEG, Op.WITHIN)
