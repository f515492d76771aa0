"""The torch ops of a recurrence: forward, backward and steps, opaque to compilers and to autograd.

They are registered when the recurrence is declared, under `chunkwise::<name>_<digest of the step>`,
`..._backward`, `..._step` and `..._pooled` (steps that change states of a pool in place): which
engine serves a call is decided within it, by an argument, the environment or the device. So graphs
and exported programs name no engine, and load wherever the declaration has been imported.

Only the inputs are saved, and the backward recomputes, unless a configuration has the forward keep
tiles (runtime/saves.py): `..._saving` returns these for `..._saved_backward`. What is kept is
decided where gradients are recorded, and stands in compiled graphs; calls of unknown sizes keep
nothing.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..codegen.plan import Hoist
from ..dsl import errors
from ..dsl.ir import Per
from .call import Call, Pool, Static, describe
from .check import CHECK_VARIABLE, asked, check_contents, check_results, check_slots
from .engines import ENGINE_VARIABLE, EngineName
from .pool import with_pool
from .prepared import (
    Prepared,
    Records,
    chosen,
    prepare_backward,
    prepare_forward,
    prepare_step,
    saves,
)
from .saves import Saved
from .transforms import Along, Derivative, Keeping, register_batches, register_derivative

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration

NAMESPACE = "chunkwise"
Op = torch._ops.OpOverload


@dataclass(frozen=True, slots=True)
class Ops:
    """The ops of a declaration. Arguments: see `Flat`."""

    forward: Op
    backward: Op
    step: Op
    pooled: Op
    saving: Op
    saved_backward: Op


@dataclass(frozen=True, slots=True)
class Flat:
    """How a call is flattened into the arguments of an op.

    Operands, initial states, cu_seqlens, floats, static numbers, the engine's name, `check` (of a
    forward). A backward has the cotangents of the output and of the final states before them.
    """

    declaration: Declaration

    @property
    def operands(self) -> int:
        return len(self.declaration.operands)

    @property
    def states(self) -> int:
        return len(self.declaration.states)

    @property
    def tensors(self) -> int:
        """How many arguments are tensors; they come first."""
        return self.operands + self.states + 1

    @property
    def numbers(self) -> int:
        """Where the floats end."""
        return self.tensors + len(self.declaration.params)

    @property
    def inputs(self) -> str:
        """The arguments as a schema; positions, not names, for a name may be any identifier."""
        parts = [f"Tensor x{i}" for i in range(self.operands)]
        parts += [f"Tensor? initial{i}" for i in range(self.states)]
        parts += ["Tensor? cu_seqlens"]
        parts += [f"float p{i}" for i in range(len(self.declaration.params))]
        parts += [f"int s{i}" for i in range(len(self.declaration.statics))]
        return ", ".join([*parts, "str? engine"])

    @property
    def forward(self) -> str:
        return f"({self.inputs}, bool? check) -> ({self._returns})"

    @property
    def saving(self) -> str:
        return f"({self.inputs}, bool? check, int kinds, int chunk) -> ({self._returns}, Tensor)"

    @property
    def step(self) -> str:
        return f"({self.inputs}) -> ({self._returns})"

    @property
    def pooled(self) -> str:
        """Operands, pools, indices, numbers of accepted tokens; then as others."""
        parts = [f"Tensor x{i}" for i in range(self.operands)]
        parts += [f"Tensor(a{i}!) pool{i}" for i in range(self.states)]
        parts += ["Tensor indices", "Tensor? accepted"]
        parts += [f"float p{i}" for i in range(len(self.declaration.params))]
        parts += [f"int s{i}" for i in range(len(self.declaration.statics))]
        return f"({', '.join([*parts, 'str? engine'])}) -> Tensor"

    def pooled_call(self, inputs: Sequence[Any], *, symbolic: bool = False) -> Call:
        """The checked call that the arguments of a step in a pool stand for."""
        a, b = self.operands, self.operands + self.states
        none = (None,) * (self.states + 1)
        call = self.call((*inputs[:a], *none, *inputs[b + 2 :]), symbolic=symbolic)
        return with_pool(call, Pool(tuple(inputs[a:b]), inputs[b], inputs[b + 1]))

    @property
    def _returns(self) -> str:
        return ", ".join(["Tensor"] * (1 + self.states))

    @property
    def backward(self) -> str:
        return f"({self._given}, {self.inputs}) -> Tensor[]"

    @property
    def saved_backward(self) -> str:
        return f"({self._given}, {self.inputs}, int kinds, Tensor kept) -> Tensor[]"

    @property
    def _given(self) -> str:
        return ", ".join(["Tensor? do", *(f"Tensor? dfinal{i}" for i in range(self.states))])

    def call(self, inputs: Sequence[Any], *, symbolic: bool = False) -> Call:
        """The checked call that the arguments of a forward stand for."""
        a, b = self.operands, self.operands + self.states
        names = (x.name for x in self.declaration.operands)
        params = zip((p.name for p in self.declaration.params), inputs[b + 1 :], strict=False)
        static: Static = tuple(zip(self.declaration.statics, inputs[self.numbers :], strict=False))
        return describe(
            self.declaration,
            dict(zip(names, inputs[:a], strict=True)),
            {n: float(p) for n, p in params},
            tuple(inputs[a:b]),
            inputs[b],
            static,
            symbolic=symbolic,
        )


class OpRegistry:
    """The ops registered in this process, under a lock."""

    def __init__(self) -> None:
        self._library = torch.library.Library(NAMESPACE, "FRAGMENT")
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Declaration, Ops]] = {}

    def of(self, declaration: Declaration) -> Ops:
        """The ops of a declaration, registered if they were not.

        Two declarations of one step share them. Those with tuples or static numbers have more than
        the step that names their ops: the second of such a name gets a number behind it.
        """
        name, several = op_name(declaration), declaration.has_micro or declaration.statics
        with self._lock:
            tried, n = name, 1
            while tried in self._known:
                owner, ops = self._known[tried]
                if not several or owner.function is declaration.function:
                    return ops
                n += 1
                tried = f"{name}_{n}"
            ops = _register(self._library, tried, Flat(declaration))
            self._known[tried] = declaration, ops
        return ops

    def known(self) -> list[tuple[Declaration, Ops]]:
        """Every declaration that has ops, with these."""
        with self._lock:
            return list(self._known.values())


REGISTRY = OpRegistry()
_CONCRETE = (Tensor, torch.nn.Parameter, type(None))


class _Choice(NamedTuple):
    """What is kept of calls of one layout."""

    keeping: Keeping | None


def op_name(declaration: Declaration) -> str:
    """`<name>_<digest>`, in the letters that torch allows."""
    safe = re.sub(r"[^0-9A-Za-z_]", "_", declaration.name)
    any_step = "_any" if declaration.any_step else ""
    return f"{safe}_{declaration.step(declaration.default_micro).digest}{any_step}"


def _register(library: torch.library.Library, name: str, flat: Flat) -> Ops:
    declaration, states = flat.declaration, flat.states
    own = {"": flat.forward, "_backward": flat.backward, "_step": flat.step, "_pooled": flat.pooled}
    own |= {"_saving": flat.saving, "_saved_backward": flat.saved_backward}
    for suffix, schema in own.items():
        library.define(name + suffix + schema)
    namespace = getattr(torch.ops, NAMESPACE)
    ops = Ops(*(getattr(namespace, name + suffix).default for suffix in own))  # in that order
    forwards, backwards, steps = Records[Prepared](), Records[Prepared](), Records[Prepared]()
    pools, keepings = Records[Prepared](), Records[_Choice]()
    tensors, numbers, given = flat.tensors, flat.numbers, 1 + states

    def forward(*args: Any, saved: Saved | None = None) -> tuple[Tensor, ...]:
        *inputs, engine, check = args
        named = engine or os.environ.get(ENGINE_VARIABLE)
        rest = (*inputs[numbers:], named, saved, torch.get_num_threads())
        if numbers > tensors and not all(map(math.isfinite, inputs[tensors:numbers])):
            flat.call(inputs)  # says which
        layout = inputs[:tensors], rest
        found = forwards.latest(*layout) or forwards.find(
            *layout, lambda: prepare_forward(flat.call(inputs), engine, saved)
        )
        if check is None:
            check = os.environ.get(CHECK_VARIABLE, "") not in ("", "0")
        if check or found.host_bounds:
            check_contents(flat.call(inputs), check)
        kept = None
        if found.kept is not None:
            shape, dtype, device = found.kept
            kept = torch.empty(shape, dtype=dtype, device=device)
        results = found(inputs if kept is None else [*inputs, *kept.unbind(0)])
        if check:
            check_results(flat.call(inputs), results)
        return tuple(results) if kept is None else (*results, kept)

    def saving(*args: Any) -> tuple[Tensor, ...]:
        *inputs, kinds, chunk = args
        return forward(*inputs, saved=Saved(Hoist(kinds), chunk))

    def saving_shapes(*args: Any) -> tuple[Tensor, ...]:
        *inputs, kinds, chunk = args
        call = flat.call(inputs, symbolic=True)
        shape = Saved(Hoist(kinds), chunk).shape(call)
        return *shapes(inputs), torch.empty(shape, dtype=call.dtype, device=call.device)

    def step(*args: Any) -> tuple[Tensor, ...]:
        *inputs, engine = args
        named = engine or os.environ.get(ENGINE_VARIABLE)
        rest = (*inputs[numbers:], named, torch.get_num_threads())
        layout = inputs[:tensors], rest
        found = steps.latest(*layout) or steps.find(
            *layout, lambda: _step(flat.call(inputs), engine)
        )
        return tuple(found(inputs))

    def pooled(*args: Any) -> Tensor:
        *inputs, engine = args
        named = engine or os.environ.get(ENGINE_VARIABLE)
        rest = (*inputs[numbers + 1 :], named, torch.get_num_threads())
        layout = inputs[: tensors + 1], rest
        found = pools.latest(*layout) or pools.find(
            *layout, lambda: _step(flat.pooled_call(inputs), engine)
        )
        if inputs[flat.operands].device.type == "cpu" or asked():
            a, b = flat.operands, flat.operands + states
            check_slots(Pool(tuple(inputs[a:b]), inputs[b], inputs[b + 1]))
        (o,) = found(inputs)
        return o

    def pooled_shape(*args: Any) -> Tensor:
        call = flat.pooled_call(args, symbolic=True)
        return torch.empty(call.output_shape, dtype=call.dtype, device=call.device)

    def shapes(inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        call = flat.call(inputs, symbolic=True)
        o = torch.empty(call.output_shape, dtype=call.dtype, device=call.device)
        finals = (
            torch.empty(call.state_shape(s), dtype=call.state_dtype, device=call.device)
            for s in declaration.states
        )
        return (o, *finals)

    def backward(
        *args: Any, saved: Saved | None = None, kept: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        *inputs, engine = args
        named = engine or os.environ.get(ENGINE_VARIABLE)
        rest = (*inputs[given + numbers :], named, saved, torch.get_num_threads())

        def prepare() -> Prepared:
            call, cotangents = flat.call(inputs[given:]), tuple(inputs[:given])
            return prepare_backward(call, cotangents, engine, saved)

        layout = inputs[: given + tensors], rest
        found = backwards.latest(*layout) or backwards.find(*layout, prepare)
        return list(found([*inputs, *kept] if kept else inputs))

    def saved_backward(*args: Any) -> list[Tensor]:
        *inputs, kinds, kept = args
        saved = Saved(Hoist(kinds), kept.shape[-1])
        return backward(*inputs, saved=saved, kept=kept.contiguous().unbind(0))

    def backward_shapes(*args: Any) -> list[Tensor]:
        present = [x for x in args[given : given + tensors - 1] if x is not None]
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in present]

    def keeping(inputs: Sequence[Any]) -> Keeping | None:
        *_, engine, _ = inputs
        if any(type(x) not in _CONCRETE for x in inputs[:tensors]):  # a graph is traced
            return _keep(inputs, engine, traced=True).keeping
        named = engine or os.environ.get(ENGINE_VARIABLE)
        layout = inputs[:tensors], (*inputs[numbers:-2], named)
        found = keepings.latest(*layout) or keepings.find(*layout, lambda: _keep(inputs, engine))
        return found.keeping

    def _keep(inputs: Sequence[Any], engine: str | None, *, traced: bool = False) -> _Choice:
        call = flat.call(inputs, symbolic=traced)
        sizes = call.B, call.T, call.HV, call.K, call.V, call.N
        saved = saves(call, engine) if all(type(n) is int for n in sizes) else None
        if saved is None:
            return _Choice(None)
        return _Choice(Keeping(ops.saving, (saved.kinds.value, saved.chunk), differentiate_saved))

    def save(ctx: Any, inputs: Sequence[Any], *kept: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors], *kept)
        ctx.rest = inputs[tensors:]
        ctx.set_materialize_grads(False)

    def pull_back(
        ctx: Any, cotangents: Sequence[Tensor | None], rest: Sequence[Any]
    ) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors  # once: a checkpoint computes it again
        saved, kept = everything[:tensors], everything[tensors:]
        op = ops.saved_backward if kept else ops.backward
        grads = iter(op(*cotangents, *saved, *rest, *kept))
        differentiable = [None if x is None else next(grads) for x in saved[: tensors - 1]]
        # cu_seqlens, and what is no tensor
        return (*differentiable, *(None,) * (1 + len(ctx.rest)))

    def differentiate(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return pull_back(ctx, cotangents, ctx.rest[:-1])  # without `check`

    def differentiate_saved(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        kinds, _ = ctx.keeping.more
        return pull_back(ctx, cotangents, (*ctx.rest[:-1], kinds))

    def differentiate_step(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return pull_back(ctx, cotangents, (*ctx.rest[:-1], EngineName.REFERENCE.value))

    def save_nothing(ctx: Any, inputs: Sequence[Any]) -> None:
        pass

    def refuse(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        raise errors.DoubleBackward(declaration.name)

    def forward_in_torch(*args: Any) -> tuple[Tensor, ...]:
        check_contents(flat.call(args), asked() if args[-1] is None else args[-1])
        return step_in_torch(*args)

    def step_in_torch(*args: Any) -> tuple[Tensor, ...]:
        from . import reference  # the engines' modules are imported where they serve

        o, finals = reference.forward(flat.call(args).of(args))
        return (o, *finals)

    def backward_in_torch(*args: Any) -> list[Tensor]:
        from . import reference

        (do, *dfinals), inputs = args[:given], args[given:]
        return reference.differentiate(flat.call(inputs).of(inputs), do, tuple(dfinals))

    def is_reference(args: Sequence[Any], engine: str | None) -> bool:
        return chosen(args[: flat.operands], engine) is EngineName.REFERENCE

    title = declaration.name
    kernels = (
        (ops.forward, forward, lambda *args: shapes(args)),
        (ops.backward, backward, backward_shapes),
        (ops.step, step, lambda *args: shapes(args)),
        (ops.pooled, pooled, pooled_shape),
        (ops.saving, saving, saving_shapes),
        (ops.saved_backward, saved_backward, backward_shapes),
    )
    for op, run, fake in kernels:
        library.impl(op._schema.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(op._schema.name, fake, lib=library)
    register_derivative(
        library,
        ops.forward,
        Derivative(
            title,
            save,
            differentiate,
            forward_in_torch,
            lambda args: is_reference(args, args[-2]),
            keeping=keeping,
        ),
    )
    register_derivative(
        library,
        ops.saved_backward,
        Derivative(title, save_nothing, refuse, backward_in_torch, lambda args: False),
    )
    register_derivative(
        library,
        ops.step,
        Derivative(title, save, differentiate_step, step_in_torch, lambda args: True),
    )
    register_derivative(
        library,
        ops.backward,
        Derivative(
            title,
            save_nothing,
            refuse,
            backward_in_torch,
            lambda args: is_reference(args[given:], args[-1]),
            records_itself=True,
        ),
    )
    per_token = [
        Along.SEQUENCES if x.per is Per.TOKEN else Along.NOTHING for x in declaration.operands
    ]
    inputs = [*per_token, *[Along.SEQUENCES] * states]
    inputs += [Along.NOTHING] * (len(ops.step._schema.arguments) - len(inputs))
    register_batches(library, ops.forward, [*inputs, Along.NOTHING], fold=True)
    register_batches(library, ops.step, inputs, fold=True)
    # an operand per head has one gradient for all sequences
    fold = Along.NOTHING not in per_token
    register_batches(library, ops.backward, [*[Along.SEQUENCES] * given, *inputs], fold=fold)
    return ops


def _step(call: Call, engine: str | None) -> Prepared:
    """What serves a step: a kernel if there is one, else the token loop in torch."""
    return prepare_step(call, engine) or prepare_forward(call, EngineName.REFERENCE.value)
