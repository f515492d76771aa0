"""Prints what an exported package knows of its kernels: the data by which they are launched."""

from __future__ import annotations

from collections.abc import Iterator

from ...codegen.triton.emit import Emitted
from ...codegen.triton.kernel import TritonKernel
from ..triton.kernels import Buffer
from ..triton.printed import kernel_of
from .contents import Package, Served
from .text import indented, module, wrapped


def print_launches(package: Package, served: Served) -> str:
    """The module with the launches of `served`, forward and backward."""
    dims = served.dims
    what = f"How the kernels for K={dims.K}, V={dims.V}, {served.dtype.value} are launched."
    lines = _kernels(served, served.emitted, "printed")
    imports = [f"from . import kernels_{served.suffix} as printed"]
    if served.segmented is not None:
        own = _kernels(served, served.segmented, "in_segments")
        lines += ["segmented=Kernels(", *indented(own), "),"]
        lines += [f"least={served.least},  # segments", f"channels={served.channels},"]
        imports.append(f"from . import kernels_{served.suffix}_segments as in_segments")
    return module(
        [
            *package.header(what),
            "",
            "import torch",
            "",
            *imports,
            "from .kernels import Buffer, Kernel",
            "from .launch_plan import LoadedKernel",
            "from .support import Kernels",
            "",
            "KERNELS = Kernels(",
            *indented(lines),
            ")",
        ]
    )


def _kernels(served: Served, emitted: Emitted, source: str) -> list[str]:
    """The fields of a `Kernels`, whose functions are in the module `source`."""
    lines = [f"chunk={served.config.chunk},  # tokens"]
    for name, kernels in (("forward", emitted.forward), ("backward", emitted.backward)):
        printed = [line for kernel in kernels for line in _loaded(kernel, source)]
        lines += [f"{name}=(", *indented(printed), "),"]
    return lines


def _loaded(printed: TritonKernel, source: str) -> Iterator[str]:
    """A `LoadedKernel` as Python, a field of its `Kernel` to a line where it fits one."""
    kernel = kernel_of(printed)
    yield f"LoadedKernel(  # {printed.loop.value}"
    yield "    Kernel("
    for name in ("name", "programs", "parts"):
        yield f"        {name}={getattr(kernel, name)!r},"
    for name in ("constants", "options", "sources", "strides", "groups"):
        entries = [f"{key!r}: {value!r}" for key, value in getattr(kernel, name).items()]
        yield from wrapped(f"{name}={{", entries, "},", "        ")
    yield "        stores=("
    yield from (f"            {_buffer(b)}," for b in kernel.stores)
    yield "        ),"
    yield "    ),"
    yield f"    {source}.{kernel.name},"
    yield "),"


def _buffer(b: Buffer) -> str:
    rest = b._asdict()
    fields = [repr(rest.pop("name")), repr(rest.pop("shape")), repr(rest.pop("dtype"))]
    return f"Buffer({', '.join([*fields, *(f'{n}={x!r}' for n, x in rest.items() if x)])})"
