"""Elementwise functions as polynomials on vectors: LLVM has no vector libm, and calls one by one.

Errors are below 2e-7, relative; NaN stays NaN. Minimax coefficients are Cephes' (expf, logf, sinf).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import tirx
from tvm.tirx import Expr

from ...dsl.ir import Op
from .code import multiply_add, number, vector_type

_LOG2E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_QUARTER = (1.5703125, 4.83751296997e-4, 7.54978995489e-8)  # pi/2, the first with few bits
_LEAST, _MOST = -104.0, 89.0  # e^x is 0 below in float32, infinite above
_LEAST_NORMAL = -87.33


class Math:
    """Functions of vectors of `lanes` float32; `bind` names a value that is used several times."""

    def __init__(self, lanes: int, bind: Callable[[str, Expr], Expr]) -> None:
        self._lanes = lanes
        self._bind = bind

    def apply(self, fn: Op, args: list[Expr]) -> Expr:
        """`fn` of its arguments."""
        if fn.arity == 2:
            return FUNCTIONS[fn](self, *args)
        (x,) = args
        return self._bind(fn.name.lower(), FUNCTIONS[fn](self, self._bind("x", x)))

    def _c(self, value: float) -> Expr:
        return number(value, self._lanes)

    def _int(self, value: int) -> Expr:
        return number(value, self._lanes, "int32")

    def _bits(self, x: Expr) -> Expr:
        return tirx.reinterpret(vector_type("int32", self._lanes), x)

    def _float(self, bits: Expr) -> Expr:
        return tirx.reinterpret(vector_type("float32", self._lanes), bits)

    def _polynomial(self, x: Expr, coefficients: tuple[float, ...]) -> Expr:
        result = self._c(coefficients[0])
        for c in coefficients[1:]:
            result = multiply_add(result, x, self._c(c))
        return result

    def _reduced(self, x: Expr) -> tuple[Expr, Expr]:
        """(e^r - 1, n as int32) with x = n log 2 + r, |r| <= log(2)/2."""
        half_up = x * self._c(_LOG2E) + self._c(0.5)
        name = vector_type("float32", self._lanes)
        n = self._bind("n", tirx.call_llvm_pure_intrin(name, "llvm.floor", half_up))
        r = x - n * self._c(_LN2_HIGH)
        r = self._bind("r", r - n * self._c(_LN2_LOW))
        small = self._bind("small", self._polynomial(r, _EXP) * (r * r) + r)
        return small, tirx.Cast(vector_type("int32", self._lanes), n)

    def _power(self, n: Expr) -> Expr:
        """2^n for n from -126 to 127."""
        exponent = tirx.shift_left(n + self._int(127), self._int(23))
        return self._bind("power", self._float(exponent))

    def _scaled(self, x: Expr) -> tuple[Expr, Expr, Expr]:
        """(e^r - 1, p, q) with e^x = e^r p q: 2^n in two factors, which may over- or underflow."""
        inside = self._bind("y", self.least(self.most(x, _LEAST), _MOST))
        small, n = self._reduced(inside)
        n = self._bind("n", n)
        half = self._bind("half", tirx.shift_right(n, self._int(1)))
        return small, self._power(half), self._power(n - half)

    def exp(self, x: Expr) -> Expr:
        """e^x; 0 and infinity where float32 ends."""
        small, p, q = self._scaled(x)
        return (small * p + p) * q

    def decayed(self, x: Expr) -> Expr:
        """e^x for x <= 0; 0 below the range of normal numbers."""
        small, n = self._reduced(self._bind("y", self.most(x, _LEAST_NORMAL)))
        power = self._power(n)
        below = x < self._c(_LEAST_NORMAL)
        return tirx.Select(below, self._c(0.0), small * power + power)

    def most(self, x: Expr, least: float) -> Expr:
        """The larger of x and a number; NaN stays."""
        return tirx.Select(x < self._c(least), self._c(least), x)

    def least(self, x: Expr, most: float) -> Expr:
        """The smaller of x and a number; NaN stays."""
        return tirx.Select(x > self._c(most), self._c(most), x)

    def expm1(self, x: Expr) -> Expr:
        """e^x - 1 without cancellation near 0."""
        small, p, q = self._scaled(x)
        # 1 within the brackets, where nothing overflows before e^x does
        return (small * p + (p - self._c(1.0) / q)) * q

    def log(self, x: Expr) -> Expr:
        """log x; -infinity at 0, NaN below."""
        tiny = x < self._c(1.1754943508e-38)
        y = tirx.Select(tiny, x * self._c(2.0**24), x)
        bits = self._bind("bits", self._bits(y))
        # mantissa in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2)
        offset = self._bind("offset", bits - self._int(0x3F3504F3))
        exponent = self._bind("exponent", tirx.shift_right(offset, self._int(23)))
        mantissa = self._float(bits - tirx.shift_left(exponent, self._int(23)))
        f = self._bind("f", mantissa - self._c(1.0))
        n = tirx.Cast(vector_type("float32", self._lanes), exponent)
        n = self._bind("n", n - tirx.Select(tiny, self._c(24.0), self._c(0.0)))
        square = self._bind("square", f * f)
        rest = self._bind("rest", self._polynomial(f, _LOG) * f * square)
        rest = self._bind("rest", n * self._c(_LN2_LOW) + rest)
        rest = self._bind("rest", rest - square * self._c(0.5))
        result = self._bind("log", (f + rest) + n * self._c(_LN2_HIGH))
        infinite = self._c(float("inf"))
        result = tirx.Select(x < infinite, result, x)  # infinite, or NaN
        result = tirx.Select(x > self._c(0.0), result, self._c(float("nan")))
        return tirx.Select(tirx.EQ(x, self._c(0.0)), self._c(float("-inf")), result)

    def log1p(self, x: Expr) -> Expr:
        """log(1 + x) without cancellation near 0: the rounding error of 1 + x is added back."""
        u = self._bind("u", self._c(1.0) + x)
        lost = self._bind("lost", (x - (u - self._c(1.0))) / u)
        whole = self._bind("whole", self.log(u))
        return tirx.Select(self.abs(x) < self._c(1e30), whole + lost, whole)

    def softplus(self, x: Expr) -> Expr:
        """log(1 + e^x), which overflows for no x."""
        small = self._bind("small", self.decayed(self._bind("m", -self.abs(x))))
        return self.most(x, 0.0) + self.log1p(small)

    def logsigmoid(self, x: Expr) -> Expr:
        """log sigmoid(x)."""
        return -self.softplus(self._bind("minus", -x))

    def sigmoid(self, x: Expr) -> Expr:
        """1 / (1 + e^-x)."""
        return self._c(1.0) / (self._c(1.0) + self.exp(self._bind("minus", -x)))

    def tanh(self, x: Expr) -> Expr:
        """Hyperbolic tangent, exact near 0 and at large x."""
        twice = self._bind("twice", self.abs(x) * self._c(-2.0))
        u = self._bind("u", self.expm1(twice))
        y = self._bind("tanh", u / (u + self._c(2.0)))
        return tirx.Select(x > self._c(0.0), -y, y)

    def cos(self, x: Expr) -> Expr:
        """Cosine; of angles beyond some thousand turns, the digits that float32 leaves."""
        return self._wave(x, 1)

    def sin(self, x: Expr) -> Expr:
        """Sine; of angles beyond some thousand turns, the digits that float32 leaves."""
        return self._wave(x, 0)

    def _wave(self, x: Expr, ahead: int) -> Expr:
        """The sine, so many quarter turns ahead."""
        n = self._bind("n", self.nearest(x * self._c(2.0 / math.pi)))
        r = x
        for part in _QUARTER:  # with x = n pi/2 + r, |r| <= pi/4
            r = self._bind("r", r - n * self._c(part))
        z = self._bind("z", r * r)
        sine = self._bind("sine", self._polynomial(z, _SIN) * z * r + r)
        cosine = self._polynomial(z, _COS) * (z * z) + (self._c(1.0) - z * self._c(0.5))
        cosine = self._bind("cosine", cosine)
        quarter = tirx.Cast(vector_type("int32", self._lanes), n) + self._int(ahead)
        quarter = self._bind("quarter", quarter)
        odd = tirx.EQ(tirx.bitwise_and(quarter, self._int(1)), self._int(1))
        wave = self._bind("wave", tirx.Select(odd, cosine, sine))
        return tirx.Select(
            tirx.EQ(tirx.bitwise_and(quarter, self._int(2)), self._int(2)), -wave, wave
        )

    def nearest(self, x: Expr) -> Expr:
        """The nearest whole number."""
        name = vector_type("float32", self._lanes)
        return tirx.call_llvm_pure_intrin(name, "llvm.floor", x + self._c(0.5))

    def abs(self, x: Expr) -> Expr:
        name = vector_type("float32", self._lanes)
        return tirx.call_llvm_pure_intrin(name, "llvm.fabs", x)

    def sqrt(self, x: Expr) -> Expr:
        name = vector_type("float32", self._lanes)
        return tirx.call_llvm_pure_intrin(name, "llvm.sqrt", x)

    def rsqrt(self, x: Expr) -> Expr:
        return self._c(1.0) / self.sqrt(x)


# a row of each function: of vectors of float32
FUNCTIONS: dict[Op, Callable[..., Expr]] = {
    Op.ADD: lambda _, x, y: tirx.Add(x, y),
    Op.SUB: lambda _, x, y: tirx.Sub(x, y),
    Op.MUL: lambda _, x, y: tirx.Mul(x, y),
    Op.DIV: lambda _, x, y: tirx.Div(x, y),
    Op.MAXIMUM: lambda _, x, y: tirx.Select(x < y, y, x),
    Op.MINIMUM: lambda _, x, y: tirx.Select(x > y, y, x),
    Op.AT_LEAST: lambda _, x, y: tirx.Select(x < y, y, x),
    Op.AT_MOST: lambda _, x, y: tirx.Select(x > y, y, x),
    Op.NEG: lambda _, x: -x,
    Op.ABS: Math.abs,
    Op.EXP: Math.exp,
    Op.LOG: Math.log,
    Op.EXPM1: Math.expm1,
    Op.LOG1P: Math.log1p,
    Op.SIGMOID: Math.sigmoid,
    Op.LOGSIGMOID: Math.logsigmoid,
    Op.SOFTPLUS: Math.softplus,
    Op.TANH: Math.tanh,
    Op.COS: Math.cos,
    Op.SIN: Math.sin,
    Op.SQRT: Math.sqrt,
    Op.RSQRT: Math.rsqrt,
}
