"""The Triton engine: which kernels serve a call. Emits them, imports them, has them launched.

Runs on a GPU; on a CPU only under Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ...codegen.buffers import OUTPUT
from ...codegen.config import Config, Dims, Precision
from ...codegen.differentiate import GRADIENT
from ...codegen.interface import Signature
from ...codegen.programs import chunk_program
from ...codegen.triton.defaults import default_config
from ...codegen.triton.emit import Emitted, emit, emit_token
from ...codegen.triton.fit import H100_SHARED, fit
from ...dsl.errors import NotLowered
from ...dsl.normal_form import NormalForm
from ...dsl.step import Step
from ..cache import import_source
from ..call import Call
from ..engines import EngineName
from ..micro_steps import coarse, coarse_gradients, refined, refined_cotangent
from ..printed import PRINTED, Dtypes, dtypes_of, unprinted
from ..tokens import Serve, Token, of_tokens
from ..tuned.artifact import CallSize
from ..tuned.selection import call_size_of, key_here, select_config, token_loop_wins
from .launch import Launch
from .launch_plan import Bound
from .segments import segment_of


@dataclass(frozen=True, slots=True)
class _Compiled:
    """What serves calls of one form, dimensions and dtypes.

    `segment`: tokens of a segment, where scans run on segments; else 0.
    """

    chunk: int
    forward: tuple[Bound, ...]
    backward: tuple[Bound, ...]
    segment: int = 0


def supports(call: Call) -> str | None:
    """Why this engine cannot serve the call; None if it can."""
    return _refusal(call.form, call.device, dtypes_of(call), bool(triton.knobs.runtime.interpret))


@lru_cache(maxsize=512)
def _refusal(
    form: NormalForm,
    device: torch.device,
    dtypes: Dtypes,
    interpreted: bool,
) -> str | None:
    why = _no_device(device, interpreted)
    if why is not None:
        return why
    why = unprinted(dtypes)
    if why is not None:
        return why
    if interpreted and torch.bfloat16 in dict(dtypes).values():
        return "Triton's interpreter computes bfloat16 products wrongly: use float32 or float16"
    try:
        chunk_program(form)
    except NotLowered as refusal:
        return str(refusal)
    return None


def _no_device(device: torch.device, interpreted: bool) -> str | None:
    if device.type != "cuda" and not interpreted:
        return f"its kernels run on a GPU, and the operands are on {device}"
    return None


def forward(
    call: Call, config: Config | None = None, *, segment: int | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o [B,T,HV,V] in the call's dtype; final states [N,HV,K,V] (or [N,HV,K]) in float32.

    `config`: instead of the one that serves such calls. `segment`, of its: tokens of a segment
    (0: none), instead of as many as such calls have.
    """
    if config is None and _token_form_wins(
        call.form, call.K, call.V, call.dtype, call.device, call_size_of(call)
    ):
        return forward_by_token(call)
    compiled = _compiled_for(call) if config is None else _compiled_with(call, config, segment)
    launch = Launch(refined(call), compiled.chunk, {}, compiled.segment)
    states = [s.name for s in call.form.states]
    finals = launch.run(compiled.forward, dict(zip(states, call.initial, strict=True)))
    return coarse(call, launch.buffers[OUTPUT]), tuple(finals[name] for name in states)


def forward_by_token(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `forward` returns, one token at a time; for any legal step."""
    rows = of_tokens(call)
    compiled = _compile_token(call.step, Dims(call.K, call.V), call.dtype, dtypes_of(rows))
    launch = Launch(rows, compiled.chunk, {})
    states = [s.name for s in call.step.states]
    finals = launch.run(compiled.forward, dict(zip(states, call.initial, strict=True)))
    return launch.buffers[OUTPUT], tuple(finals[name] for name in states)


def prepare_step(token: Token) -> Serve | str:
    """What computes single tokens of a layout, or why no kernel does."""
    call = token.call
    why = _no_device(call.device, bool(triton.knobs.runtime.interpret))
    why = why or unprinted(dtypes_of(call))
    if why is not None:
        return why
    try:
        dtypes = dtypes_of(of_tokens(call))
        _compile_token(call.step, Dims(call.K, call.V), call.dtype, dtypes)
    except NotLowered as refused:
        return str(refused)

    def serve(values: Sequence[object]) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        o, new = forward_by_token(token.filled(values))
        return (o if token.has_time else o.squeeze(1)), new[0] if len(new) == 1 else new

    return serve


def backward(
    call: Call,
    do: Tensor,
    dfinals: tuple[Tensor | None, ...],
    config: Config | None = None,
    *,
    segment: int | None = None,
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    """Gradients of every operand, in its shape and dtype, and of the initial states."""
    compiled = _compiled_for(call) if config is None else _compiled_with(call, config, segment)
    extra = {GRADIENT + "o": refined_cotangent(call, do)}
    launch = Launch(refined(call), compiled.chunk, extra, compiled.segment)
    states = [s.name for s in call.form.states]
    starts: dict[str, Tensor | None] = dict(zip(states, call.initial, strict=True))
    starts |= {GRADIENT + name: d for name, d in zip(states, dfinals, strict=True)}
    ends = launch.run(compiled.backward, starts)
    gradients = coarse_gradients(call, {n: launch.gradient(n) for n in call.operands})
    initials = tuple(
        None if x is None else ends[GRADIENT + name].to(x.dtype)
        for name, x in zip(states, call.initial, strict=True)
    )
    return gradients, initials


def configuration(
    form: NormalForm, dims: Dims, dtype: torch.dtype, shared: int = H100_SHARED
) -> Config:
    """The configuration for calls of `form`, untuned, where a program has `shared` bytes."""
    config = default_config(chunk_program(form), dims, wide_dtype=dtype is torch.float32)
    return fit(form, config, dims, dtype.itemsize, shared)


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use on `device`."""
    if device.type != "cuda":
        return H100_SHARED
    index = torch.cuda.current_device() if device.index is None else device.index
    # what Triton itself compares a kernel with before it launches it
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many of them `device` has; of no GPU, those of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _compiled_for(call: Call) -> _Compiled:
    size = call_size_of(call)
    return _compile(call.form, call.K, call.V, call.dtype, dtypes_of(call), call.device, size)


@lru_cache(maxsize=8192)
def _token_form_wins(
    form: NormalForm, K: int, V: int, dtype: torch.dtype, device: torch.device, size: CallSize
) -> bool:
    key = key_here(form, EngineName.TRITON, dtype, Dims(K, V), device)
    return token_loop_wins(key, size)


def _compiled_with(call: Call, config: Config, segment: int | None) -> _Compiled:
    dims = Dims(call.K, call.V)
    if segment is None:
        segment = segment_of(call.form, dims, call_size_of(call), multiprocessors(call.device))
    return compile_with(call.form, dims, call.dtype, dtypes_of(call), config, segment)


@lru_cache(maxsize=8192)
def _compile(
    form: NormalForm,
    K: int,
    V: int,
    dtype: torch.dtype,
    dtypes: Dtypes,
    device: torch.device,
    size: CallSize,
) -> _Compiled:
    dims = Dims(K, V)
    config = select_config(
        Config,
        key_here(form, EngineName.TRITON, dtype, dims, device),
        size,
        lambda: configuration(form, dims, dtype, shared_memory(device)),
    )
    segment = segment_of(form, dims, size, multiprocessors(device))
    return compile_with(form, dims, dtype, dtypes, config, segment)


def compile_with(
    form: NormalForm,
    dims: Dims,
    dtype: torch.dtype,
    dtypes: Dtypes,
    config: Config,
    segment: int = 0,
) -> _Compiled:
    """The kernels of `form` under a configuration of the caller's choice.

    `segment`: tokens of a segment, to have scans run on segments; else 0.
    """
    kernels = _kernels(form, dims, dtype, dtypes, config, segments=segment > 0)
    return replace(kernels, segment=segment)


@lru_cache(maxsize=512)
def _kernels(
    form: NormalForm,
    dims: Dims,
    dtype: torch.dtype,
    dtypes: Dtypes,
    config: Config,
    *,
    segments: bool,
) -> _Compiled:
    emitted = emit(form, signature(dims, dtype, dtypes), config, segments=segments)
    return _imported(emitted, config.chunk)


@lru_cache(maxsize=512)
def _compile_token(step: Step, dims: Dims, dtype: torch.dtype, dtypes: Dtypes) -> _Compiled:
    return _imported(emit_token(step, signature(dims, dtype, dtypes)), 1)


def _imported(emitted: Emitted, chunk: int) -> _Compiled:
    module = import_source(emitted.source)
    forward, backward = (
        tuple(Bound(k, getattr(module, k.name)) for k in kernels)
        for kernels in (emitted.forward, emitted.backward)
    )
    return _Compiled(chunk, forward, backward)


def signature(dims: Dims, dtype: torch.dtype, dtypes: Dtypes) -> Signature:
    """What kernels are printed for, from the dtypes of a call and of its operands."""
    named = tuple((name, PRINTED[d]) for name, d in dtypes)
    return Signature(dims, PRINTED[dtype], named, _precision())


@lru_cache(maxsize=1)
def _precision() -> Precision:
    if torch.version.hip or triton.knobs.runtime.interpret:
        return Precision.IEEE
    return Precision.TF32X3
