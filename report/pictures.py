"""Pictures of a recurrence: its road through the compiler, and the kernels of a plan."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ..codegen import cost
from ..codegen.chunk import ChunkProgram
from ..codegen.config import Config, Dims, held
from ..codegen.differentiate import Adjoint
from ..codegen.interface import Dtype
from ..codegen.plan import Kernel, Loop, Program
from ..codegen.programs import backward_program, chunk_adjoint, chunk_program, forward_program
from ..codegen.text.mathematics import print_chunk
from ..codegen.triton.defaults import default_config
from ..dsl.declaration import Declaration
from ..dsl.explain import print_form
from ..dsl.normal_form import NormalForm
from .drawing import LINE, Bar, Drawing, bars, text_width

DIMS = Dims(128, 128)
_LOOPS = {
    Loop.PARALLEL: "all chunks at once",
    Loop.FORWARD: "scan, first to last",
    Loop.REVERSE: "scan, last to first",
}


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One kernel of a plan: bytes moved and FLOPs of products, per token and value head."""

    direction: str
    kernel: Kernel
    bytes: float
    flops: float

    @property
    def name(self) -> str:
        """The kernel's name without its direction."""
        return self.kernel.name.removeprefix(f"{self.direction}_")


@dataclass(frozen=True, slots=True)
class PlanCosts:
    """The default plans of both directions, and the bytes that any plan has to move."""

    config: Config
    dims: Dims
    dtype: Dtype
    kernels: tuple[KernelCost, ...]
    compulsory: dict[str, float]


def plan_costs(form: NormalForm, dims: Dims = DIMS, dtype: Dtype = Dtype.BFLOAT16) -> PlanCosts:
    """The kernels by default with their costs. Raises NotLowered for a form without chunks."""
    config = default_config(chunk_program(form), dims, wide_dtype=dtype is Dtype.FLOAT32)
    transposed = chunk_program(form).transposed
    programs: dict[str, Program] = {
        "forward": forward_program(form, config.forward),
        "backward": backward_program(form, config.backward),
    }

    def number(expression: cost.Expr, *, transposed: bool) -> float:
        return cost.evaluate(expression, config.chunk, held(dims, transposed=transposed))

    kernels = []
    for direction, program in programs.items():
        for kernel in program.kernels:
            spent = cost.kernel_cost(kernel, dtype)
            moved, products = (
                number(x, transposed=kernel.transposed) for x in (spent.moved, spent.products)
            )
            kernels.append(KernelCost(direction, kernel, moved, products))
    chunks: dict[str, ChunkProgram | Adjoint] = {
        "forward": chunk_program(form),
        "backward": chunk_adjoint(form),
    }
    floors = {
        name: number(cost.compulsory_bytes(chunk, dtype), transposed=transposed)
        for name, chunk in chunks.items()
    }
    return PlanCosts(config, dims, dtype, tuple(kernels), floors)


def kernels_picture(name: str, costs: PlanCosts) -> str:
    """The kernels of both directions: bars of bytes and of FLOPs, each on its own scale."""
    most_bytes = max((k.bytes for k in costs.kernels), default=1.0)
    most_flops = max((k.flops for k in costs.kernels), default=1.0) or 1.0
    rows = []
    for k in costs.kernels:
        label = f"{k.direction} {k.name}: {_LOOPS[k.kernel.loop]}"
        texts = (f"{k.bytes:,.0f} bytes", f"{k.flops:,.0f} FLOPs")
        rows.append(Bar(label, (k.bytes / most_bytes, k.flops / most_flops), texts))
    title = (
        f"{name}: kernels by default, per token and value head "
        f"(K={costs.dims.K}, V={costs.dims.V}, C={costs.config.chunk}, {costs.dtype.value})"
    )
    return bars(title, rows, ("bytes moved", "FLOPs of products"))


def road_picture(declared: Declaration) -> str:
    """From the step to the kernels, each stage as the compiler prints it."""
    form = declared.normal_form(declared.default_micro)
    chunk = print_chunk(chunk_program(form)).splitlines()
    stages = [
        ("the declared step", "", source(declared).splitlines()),
        ("normal form", "traced and normalised", print_form(form).splitlines()),
        ("one chunk", "derived", [_without_marks(line) for line in chunk]),
    ]
    width = 40 + max(text_width(line, code=True) for _, _, lines in stages for line in lines)
    costs = plan_costs(form)
    width = max(width, *(40 + _row_width(costs, d) for d in costs.compulsory))
    drawing = Drawing(width)
    y = 4.0
    for title, verb, lines in stages:
        y = _stage(drawing, y, title, verb, lines)
    y = _planned(drawing, y, costs)
    return drawing.svg(y, f"The road of {declared.name}")


def source(declared: Declaration) -> str:
    """The declaration as it was written, without its decorators and a formatter's comment."""
    lines = textwrap.dedent(inspect.getsource(declared.function)).rstrip().splitlines()
    start = next(n for n, line in enumerate(lines) if line.lstrip().startswith("def "))
    return "\n".join(lines[start:]).replace("  # fmt: skip", "")


def _without_marks(line: str) -> str:
    return line.replace("[s]", "").replace("[n]", "").rstrip()


def _stage(drawing: Drawing, y: float, title: str, verb: str, lines: Sequence[str]) -> float:
    if verb:
        y = _arrow(drawing, y, verb)
    height = LINE * (len(lines) + 1) + 14
    drawing.box(1, y, drawing.width - 2, height)
    drawing.text(14, y + 20, title, "strong")
    for n, line in enumerate(lines):
        drawing.text(14, y + 20 + LINE * (n + 1), line, "code")
    return y + height


def _arrow(drawing: Drawing, y: float, verb: str) -> float:
    middle = drawing.width / 2
    drawing.arrow(middle, y + 4, y + 34)
    drawing.text(middle + 12, y + 23, verb, "faint")
    return y + 38


def _lines_of(k: KernelCost) -> list[str]:
    stored = ", ".join(name.label for name, _ in k.kernel.stores)
    return [_LOOPS[k.kernel.loop], *textwrap.wrap(f"stores {stored}", 30)]


def _box_width(k: KernelCost) -> float:
    return max(text_width(line) for line in (k.name, *_lines_of(k))) + 24


def _row_width(costs: PlanCosts, direction: str) -> float:
    own = [k for k in costs.kernels if k.direction == direction]
    return sum(_box_width(k) + 12 for k in own) + 70


def _planned(drawing: Drawing, y: float, costs: PlanCosts) -> float:
    y = _arrow(drawing, y, "differentiated, factored and planned")
    top = y
    boxes: list[tuple[float, float, KernelCost, float]] = []
    y += 30
    for direction in costs.compulsory:
        own = [k for k in costs.kernels if k.direction == direction]
        height = LINE * max(len(_lines_of(k)) + 1 for k in own) + 12.0
        x = 84.0
        drawing.text(14, y + 20, direction, "faint")
        for k in own:
            boxes.append((x, y, k, height))
            x += _box_width(k) + 12
        y += height + 12
    drawing.box(1, top, drawing.width - 2, y - top)
    drawing.text(14, top + 20, "kernels", "strong")
    for x, at, k, height in boxes:
        drawing.box(x, at, _box_width(k), height)
        drawing.text(x + 12, at + 20, k.name, "strong")
        for n, line in enumerate(_lines_of(k)):
            drawing.text(x + 12, at + 20 + LINE * (n + 1), line, "faint" if n == 0 else "")
    return y + 4
