"""The contents of an exported package, as data that its printers share."""

from __future__ import annotations

from dataclasses import dataclass

from ...codegen.config import Config, Dims
from ...codegen.interface import Dtype
from ...codegen.triton.emit import Emitted
from ...dsl.declaration import Declaration
from ...dsl.ir import Kind, Per
from ...dsl.normal_form import NormalForm, Operand
from ...dsl.step import output_names
from ..tuned.artifact import Certificate


@dataclass(frozen=True, slots=True)
class Served:
    """Kernels for one dtype and one pair of dimensions, and where their configuration is from.

    Attributes:
        segmented: the same kernels, whose scans run on segments of sequences; None if they cannot.
        least: segments that a sequence must have for those.
        channels: of the value axis, as scans hold it, padded.
    """

    dtype: Dtype
    dims: Dims
    config: Config
    source: str
    emitted: Emitted
    certificate: Certificate | None
    segmented: Emitted | None = None
    least: int = 0
    channels: int = 0

    @property
    def suffix(self) -> str:
        """Ends the names of its modules."""
        return f"{self.dtype.value}_k{self.dims.K}_v{self.dims.V}"


@dataclass(frozen=True, slots=True)
class Package:
    """A recurrence with all kernels that are exported for it.

    Attributes:
        name: the name of the function that users call.
        micro: the number of micro-steps of a token.
        command: the command line that regenerates the package.
        narrow: the operands in the dtype of products; the others are widened to float32.
    """

    name: str
    declaration: Declaration
    micro: int
    command: str
    narrow: frozenset[str]
    served: tuple[Served, ...]

    @property
    def form(self) -> NormalForm:
        return self.declaration.normal_form(self.micro)

    @property
    def outputs(self) -> dict[str, tuple[str, ...]]:
        """The axes of every output by letter."""
        outputs = self.form.outputs
        axes = (("B", "T", "HV", *o.kind.axes) for o in outputs)
        return dict(zip(output_names(len(outputs)), axes, strict=True))

    @property
    def operands(self) -> tuple[str, ...]:
        return tuple(o.name for o in self.form.operands)

    @property
    def states(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.form.states)

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.form.params)

    @property
    def keywords(self) -> list[str]:
        """The run-time floats as keyword arguments, with their defaults."""
        return [
            p.name if p.default is None else f"{p.name}={p.default!r}" for p in self.form.params
        ]

    @property
    def lead(self) -> str:
        """The operand whose dtype is that of the output: the first Value per token."""
        values = [o for o in self.form.operands if o.kind is Kind.VALUE and o.per is Per.TOKEN]
        return (values or list(self.form.operands))[0].name

    def header(self, what: str) -> list[str]:
        """A module's docstring: what it is for, where it comes from, and how to print it anew."""
        return [
            f'"""{what}',
            "",
            f"Generated from the recurrence {self.form.name}, normal form {self.form.digest}.",
            f"regenerate  {self.command}",
            '"""',
        ]


def axes(o: Operand, micro_steps: int = 1) -> tuple[str, ...]:
    """An operand's axes in letters, the number of micro-steps written out."""
    return tuple(str(micro_steps) if a == "n" else a for a in o.axes)
