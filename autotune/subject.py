"""Turns a user's request (recurrence, dimensions, dtype, size, engine) into a subject to tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen.config import Config, Dims
from ..dsl import errors
from ..dsl.declaration import Declaration
from ..dsl.ir import Kind, Per
from ..dsl.normal_form import Operand
from ..runtime.call import Call, describe
from ..runtime.engines import EngineName, load
from ..runtime.tuned.artifact import CallSize, Configuration, Key, Versions
from ..runtime.tuned.selection import call_size_of, find, folders, key_here
from .call_tunable import CallTunable
from .cpu_spaces import eager_space, tvm_space
from .deadline import Deadline
from .inputs import Family, draw
from .measure import CpuDevice, CudaDevice, Device
from .tunable import Tunable
from .validation import ValidationSuite, one_thread, validation_suite

_DRAWN = 64  # tokens that are drawn; longer calls repeat them: times do not depend on values
_AHEAD = 32  # overwrites of the cache ahead of a whole call, which the host queues more slowly


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a call to tune for: B sequences of T tokens, H heads (as many value heads)."""

    B: int
    T: int
    H: int


@dataclass(frozen=True, slots=True)
class Subject:
    """The arguments of `tune`; `devices` are those for parts and for whole calls."""

    tunable: Tunable
    devices: tuple[Device, Device]
    key: Key
    call_size: CallSize


def subject(
    declaration: Declaration,
    engine: EngineName,
    dims: Dims,
    dtype: torch.dtype,
    size: Size,
    device: torch.device,
    chunks: tuple[int, ...] = (),
    plans: int | None = None,
) -> Subject:
    """The subject for calls of `declaration` of that size on `device`.

    `chunks` limits the chunk lengths that are tried (empty: all), `plans` the number of plans per
    direction (None: all).

    Raises:
        EngineUnavailable: the engine cannot serve such calls here, or has nothing to tune.
    """
    call = example(declaration, dims, dtype, size, device)
    refusal = load(engine).refusal(call)
    if refusal is not None:
        raise errors.EngineUnavailable(engine.value, refusal)
    key = key_here(call.form, engine, dtype, dims, device)

    made: list[ValidationSuite] = []

    def suite(deadline: Deadline) -> ValidationSuite:
        if not made:
            made.append(validation_suite(declaration, dims, dtype, device, deadline=deadline))
        return made[0]

    tunable = _tunable(engine, call, suite, _neighbours(key), chunks, plans)
    if device.type == "cuda":
        devices: tuple[Device, Device] = (CudaDevice(device), CudaDevice(device, _AHEAD))
    else:
        devices = (CpuDevice(), CpuDevice())
    return Subject(tunable, devices, key, call_size_of(call))


def example(
    declaration: Declaration, dims: Dims, dtype: torch.dtype, size: Size, device: torch.device
) -> Call:
    """A call of that size; its values are drawn for a short call and repeated."""
    micro = declaration.default_micro
    form = declaration.normal_form(micro)
    tokens = min(size.T, _DRAWN)
    with one_thread():
        short = draw(
            declaration, form, Family.ORDINARY, dims, dtype, device, tokens=tokens, micro=micro
        )
    operands = {o.name: _repeated(short.operands[o.name], o, size) for o in form.operands}
    initial = (None,) * len(form.states)
    return describe(declaration, operands, short.params, initial, None, short.static)


def _repeated(x: Tensor, o: Operand, size: Size) -> Tensor:
    def along(axis: int, count: int) -> None:
        nonlocal x
        index = torch.arange(count, dtype=torch.int64, device=x.device) % x.shape[axis]
        x = x.index_select(axis, index)

    if o.per is Per.HEAD:
        along(0, size.H)
        return x
    along(0, size.B)
    along(1, size.T)
    along(x.ndim - (1 if o.kind is Kind.SCALAR else 2), size.H)
    return x


def _tunable(
    engine: EngineName,
    call: Call,
    suite: Callable[[Deadline], ValidationSuite],
    neighbours: tuple[Configuration, ...],
    chunks: tuple[int, ...],
    plans: int | None,
) -> Tunable:
    if engine is EngineName.TRITON:
        # Triton is imported only where its engine is tuned
        from ..runtime.triton.engine import shared_memory
        from .gpu import GPUS, gpu_of
        from .triton_tunable import CHUNKS, TritonTunable

        shared = shared_memory(call.device)
        on_gpu = call.device.type == "cuda"
        gpu = gpu_of(call.device, shared) if on_gpu else GPUS["h100"]
        known = tuple(c for c in neighbours if isinstance(c, Config))
        return TritonTunable(
            call, gpu, suite, chunks=chunks or CHUNKS, plans=plans, neighbours=known
        )
    if engine is EngineName.EAGER:
        return CallTunable(call, engine, eager_space(chunks), suite)
    if engine is EngineName.TVM:
        from ..runtime.tvm.engine import configuration, fitted

        default = fitted(configuration(), call)
        return CallTunable(call, engine, tvm_space(call, default, chunks), suite)
    raise errors.EngineUnavailable(
        engine.value, "it has no configurations to choose from", help="tune triton, tvm or eager"
    )


def rejected(key: Key, versions: Versions) -> frozenset[Configuration]:
    """The configurations that failed validation on this kind of machine under these versions."""
    found = find(key, folders()).artifact
    known = () if found is None else found.quarantine
    return frozenset(r.config for r in known if r.versions == versions)


def _neighbours(key: Key) -> tuple[Configuration, ...]:
    """The configurations that serve other sizes of call, or other machines of this kind."""
    found = find(key, folders()).artifact
    return () if found is None else tuple(dict.fromkeys(t.config for t in found.tuned))
