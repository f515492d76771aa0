"""The commands `chunkwise list`, `explain` and `prove`, which describe recurrences."""

from __future__ import annotations

import argparse
import time
from typing import TypedDict

from . import library
from .cli_arguments import add_dims, add_dtype, counts
from .cli_command import Command, UsageError, add_json, add_target, find, no_such, print_json
from .cli_progress import Progress
from .codegen.config import Dims
from .codegen.interface import Dtype
from .dsl.classify import classify
from .dsl.declaration import Declaration
from .dsl.explain import equations, explain
from .runtime.explanation import sections

_SECTIONS = ("explanation", "chunk", "costs", "engines")


_Row = TypedDict("_Row", {"name": str, "about": str, "equations": list[str], "class": str})


def _list(arguments: argparse.Namespace) -> int:
    rows: list[_Row] = []
    for name in library.names():
        declared = getattr(library, name).declaration
        form = declared.normal_form(declared.default_micro)
        rows.append(
            {
                "name": name,
                "about": declared.doc.partition("\n")[0],
                "equations": equations(declared.step(declared.default_micro)),
                "class": str(classify(form)),
            }
        )
    if arguments.json:
        print_json(rows)
        return 0
    for row in rows:
        print(f"{row['name']}: {row['about']}")
        for equation in row["equations"]:
            print(f"    {equation}")
        print(f"    ({row['class']})")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    pages = []
    for op in [find(target) for target in arguments.target]:
        declared = op.declaration
        if arguments.cost:
            pages.append({"name": op.__name__, "cost": _cost(declared, arguments)})
            continue
        page = {"name": op.__name__, "explanation": explain(declared)}
        pages.append(page | sections(declared))
    if arguments.json:
        print_json(pages)
    elif arguments.section:
        print("\n\n".join(page.get(arguments.section, "") for page in pages))
    else:
        print("\n\n".join(page[n] for page in pages for n in page if n != "name"))
    return 0


def _cost(declared: Declaration, arguments: argparse.Namespace) -> str:
    """The cost model's account, which alone imports Triton's printer and SymPy."""
    from .autotune.explain_cost import explain_cost
    from .autotune.gpu import GPUS
    from .runtime.tuned.artifact import CallSize

    gpu = arguments.cost.lower()
    if gpu not in GPUS:
        raise UsageError(no_such("GPU", gpu, GPUS))
    form = declared.normal_form(declared.default_micro)
    dtype, size = arguments.dtype, CallSize(*arguments.size)
    return explain_cost(form, arguments.dims, dtype, size, GPUS[gpu])


def _size(text: str) -> tuple[int, int]:
    rows, tokens = counts(text, "ROWS,TOKENS", "64,4096")
    return rows, tokens


def _prove(arguments: argparse.Namespace) -> int:
    proofs = []
    for op in [find(target) for target in arguments.target]:
        start = time.perf_counter()
        with Progress(f"proving {op.__name__}", quiet=arguments.json):
            proof = op.prove(arguments.chunk)
        seconds = time.perf_counter() - start
        proofs.append({"name": op.__name__, "proof": proof, "seconds": round(seconds, 3)})
        if not arguments.json:
            print(f"{proof}\n  in {seconds:.2f} s", flush=True)
    if arguments.json:
        print_json(proofs)
    return 0


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser, several=True)
    parser.add_argument("--section", choices=_SECTIONS, help="only this section")
    parser.add_argument(
        "--cost", metavar="GPU", help="only the cost model's account: h100, h200, a100, b200, …"
    )
    add_dims(parser, Dims(128, 128), " (for --cost)")
    add_dtype(parser, Dtype.BFLOAT16, "for --cost; default: bfloat16")
    parser.add_argument(
        "--size",
        type=_size,
        default=(64, 4096),
        metavar="ROWS,TOKENS",
        help="for --cost: sequences x heads, and tokens of each (default 64,4096)",
    )
    add_json(parser)


def _prove_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser, several=True)
    parser.add_argument(
        "--chunk",
        type=int,
        choices=(2, 3, 4),
        default=3,
        help="prove chunks of 2 up to this many tokens (default 3; 4 takes longer)",
    )
    add_json(parser)


LIST = Command(
    "list",
    "List the recurrences of the library, each with its equations and its class.",
    ("chunkwise list", "chunkwise list --json"),
    add_json,
    _list,
)
EXPLAIN = Command(
    "explain",
    "Show how the compiler understands a recurrence: normal form, class, kernels, cost.",
    ("chunkwise explain kda", "chunkwise explain gated_delta_rule --cost h100"),
    _explain_arguments,
    _explain,
)
PROVE = Command(
    "prove",
    "Prove, on small sizes, that the chunk form and its gradient equal those of the declared step.",
    ("chunkwise prove gated_delta_rule", "chunkwise prove my_rules.py:my_rule --chunk 4"),
    _prove_arguments,
    _prove,
)
