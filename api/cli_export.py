"""The command that writes a recurrence as a package which does not need this one."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_command import Command, UsageError, add_target, find
from .cli_emit import dims
from .codegen.config import Dims
from .codegen.triton_types import Dtype
from .runtime.export import Layout, Request, export, write

_SHORT = {"bf16": Dtype.BFLOAT16, "fp16": Dtype.FLOAT16, "fp32": Dtype.FLOAT32}


def dtypes(text: str) -> tuple[Dtype, ...]:
    """`bf16,float32` as dtypes, each once."""
    known = {**_SHORT, **{d.value: d for d in Dtype}}
    unknown = [word for word in text.split(",") if word not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no dtype {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(dict.fromkeys(known[word] for word in text.split(",")))


def _export(arguments: argparse.Namespace) -> int:
    declaration = find(arguments.target).declaration
    request = Request(
        target=arguments.target,
        dims=tuple(dict.fromkeys(arguments.dims or [Dims(128, 128)])),
        dtypes=arguments.dtype,
        name=arguments.name,
        micro=arguments.micro or (2 if declaration.has_micro else 1),
        layout=Layout(arguments.layout),
    )
    try:
        files = export(declaration, request)
    except ValueError as why:
        if type(why) is not ValueError:  # errors of the catalogue are shown as they are
            raise
        raise UsageError(str(why)) from None
    write(arguments.output, files)
    for name in sorted(files):
        print(arguments.output / name)
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="the package's folder"
    )
    parser.add_argument(
        "--dims", type=dims, action="append", help="K=128,V=128; again for further dimensions"
    )
    parser.add_argument(
        "--dtype",
        type=dtypes,
        default=(Dtype.BFLOAT16,),
        help="bf16, fp16, fp32; several: bf16,fp32",
    )
    parser.add_argument("--name", help="of the function (default: that of the recurrence)")
    parser.add_argument("--micro", type=int, metavar="N", help="micro-steps of tuple operands")
    parser.add_argument(
        "--layout",
        choices=[layout.value for layout in Layout],
        default=Layout.PACKAGE.value,
        help="a Python package, or a repository for Hugging Face's `kernels`",
    )


EXPORT = Command(
    "export",
    "Write kernels, op, test and reference as a package that needs torch and triton only.",
    (
        "chunkwise export gated_delta_rule -o my_model/kernels",
        "chunkwise export my_rules.py:my_rule -o my_rule --dims K=64,V=64 --dtype bf16,fp32",
        "chunkwise export kda -o kda-repository --layout hub",
    ),
    _arguments,
    _export,
)
