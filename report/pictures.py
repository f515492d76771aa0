"""Pictures of the kernels of a plan, and what they cost."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass

from ..codegen import cost
from ..codegen.chunk import ChunkProgram
from ..codegen.config import Config, Dims, held
from ..codegen.differentiate import Adjoint
from ..codegen.interface import Dtype
from ..codegen.plan import Kernel, Loop, Program
from ..codegen.programs import backward_program, chunk_adjoint, chunk_program, forward_program
from ..codegen.triton.defaults import default_config
from ..dsl.declaration import Declaration
from ..dsl.normal_form import NormalForm
from .drawing import Bar, bars

DIMS = Dims(128, 128)
LOOPS = {
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
        label = f"{k.direction} {k.name}: {LOOPS[k.kernel.loop]}"
        texts = (f"{k.bytes:,.0f} bytes", f"{k.flops:,.0f} FLOPs")
        rows.append(Bar(label, (k.bytes / most_bytes, k.flops / most_flops), texts))
    title = (
        f"{name}: kernels by default, per token and value head "
        f"(K={costs.dims.K}, V={costs.dims.V}, C={costs.config.chunk}, {costs.dtype.value})"
    )
    return bars(title, rows, ("bytes moved", "FLOPs of products"))


def source(declared: Declaration) -> str:
    """The declaration as it was written, without its decorators and a formatter's comment."""
    lines = textwrap.dedent(inspect.getsource(declared.function)).rstrip().splitlines()
    start = next(n for n, line in enumerate(lines) if line.lstrip().startswith("def "))
    return "\n".join(lines[start:]).replace("  # fmt: skip", "")
