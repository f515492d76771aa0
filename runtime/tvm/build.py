"""Printed TIR to machine code: compiled in parallel, linked, and kept on disk for later processes.

A library is named by what it was made from. Beside it lies its checksum: one that does not match
is rebuilt. Where there is no linker, or no library can be written, code is compiled into memory in
every process.
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
from tvm import tirx
from tvm.tirx import PrimFunc

from ...codegen.tir.kernel import TirKernel
from ...dsl import errors
from ..cache import do_without, keep, own_folder, read_file

Function = Callable[..., None]
# entry functions, which programs call by name, and the functions that entry functions call
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
_ROOM = 4 << 20  # bytes: more than any object file
_LARGEST = 1 << 28  # bytes of a library


@lru_cache(maxsize=1)
def host_cpu() -> str:
    """The name by which LLVM knows this CPU."""
    return str(tvm.get_global_func("tvm.codegen.llvm.GetHostCPUName")())


def knows_cpu(cpu: str) -> bool:
    """Whether LLVM knows a CPU of that name, of 64 bits and of this machine's architecture."""
    triple = str(tvm.get_global_func("tvm.codegen.llvm.GetDefaultTargetTriple")())
    if not tvm.get_global_func("target.llvm_is_valid_cpu")(cpu, triple):
        return False
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    has = tvm.get_global_func("target.llvm_cpu_has_feature")
    return not triple.startswith("x86") or bool(has("64bit", target))


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
        FileNotFoundError: this machine has no linker. LinkerFailed: it has one that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "library.o"
        _write_object(_compiled(functions, parts, cpu, checked=True), compiled)
        if not link([compiled], path):
            raise FileNotFoundError(f"no linker found; looked for {', '.join(_LINKERS)}")


def link(objects: Sequence[Path], library: Path) -> bool:
    """A shared library of object files; False where this machine has no linker.

    Raises:
        LinkerFailed: with what it printed.
    """
    linker = next(filter(None, map(shutil.which, _LINKERS)), None)
    if linker is None:
        return False
    command = [linker, "-shared", "-s"]
    if sys.platform == "linux":  # of equal names in two libraries each calls its own
        command.append("-Bsymbolic" if Path(linker).name == "ld" else "-Wl,-Bsymbolic")
    command += map(str, ("-o", library, *objects))
    done = subprocess.run(command, check=False, capture_output=True)
    if done.returncode:
        printed = (done.stderr or done.stdout).decode(errors="replace")
        raise errors.LinkerFailed(" ".join(command), done.returncode, printed)
    return True


def _write_object(module: tvm.runtime.Module, path: Path) -> None:
    """The object file of machine code.

    LLVM ends the process where a write fails. So the room is taken before, by a write that raises.

    Raises:
        OSError: there is no room.
    """
    path.write_bytes(bytes(_ROOM))
    module.write_to_file(str(path), "o")


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
    try:
        with ThreadPoolExecutor(1) as workers:
            path = _library(name, [((), (function,))], cpu, workers)
        if path is None:
            return None
        return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), ctypes.c_void_p).value
    except (OSError, AttributeError, errors.LinkerFailed) as why:
        # what it calls is nowhere to be found, or this linker asks for it
        _LOG.info("%s: %s", name, why)
        return None


def _function(kernel: TirKernel, cpu: str, workers: Executor) -> Function:
    units: list[_Unit] = [((kernel.function,), ()), *(((), (part,)) for part in kernel.parts)]
    try:
        path = _library(kernel.name, units, cpu, workers)
        if path is not None:
            return _named(_loaded(path), kernel)
    except (OSError, errors.LinkerFailed) as why:
        do_without(why)
    return _named(_compiled([kernel.function], kernel.parts, cpu), kernel)


def _loaded(library: Path) -> tvm.runtime.Module:
    try:
        return tvm_ffi.load_module(str(library))
    except RuntimeError as why:  # the loader's verdict: a file system that runs nothing, say
        raise errors.BadCache(str(library.parent), str(why)) from None


def _named(module: tvm.runtime.Module, kernel: TirKernel) -> Function:
    function: Function = module[kernel.name]
    return function


def _library(name: str, units: Sequence[_Unit], cpu: str, workers: Executor) -> Path | None:
    """The library of the units on disk, compiled now if it was not there; None: no linker is.

    Raises:
        OSError: it cannot be written. LinkerFailed: as its name says.
    """
    hashes = [tvm_ffi.structural_hash(f) for unit in units for some in unit for f in some]
    text = repr((*hashes, cpu, _OPTIMISE, tvm.__version__, tvm_ffi.__version__))
    digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
    path = own_folder("tvm") / f"{name}_{digest}.so"
    if not any(map(shutil.which, _LINKERS)):
        return path if _sound(path) else None

    def make(folder: Path) -> list[Path]:
        library, checksum = folder / path.name, folder / path.with_suffix(".sum").name
        objects = [folder / f"{number}.o" for number in range(len(units))]

        def compile_(unit: _Unit, path: Path) -> None:
            _write_object(_compiled(*unit, cpu), path)

        list(workers.map(compile_, units, objects))
        link(objects, library)
        checksum.write_text(_checksum(library), encoding="utf-8")
        return [checksum, library]

    keep(path, lambda: _sound(path), make)
    return path


def _sound(path: Path) -> bool:
    """Whether the library is there, whole."""
    try:
        recorded = read_file(path.with_suffix(".sum"), 64)
        return recorded == _checksum(path).encode()
    except OSError:
        return False


def _checksum(path: Path) -> str:
    return hashlib.blake2b(read_file(path, _LARGEST), digest_size=16).hexdigest()
