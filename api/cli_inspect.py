"""The commands `chunkwise list`, `explain` and `prove`, which describe recurrences."""

from __future__ import annotations

import argparse
import time

from . import library
from .cli_command import Command, UsageError, add_json, add_target, find, print_json
from .cli_emit import dims
from .codegen.config import Dims
from .codegen.interface import Dtype
from .dsl.classify import classify
from .dsl.declaration import Declaration
from .dsl.explain import explain
from .runtime.explanation import sections

_SECTIONS = ("explanation", "chunk", "costs", "engines")


def _list(arguments: argparse.Namespace) -> int:
    rows = []
    for name in library.names():
        declared = getattr(library, name).declaration
        form = declared.normal_form(declared.default_micro)
        first_line = declared.doc.partition("\n")[0]
        rows.append({"name": name, "class": str(classify(form)), "about": first_line})
    if arguments.json:
        print_json(rows)
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['about']}")
        print(f"{'':<{width}}  {row['class']}")
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

    if arguments.cost not in GPUS:
        raise UsageError(f"no GPU {arguments.cost!r}; there are {', '.join(GPUS)}")
    form = declared.normal_form(declared.default_micro)
    dtype, size = Dtype(arguments.dtype), CallSize(*arguments.size)
    return explain_cost(form, arguments.dims, dtype, size, GPUS[arguments.cost])


def _size(text: str) -> tuple[int, int]:
    try:
        rows, tokens = (int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWS,TOKENS, as in 64,4096") from None
    return rows, tokens


def _prove(arguments: argparse.Namespace) -> int:
    proofs = []
    for op in [find(target) for target in arguments.target]:
        start = time.perf_counter()
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
    parser.add_argument("--dims", type=dims, default=Dims(128, 128), help="for --cost: K=128,V=128")
    parser.add_argument("--dtype", choices=[d.value for d in Dtype], default="bfloat16")
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
    "List the recurrences of the library, each with its class.",
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
