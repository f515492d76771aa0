"""A compiled recurrence as text: its chunk form, its kernels and their costs."""

from __future__ import annotations

from ...dsl.normal_form import NormalForm
from ..config import Dims, held
from ..interface import Dtype
from ..plan import Plan, Program
from ..programs import (
    backward_program,
    chunk_adjoint,
    chunk_program,
    forward_program,
    saved_by,
    savings,
)
from ..triton.defaults import default_config
from .mathematics import print_chunk

_DIMS = Dims(128, 128)


def chunk_form(form: NormalForm) -> str:
    """The chunk as mathematics. Raises NotLowered for a form that has no chunk form yet."""
    text = print_chunk(chunk_program(form))
    return "\n".join(["chunkwise form", *(f"  {line}" for line in text.splitlines())])


def costs(form: NormalForm, dims: Dims = _DIMS, dtype: Dtype = Dtype.BFLOAT16) -> str:
    """The kernels of the default plans with FLOPs and bytes per token and value head."""
    from .. import cost  # SymPy takes half a second to import

    transposed = chunk_program(form).transposed
    config = default_config(chunk_program(form), dims, wide_dtype=dtype is Dtype.FLOAT32)
    rows = [("", "FLOPs of products", "", "bytes moved", "")]

    def row(label: str, products: cost.Expr, moved: cost.Expr, *, transposed: bool = False) -> None:
        own = held(dims, transposed=transposed)

        def number(expression: cost.Expr) -> str:
            return f"{cost.evaluate(expression, config.chunk, own):,.0f}"

        def readable(expression: cost.Expr) -> str:
            return cost.readable(expression, transposed=transposed)

        flops = ("", "") if products is None else (readable(products), number(products))
        rows.append((label, *flops, readable(moved), number(moved)))

    def direction(name: str, plan: Plan, program: Program, floor: cost.Expr) -> None:
        rows.append((f"{name} ({plan.label})", "", "", "", ""))
        for kernel in program.kernels:
            spent = cost.kernel_cost(kernel, dtype)
            label = kernel.name.removeprefix(f"{name}_")
            row(f"  {label}", spent.products, spent.moved, transposed=kernel.transposed)
        whole = cost.program_cost(program, dtype)
        row("  together", whole.products, whole.moved)
        row("  compulsory", None, floor, transposed=transposed)

    forward, backward = config.forward, config.backward
    direction(
        "forward",
        forward,
        forward_program(form, forward),
        cost.compulsory_bytes(chunk_program(form), dtype),
    )
    direction(
        "backward",
        backward,
        backward_program(form, backward),
        cost.compulsory_bytes(chunk_adjoint(form), dtype),
    )
    title = (
        f"kernels by default, per token and value head; numbers for K={dims.K}, V={dims.V}, "
        f"C={config.chunk}, ℓ=log2 C={config.chunk.bit_length() - 1}, {dtype.value}"
    )
    for kinds in savings(form)[1:]:
        tiles = dict(saved_by(form, kinds))
        names = ", ".join(name.label for name in tiles)
        row(f"  memory of {names}, if saved", None, cost.stored_bytes(tiles.values(), dtype))
    return "\n".join([title, *_table(rows)])


def _table(rows: list[tuple[str, str, str, str, str]]) -> list[str]:
    widths = [max(len(r[n]) for r in rows if r[1] or r[3]) for n in range(5)]
    lines = []
    for label, flops, f, moved, b in rows:
        text = f"  {label:<{widths[0]}}  {flops:<{widths[1]}} {f:>{widths[2]}}"
        lines.append(f"{text}   {moved:<{widths[3]}} {b:>{widths[4]}}".rstrip())
    return lines
