"""Offline compilation of emitted kernels in a pool of processes, equal ones once.

A kernel is compiled from a module of its own, under one name for all: those that differ in nothing
else are one job, and Triton's cache hits again in the next process.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

from triton.errors import TritonError

from ...dsl.ir import Kind, Per
from ...dsl.normal_form import NormalForm
from ..buffers import BufferId
from ..config import Dims, Precision
from ..interface import Dtype, Signature
from ..modules import import_text
from ..triton.kernel import TritonKernel
from . import library as triton_library
from .resources import SERIALISED, Resources, Target, compile_kernel

UNIT = "audited"
# what Triton's front end, its passes and the assemblers raise: the compiler's verdict, not ours
VERDICTS = (
    TritonError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)


def signature_for(form: NormalForm, dims: Dims, dtype: Dtype, target: Target) -> Signature:
    """Keys and Values in `dtype`, Scalars and per-head operands in float32, as models pass them."""
    wide = tuple(
        (o.name, Dtype.FLOAT32) for o in form.operands if o.kind is Kind.SCALAR or o.per is Per.HEAD
    )
    # tf32x3 does not exist on gfx942
    precision = Precision.IEEE if target is Target.GFX942 else Precision.TF32X3
    return Signature(dims, dtype, wide, precision)


def unit(kernel: TritonKernel) -> str:
    """A module with this kernel alone, called `audited`, and the functions that it calls.

    Without its own name: the two directions often begin with the same kernel.
    """
    functions = triton_library.sources(set(kernel.functions))
    head = "import triton\nimport triton.language as tl"
    source = kernel.source.replace(f"def {kernel.name}(", f"def {UNIT}(")
    return "\n\n".join(p.strip("\n") for p in (head, functions, source) if p) + "\n"


@dataclass(frozen=True, slots=True)
class Job:
    """One compilation; jobs of equal `key` are one."""

    kernel: TritonKernel
    buffers: tuple[tuple[BufferId, Dtype], ...]
    signature: Signature
    target: Target
    packed: bool

    @property
    def key(self) -> str:
        k = self.kernel
        used = {p.of for p in k.parameters}
        dtypes = [(str(p.of), self.signature.of(str(p.of))) for p in k.parameters]
        buffers = sorted((str(n), d.value) for n, d in self.buffers if n in used)
        signature = (self.signature.dtype, dtypes, buffers)
        text = repr((unit(k), k.constants, k.config.warps, k.config.stages, signature))
        text += f"{self.target} {self.packed}"
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a compilation took, or why there is nothing to launch."""

    resources: Resources | None
    error: str
    seconds: float

    @property
    def fits(self) -> bool:
        return self.resources is not None and self.resources.fits


def verdict(outcome: Outcome) -> str:
    """What is wrong with a kernel, for tables; empty if nothing is."""
    r = outcome.resources
    if r is None:
        return outcome.error
    if not r.fits:
        return "does not fit"
    return SERIALISED if r.usage.is_serialised else ""


def compile_job(job: Job) -> Outcome:
    """Run one job in this process."""
    start = time.perf_counter()
    try:
        found = compile_kernel(
            _import(unit(job.kernel)),
            replace(job.kernel, name=UNIT),
            dict(job.buffers),
            job.signature,
            job.target,
            packed=job.packed,
        )
    except VERDICTS as why:
        lines = [line for line in str(why).splitlines() if line.strip()]
        text = f"{type(why).__name__}: {lines[-1] if lines else ''}"
        return Outcome(None, text[:300], time.perf_counter() - start)
    return Outcome(found, "", time.perf_counter() - start)


@cache
def _import(source: str) -> ModuleType:
    digest = hashlib.blake2b(source.encode(), digest_size=10).hexdigest()
    return import_text(f"chunkwise_audited_{digest}", source, f"{digest}.py")


def run_jobs(jobs: Mapping[str, Job], workers: int) -> Iterator[tuple[str, Outcome]]:
    """Every job's key and outcome; a compiler that takes its process down is an outcome too."""
    done = set()
    # longest first is unknown; by target, so that equal work is spread over the pool
    try:
        for key, outcome in _pooled(jobs, workers):
            done.add(key)
            yield key, outcome
    except BrokenProcessPool:
        for key, job in jobs.items():
            if key not in done:
                yield key, _alone(key, job)


def _pooled(jobs: Mapping[str, Job], workers: int) -> Iterator[tuple[str, Outcome]]:
    context = multiprocessing.get_context("spawn")  # a fork would share LLVM's threads
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _ignore_interrupts) as pool:
        futures: dict[Future[Outcome], str] = {
            pool.submit(compile_job, job): key for key, job in jobs.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except (KeyboardInterrupt, GeneratorExit):  # nobody waits for the others
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            raise


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the one that reads the outcomes decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _alone(key: str, job: Job) -> Outcome:
    try:
        ((_, outcome),) = _pooled({key: job}, 1)
    except BrokenProcessPool:
        return Outcome(None, "the compiler crashed", 0.0)
    return outcome
