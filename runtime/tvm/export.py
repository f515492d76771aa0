"""A shared library of a recurrence's kernels, for programs without this package or a compiler.

It runs with the package apache-tvm-ffi alone, from Python or C++. The caller allocates everything,
scratch included, and may call from threads of its own; a wrong shape or dtype is an error.
"""

from __future__ import annotations

from pathlib import Path

from ...codegen.config import Dims, Precision
from ...codegen.interface import Dtype, Role, Signature
from ...codegen.programs import backward_program, forward_program
from ...codegen.tir.config import TvmConfig, default_config
from ...codegen.tir.kernel import CHUNK, SEQUENCE, TirKernel, print_number, print_tir
from ...dsl.normal_form import NormalForm
from .build import host_cpu, lanes_of, write_library


def export_library(
    form: NormalForm,
    dims: Dims,
    path: Path,
    *,
    dtype: Dtype = Dtype.FLOAT32,
    cpu: str | None = None,
    config: TvmConfig | None = None,
) -> str:
    """Write the kernels of `form`, forward and backward, to the shared library `path`.

    Args:
        form: the normal form of what is exported.
        dims: channels of Keys and Values; B, T and heads are free.
        path: of the library.
        dtype: of the operands and of the output.
        cpu: LLVM's name of the CPU that it is for (`x86-64-v3`, say); None: this one.
        config: how the kernels are cut and tiled; None: the default for that CPU.

    Returns:
        What the functions take, as text. `<kernel>_scratch()` of the library is the length of a
        kernel's scratch, `chunk()` the tokens in a chunk.

    Raises:
        NotLowered: the chunk form is not derived. FileNotFoundError: there is no linker here.
    """
    cpu = cpu or host_cpu()
    config = config or default_config(lanes_of(cpu))
    signature = Signature(dims, dtype, (), Precision.IEEE)
    programs = forward_program(form, config.forward), backward_program(form, config.backward)
    kernels = [print_tir(k, signature, config) for p in programs for k in p.kernels]
    numbers = {f"{k.name}_scratch": k.scratch for k in kernels} | {"chunk": config.chunk}
    functions = [k.function for k in kernels]
    functions += [print_number(name, value) for name, value in numbers.items()]
    write_library(functions, [part for k in kernels for part in k.parts], cpu, path)
    title = f"{form.name}: K={dims.K} V={dims.V} {dtype.value}, {config.chunk} tokens per chunk"
    tables = f"sequences [N,{len(SEQUENCE)}] int64: {', '.join(SEQUENCE)}\n"
    tables += f"chunks [M,{len(CHUNK)}] int64: {', '.join(CHUNK)}"
    return "\n\n".join([f"{title}, for {cpu}", tables, *map(_described, kernels)])


def _described(kernel: TirKernel) -> str:
    """A kernel's arguments, in order."""
    lines = [f"{kernel.name}: {kernel.loop.value}"]
    for parameter, tensor in zip(kernel.parameters, kernel.tensors, strict=True):
        lines.append(f"  {parameter.name:<12} {tensor:<32} {_meaning(parameter.role)}")
    rest = ["sequences", "chunks", f"scratch [{kernel.scratch}] float32", "HV"]
    rest += [f"{n} (a float)" for n in kernel.numbers]
    items = "M" if kernel.loop.name == "PARALLEL" else "N"
    count = f"{items} * HV" + (f" * {kernel.v_programs}" if kernel.v_programs > 1 else "")
    return "\n".join([*lines, f"  {', '.join(rest)}, begin, end: of {count} items"])


def _meaning(role: Role) -> str:
    meaning = str(role.value).split(",")[0]
    return f"{meaning}; empty (first size 0) for zero" if role is Role.INITIAL else meaning
