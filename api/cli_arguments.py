"""The values that arguments of several commands take: dimensions, dtypes, counts, lists."""

from __future__ import annotations

import argparse

from .codegen.config import Dims
from .codegen.interface import Dtype

# Every command reads each of these spellings, and prints torch's name.
_SPELLINGS = {
    **{d.value: d for d in Dtype},
    **dict.fromkeys(("bf16",), Dtype.BFLOAT16),
    **dict.fromkeys(("fp16", "f16", "half"), Dtype.FLOAT16),
    **dict.fromkeys(("fp32", "f32", "float"), Dtype.FLOAT32),
}
_DTYPES = "bfloat16 (bf16), float16 (fp16), float32 (fp32)"


def dtype(text: str) -> Dtype:
    """`bfloat16`, `bf16` or `torch.bfloat16` as a dtype."""
    word = text.lower().removeprefix("torch.")
    if word not in _SPELLINGS:
        raise argparse.ArgumentTypeError(f"no dtype {text!r} of kernels; there are {_DTYPES}")
    return _SPELLINGS[word]


def dtypes(text: str) -> tuple[Dtype, ...]:
    """`bfloat16,fp32` as dtypes, each once."""
    return tuple(dict.fromkeys(dtype(word) for word in text.split(",")))


def add_dtype(parser: argparse.ArgumentParser, default: Dtype | None, help: str = "") -> None:
    """The --dtype option, `arguments.dtype`."""
    said = help or (f"default: {default.value}" if default is not None else "")
    parser.add_argument(
        "--dtype",
        type=dtype,
        default=default,
        metavar="DTYPE",
        help=f"{_DTYPES}; {said}" if said else _DTYPES,
    )


def dims(text: str) -> Dims:
    """`K=128,V=128` as dimensions."""
    try:
        sizes = dict(part.split("=") for part in text.split(","))
        found = Dims(int(sizes.pop("K")), int(sizes.pop("V")))
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not like K=128,V=128") from None
    if sizes or found.K < 1 or found.V < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: K and V, and no others, are 1 or more")
    return found


def add_dims(parser: argparse.ArgumentParser, default: Dims, help: str = "") -> None:
    """The --dims option, `arguments.dims`."""
    said = f"key and value channels of a head{help}; default: K={default.K},V={default.V}"
    parser.add_argument("--dims", type=dims, default=default, metavar="K=N,V=N", help=said)


def add_dims_list(parser: argparse.ArgumentParser) -> None:
    """The --dims option of several dimensions, `arguments.dims`; None if it is not given."""
    parser.add_argument(
        "--dims",
        type=dims,
        action="append",
        metavar="K=N,V=N",
        help="key and value channels of a head, repeatable; default: K=128,V=128",
    )


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str, form: str, example: str) -> tuple[int, ...]:
    """`4,4096,16` as whole numbers above 0, as many as `form` (`B,T,H`) names."""
    try:
        found = tuple(int(x) for x in text.split(","))
    except ValueError:
        found = ()
    if len(found) != len(form.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}, as in {example}")
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: {form} are numbers of at least 1")
    return found
