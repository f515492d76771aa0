"""What a user holds: a declared recurrence, to be called, differentiated, explained, stepped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import overload

from torch import Tensor

from ..dsl import errors
from ..dsl.declaration import Declaration
from ..dsl.explain import explain
from ..dsl.trace import where
from .call import arrange, boundaries, initial_states
from .decode import Stepper
from .engines import EngineName, choose
from .explanation import sections
from .ops import REGISTRY

States = Tensor | tuple[Tensor, ...]
GivenStates = Tensor | Sequence[Tensor | None] | None

# keyword arguments that every recurrence has, so that no operand may be called like one of them
OPTIONS = (
    inspect.Parameter("initial_state", inspect.Parameter.KEYWORD_ONLY, default=None),
    inspect.Parameter("output_final_state", inspect.Parameter.KEYWORD_ONLY, default=False),
    inspect.Parameter("cu_seqlens", inspect.Parameter.KEYWORD_ONLY, default=None),
    inspect.Parameter("engine", inspect.Parameter.KEYWORD_ONLY, default=None),
    inspect.Parameter("check", inspect.Parameter.KEYWORD_ONLY, default=None),
)


class Recurrence:
    """A linear-attention recurrence, declared as one step and callable on whole sequences.

    Calling it takes the operands in the order of the declaration (or by name), the declaration's
    keyword-only floats, and

        initial_state: `[N,HV,K,V]` (`[N,HV,K]` for a KeyState); a tuple for several states.
            Zero where absent.
        output_final_state: return the state after the last token too.
        cu_seqlens: int32 or int64 `[N+1]`, boundaries of N sequences packed along T, with B = 1.
        engine: "reference", "eager", "tvm" or "triton"; by default the device's own
            (CHUNKWISE_ENGINE).
        check: look for NaN in operands and growth in gates first, and for overflow in results,
            which waits for the device; by default as CHUNKWISE_CHECK says.

    and returns `(o, final_state)`: o `[B,T,HV,V]` in the dtype of the first Value operand, the
    final state in float32 (a tuple for several states), or None where it was not asked for.
    Everything is differentiable once, in reverse mode: each operand, the initial state, through the
    final state; also under torch.func and vmap. engine="reference" has derivatives of every order
    and forward mode too; other engines raise NoTransform and DoubleBackward for those.
    Under autocast the operands are used in the dtype they come in. Kernels on a GPU multiply states
    and cotangents in the dtype of the operands: with float16, both have to lie in its range (2**-24
    to 65504), as bfloat16's and float32's do not.

    Raises: the classes of `chunkwise.errors`, each naming operand, what it got, what it expected.
    """

    def __init__(self, declaration: Declaration, engine: EngineName | str | None = None) -> None:
        self.declaration = declaration
        self._engine = engine.value if isinstance(engine, EngineName) else engine
        self.__name__ = declaration.name
        self.__qualname__ = declaration.function.__qualname__
        self.__doc__ = declaration.function.__doc__
        self.__module__ = declaration.function.__module__
        self.__wrapped__ = declaration.function
        self.__signature__ = _signature(declaration)
        self._ops = REGISTRY.of(declaration)
        self._step = Stepper(declaration, self._ops, self._engine)
        self._no_states = (None,) * len(declaration.states)

    def __call__(
        self,
        /,  # an operand may be called self
        *args: Tensor,
        initial_state: GivenStates = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        engine: EngineName | str | None = None,
        check: bool | None = None,
        **named: Tensor | float,
    ) -> tuple[Tensor, States | None]:
        if check is not None and not isinstance(check, bool):
            raise errors.BadOption("check", check, "True, False or None")
        operands, params, static = arrange(self.declaration, args, named)
        initial: Sequence[Tensor | None] = self._no_states
        if initial_state is not None:
            initial = initial_states(self.declaration, initial_state)
        o, *finals = self._ops.forward(
            *operands.values(),
            *initial,
            cu_seqlens if cu_seqlens is None else boundaries(cu_seqlens),
            *params.values(),
            *[number for _, number in static],
            (engine.value if isinstance(engine, EngineName) else engine) or self._engine,
            check,
        )
        if not output_final_state:
            return o, None
        return o, finals[0] if len(finals) == 1 else tuple(finals)

    def step(
        self,
        /,
        *args: Tensor,
        state: GivenStates = None,
        engine: EngineName | str | None = None,
        **named: Tensor | float,
    ) -> tuple[Tensor, States]:
        """One token, for decoding: `(o, new_state)`.

        A kernel computes it (of any declaration, on a CPU with TVM and on a GPU), or torch in
        float64. Where gradients are recorded, under torch.func and under torch.compile it is an op:
        the same kernel, whose gradient torch computes.

        Args:
            *args, **named: the operands of a call without their T axis (`[B,H,K]`, `[B,HV,V]`,
                `[B,HV]`; per-head ones unchanged) or with T = 1, and the declaration's floats.
            state: as `initial_state` of a call, N = B; zero where absent.
            engine: "tvm" or "triton" for a kernel or else an error, "reference" for torch.

        Returns:
            o `[B,HV,V]` (`[B,1,HV,V]` where the operands have T) and the float32 state.
        """
        return self._step(
            args, named, state, engine.value if isinstance(engine, EngineName) else engine
        )

    def explain(self) -> str:
        """What was understood and what will run: class, equations, gates' bounds, costs."""
        made = sections(self.declaration)
        return "\n\n".join([explain(self.declaration), *made.values()])

    def prove(self, chunk: int = 3) -> str:
        """Prove, on chunks of 2 to `chunk` tokens, that forward and gradient equal the step's.

        The chunk form with symbols, the tiles of a chunk and of its adjoint at random points.

        Raises:
            NotLowered: the proof does not cover the recurrence. ProofFailed: it does not hold.
        """
        from ..codegen.prove import prove  # SymPy takes half a second to import

        return str(prove(self.declaration, chunk))

    def __reduce__(self) -> str:
        """By name, like a function: copies (of a module that holds it, say) are the op itself."""
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<recurrence {self.__name__}{self.__signature__}>"


@overload
def recurrence(function: Callable[..., object], /) -> Recurrence: ...


@overload
def recurrence(
    *, engine: EngineName | str | None = None
) -> Callable[[Callable[..., object]], Recurrence]: ...


def recurrence(
    function: Callable[..., object] | None = None, /, *, engine: EngineName | str | None = None
) -> Recurrence | Callable[[Callable[..., object]], Recurrence]:
    """Declare a recurrence: the decorated function is one step, traced, never run on tensors.

    Args:
        function: `(state, ..., operand, ..., *, parameter, ...) -> (new state, output)`, every
            argument annotated with its kind (State, KeyState, Key, Value, Scalar, HeadScalar,
            HeadKey, HeadValue, a tuple of a token kind for micro-steps; float, int or bool).
        engine: the engine of calls that name none. `@recurrence(engine="reference")` also takes
            a step that has no chunkwise form, and runs it token by token.

    Returns:
        The differentiable op, as a `Recurrence`.

    Raises:
        DeclarationError: the step has a mistake; the message shows its line.
    """
    if function is None:
        return lambda f: _declare(f, engine)
    return _declare(function, engine)


def _declare(function: Callable[..., object], engine: EngineName | str | None) -> Recurrence:
    any_step = engine is not None and choose("cpu", engine) is EngineName.REFERENCE
    return Recurrence(Declaration(function, any_step=any_step), engine)


def _signature(declaration: Declaration) -> inspect.Signature:
    names = [*(x.name for x in declaration.operands), *(p.name for p in declaration.params)]
    states = [s.name for s in declaration.states]
    reserved = {p.name for p in OPTIONS} | {"state", "o"}
    # what kernels call gradients and what lies between them
    taken = {f"d_{n}" for n in (*names, *states, "o")} | {f"{n}_chunk" for n in (*names, *states)}
    for name in (*names, *declaration.statics):
        if name in reserved | taken:
            raise errors.ReservedName(name, sorted(reserved), where(declaration.function))
    either, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(x.name, either) for x in declaration.operands]
    for p in declaration.params:
        default = inspect.Parameter.empty if p.default is None else p.default
        parameters.append(inspect.Parameter(p.name, keyword, default=default))
    for name, constant in declaration.statics.items():
        parameters.append(inspect.Parameter(name, keyword, default=constant))
    return inspect.Signature([*parameters, *OPTIONS])
