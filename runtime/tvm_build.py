"""Printed TIR to machine code for this CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import tvm
from tvm import tirx

from ..codegen.print_tir import TirKernel

Function = Callable[..., None]

# what is left to do for statements that are flat, vectorised and unrolled already
_LOWERING = (
    tirx.transform.AnnotateEntryFunc(),
    tirx.transform.MakePackedAPI(),
    tirx.transform.BF16StorageLegalize(),
    tirx.transform.LowerTVMBuiltin(),
    tirx.transform.LowerIntrin(),
)


@lru_cache(maxsize=1)
def host_cpu() -> str:
    """The name by which LLVM knows this CPU."""
    return str(tvm.get_global_func("tvm.codegen.llvm.GetHostCPUName")())


@lru_cache(maxsize=1)
def host_lanes() -> int:
    """How many float32 numbers a vector register of this CPU holds."""
    features = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    for name, lanes in (("avx512f", 16), ("avx2", 8)):
        if bool(features.get(name, False)):
            return lanes
    return 4


def build(kernels: Sequence[TirKernel], cpu: str) -> tvm.runtime.Module:
    """One module with a function for each kernel."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    module = tvm.IRModule({k.name: k.function for k in kernels})
    module = tirx.transform.BindTarget(target.with_host(target))(module)
    for lower in _LOWERING:
        module = lower(module)
    return tvm.get_global_func("target.build.llvm")(module, target)
