"""The environment variables that chunkwise reads: one table, for `doctor` and the documents."""

from __future__ import annotations

from dataclasses import dataclass

from .runtime.cache import CACHE_VARIABLE
from .runtime.check import CHECK_VARIABLE
from .runtime.engines import ENGINE_VARIABLE


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable: the values it takes, and what it decides. `read`: at each call, say."""

    name: str
    values: str
    default: str
    meaning: str
    read: str


VARIABLES = (
    Variable(
        ENGINE_VARIABLE,
        "`reference`, `eager`, `triton` or `tvm`",
        "the device's own engine",
        "The engine of calls that do not name one, as `engine=` does.",
        "at every call",
    ),
    Variable(
        CHECK_VARIABLE,
        "`1`; empty or `0`: no",
        "no",
        "Looks for NaN in operands, growth in gates and overflow in results, as `check=True` does. "
        "It waits for the device.",
        "at every call",
    ),
    Variable(
        CACHE_VARIABLE,
        "a folder to which only you may write",
        "`chunkwise` under `XDG_CACHE_HOME`",
        "Where emitted kernels, compiled code, tuned artifacts and studies are kept.",
        "at every use of the cache",
    ),
    Variable(
        "XDG_CACHE_HOME",
        "a folder",
        "`~/.cache`",
        f"The folder of all caches of a user, where `{CACHE_VARIABLE}` is not set.",
        "at every use of the cache",
    ),
    Variable(
        "TRITON_INTERPRET",
        "`1`",
        "not set",
        "Triton's own: kernels run in its interpreter, on CPUs too. `emit --resources` and "
        "`audit`, which compile, refuse to run under it. Exported packages read it as well.",
        "by Triton, when it is imported",
    ),
    Variable(
        "TRITON_PTXAS_PATH",
        "a file",
        "the `ptxas` in Triton's wheel",
        "Triton's own: the assembler. `doctor` and artifacts name its release.",
        "once per process",
    ),
    Variable(
        "CUDA_VISIBLE_DEVICES",
        "numbers of GPUs",
        "all GPUs",
        "CUDA's own; `doctor` names it where torch sees no GPU.",
        "by torch",
    ),
    *(
        Variable(
            name,
            "as glibc says",
            "not set",
            "glibc's own: where one of these decides what freed memory is kept, the TVM engine "
            "does not (otherwise it has glibc keep up to 256 MiB).",
            "once per process",
        )
        for name in (
            "GLIBC_TUNABLES",
            "MALLOC_MMAP_MAX_",
            "MALLOC_MMAP_THRESHOLD_",
            "MALLOC_TOP_PAD_",
            "MALLOC_TRIM_THRESHOLD_",
        )
    ),
)
