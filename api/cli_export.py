"""The command `chunkwise export`: a package or a library that does not need chunkwise."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from .cli_arguments import add_dims_list, count, dtypes
from .cli_command import Command, UsageError, add_target, find
from .cli_progress import Progress
from .codegen.config import Dims
from .codegen.interface import Dtype
from .runtime.export.package import Layout, Request, export, write
from .runtime.extras import how_to_install


def _library(arguments: argparse.Namespace) -> int:
    """Write a shared library for a CPU, and print the parameters of its functions."""
    declaration = find(arguments.target).declaration
    sizes = arguments.dims or [Dims(128, 128)]
    asked = arguments.dtype or (Dtype.FLOAT32,)
    if len(sizes) > 1 or len(asked) > 1:
        raise UsageError("a library holds one pair of dimensions and one dtype")
    if arguments.name or arguments.layout != Layout.PACKAGE.value:
        raise UsageError("--name and --layout are for packages; a library has neither")
    if importlib.util.find_spec("tvm") is None:
        raise UsageError(f"--target llvm needs TVM: {how_to_install('tvm')}")
    from .runtime.tvm.build import knows_cpu
    from .runtime.tvm.export import export_library

    if arguments.cpu and not knows_cpu(arguments.cpu):
        raise UsageError(
            f"--cpu {arguments.cpu}: LLVM knows no such CPU of 64 bits here; x86-64-v3 and "
            "skylake-avx512 are names of some, and `llc -mcpu=help` lists all"
        )
    micro = arguments.micro or declaration.default_micro
    form = declaration.normal_form(micro)
    with Progress("compiling the library"):
        said = export_library(form, sizes[0], arguments.output, dtype=asked[0], cpu=arguments.cpu)
    print(said)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    if arguments.kind == "llvm":
        return _library(arguments)
    if arguments.cpu:
        raise UsageError("--cpu is for libraries: --target llvm")
    declaration = find(arguments.target).declaration
    request = Request(
        target=arguments.target,
        dims=tuple(dict.fromkeys(arguments.dims or [Dims(128, 128)])),
        dtypes=arguments.dtype or (Dtype.BFLOAT16,),
        name=arguments.name,
        micro=arguments.micro or declaration.default_micro,
        layout=Layout(arguments.layout),
    )
    try:
        with Progress("printing kernels"):
            files = export(declaration, request)
    except ValueError as why:
        if type(why) is not ValueError:  # errors of the catalogue are shown as they are
            raise
        raise UsageError(str(why)) from None
    try:
        write(arguments.output, files)
    except OSError as why:  # a file where the folder should be, no room, no permission
        raise UsageError(f"{arguments.output} cannot be written: {why.strerror or why}") from None
    for name in sorted(files):
        print(arguments.output / name)
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="the package's folder, or the library",
    )
    parser.add_argument(
        "--target",
        dest="kind",
        choices=["triton", "llvm"],
        default="triton",
        help="a package of Triton kernels, or a shared library for a CPU",
    )
    parser.add_argument("--cpu", help="the library's CPU, as x86-64-v3 (default: this one)")
    add_dims_list(parser)
    parser.add_argument(
        "--dtype",
        type=dtypes,
        metavar="DTYPE,DTYPE",
        help="bfloat16 (bf16), float16 (fp16), float32 (fp32), or several; default: bfloat16, "
        "and float32 for a library",
    )
    parser.add_argument("--name", help="the function's name (default: the recurrence's)")
    parser.add_argument("--micro", type=count, metavar="N", help="micro-steps of tuple operands")
    parser.add_argument(
        "--layout",
        choices=[layout.value for layout in Layout],
        default=Layout.PACKAGE.value,
        help="a Python package, or a repository for Hugging Face's `kernels`",
    )


EXPORT = Command(
    "export",
    "Write a package that needs torch and triton only, or a shared library for a CPU.",
    (
        "chunkwise export gated_delta_rule -o my_model/kernels",
        "chunkwise export my_rules.py:my_rule -o my_rule --dims K=64,V=64 --dtype bf16,fp32",
        "chunkwise export kda -o kda-repository --layout hub",
        "chunkwise export gated_delta_rule -o libgdr.so --target llvm --dims K=64,V=64",
    ),
    _arguments,
    _export,
)
