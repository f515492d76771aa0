"""Mistakes in a call of a recurrence: operands, states, boundaries, options, transforms."""

from __future__ import annotations

from collections.abc import Sequence

from .diagnostic import ChunkwiseError, did_you_mean

OPTION_NAMES = (
    *("initial_state", "output_final_state", "cu_seqlens", "engine", "check"),
    *("group", "state", "state_indices", "num_accepted"),
)


class CallError(ChunkwiseError):
    """A call of an op with operands it cannot take."""


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


class BadShape(CallError, ValueError):
    """An operand of the wrong shape."""

    def __init__(
        self, operand: str, got: Sequence[int], expected: str, *, kind: str = "", help: str = ""
    ) -> None:
        declared = f", declared {kind}," if kind else ""
        if kind == "Scalar" and len(got) == 4 and not help:
            help = f"a gate per channel is declared `{operand}: Key` (or Value)"
            if got[-1] == 1:
                help = f"one number per head has no axis of its own: {operand}.squeeze(-1)"
        if kind in ("Key", "Value") and len(got) == 3 and not help:
            help = f"is the batch missing? {operand}[None] has B = 1"
            help += f" (one number per head is declared `{operand}: Scalar`)"
        super().__init__(
            f"operand {operand!r}{declared} has shape {_shape(got)}, expected {expected}", help=help
        )


class BadDtype(CallError, TypeError):
    """An operand of a dtype that no kernel takes."""

    def __init__(self, operand: str, got: str, expected: str, *, help: str = "") -> None:
        super().__init__(f"operand {operand!r} has dtype {got}, expected {expected}", help=help)


class NotATensor(BadDtype):
    """An operand that is no tensor: an array of numpy, a list, a number."""

    def __init__(self, operand: str, got: str, expected: str) -> None:
        helps = {"ndarray": f"pass torch.from_numpy({operand})", "str": "pass a tensor"}
        number = f"for one number everywhere pass torch.full(size, {operand}) of that size"
        helps |= dict.fromkeys(("int", "float"), number)
        helps["Traced"] = (
            "a step cannot call a recurrence: write its lines here, or a plain function of both"
        )
        CallError.__init__(
            self,
            f"operand {operand!r} is of type {got}, expected {expected}",
            help=helps.get(got, f"pass torch.tensor({operand})"),
        )


class BadDevice(CallError, ValueError):
    """Operands on different devices, or on one that the engine does not serve."""

    def __init__(self, operand: str, got: str, expected: str) -> None:
        super().__init__(
            f"operand {operand!r} is on {got}, expected {expected}",
            help=f"move it: {operand}.to({expected!r})",
        )


class BadLayout(CallError, TypeError):
    """A tensor that is no dense block of strided memory on one device: sparse, nested, sharded."""

    def __init__(self, operand: str, got: str, *, help: str = "") -> None:
        super().__init__(
            f"operand {operand!r} is {got}, expected a dense, strided tensor",
            help=help or "convert it with .to_dense()",
        )


class BadNumber(CallError, ValueError):
    """A parameter that no kernel can compute with: infinite, or not a number."""

    def __init__(self, parameter: str, got: float) -> None:
        super().__init__(f"parameter {parameter!r} is {got}, expected a finite number")


class BadOption(CallError, TypeError, ValueError):
    """An option of a call (`check`, say) with a value that it does not have."""

    def __init__(self, option: str, got: object, expected: str) -> None:
        super().__init__(f"option {option!r} is {got!r}, expected {expected}")


class HeadMismatch(CallError, ValueError):
    """Head counts that do not divide."""

    def __init__(self, operand: str, got: int, expected: str) -> None:
        super().__init__(
            f"operand {operand!r} has {got} heads, expected {expected}",
            why="value head j uses key head j // (HV/H), so HV must be a multiple of H",
        )


class BadCuSeqlens(CallError, ValueError):
    """Offsets of a packed batch that are not offsets."""

    def __init__(self, got: str, expected: str) -> None:
        super().__init__(
            f"cu_seqlens is {got}, expected {expected}",
            help="it starts at 0, does not decrease, and ends at T: [0, 5, 5, 12] packs lengths "
            "5, 0 and 7",
        )


class BadSlots(CallError, IndexError):
    """Slots of a pool that do not exist, or that two sequences would write."""

    def __init__(self, what: str, got: str, expected: str) -> None:
        super().__init__(f"{what} holds {got}, expected {expected}")


class RankMismatch(CallError, ValueError):
    """Calls of the ranks of a process group that do not fit together, raised on every rank."""

    def __init__(self, rank: int, what: str, got: str, expected: str) -> None:
        super().__init__(f"on rank {rank} {what} is {got}, expected {expected}")


class BadBatch(CallError, ValueError):
    """Batch or sequence counts that do not agree."""

    def __init__(self, operand: str, got: int, expected: str, *, help: str = "") -> None:
        super().__init__(
            f"operand {operand!r} has batch size {got}, expected {expected}", help=help
        )


class MissingOperand(CallError, TypeError):
    """A call that leaves an operand out."""

    def __init__(self, operand: str, kind: str, expected: str, *, op: str = "") -> None:
        super().__init__(
            f"{op or 'the op'} needs the operand {operand!r} ({kind}), got nothing, "
            f"expected a tensor {expected}"
        )


class UnknownOperand(CallError, TypeError):
    """A call with an operand that was not declared."""

    def __init__(self, operand: str, expected: Sequence[str], *, op: str = "") -> None:
        helps = dict.fromkeys(OPTION_NAMES, "that is an option of other calls of the recurrence")
        helps["state"] = "the state before all tokens is `initial_state=`; a step takes `state=`"
        helps["initial_state"] = "a step takes `state=`, the state before its token"
        if operand.startswith("number "):
            help = "states and options are passed by name: initial_state=…, or state=… of a step"
        else:
            help = helps.get(operand) or did_you_mean(operand, [*expected, *OPTION_NAMES])
        super().__init__(
            f"{op or 'the op'} got the operand {operand!r}, expected only {', '.join(expected)}",
            help=help,
        )


class NanOperand(CallError, ValueError):
    """An operand with NaNs or infinities (looked for under CHUNKWISE_CHECK)."""

    def __init__(self, operand: str, got: str) -> None:
        super().__init__(
            f"operand {operand!r} holds {got}, expected finite numbers",
            help="CHUNKWISE_CHECK looked for it; a packed batch must not be padded with NaN",
        )


class Overflow(CallError, ArithmeticError):
    """A result that is not finite, of operands that are (looked for under CHUNKWISE_CHECK)."""

    def __init__(self, op: str, result: str, got: str) -> None:
        super().__init__(
            f"the {result} of {op} holds {got}, though every operand is finite",
            why="kernels on a GPU multiply states in the operands' dtype, and numbers of float16 "
            "end at 65504; or the step itself divides by zero or grows beyond its dtype",
            help="pass bfloat16 or float32 operands, or scale values and initial states down (and "
            "losses up: gradients below 2**-24 vanish in float16)",
        )


AT_MOST_ZERO = "at most 0"


class PositiveGate(CallError, ValueError):
    """A gate that breaks its bound: a log-decay above 0, a `within` out of range."""

    def __init__(self, operand: str, got: str, expected: str) -> None:
        promised = expected != AT_MOST_ZERO
        super().__init__(
            f"{operand} reaches {got}, expected {expected}",
            why="the compiler relies on the bounds that the declaration promises with `within`"
            if promised
            else "gates are natural-log decays ≤ 0; above 0 the state grows and a chunk overflows",
            help="promise wider bounds, or use `clamp`, which applies them"
            if promised
            else "is a sign forgotten? pass -softplus(x) or logsigmoid(x)",
        )


class DoubleBackward(CallError, RuntimeError):
    """A gradient of a gradient: the backward kernels have none."""

    def __init__(self, op: str) -> None:
        super().__init__(
            f"the gradient of {op} was differentiated again",
            why="forward and backward are one kernel each; the backward has no derivative",
            help='differentiate once (create_graph=False); engine="reference" has derivatives of '
            "every order",
        )


class NoTransform(CallError, RuntimeError):
    """A transform of torch that kernels have no rule for: forward mode, batches of old autograd."""

    def __init__(self, op: str, transform: str, *, why: str = "", help: str = "") -> None:
        super().__init__(
            f"{op} was called under {transform}",
            why=why or "kernels compute outputs and their gradients in reverse mode, nothing else",
            help=help
            or "use reverse mode (torch.func.grad, vjp, jacrev; vmap of those); "
            'engine="reference" has forward mode too',
        )
