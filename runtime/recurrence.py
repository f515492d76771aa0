"""What a user holds: a declared recurrence, to be called, differentiated, explained, stepped."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ..dsl import errors
from ..dsl.declaration import Declaration
from ..dsl.explain import explain
from ..dsl.step import output_names
from ..dsl.trace import where
from . import documentation
from .call import Static, any_sharded, arrange, boundaries, describe, initial_states
from .decode import Stepper
from .engines import EngineName, choose
from .explanation import sections
from .ops import REGISTRY
from .stages import stages
from .warmup import Sizes, warm_up

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

States = Tensor | tuple[Tensor, ...]
GivenStates = Tensor | Sequence[Tensor | None] | None


def _option(name: str, default: object, annotation: object = inspect.Parameter.empty) -> Any:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


# keyword arguments that every recurrence has, so that no operand may be called like one of them
OPTIONS = (
    _option("initial_state", None),
    _option("output_final_state", False, bool),
    _option("cu_seqlens", None),
    _option("engine", None),
    _option("check", None),
    _option("group", None),
)
STEP_OPTIONS = (
    _option("state", None),
    _option("state_indices", None),
    _option("num_accepted", None),
    _option("engine", None),
)


class Recurrence:
    """A linear-attention recurrence, declared as one step and callable on whole sequences.

    `recurrence` makes one of a function; `chunkwise.library` has those of the literature. The
    declared function is the meaning of the op: no hidden scale, no hidden norm. `help(op)` shows
    the operands of a recurrence with their kinds and shapes.

    Everything is differentiable once, in reverse mode: each operand, the initial state, through the
    final state; also under torch.func and vmap. engine="reference" has derivatives of every order
    and forward mode too. Under autocast the operands are used in the dtype they come in. Kernels on
    a GPU multiply states and cotangents in the dtype of the operands: with float16, both have to
    lie in its range (2**-24 to 65504), as bfloat16's and float32's do not.

    Args:
        declaration: the step with what is derived from it.
        engine: the engine of calls that name none; None lets the device choose.

    Attributes:
        declaration (Declaration): the step, its operands, its normal form.
    """

    def __new__(
        cls, declaration: Declaration, engine: EngineName | str | None = None
    ) -> Recurrence:
        """A class of its own per op, whose methods have the op's operands in their signatures."""
        _refuse_reserved(declaration)
        called = documentation.signature(declaration, OPTIONS)
        stepped = documentation.signature(declaration, STEP_OPTIONS, time=False)
        of_call = documentation.docstring(declaration, cls.__call__)
        of_step = documentation.docstring(declaration, cls.step, time=False)
        methods = {
            "__call__": documentation.documented(cls.__call__, called, of_call),
            "step": documentation.documented(cls.step, stepped, of_step),
        }
        own = type(cls.__name__, (cls,), {"__module__": cls.__module__, **methods})
        op: Recurrence = object.__new__(own)
        op.__signature__, op.__doc__ = called, of_call
        return op

    __signature__: inspect.Signature

    def __init__(self, declaration: Declaration, engine: EngineName | str | None = None) -> None:
        self.declaration = declaration
        self._engine = engine.value if isinstance(engine, EngineName) else engine
        self.__name__ = declaration.name
        self.__qualname__ = declaration.function.__qualname__
        self.__module__ = declaration.function.__module__
        self.__wrapped__ = declaration.function
        self._ops = REGISTRY.of(declaration)
        self._step = Stepper(declaration, self._ops, self._engine)
        self._no_states = (None,) * len(declaration.states)
        self._stages = stages(declaration, Recurrence)
        self._has_one_output = len(declaration.step(declaration.default_micro).outputs) == 1
        self._channels_of = _channels_of(declaration)

    def __call__(
        self,
        /,  # an operand may be called self
        *args: Tensor,
        initial_state: GivenStates = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        engine: EngineName | str | None = None,
        check: bool | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
        **named: Tensor | float,
    ) -> tuple[Tensor, States | None]:
        """The recurrence over whole sequences.

        Args:
            *args: the operands in the order of the declaration, of the shapes that their kinds say
                (`[B,T,H,K]` for a Key); all of them, with states, may be DTensors of one mesh, and
                results then are: sequences and heads stay split, nothing else does.
            **named: operands by name, and the declaration's keyword-only numbers.
            initial_state: the state before the first token, `[N,HV,K,V]` (`[N,HV,K]` for a
                KeyState); a tuple for several states, in which None is zero; all zero where absent.
            output_final_state: return the state after the last token too.
            cu_seqlens: int32 or int64 `[N+1]`, boundaries of N sequences packed along T; then
                B = 1.
            engine: "reference", "eager", "tvm" or "triton"; by default CHUNKWISE_ENGINE, else the
                device's own.
            check: look for NaN in operands and growth in gates first, and for overflow in results,
                which waits for the device; by default as CHUNKWISE_CHECK says.
            group: the ranks of torch.distributed (a process group, or a mesh of one axis) over
                which the tokens are split in order, when sequences are too long for one. Operands
                are this rank's tokens; `initial_state`, before the sequences begin, and
                `cu_seqlens`, in the tokens of all ranks, are the same on every rank. The final
                state is the one after this rank's part: the last rank's is the sequence's (of a
                packed batch, the rank's where it ends, zero where it is not). Every rank has to
                take part in the backward too.

        Returns:
            `(o, final_state)`: o `[B,T,HV,V]` in the dtype of the first Value operand, a tuple if
            the step returns several outputs; the final state `[N,HV,K,V]` in float32 (a tuple for
            several states), or None where it was not asked for.

        Raises:
            MissingOperand: an operand or a number without a default was left out.
            UnknownOperand: there is one too many, or one of another name.
            BadShape: an operand or state is not of the shape that its kind says.
            HeadMismatch: HV is no multiple of H.
            BadBatch: counts of sequences or states do not agree.
            BadCuSeqlens: boundaries that are no offsets from 0 to T.
            BadDtype: an operand is no tensor of floats, or a number no number.
            BadDevice: operands on two devices.
            BadLayout: an operand is sparse or nested, or only some of them are DTensors.
            BadNumber: a number that is infinite or NaN.
            BadOption: `check` is no bool, or `engine` no name.
            NanOperand: `check` found NaN or infinities in an operand.
            PositiveGate: `check` found a log-decay above 0, or a broken promise of `within`.
            Overflow: `check` found results that are not finite.
            EngineUnavailable: the engine does not serve this call.
            NotLowered: the step has no kernels yet; engine="reference" runs it.
            DoubleBackward: a gradient was differentiated again.
            NoTransform: the call is under forward mode.
            RankMismatch: calls of the ranks of `group` do not fit together; on every rank.
        """
        if check is not None and not isinstance(check, bool):
            raise errors.BadOption("check", check, "True, False or None")
        name = (engine.value if isinstance(engine, EngineName) else engine) or self._engine
        if name is not None and not isinstance(name, str):
            known = 'a name: "reference", "eager", "tvm" or "triton"'
            raise errors.BadOption("engine", name, known)
        if group is not None:
            from . import parallel  # imports torch.distributed

            given = parallel.Given(args, named, initial_state, cu_seqlens, name, check)
            o, *made = parallel.call(self.declaration, self._ops, given, group)
            operands, params, static = arrange(self.declaration, args, named)
            return self._returned(o, made if output_final_state else None, operands, static)
        if any_sharded(args, named):
            from . import sharded

            options = {"output_final_state": output_final_state, "engine": name, "check": check}
            where_split = (self, self.declaration, args, named, initial_state, cu_seqlens)
            return sharded.call(*where_split, options)
        operands, params, static = arrange(self.declaration, args, named)
        initial: Sequence[Tensor | None] = self._no_states
        if initial_state is not None:
            initial = initial_states(self.declaration, initial_state)
        bounds = boundaries(cu_seqlens)
        if self._stages is not None and self._stages.serve(operands, name):
            symbolic = any(type(n) is not int for x in operands.values() for n in x.shape)
            starts = tuple(initial)
            call = describe(
                self.declaration, operands, params, starts, bounds, static, symbolic=symbolic
            )
            if self._stages.take(call, finals=output_final_state):
                return self._stages(call, finals=output_final_state, engine=name, check=check)
        o, *made = self._ops.forward(
            *operands.values(),
            *initial,
            bounds,
            *params.values(),
            *[number for _, number in static],
            name,
            check,
        )
        return self._returned(o, made if output_final_state else None, operands, static)

    def _returned(
        self,
        o: Tensor,
        finals: Sequence[Tensor] | None,
        operands: Mapping[str, Tensor],
        static: Static,
    ) -> tuple[Any, States | None]:
        outputs: Any = o if self._has_one_output else self._outputs(o, operands, static)
        if finals is None:
            return outputs, None
        return outputs, finals[0] if len(finals) == 1 else tuple(finals)

    def step(
        self,
        /,
        *args: Tensor,
        state: GivenStates = None,
        state_indices: Tensor | None = None,
        num_accepted: Tensor | None = None,
        engine: EngineName | str | None = None,
        **named: Tensor | float,
    ) -> tuple[Tensor, States]:
        """One token, or up to 8 with the state after each, for decoding.

        A kernel computes it (of any declaration, on a CPU with TVM and on a GPU), or torch in
        float64. Where gradients are recorded, under torch.func and under torch.compile it is an op:
        the same kernel, whose gradient torch computes.

        With `state_indices` the state is a pool of many sequences' states, which the step reads and
        writes in place, without a gradient; no launch waits for a device, so that CUDA graphs take
        it. On a GPU what indices hold is looked at under CHUNKWISE_CHECK alone; one outside the
        pool is then none, as a negative one is: nothing is read or written for its sequence, whose
        output has no meaning.

        Args:
            *args: the operands of a call without their T axis (`[B,H,K]`, `[B,HV,V]`, `[B,HV]`;
                per-head ones unchanged), or all of them with T from 1 to 8.
            **named: operands by name, and the declaration's keyword-only numbers.
            state: the state before the first of these tokens, `[B,HV,K,V]` (`[B,HV,K]` for a
                KeyState); a tuple for several states; zero where absent. With `num_accepted` the
                states after several tokens, `[B,W,HV,K,V]`. With `state_indices` a pool
                `[slots,HV,K,V]` of any strides, in float32, bfloat16 or float16.
            state_indices: int32 or int64 `[B]`, the slot of each sequence; or `[B,W]`, W >= T: the
                state after token t is written to slot t, the first is read from slot
                `num_accepted - 1`. No two sequences may have the same slot.
            num_accepted: int32 or int64 `[B]`, after how many of the tokens of the step before the
                sequence goes on (1 to W), in verifying drafts; 1 where absent.
            engine: "tvm" or "triton" for a kernel or else an error, "reference" for torch.

        Returns:
            `(o, new_state)`: o `[B,HV,V]` (`[B,T,HV,V]` where the operands have T) in the dtype of
            the first Value operand; the state `[B,HV,K,V]` in float32, where T > 1 or with
            `num_accepted` after each token, `[B,T,HV,K,V]`; or the pool itself. A tuple each for
            several outputs or states.

        Raises:
            CallError: what a call raises, in terms of T <= 8.
            BadSlots: an index that is no slot, or one of two sequences.
            EngineUnavailable: the named engine has no kernel for this step, or gradients are wanted
                of it.
        """
        if isinstance(engine, EngineName):
            engine = engine.value
        if state_indices is None and num_accepted is None:
            made = self._step.one(args, named, state, engine)
        else:
            made = self._step.kept(args, named, state, state_indices, num_accepted, engine)
        if self._has_one_output:
            return made
        o, new = made
        operands, _, static = arrange(self.declaration, args, named)
        outputs: Any = self._outputs(o, operands, static)
        return outputs, new

    def _outputs(
        self, o: Tensor, operands: Mapping[str, Tensor], static: Static
    ) -> tuple[Tensor, ...]:
        """The outputs, which ops return side by side along the channels (`dsl.oracle.joined`)."""
        micro = 1
        widths = {"": 1}  # K and V, and of a Scalar
        for x in self.declaration.operands:
            shape, channels = operands[x.name].shape, len(x.kind.axes)
            widths |= dict.fromkeys(x.kind.axes, shape[-1])
            micro = shape[-1 - channels - 1] if x.micro else micro
        channels_of = self._channels_of(micro, static)
        parts = o.split([widths[a] for a in channels_of], -1)
        return tuple(x if a else x.squeeze(-1) for x, a in zip(parts, channels_of, strict=True))

    def warmup(
        self,
        dims: Sizes,
        dtypes: torch.dtype | Sequence[torch.dtype] = torch.float32,
        device: torch.device | str = "cpu",
        *,
        state_dtypes: torch.dtype | Sequence[torch.dtype] | None = None,
        gradients: bool = False,
    ) -> dict[str, float]:
        """Compile what calls and steps of these sizes need, so that no request waits for it.

        It makes such calls on zeros: prompts with a first state and without, of whole chunks and
        with a rest, single steps, and steps on a pool, of one token and of several.

        Args:
            dims: sizes by letter, each a number or several: K and V, HV value heads, and what
                differs from H = HV, B = 1 and T = 1: heads of the Keys, sequences, the lengths of
                prompts (of one token alone: nothing but steps), n micro-steps.
            dtypes: of operands but Scalars and those per head, which are float32.
            device: where they lie.
            state_dtypes: of pools; float32 (float64) where absent.
            gradients: compile the backward of prompts too.

        Returns:
            Seconds that calls, gradients, steps and steps on pools took, by these names.

        Raises:
            MissingOperand, UnknownOperand, BadOption: the size in `dims` that is missing, unknown
                or no number of at least 1.
        """
        given = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
        pools = state_dtypes
        if pools is None:
            pools = torch.float64 if torch.float64 in given else torch.float32
        kinds = [pools] if isinstance(pools, torch.dtype) else list(pools)
        return warm_up(self, dims, given, device, kinds, gradients=gradients)

    def explain(self) -> str:
        """A page on what was understood and what will run.

        Returns:
            The step, its normal form and class, the operands with their shapes, the bounds of the
            gates, the chunk form, and per kernel FLOPs, and bytes read and written.
        """
        made = [explain(self.declaration), *sections(self.declaration).values()]
        if self._stages is not None:
            made.append(f"On a GPU a call is made of {self._stages}.")
        return "\n\n".join(made)

    def prove(self, chunk: int = 3) -> str:
        """Prove, on chunks of 2 to `chunk` tokens, that forward and gradient equal the step's.

        The chunk form with symbols, the tiles of a chunk and of its adjoint at random points.

        Args:
            chunk: the largest number of tokens; time grows steeply with it.

        Returns:
            What was proved, a line each.

        Raises:
            NotLowered: the proof does not cover the recurrence.
            ProofFailed: it does not hold, a fault of the compiler.
        """
        from ..codegen.prove import prove  # SymPy takes half a second to import

        return str(prove(self.declaration, chunk))

    def __reduce__(self) -> str:
        """By name, like a function: copies (of a module that holds it, say) are the op itself."""
        return self.__qualname__

    def __repr__(self) -> str:
        return documentation.short(self.declaration)

    def _repr_html_(self) -> str:
        """The recurrence in a notebook: its equations, its operands, its class."""
        return documentation.html(self.declaration)


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


def _channels_of(declaration: Declaration) -> Callable[[int, Static], tuple[str, ...]]:
    """By micro-steps and numbers: the channel axis of every output, empty of a Scalar."""

    def channels(micro: int, static: Static) -> tuple[str, ...]:
        step = declaration.step(micro, dict(static))
        return tuple("".join(n.kind.axes) for n in step.outputs)

    # what torch.compiler.assume_constant_result does, which imports the compiler
    channels._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return channels


def _refuse_reserved(declaration: Declaration) -> None:
    names = [*(x.name for x in declaration.operands), *(p.name for p in declaration.params)]
    states = [s.name for s in declaration.states]
    reserved = {p.name for p in (*OPTIONS, *STEP_OPTIONS)} | {"o"}
    # what kernels call gradients and what lies between them
    outputs = output_names(len(declaration.step(declaration.default_micro).outputs))
    reserved |= set(outputs)
    taken = {f"d_{n}" for n in (*names, *states, *outputs)}
    taken |= {f"{n}_chunk" for n in (*names, *states)}
    for name in (*names, *declaration.statics):
        entry = re.fullmatch(r"(\w+)_at\d+", name)  # what kernels call an entry of a tuple
        if name in reserved | taken or (entry and entry[1] in names):
            raise errors.ReservedName(name, sorted(reserved), where(declaration.function))
