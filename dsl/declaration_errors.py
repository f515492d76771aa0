"""Mistakes in a declaration: kinds, signatures, and steps that have no chunkwise form."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .diagnostic import ChunkwiseError, did_you_mean
from .ir import Loc

FUNCTION_NAMES: set[str] = set()  # of the language, for hints: `functions` fills it


def _known_functions(name: str) -> str:
    """Functions that resemble `name`, and all that there are."""
    known = f"functions of a step are {', '.join(sorted(FUNCTION_NAMES))}"
    return f"{did_you_mean(name, FUNCTION_NAMES)} {known}".strip()


class DeclarationError(ChunkwiseError):
    """A recurrence that cannot be declared as written."""


class _OfOneThing(DeclarationError):
    """A mistake whose sentences stand in its class, with `{}` for what they speak of."""

    headline: str
    why = help = ""

    def __init__(self, what: str, loc: Loc | None) -> None:
        headline, why, help = (x.format(what) for x in (self.headline, self.why, self.help))
        super().__init__(headline, loc=loc, why=why, help=help)


# ---------------------------------------------------------------- operators used on wrong kinds


class WrongSide(DeclarationError, TypeError):
    """`S @ q` or `v @ S`: the vector stands on the wrong side of the state.

    `texts` are the two sides as the user wrote them, where they are names.
    """

    def __init__(
        self, left: str, right: str, loc: Loc | None, texts: tuple[str, str] = ("", "")
    ) -> None:
        at_state = left.endswith("State")
        vector = texts[1] if at_state else texts[0]
        state = (texts[0] if at_state else texts[1]) or "S"
        swapped = f"{vector or 'q'} @ {state}" if at_state else f"{state} @ {vector or 'v'}"
        help = f"write `{swapped}`"
        if left == right == "State":
            help = "a state meets vectors only, and the step must be affine in it: `k @ S`, `S @ v`"
        super().__init__(
            f"{left} @ {right} does not contract: a Key stands left of the state, a Value right",
            loc=loc,
            why="the state is K×V: k @ S sums over K and gives a Value, S @ v sums over V",
            help=help,
        )


class KeyTimesValue(DeclarationError, TypeError):
    """`k * v`: an elementwise product over two different axes."""

    def __init__(self, left: str, right: str, loc: Loc | None) -> None:
        super().__init__(
            f"{left} * {right} has no elementwise meaning: a Key has K channels, a Value V",
            loc=loc,
            why="operands are told apart by kind, never by shape, so this is wrong even when K = V",
            help="the matrix k vᵀ is `outer(k, v)`",
        )


class KindMismatch(DeclarationError, TypeError):
    """Two values whose kinds do not go together under an operator or function."""

    def __init__(self, what: str, got: str, expected: str, help: str, loc: Loc | None) -> None:
        super().__init__(f"{what} got {got}, expected {expected}", loc=loc, help=help)


class MatmulOfVectors(DeclarationError, TypeError):
    """`k @ q`, or `k @ exp(g) * S` which Python reads as `(k @ exp(g)) * S`."""

    def __init__(self, left: str, right: str, loc: Loc | None) -> None:
        both = left == right
        super().__init__(
            f"{left} @ {right}: `@` reads a state, and neither side is one",
            loc=loc,
            why="Python reads `k @ exp(g) * S` as `(k @ exp(g)) * S`" if "Scalar" in right else "",
            help="the inner product of two vectors is `dot(x, y)`"
            if both
            else "the matrix k vᵀ is `outer(k, v)`"
            if {left, right} == {"Key", "Value"}
            else "write `k @ (exp(g) * S)`, or name the decayed state first",
        )


class OuterOrder(DeclarationError, TypeError):
    """`outer(v, k)`, where the Key comes first, or `outer(k, k)`, which is no state.

    `text` is the second operand as the user wrote it, where it is a name.
    """

    def __init__(self, left: str, right: str, loc: Loc | None, text: str = "") -> None:
        if left == right == "Key":
            k = text or "k"
            super().__init__(
                "outer(Key, Key) is a K×K matrix: there are only K×V states and their rows",
                loc=loc,
                why=f"the papers' (I − β k kᵀ) S is S − β k (kᵀ S), where `{k} @ S` is a Value",
                help=f"for `outer(k, {k}) @ S` write `outer(k, {k} @ S)`",
            )
            return
        super().__init__(
            f"outer({left}, {right}): the Key comes first, then the Value",
            loc=loc,
            why="the state is K×V, so its rank-one updates are k vᵀ",
            help="write `outer(k, v)`; for a KeyState, `outer(k, scalar)` or just `z + k`",
        )


class StatePlusNumber(_OfOneThing, TypeError):
    """`S + 1e-6`: a number added to a whole state."""

    headline = "{} is added to a state: only states add to states"
    why = "a state changes by factors and by what is written to it, a Key and a Value"
    help = (
        "add a small constant to what is read (`dot(q, z) + eps`), or write it as `outer(k, v)`; "
        "compute a running maximum of gates before the op"
    )


class StateAsVector(DeclarationError, TypeError):
    """A state used where a Key, Value or Scalar is expected."""

    def __init__(self, what: str, got: str, loc: Loc | None) -> None:
        super().__init__(
            f"{what} got a {got}: a state is only scaled, added to a state, or read",
            loc=loc,
            help="compute a running maximum of gates before the op, by `torch.cummax`, and give it "
            "gates relative to that"
            if what in ("maximum", "minimum")
            else "read it: `q @ S` (a Value), `S @ v` (a Key), `q @ z` or `dot(q, z)` for a "
            "KeyState",
        )


class ForeignFunction(DeclarationError, TypeError):
    """`torch.exp(g)`, `np.exp(g)`, `math.exp(g)` on a traced value."""

    def __init__(self, name: str, loc: Loc | None) -> None:
        bare = name.rpartition(".")[2]
        super().__init__(
            f"{name} was called on a traced value",
            loc=loc,
            why="the step is traced once with symbols that hold no numbers",
            help=f"use chunkwise's own function: `from chunkwise import {bare}`"
            if bare in FUNCTION_NAMES
            else "use chunkwise's own functions: " + ", ".join(sorted(FUNCTION_NAMES)),
        )


class TracedBranch(_OfOneThing, TypeError):
    """`if g > 0`, `max(a, b)`: a decision on a value that is not known yet."""

    headline = "{} on a traced value: it holds no number that Python could compare"
    why = "the step is traced once, for all tokens; it cannot branch on data"
    help = "use `maximum`, `minimum` or `clamp`; branch on a keyword-only int or bool"


class TracedIteration(_OfOneThing, TypeError):
    """`sum(k * k)`, `k[0]`, `len(k)`: taking a traced value apart."""

    headline = "{} on a traced value: its channels cannot be taken apart"
    help = (
        "use `chunkwise.sum` or `dot` to add up channels; declare `tuple[Key, ...]` for several "
        "keys per token"
    )


class InPlace(_OfOneThing, TypeError):
    """`S[:] = …`, `S.add_(…)`: a traced value is changed, as tensors can be."""

    headline = "{} changes a traced value in place"
    why = "a step says what the new state is; nothing is stored while it is traced"
    help = "give the new value a name: `S = S + outer(k, v)` (`S += …` does that too)"


class UnknownName(DeclarationError, NameError):
    """A name in the step that Python does not know: a function that was not imported, a typo."""

    def __init__(self, name: str, loc: Loc | None) -> None:
        help = _known_functions(name)
        if name in FUNCTION_NAMES:
            help = f"import it: `from chunkwise import {name}`"
        super().__init__(f"the name {name!r} is not defined", loc=loc, help=help)


class NoAttribute(DeclarationError, AttributeError):
    """`k.T`, `k.exp()`: a traced value has operators, not tensor methods."""

    def __init__(self, name: str, loc: Loc | None) -> None:
        help = _known_functions(name)
        if name == "T":
            help = (
                "there is nothing to transpose: write `k @ S`, `S @ v`, `outer(k, v)`, `dot(x, y)`"
            )
        elif name in ("shape", "size", "dim", "ndim", "numel", "dtype", "device"):
            help = (
                "a step is for any sizes and dtypes: scale operands before the call, "
                "or declare a keyword-only float"
            )
        elif name in FUNCTION_NAMES:
            help = f"write `{name}(x)` with `from chunkwise import {name}`"
        super().__init__(f"a traced value has no attribute {name!r}", loc=loc, help=help)


class CapturedTensor(_OfOneThing, TypeError):
    """A tensor or array from outside, used inside the step."""

    headline = "a {} from outside the step meets a traced value"
    why = "tensors are not captured by closure: they would get no gradient and no layout"
    help = (
        "declare it as an operand: HeadScalar, HeadKey or HeadValue if it belongs to the head, "
        "Scalar, Key or Value if it changes with the token; outside a step call torch"
    )


class BadPower(DeclarationError, ValueError):
    """`x ** p` for a power that is not one of the few that mean multiplication or a root."""

    def __init__(self, got: str, loc: Loc | None, *, base: object = "x") -> None:
        positive = "write `exp(p * log(x))` if x is positive"
        super().__init__(
            f"{base} ** {got}: expected 2, 3, 4, -1, -2, 0.5 or -0.5",
            loc=loc,
            help=positive if base == "x" else f"write `exp(x * math.log({base}))`",
        )


class BadBounds(DeclarationError, ValueError):
    """`within` or `clamp` with bounds that are not two ordered numbers."""

    def __init__(self, what: str, lo: object, hi: object, loc: Loc | None) -> None:
        super().__init__(
            f"{what} got the bounds [{lo}, {hi}], expected two Python numbers, the lower first",
            loc=loc,
        )


# ---------------------------------------------------------------- signatures and returns


class MissingAnnotation(DeclarationError, TypeError):
    """A parameter without a kind; `op` is the function's name."""

    def __init__(self, name: str, loc: Loc | None, op: str = "") -> None:
        super().__init__(
            f"the parameter {name!r} has no annotation",
            loc=loc,
            why="a step is a plain function of states and operands, no method"
            if name == "self"
            else "",
            help=("a lambda has no annotations, so write a `def`; " if op == "<lambda>" else "")
            + "say what it is: State, KeyState, Key, Value, Scalar, HeadScalar, HeadKey or "
            "HeadValue; a keyword-only number is a float, int or bool",
        )


class BadAnnotation(DeclarationError, TypeError):
    """A parameter whose annotation is not a kind."""

    def __init__(self, name: str, got: str, why: str, loc: Loc | None) -> None:
        super().__init__(
            f"the parameter {name!r} is annotated {got}, expected a kind",
            loc=loc,
            why=why,
            help="kinds are State, KeyState, Key, Value, Scalar, HeadScalar, HeadKey, HeadValue, "
            "tuple[Key, ...] for micro-steps, and keyword-only float, int or bool",
        )


class NoState(_OfOneThing, TypeError):
    """A step without a state."""

    headline = "{} declares no state"
    help = "annotate one parameter `S: State` (K×V) or `z: KeyState` (K)"


class NothingReturned(_OfOneThing, ValueError):
    """A step that returns None."""

    headline = "{} returns nothing, expected the new state and the output"
    help = "end with `return S, o`; with several states `return (S, M), o`"


class BadReturn(DeclarationError, TypeError):
    """A step that returns something other than `state, output`."""

    def __init__(self, got: str, expected: str, loc: Loc | None) -> None:
        super().__init__(
            f"the step returns {got}, expected {expected}",
            loc=loc,
            help="end with `return S, o`; several states are a tuple, in the order of the "
            "signature, and so are several outputs, none of them a state: `return (S, M), (o, p)`",
        )


class ReturnOrder(DeclarationError, TypeError):
    """`return o, S`: the order is swapped."""

    def __init__(self, loc: Loc | None) -> None:
        super().__init__(
            "the step returns the output first and the state second: is the order swapped?",
            loc=loc,
            help="write `return S, o`: the new state, then the output",
        )


class StateUnchanged(_OfOneThing, ValueError):
    """A state that is returned as it came."""

    headline = "the state {!r} is returned unchanged"
    why = "a state that no token writes to is a constant"
    help = "return the updated {}; if it is constant, declare it as a Head… operand"


class UnusedOperand(_OfOneThing, ValueError):
    """An operand or parameter that reaches neither the state nor the output."""

    headline = "{!r} is declared but reaches neither a returned state nor the output"
    help = "use it or remove it from the signature"


# ---------------------------------------------------------------- steps without a chunkwise form


class NotAffine(DeclarationError, ValueError):
    """A step that is not affine in its state."""

    def __init__(self, how: str, culprit: str, loc: Loc | None) -> None:
        super().__init__(
            f"{how}, so the step is not affine in the state",
            loc=loc,
            why="chunkwise kernels exist for S_t = A_t S_{t-1} + B_t, where A_t and B_t do not "
            "depend on S",
            help=f"apply {culprit} to k, v or the output; or run it token by token with "
            'engine="reference"',
        )


class NoChunkForm(DeclarationError, ValueError):
    """An affine step that is still outside the family that chunks."""

    def __init__(self, what: str, why: str, help: str, loc: Loc | None) -> None:
        super().__init__(what, loc=loc, why=why, help=help)


class StateGrows(DeclarationError, ValueError):
    """A multiplier of the state that exceeds 1 (usually a forgotten sign)."""

    def __init__(self, what: str, lo: float, hi: float, loc: Loc | None) -> None:
        super().__init__(
            f"the state grows: its multiplier {what} lies in [{lo:.4g}, {hi:.4g}]",
            loc=loc,
            why="a decay must lie in [-1, 1]; products of larger ones overflow within a chunk",
            help="is a sign forgotten? write `exp(-exp(A_log) * softplus(x)) * S`; or scale v"
            if math.isinf(hi)
            else "bound the factor: `within(f, -1, 1) * S` promises it, `clamp(f, -1, 1) * S` "
            "applies it; or scale v",
        )


class UnboundedDecay(_OfOneThing, ValueError):
    """`f * S` where nothing says that f lies in [-1, 1]."""

    headline = "the state is multiplied by {}, and nothing bounds it to [-1, 1]"
    why = "decays live in log space, where products of larger multipliers overflow"
    help = (
        "write `within(f, 0, 1) * S` to promise it, `clamp(f, 0, 1)` to enforce it, `sigmoid(f) * "
        "S`, or `exp(g) * S` with g ≤ 0; -1 in place of 0 for either sign"
    )


class DecayNotPositive(DeclarationError, ValueError):
    """A multiplier of the state that is 0 at every token; others may be 0 or negative."""

    def __init__(self, what: str, lo: float, hi: float, loc: Loc | None) -> None:
        super().__init__(
            f"the state is multiplied by {what}, which lies in [{lo:.4g}, {hi:.4g}]",
            loc=loc,
            why="nothing is left of a state from one token to the next",
            help="compute it in the step instead of carrying it; a factor that is 0 at some tokens "
            "only, as `clamp(f, 0, 1)` or `tanh(x)`, is a decay",
        )


class ReservedName(DeclarationError, ValueError):
    """An operand named like something that every op has: an option, its output, a gradient."""

    def __init__(self, name: str, reserved: Sequence[str], loc: Loc | None) -> None:
        super().__init__(
            f"{name!r} is a name that every op uses; it cannot name an operand or parameter",
            loc=loc,
            help=f"choose another name; reserved are {', '.join(reserved)}, "
            "and d_x, x_chunk and x_at0, x_at1, ... for every operand or state x",
        )
