"""Symbolic operands: Python's operators on them build StepIR, by kind, never by shape."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import errors
from .ir import Attr, Kind, Node, Op, constant
from .source import here


class Traced:
    """A value of the step while it is traced: a node of StepIR, and nothing else.

    Scalars go with anything; a Key scales the rows of a state, a Value its columns; `k @ S` is a
    Value, `S @ v` a Key. Code that needs a number raises an error that names the right expression.
    """

    __slots__ = ("node",)
    node: Node

    def __init__(self, node: Node) -> None:
        self.node = node

    @property
    def kind(self) -> Kind:
        return self.node.kind

    def __repr__(self) -> str:
        return f"<traced {self.kind.spelled}: {self.node.op.name.lower()}>"

    # ------------------------------------------------------------ arithmetic
    def __add__(self, other: Traced | float) -> Traced:
        return _sum(Op.ADD, self, other)

    def __radd__(self, other: Traced | float) -> Traced:
        return _sum(Op.ADD, other, self)

    def __sub__(self, other: Traced | float) -> Traced:
        return _sum(Op.SUB, self, other)

    def __rsub__(self, other: Traced | float) -> Traced:
        return _sum(Op.SUB, other, self)

    def __mul__(self, other: Traced | float) -> Traced:
        return _product(self, other)

    def __rmul__(self, other: Traced | float) -> Traced:
        return _product(other, self)

    def __truediv__(self, other: Traced | float) -> Traced:
        return _quotient(self, other)

    def __rtruediv__(self, other: Traced | float) -> Traced:
        return _quotient(other, self)

    def __matmul__(self, other: Traced) -> Traced:
        return _read(self, other)

    def __rmatmul__(self, other: Traced) -> Traced:
        return _read(other, self)

    def __neg__(self) -> Traced:
        if self.kind.is_state:
            return scale(self, lift(-1.0))
        return build(Op.NEG, self)

    def __pos__(self) -> Traced:
        return self

    def __abs__(self) -> Traced:
        return unary(Op.ABS, self)

    def __pow__(self, power: float) -> Traced:
        return _power(self, power)

    def __format__(
        self, spec: str
    ) -> str:  # of `print(f"{S:.2f}")`, which has no numbers to format
        return repr(self)

    # ------------------------------------------------------------ traps
    def __rpow__(self, base: float) -> NoReturn:
        raise errors.BadPower("a traced value", here(), base=base)

    def __array_ufunc__(
        self, ufunc: Callable[..., object], method: str, *inputs: Any, **options: Any
    ) -> Traced:
        """numpy scalars multiply like Python's; any other use of numpy is a mistake."""
        apply = _NUMPY_BINARY.get(getattr(ufunc, "__name__", ""))
        if apply is not None and method == "__call__" and len(inputs) == 2 and not options:
            return apply(*inputs)
        raise errors.ForeignFunction(f"np.{getattr(ufunc, '__name__', 'function')}", here())

    def __array__(self, *args: Any, **options: Any) -> NoReturn:
        raise errors.ForeignFunction("numpy", here())

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: object = None,
    ) -> NoReturn:
        # torch's own operators swallow a TypeError from here and try the reflected operator, which
        # raises CapturedTensor
        raise errors.ForeignFunction(f"torch.{getattr(func, '__name__', 'function')}", here())

    def __float__(self) -> NoReturn:
        raise errors.ForeignFunction("math or float()", here())

    def __int__(self) -> NoReturn:
        raise errors.ForeignFunction("int()", here())

    def __index__(self) -> NoReturn:
        raise errors.TracedIteration("range() or an index", here())

    def __bool__(self) -> NoReturn:
        raise errors.TracedBranch("if, and, or, not, while", here())

    def __lt__(self, other: object) -> NoReturn:
        raise errors.TracedBranch("a comparison (or min, max, sorted)", here())

    __le__ = __gt__ = __ge__ = __lt__

    def __eq__(self, other: object) -> NoReturn:
        raise errors.TracedBranch("== or !=", here())

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[Traced]:
        raise errors.TracedIteration("builtin sum() or a loop", here())

    def __len__(self) -> NoReturn:
        raise errors.TracedIteration("len()", here())

    def __getitem__(self, index: object) -> NoReturn:
        raise errors.TracedIteration("indexing", here())

    def __setitem__(self, index: object, value: object) -> NoReturn:
        raise errors.InPlace("an assignment to an element or a slice", here())

    def __delitem__(self, index: object) -> NoReturn:
        raise errors.InPlace("del", here())

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # protocols and notebooks probe for these
            raise AttributeError(name)
        if name.endswith("_"):
            raise errors.InPlace(f".{name}()", here())
        raise errors.NoAttribute(name, here())


def lift(x: object) -> Traced:
    """A traced value, or a Python number as a constant; anything else is a mistake."""
    if isinstance(x, Traced):
        return x
    if isinstance(x, numbers.Real):
        return Traced(constant(float(x)))
    if hasattr(x, "__array__") or hasattr(x, "__torch_function__"):
        kind = type(x)
        raise errors.CapturedTensor(f"{kind.__module__.partition('.')[0]}.{kind.__name__}", here())
    raise errors.KindMismatch(
        "an operator",
        f"a {type(x).__name__}",
        "a traced value or a Python number",
        "a tuple is several values: take one, or name all of them, `x, y = rotate(x, y, angle)`"
        if isinstance(x, tuple)
        else "",
        here(),
    )


def name_of(x: Traced) -> str:
    """The kind of a value, for messages."""
    return x.kind.spelled


def name_if_leaf(x: Traced) -> str:
    """The name of an operand or a state; empty for other values."""
    named = x.node.op in (Op.OPERAND, Op.STATE)
    return str(x.node.attrs[0]) if named else ""


def build(op: Op, *args: Traced, attrs: tuple[Attr, ...] = (), kind: Kind | None = None) -> Traced:
    """A node; unless given, it has the kind of its only non-Scalar argument."""
    if kind is None:
        kind = next((a.kind for a in args if a.kind is not Kind.SCALAR), Kind.SCALAR)
    return Traced(Node(op, tuple(a.node for a in args), attrs, kind, here()))


def unary(op: Op, x: Traced | float) -> Traced:
    """An elementwise function. Of a state too: it traces, and only the reference engine runs it."""
    return build(op, lift(x))


def binary(op: Op, x: Traced | float, y: Traced | float, what: str) -> Traced:
    """An elementwise function of two vectors; a Scalar broadcasts."""
    a, b = lift(x), lift(y)
    for z in (a, b):
        if z.kind.is_state:
            raise errors.StateAsVector(what, name_of(z), here())
    if a.kind is not b.kind and Kind.SCALAR not in (a.kind, b.kind):
        if op is Op.MUL:
            raise errors.KeyTimesValue(name_of(a), name_of(b), here())
        raise errors.KindMismatch(
            what,
            f"a {name_of(a)} and a {name_of(b)}",
            "two values of one kind, or a Scalar",
            "a matrix is `outer(k, v)`; a Value is read from the state with `k @ S`",
            here(),
        )
    return build(op, a, b)


def scale(state: Traced, factor: Traced) -> Traced:
    """A state times a factor; a Value has no columns of a KeyState to scale."""
    if state.kind is Kind.KEY_STATE and factor.kind is Kind.VALUE:
        raise errors.KindMismatch(
            "a KeyState's factor",
            "a Value",
            "a Scalar or a Key",
            "a KeyState has no V axis",
            here(),
        )
    return build(Op.SCALE, state, factor, kind=state.kind)


def _sum(op: Op, x: Traced | float, y: Traced | float) -> Traced:
    a, b = lift(x), lift(y)
    if not (a.kind.is_state or b.kind.is_state):
        return binary(op, a, b, "+" if op is Op.ADD else "-")
    kinds = {a.kind, b.kind}
    if kinds == {Kind.KEY_STATE, Kind.KEY}:  # z + k: one more column of ones
        one = lift(1.0)
        a, b = (
            build(Op.OUTER, t, one, kind=Kind.KEY_STATE) if t.kind is Kind.KEY else t
            for t in (a, b)
        )
    elif Kind.SCALAR in kinds:
        number = a if a.kind is Kind.SCALAR else b
        is_number = number.node.op is Op.CONST
        raise errors.StatePlusNumber(
            f"the number {number.node.attrs[0]}" if is_number else "a Scalar", here()
        )
    elif len(kinds) > 1:
        raise errors.KindMismatch(
            "+" if op is Op.ADD else "-",
            f"a {name_of(a)} and a {name_of(b)}",
            "two states of one kind",
            "what is written to a State is `outer(k, v)`; to a KeyState, a Key",
            here(),
        )
    return build(op, a, b)


def _product(x: Traced | float, y: Traced | float) -> Traced:
    a, b = lift(x), lift(y)
    if a.kind.is_state and b.kind.is_state:
        raise errors.KindMismatch(
            "*",
            f"a {name_of(a)} and a {name_of(b)}",
            "at most one state",
            "the step must be affine in the state; scale its rows with a Key, its columns with a "
            "Value",
            here(),
        )
    if a.kind.is_state:
        return scale(a, b)
    if b.kind.is_state:
        return scale(b, a)
    return binary(Op.MUL, a, b, "*")


def _quotient(x: Traced | float, y: Traced | float) -> Traced:
    a, b = lift(x), lift(y)
    if b.kind.is_state:
        raise errors.StateAsVector("/", name_of(b), here())
    if a.kind.is_state:
        return scale(a, build(Op.DIV, lift(1.0), b))
    return binary(Op.DIV, a, b, "/")


def _read(x: Traced | float, y: Traced | float) -> Traced:
    a, b = lift(x), lift(y)
    if a.kind is Kind.KEY and b.kind is Kind.STATE:
        return build(Op.READ, a, b, kind=Kind.VALUE)
    if a.kind is Kind.KEY and b.kind is Kind.KEY_STATE:
        return build(Op.READ, a, b, kind=Kind.SCALAR)
    if a.kind is Kind.STATE and b.kind is Kind.VALUE:
        return build(Op.READ_VALUE, a, b, kind=Kind.KEY)
    if a.kind.is_state or b.kind.is_state:
        raise errors.WrongSide(name_of(a), name_of(b), here(), (name_if_leaf(a), name_if_leaf(b)))
    raise errors.MatmulOfVectors(name_of(a), name_of(b), here())


def _power(x: Traced, power: object) -> Traced:
    if isinstance(power, Traced) or not isinstance(power, numbers.Real):
        raise errors.BadPower("a traced value", here())
    p = float(power)
    if x.kind.is_state:
        raise errors.StateAsVector("**", name_of(x), here())
    if p in (0.5, -0.5):
        return unary(Op.SQRT if p > 0 else Op.RSQRT, x)
    if p not in (1.0, 2.0, 3.0, 4.0, -1.0, -2.0):
        raise errors.BadPower(f"{p:g}", here())
    result = x
    for _ in range(int(abs(p)) - 1):
        result = binary(Op.MUL, result, x, "**")
    return result if p > 0 else _quotient(1.0, result)


_NUMPY_BINARY: dict[str, Callable[[Any, Any], Traced]] = {
    "add": lambda x, y: _sum(Op.ADD, x, y),
    "subtract": lambda x, y: _sum(Op.SUB, x, y),
    "multiply": _product,
    "divide": _quotient,
    "true_divide": _quotient,
    "matmul": _read,
}
