"""Finds the kernel specialisations that a run needs, and compiles them in other processes.

In a first run, Triton's pre-compilation hook notes each specialisation and declines to compile it.
Other processes then compile these specialisations into Triton's cache on disk. The second, real run
looks up the same keys and finds everything compiled.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from ..codegen.modules import import_file
from ..codegen.triton.offline import VERDICTS
from ..codegen.triton.resources import SERIALISED, usage
from ..runtime.tuned.artifact import KernelReport
from .tunable import Built, Run


@dataclass(frozen=True, slots=True)
class TritonJob:
    """One specialisation of one kernel, as Triton's compiler takes it."""

    file: str
    kernel: str
    signature: Mapping[str, object]
    constants: Mapping[tuple[int, ...], object]
    attributes: Mapping[tuple[int, ...], object]
    options: Mapping[str, object]
    target: tuple[str, str | int, int]
    shared: int  # bytes of shared memory that a program may use

    def __call__(self) -> Built:
        """Compile it into Triton's cache."""
        started = time.monotonic()
        try:
            function = getattr(_module(self.file), self.kernel)
            source = (GluonASTSource if function.is_gluon() else ASTSource)(
                function, dict(self.signature), dict(self.constants), dict(self.attributes)
            )
            compiled = triton.compile(
                source, target=GPUTarget(*self.target), options=dict(self.options)
            )
        except VERDICTS as why:
            return Built.failed(why, started)
        if compiled.metadata.shared > self.shared:
            text = "more shared memory than a program may use"
            return Built(error=text, seconds=time.monotonic() - started)
        binary = compiled.asm.get("cubin") or compiled.asm.get("hsaco")
        used = usage(compiled.asm)
        counted = used.instructions
        return Built(
            KernelReport(None, used.registers, used.spills, compiled.metadata.shared),
            None if binary is None else hashlib.blake2b(binary, digest_size=10).hexdigest(),
            error=SERIALISED if used.is_serialised else None,
            seconds=time.monotonic() - started,
            notes={} if counted is None else {"wgmma": counted.wgmma, "barriers": counted.barriers},
        )


def specialisations(run: Run, shared: int) -> tuple[TritonJob, ...]:
    """The compilations that `run` needs in this process, found without compiling or launching.

    `run` computes garbage here, so its course must not depend on results. `shared` is the shared
    memory that a program may use, in bytes.
    """
    found: list[TritonJob] = []

    def note(*, fn: Any, compile: Mapping[str, Any], **_: object) -> bool:
        function = fn.jit_function
        file = inspect.getsourcefile(function.fn)
        assert file is not None
        target = triton.runtime.driver.active.get_current_target()
        options = json.loads(compile["specialization_data"])["options"]
        found.append(
            TritonJob(
                file,
                fn.name,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()},
                (target.backend, target.arch, target.warp_size),
                shared,
            )
        )
        return True  # declines both the compilation and the launch

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        run()
    return tuple({repr(job): job for job in found}.values())


def _module(file: str) -> ModuleType:
    name = f"chunkwise_compiled_{hashlib.blake2b(file.encode(), digest_size=8).hexdigest()}"
    return import_file(name, Path(file))
