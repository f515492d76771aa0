"""The Triton engine: selects a call's configuration, emits its kernels and imports them.

Runs on a GPU; on a CPU only under Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton

from ...codegen.config import Config, Dims, Precision
from ...codegen.gluon import emit as gluon_emit
from ...codegen.gluon.defaults import preferred
from ...codegen.interface import Signature
from ...codegen.plan import Hoist
from ...codegen.programs import chunk_program
from ...codegen.triton.defaults import kept
from ...codegen.triton.emit import Emitted, emit, emit_token
from ...codegen.triton.fit import H100_SHARED, fit, untuned_config
from ...dsl.normal_form import NormalForm
from ...dsl.step import Step
from ..cache import import_source
from ..call import Call
from ..engine import Execute, KernelEngine, Task, chunk_refusal
from ..engines import EngineName
from ..prepared import Way
from ..printed import (
    PRINTED,
    Dtypes,
    dtypes_of,
    printed_token_refusal,
    signature_of,
    unsupported_dtype,
)
from ..saves import Saved, saved_under
from ..tuned.artifact import CallSize, Configuration
from ..tuned.selection import call_size_of, find, folders, select_config
from .descriptors import is_hopper, is_matrix, multiprocessors
from .joined import JoinedLaunch
from .launch import Launch
from .launch_plan import LoadedKernel, OperandLayout
from .printed import kernel_of
from .segments import joined_segment, segment_of

_GRADIENTS = "backward_gradients"


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The kernels for calls of one form, dimensions and dtypes.

    `chunk`: rows of a chunk; `segment`: tokens of a segment, where scans run on segments; else 0.
    """

    chunk: int
    forward: tuple[LoadedKernel, ...]
    backward: tuple[LoadedKernel, ...]
    segment: int = 0


class _Triton(KernelEngine):
    """Kernels of Triton, on a GPU or in its interpreter."""

    name = EngineName.TRITON
    joins = True

    def refusal(self, call: Call) -> str | None:
        why = self.device_refusal(call) or unsupported_dtype(dtypes_of(call))
        if why is not None:
            return why
        if triton.knobs.runtime.interpret and torch.bfloat16 in dict(dtypes_of(call)).values():
            return "Triton's interpreter computes bfloat16 products wrongly: use float32 or float16"
        return chunk_refusal(call.form)

    def device_refusal(self, call: Call) -> str | None:
        return _no_device(call.device)

    def token_refusal(self, call: Call) -> str | None:
        return self.device_refusal(call) or printed_token_refusal(call)

    def saves(self, call: Call) -> Saved | None:
        if self.forward_way(call) is not Way.CHUNKS:
            return None
        return saved_under(_config_for(call), call)

    def compile(self, task: Task, config: Configuration | None, segment: int | None) -> Execute:
        call = task.call
        if task.way in (Way.TOKENS, Way.POOL):
            dims, dtypes = Dims(call.K, call.V), dtypes_of(task.rows)
            pooled = call.pool is not None
            compiled = _compile_token(call.step, dims, call.dtype, dtypes, pooled=pooled)
        elif task.joined:
            compiled = _compiled_for(call, joined_segment(*_sizes(call)))
        elif config is None and task.saved is None:
            compiled = _compiled_for(call)
        else:
            chosen = _config_for(call) if config is None else config
            assert isinstance(chosen, Config)
            compiled = _compiled_with(call, _keeping(call, chosen, task.saved), segment)
        kernels = compiled.backward if task.way is Way.BACKWARD else compiled.forward
        launch = JoinedLaunch if task.joined else Launch
        return launch(task, kernels, compiled.chunk, compiled.segment)


ENGINE = _Triton()


def _no_device(device: torch.device) -> str | None:
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"its kernels run on a GPU, and the operands are on {device}"
    return None


def configuration(
    form: NormalForm, dims: Dims, dtype: torch.dtype, shared: int = H100_SHARED
) -> Config:
    """The configuration for calls of `form`, untuned, where a program has `shared` bytes."""
    return untuned_config(form, dims, PRINTED[dtype], shared)


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use on `device`."""
    if device.type != "cuda":
        return H100_SHARED
    index = torch.cuda.current_device() if device.index is None else device.index
    # what Triton itself compares a kernel with before it launches it
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])


def _compiled_for(call: Call, segment: int | None = None) -> _Compiled:
    return _compiled_with(call, _keeping(call, _config_for(call), None), segment)


def _config_for(call: Call) -> Config:
    """The configuration that serves calls like `call`."""
    form, dims = call.form, Dims(call.K, call.V)

    def default() -> Config:
        return configuration(form, dims, call.dtype, shared_memory(call.device))

    config = select_config(Config, ENGINE.key(call), call_size_of(call), default)
    return _as_on_hopper(call, config, default())


def _keeping(call: Call, config: Config, saved: Saved | None) -> Config:
    """`config` with a forward that keeps what is `saved`, no more and no less.

    Another chunk than that of `config` has been agreed on only if the configuration has changed
    between the directions of a call, or since its graph was compiled: the default then serves.
    """
    if saved is None:
        return config.saving(Hoist.NOTHING)
    if saved.chunk != config.chunk:
        dims, shared = Dims(call.K, call.V), shared_memory(call.device)
        config = replace(configuration(call.form, dims, call.dtype, shared), chunk=saved.chunk)
        config = fit(call.form, config, dims, call.dtype.itemsize, shared)
    return config.saving(saved.kinds)


def _as_on_hopper(call: Call, config: Config, usual: Config) -> Config:
    """`config` as is measured to be faster on a Hopper GPU, where nothing else was chosen.

    Its forward keeps tiles for the backward, and kernels are in Gluon. `usual`: the default, under
    whose plans they were measured.
    """
    device, size = call.device, call_size_of(call)
    chosen = any(k.printer is not None for k in (config.default, *dict(config.kernels).values()))
    if chosen or not is_hopper(device):
        return config
    dims = Dims(call.K, call.V)
    keeps = kept(chunk_program(call.form), dims) if call.dtype.itemsize == 2 else Hoist.NOTHING
    saving = config.saving(keeps)
    same = (saving.chunk, saving.forward, saving.backward)
    tuned, usual = config != usual, usual.saving(keeps)
    config = config if tuned else saving
    base = saving if same == (usual.chunk, usual.forward, usual.backward) else usual
    count = multiprocessors(device)
    if call.cu_seqlens is not None or segment_of(call.form, dims, size, count):
        return config
    printed_for = signature(dims, call.dtype, dtypes_of(call))
    made = preferred(call.form, base, printed_for, size.rows, size.tokens, count)
    if made is None or call.T % made.chunk:
        return config
    if made.chunk != base.chunk and not _has_matrices(call):  # Triton's are slower in its chunks
        return config
    if not _has_own_heads(call):  # their gradients in Gluon have not been timed
        rest = tuple(k for k in made.kernels if k[0] != _GRADIENTS)
        made = replace(made, kernels=(*rest, (_GRADIENTS, base.of(_GRADIENTS))))
    artifact = find(ENGINE.key(call), folders()).artifact
    wrong = () if artifact is None else artifact.quarantine
    return config if any(r.config == made for r in wrong) else made


def _has_matrices(call: Call) -> bool:
    """Whether tokens of a call lie as TMA takes them, and all operands have as many heads."""
    tokens = [x for x in call.operands.values() if x.dim() == 4]
    layouts = [OperandLayout.of("", x, per_head=False) for x in tokens]
    return _has_own_heads(call) and all(is_matrix(o, call.B) for o in layouts)


def _has_own_heads(call: Call) -> bool:
    """Whether no two value heads share a head of Keys or Values."""
    return all(x.shape[2] == call.HV for x in call.operands.values() if x.dim() == 4)


def _compiled_with(call: Call, config: Config, segment: int | None) -> _Compiled:
    segment = segment_of(*_sizes(call)) if segment is None else segment
    dims = Dims(call.K, call.V)
    return compile_with(call.form, dims, call.dtype, dtypes_of(call), config, segment)


def _sizes(call: Call) -> tuple[NormalForm, Dims, CallSize, int]:
    """What the segments of a call depend on."""
    return call.form, Dims(call.K, call.V), call_size_of(call), multiprocessors(call.device)


@lru_cache(maxsize=512)
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
    printed_for, segments = signature(dims, dtype, dtypes), segment > 0
    emitted = emit(form, printed_for, config, segments=segments)
    in_gluon = gluon_emit.emit(form, printed_for, config, segments=segments)
    return _imported(emitted, config.chunk, segment, in_gluon)


@lru_cache(maxsize=512)
def _compile_token(
    step: Step, dims: Dims, dtype: torch.dtype, dtypes: Dtypes, *, pooled: bool
) -> _Compiled:
    return _imported(emit_token(step, signature(dims, dtype, dtypes), pooled=pooled), 1)


def _imported(
    emitted: Emitted, chunk: int, segment: int = 0, in_gluon: gluon_emit.Emitted | None = None
) -> _Compiled:
    module = import_source(emitted.source)
    gluon: dict[str, LoadedKernel] = {}
    if in_gluon is not None and in_gluon.kernels and not triton.knobs.runtime.interpret:
        own = import_source(in_gluon.source)
        gluon = {k.name: LoadedKernel(kernel_of(k), getattr(own, k.name)) for k in in_gluon.kernels}
    forward, backward = (
        tuple(
            LoadedKernel(kernel_of(k), getattr(module, k.name), gluon=gluon.get(k.name))
            for k in kernels
        )
        for kernels in (emitted.forward, emitted.backward)
    )
    return _Compiled(chunk, forward, backward, segment)


def signature(dims: Dims, dtype: torch.dtype, dtypes: Dtypes) -> Signature:
    """What kernels are printed for, from the dtypes of a call and of its operands."""
    exact = torch.version.hip or triton.knobs.runtime.interpret
    return signature_of(dims, dtype, dtypes, Precision.IEEE if exact else Precision.TF32X3)
