"""The two torch ops of a recurrence: forward and backward, opaque to the compiler and to autograd.

Per (normal form, engine) one pair is registered, when it is first needed:
`chunkwise::<name>_<digest>_<engine>` and the same with `_backward`. Only the inputs are saved; the
backward recomputes, so what is saved never depends on how an engine plans its kernels.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dsl import errors
from ..dsl.ir import Per
from . import reference
from .call import Call, Static, describe, on_one_device
from .check import check_contents, check_results
from .engines import Engine, EngineName, load
from .transforms import Along, Derivative, register_batches, register_derivative

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration

NAMESPACE = "chunkwise"


@dataclass(frozen=True, slots=True)
class Signature:
    """How a call is flattened into an op's arguments: operands, initial states, the rest."""

    declaration: Declaration
    static: Static

    @property
    def operands(self) -> int:
        return len(self.declaration.operands)

    @property
    def states(self) -> int:
        return len(self.declaration.states)

    @property
    def inputs(self) -> str:
        """The arguments as a schema; positions, not names, for a name may be any identifier."""
        parts = [f"Tensor x{i}" for i in range(self.operands)]
        parts += [f"Tensor? initial{i}" for i in range(self.states)]
        parts += ["Tensor? cu_seqlens"]
        parts += [f"float p{i}" for i in range(len(self.declaration.params))]
        return ", ".join(parts)

    @property
    def forward(self) -> str:
        returns = ", ".join(["Tensor"] * (1 + self.states))
        return f"({self.inputs}, bool? check) -> ({returns})"

    @property
    def backward(self) -> str:
        given = ", ".join(["Tensor? do", *(f"Tensor? dfinal{i}" for i in range(self.states))])
        return f"({given}, {self.inputs}) -> Tensor[]"

    def call(self, inputs: Sequence[Any], *, symbolic: bool = False) -> Call:
        """The checked call that these flat arguments stand for."""
        a, b = self.operands, self.operands + self.states
        names = (x.name for x in self.declaration.operands)
        params = zip((p.name for p in self.declaration.params), inputs[b + 1 :], strict=True)
        return describe(
            self.declaration,
            dict(zip(names, inputs[:a], strict=True)),
            {n: float(p) for n, p in params},
            tuple(inputs[a:b]),
            inputs[b],
            self.static,
            symbolic=symbolic,
        )


class OpRegistry:
    """The ops registered in this process; registration happens once per name, under a lock."""

    def __init__(self) -> None:
        self._library = torch.library.Library(NAMESPACE, "FRAGMENT")
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._known: dict[tuple[Declaration, EngineName, int, Static], str] = {}

    def ensure(
        self, declaration: Declaration, engine: EngineName, micro: int, static: Static = ()
    ) -> str:
        """The name of the forward op, `torch.ops.chunkwise.<name>`, registered if it was not.

        Two declarations with one normal form share their ops, since nothing else is computed.
        """
        key = (declaration, engine, micro, static)
        known = self._known.get(key)
        if known is not None:
            return known
        name = op_name(declaration, engine, micro, static)
        with self._lock:
            if name not in self._names:
                _register(self._library, name, Signature(declaration, static), engine)
                self._names.add(name)
            self._known[key] = name
        return name


REGISTRY = OpRegistry()


def op_name(declaration: Declaration, engine: EngineName, micro: int, static: Static) -> str:
    """`<name>_<digest>_<engine>`, in the letters that torch allows."""
    safe = re.sub(r"[^0-9A-Za-z_]", "_", declaration.name)
    # the reference engine also runs steps that have no normal form
    if engine is EngineName.REFERENCE:
        digest = declaration.step(micro, dict(static)).digest
    else:
        digest = declaration.normal_form(micro, dict(static)).digest
    return f"{safe}_{digest}_{engine.value}"


def _register(
    library: torch.library.Library, name: str, signature: Signature, engine: EngineName
) -> None:
    declaration = signature.declaration
    n, states = signature.operands, signature.states
    backward_name = f"{name}_backward"
    library.define(name + signature.forward)
    library.define(backward_name + signature.backward)
    ops = getattr(torch.ops, NAMESPACE)
    forward_op, backward_op = getattr(ops, name).default, getattr(ops, backward_name).default

    def forward(*args: Any) -> tuple[Tensor, ...]:
        *inputs, check = args
        call = signature.call(inputs)
        check_contents(call, check)
        call = on_one_device(call)
        serving = _loaded(_engine_of(engine, call), call)
        if _is_empty(call):
            return _empty_forward(call)
        with _without_autocast(call.device):
            o, finals = serving.forward(call)
        check_results(call, check, o, finals)
        return (o, *finals)

    def forward_shapes(*args: Any) -> tuple[Tensor, ...]:
        call = signature.call(args[:-1], symbolic=True)
        o = torch.empty(call.output_shape, dtype=call.dtype, device=call.device)
        finals = (
            torch.empty(call.state_shape(s), dtype=call.state_dtype, device=call.device)
            for s in declaration.states
        )
        return (o, *finals)

    def backward(*args: Any) -> list[Tensor]:
        do, *dfinals = args[: 1 + states]
        call = on_one_device(signature.call(args[1 + states :]))
        if _is_empty(call):
            return _empty_backward(call, dfinals)
        if do is None:
            do = torch.zeros(call.output_shape, dtype=call.dtype, device=call.device)
        with _without_autocast(call.device):
            # an expanded gradient (of a sum, say) has strides 0, which no kernel expects
            of_operands, of_initial = _loaded(_engine_of(engine, call), call).backward(
                call, do.contiguous(), tuple(d if d is None else d.contiguous() for d in dfinals)
            )
        grads = [of_operands[x.name] for x in declaration.operands]
        grads += [g for g in of_initial if g is not None]
        return [g.contiguous() for g in grads]

    def backward_shapes(*args: Any) -> list[Tensor]:
        inputs = args[1 + states :]
        present = [x for x in inputs[: n + states] if x is not None]
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in present]

    def save(ctx: Any, inputs: Sequence[Any]) -> None:
        ctx.save_for_backward(*inputs[: n + states + 1])
        ctx.params = inputs[n + states + 1 : -1]
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = iter(backward_op(*cotangents, *saved, *ctx.params))
        differentiable = [None if x is None else next(grads) for x in saved[: n + states]]
        # cu_seqlens, the parameters and `check`
        return (*differentiable, *(None for _ in range(2 + len(ctx.params))))

    def save_nothing(ctx: Any, inputs: Sequence[Any]) -> None:
        pass

    def refuse(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        raise errors.DoubleBackward(declaration.name)

    def forward_in_torch(*args: Any) -> tuple[Tensor, ...]:
        call = signature.call(args[:-1])
        check_contents(call, args[-1])
        o, finals = reference.forward(on_one_device(call))
        return (o, *finals)

    def backward_in_torch(*args: Any) -> list[Tensor]:
        do, *dfinals = args[: 1 + states]
        call = on_one_device(signature.call(args[1 + states :]))
        of_operands, of_initial = reference.differentiate(call, do, tuple(dfinals))
        return [*of_operands.values(), *(g for g in of_initial if g is not None)]

    for own, run, shapes in (
        (name, forward, forward_shapes),
        (backward_name, backward, backward_shapes),
    ):
        library.impl(own, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{own}", shapes, lib=library)
    by_reference = engine is EngineName.REFERENCE
    register_derivative(
        library,
        forward_op,
        Derivative(
            declaration.name, save, differentiate, forward_in_torch if by_reference else None
        ),
    )
    register_derivative(
        library,
        backward_op,
        Derivative(
            declaration.name,
            save_nothing,
            refuse,
            backward_in_torch if by_reference else None,
            records_itself=by_reference,
        ),
    )
    per_token = [
        Along.SEQUENCES if x.per is Per.TOKEN else Along.NOTHING for x in declaration.operands
    ]
    inputs = [*per_token, *[Along.SEQUENCES] * states]
    inputs += [Along.NOTHING] * (1 + len(declaration.params))
    register_batches(library, forward_op, [*inputs, Along.NOTHING], fold=True)
    cotangents = [Along.SEQUENCES] * (1 + states)
    # an operand per head has one gradient for all sequences
    register_batches(
        library, backward_op, [*cotangents, *inputs], fold=Along.NOTHING not in per_token
    )


def _engine_of(name: EngineName, call: Call) -> EngineName:
    """`name`; where there is no channel no kernel has work, and the token loop says what is left.

    (Without Keys reads are zero, and outputs what the step makes of zero.)
    """
    return EngineName.REFERENCE if 0 in (call.K, call.V) else name


def _is_empty(call: Call) -> bool:
    """No token in the whole call: an engine never sees it."""
    return 0 in (call.B, call.T, call.HV)


def _empty_forward(call: Call) -> tuple[Tensor, ...]:
    o = torch.zeros(call.output_shape, dtype=call.dtype, device=call.device)
    finals = (
        torch.zeros(call.state_shape(s), dtype=call.state_dtype, device=call.device)
        if start is None
        else start.to(call.state_dtype, copy=True).contiguous()
        for s, start in zip(call.declaration.states, call.initial, strict=True)
    )
    return (o, *finals)


def _empty_backward(call: Call, dfinals: Sequence[Tensor | None]) -> list[Tensor]:
    """The final state is the initial one, so its gradient passes through."""
    grads = [torch.zeros_like(x).contiguous() for x in call.operands.values()]
    for start, dfinal in zip(call.initial, dfinals, strict=True):
        if start is not None:
            passed = torch.zeros_like(start) if dfinal is None else dfinal
            grads.append(passed.to(start.dtype, copy=True).contiguous())
    return grads


def _loaded(name: EngineName, call: Call) -> Engine:
    """The engine, once it has agreed to serve the call."""
    engine = load(name)
    reason = engine.supports(call)
    if reason is not None:
        raise errors.NotLowered(
            f"engine {name.value!r} cannot serve this call of {call.declaration.name}",
            reason,
            'engine="reference" runs any legal step, token by token',
        )
    return engine


@contextlib.contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Operands are used as they come: autocast may not change dtypes inside an engine."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
