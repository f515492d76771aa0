"""StepIR: one step of a recurrence as an immutable expression graph, and its one page of ops.

A node is its own value: two nodes with the same op, attributes and arguments are equal and hash
alike (`key` is a digest of the whole expression), so common subexpressions are shared without a
table, and the digest of a normal form names its kernels in every process.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar


class Kind(Enum):
    """The kind of a value, per head and token; the enum's value is its axes."""

    SCALAR = ""
    KEY = "K"
    VALUE = "V"
    STATE = "KV"
    KEY_STATE = "K'"

    axes: tuple[str, ...]  # of channels, in order, by letter

    def __init__(self, letters: str) -> None:
        self.axes = tuple(letters.rstrip("'"))

    @property
    def is_state(self) -> bool:
        return self in (Kind.STATE, Kind.KEY_STATE)

    @property
    def spelled(self) -> str:
        """The kind as users write it: `KeyState`."""
        return self.name.title().replace("_", "")


class Per(Enum):
    """How often an operand changes."""

    TOKEN = "token"
    HEAD = "head"


class Op(Enum):
    """The ops of a step: `name = (number of arguments, meaning)`."""

    # leaves
    OPERAND = (0, "a tensor of the call; attrs (name, micro-step index or None)")
    PARAM = (0, "a run-time float of the call; attrs (name,)")
    CONST = (0, "a number; attrs (value,)")
    STATE = (0, "the incoming state; attrs (name,)")
    RESULT = (0, "normal form only: the value of its n-th read; attrs (n,)")
    # elementwise; a Scalar broadcasts, otherwise the kinds agree
    ADD = (2, "x + y (also of two states)")
    SUB = (2, "x - y")
    MUL = (2, "x * y")
    DIV = (2, "x / y")
    # they differ in the gradient where x = y: half to each, or all of it to x
    MAXIMUM = (2, "the larger of x and y")
    MINIMUM = (2, "the smaller of x and y")
    AT_LEAST = (2, "x, but y where x is less: the larger")
    AT_MOST = (2, "x, but y where x is more: the smaller")
    NEG = (1, "-x")
    EXP = (1, "e**x")
    LOG = (1, "natural logarithm")
    EXPM1 = (1, "e**x - 1")
    LOG1P = (1, "log(1 + x)")
    SIGMOID = (1, "1 / (1 + e**-x)")
    LOGSIGMOID = (1, "log sigmoid(x)")
    SOFTPLUS = (1, "log(1 + e**x)")
    TANH = (1, "hyperbolic tangent")
    COS = (1, "cosine")
    SIN = (1, "sine")
    SQRT = (1, "square root")
    RSQRT = (1, "1 / sqrt(x)")
    ABS = (1, "|x|")
    WITHIN = (1, "x, promised to lie in [lo, hi]; attrs (lo, hi)")
    # reduction
    SUM = (1, "sum over the channels of a Key or Value")
    # state algebra
    SCALE = (2, "state * factor: a Scalar scales all, a Key rows, a Value columns")
    OUTER = (2, "Key x Value -> State; Key x Scalar -> KeyState")
    READ = (2, "k @ S: Key x State -> Value; Key x KeyState -> Scalar")
    READ_VALUE = (2, "S @ v: State x Value -> Key")

    @property
    def arity(self) -> int:
        return int(self.value[0])

    @property
    def meaning(self) -> str:
        return str(self.value[1])


Attr = str | int | float | None


@dataclass(frozen=True, slots=True)
class Loc:
    """Where in the user's file an expression was written (columns where Python gives them)."""

    file: str
    line: int
    function: str
    col: int | None = None
    end_col: int | None = None


class Expression:
    """A value that is made of its arguments: a node here, a tile in `codegen.tile`.

    Equality is equality of the whole expression, by `key`, its digest.
    """

    __slots__ = ()
    args: tuple[Any, ...]
    key: str

    def _identify(self, *own: object) -> None:
        """Set the key, from what an expression is beside its arguments, and from their keys."""
        text = repr((*own, [a.key for a in self.args]))
        object.__setattr__(self, "key", hashlib.blake2b(text.encode(), digest_size=10).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, slots=True, eq=False)
class Node(Expression):
    """One value of a step."""

    op: Op
    args: tuple[Node, ...]
    attrs: tuple[Attr, ...]
    kind: Kind
    loc: Loc | None = None
    key: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._identify(self.op.name, self.attrs, self.kind.name)


def constant(value: float) -> Node:
    """The number `value` as a Scalar."""
    return Node(Op.CONST, (), (float(value),), Kind.SCALAR)


def operands_of(*roots: Node) -> dict[str, None]:
    """The names of the operands below `roots`, each once, in a stable order."""
    return {str(n.attrs[0]): None for n in topological(*roots) if n.op is Op.OPERAND}


def bounds_of(within: Node) -> tuple[float, float]:
    """The bounds that a WITHIN promises."""
    lo, hi = (float(x) for x in within.attrs if isinstance(x, (int, float)))
    return lo, hi


def promises_of(*roots: Node) -> dict[str, tuple[float, float]]:
    """The bounds that are promised of operands themselves, by name."""
    return {
        str(n.args[0].attrs[0]): bounds_of(n)
        for n in topological(*roots)
        if n.op is Op.WITHIN and n.args[0].op is Op.OPERAND
    }


_E = TypeVar("_E", bound=Expression)


def topological(*roots: _E, stop: frozenset[_E] = frozenset()) -> list[_E]:
    """Every expression below `roots`, arguments first, each once, in a stable order.

    The arguments of expressions in `stop` are not visited.
    """
    order: dict[_E, None] = {}
    stack: list[tuple[_E, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if node in order:
            continue
        if done or node in stop:
            order[node] = None
        else:
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))
    return list(order)
