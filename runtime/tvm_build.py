"""Printed TIR to machine code: compiled in parallel, linked, and kept on disk for later processes.

A library is named by what it was made from. Beside it lies its checksum: one that does not match
is rebuilt. Where there is no linker, code is compiled into memory in every process.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import tvm
import tvm_ffi
from filelock import FileLock
from tvm import tirx
from tvm.tirx import PrimFunc

from ..codegen.print_tir import TirKernel
from .cache import cache_folder, write_atomically

Function = Callable[..., None]
# functions called from outside, and functions called by those or by their address
_Unit: TypeAlias = tuple[Sequence[PrimFunc], Sequence[PrimFunc]]

_LOG = logging.getLogger(__name__)
_LINKERS = ("cc", "gcc", "clang", "ld")
# statements are flat, vectorised and unrolled, and call LLVM's own functions: little is left. Not
# LowerIntrin: its search for multiply-adds takes twice as long for each one nested in another
_ENTRY = (tirx.transform.AnnotateEntryFunc(), tirx.transform.MakePackedAPI())
_REST = (
    tirx.transform.BF16StorageLegalize(),
    tirx.transform.LowerTVMBuiltin(),
)
_OPTIMISE = 2  # level 3 takes twice as long, mostly over loops that it unrolls


@lru_cache(maxsize=1)
def host_cpu() -> str:
    """The name by which LLVM knows this CPU."""
    return str(tvm.get_global_func("tvm.codegen.llvm.GetHostCPUName")())


@lru_cache(maxsize=16)
def lanes_of(cpu: str) -> int:
    """How many float32 numbers a vector register of that CPU holds."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    has = tvm.get_global_func("target.llvm_cpu_has_feature")
    for feature, lanes in (("avx512f", 16), ("avx2", 8)):
        if has(feature, target):
            return lanes
    return 4


def functions(kernels: Sequence[TirKernel], cpu: str) -> list[Function]:
    """The compiled function of each kernel; those not on disk are compiled at the same time."""
    with ThreadPoolExecutor(len(kernels)) as threads, ThreadPoolExecutor(os.cpu_count()) as workers:
        return list(threads.map(lambda kernel: _function(kernel, cpu, workers), kernels))


def write_library(
    functions: Sequence[PrimFunc], parts: Sequence[PrimFunc], cpu: str, path: Path
) -> None:
    """A shared library of functions that compare every argument with what they take.

    `parts`: functions that those call, and nobody else.

    Raises:
        FileNotFoundError: this machine has no linker.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "library.o"
        _compiled(functions, parts, cpu, checked=True).write_to_file(str(compiled), "o")
        if not link([compiled], path):
            raise FileNotFoundError(f"no linker found; looked for {', '.join(_LINKERS)}")


def link(objects: Sequence[Path], library: Path) -> bool:
    """A shared library of object files; False where this machine has no linker."""
    linker = next(filter(None, map(shutil.which, _LINKERS)), None)
    if linker is None:
        return False
    command = [linker, "-shared", "-s"]
    if sys.platform == "linux":  # of equal names in two libraries each calls its own
        command.append("-Bsymbolic" if Path(linker).name == "ld" else "-Wl,-Bsymbolic")
    subprocess.run([*command, "-o", library, *objects], check=True, capture_output=True)
    return True


def _compiled(
    functions: Sequence[PrimFunc],
    parts: Sequence[PrimFunc],
    cpu: str,
    *,
    checked: bool = False,
) -> tvm.runtime.Module:
    """Machine code: `functions` are called from outside, `parts` only by them."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "opt-level": _OPTIMISE})
    unchecked = () if checked else (tirx.transform.SkipAssert(),)
    lowered = tvm.IRModule()
    for made, entry in ((functions, _ENTRY), (parts, ())):
        module = tvm.IRModule({str(f.attrs["global_symbol"]): f for f in made})
        module = tirx.transform.BindTarget(target.with_host(target))(module)
        for lower in (*entry, *unchecked, *_REST):
            module = lower(module)
        lowered.update(module)
    return tvm.get_global_func("target.build.llvm")(lowered, target)


def symbol(function: PrimFunc, cpu: str) -> int | None:
    """The address of a compiled C function; None where it cannot be linked or loaded."""
    name = str(function.attrs["global_symbol"])
    path = _path(name, [function], cpu)
    try:
        with ThreadPoolExecutor(1) as workers:
            if not _written(path, [((), (function,))], cpu, workers):
                return None
        return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), ctypes.c_void_p).value
    except (OSError, AttributeError, subprocess.CalledProcessError) as why:
        # what it calls is nowhere to be found, or this linker asks for it
        _LOG.info("%s: %s", path, why)
        return None


def _function(kernel: TirKernel, cpu: str, workers: Executor) -> Function:
    path = _path(kernel.name, [kernel.function, *kernel.parts], cpu)
    units: list[_Unit] = [((kernel.function,), ()), *(((), (part,)) for part in kernel.parts)]
    if not _written(path, units, cpu, workers):
        module = _compiled([kernel.function], kernel.parts, cpu)
        return _named(module, kernel)
    return _named(tvm_ffi.load_module(str(path)), kernel)


def _named(module: tvm.runtime.Module, kernel: TirKernel) -> Function:
    function: Function = module[kernel.name]
    return function


def _path(name: str, functions: Sequence[PrimFunc], cpu: str) -> Path:
    """Where the library made from `functions` lies."""
    hashes = [tvm_ffi.structural_hash(f) for f in functions]
    text = repr((*hashes, cpu, _OPTIMISE, tvm.__version__, tvm_ffi.__version__))
    digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
    return cache_folder() / "tvm" / f"{name}_{digest}.so"


def _written(path: Path, units: Sequence[_Unit], cpu: str, workers: Executor) -> bool:
    """Whether the library `path` is there, compiled now if it was not; False: without a linker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if _sound(path):
            return True
        if not any(map(shutil.which, _LINKERS)):
            return False
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            linked = Path(folder) / "kernel.so"
            objects = [Path(folder) / f"{number}.o" for number in range(len(units))]

            def compile_(unit: _Unit, path: Path) -> None:
                _compiled(*unit, cpu).write_to_file(str(path), "o")

            list(workers.map(compile_, units, objects))
            link(objects, linked)
            write_atomically(_checksum_file(path), _checksum(linked))
            linked.replace(path)
        return True


def _sound(path: Path) -> bool:
    """Whether the library is there, whole."""
    if not path.exists():
        return False
    recorded = _checksum_file(path)
    if recorded.exists() and recorded.read_text(encoding="utf-8") == _checksum(path):
        return True
    _LOG.warning("%s is damaged: it is compiled again", path)
    return False


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sum")


def _checksum(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
