"""The names of buffers, which kernels store for one another and as results."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class BufferKind(Enum):
    """The contents of a buffer, and the form of its text name."""

    OUTPUT = "{}"  # an output of the recurrence, per token
    GRADIENT = "d_{}"  # the gradient of an operand: per token, or of one per head a part per chunk
    INTERMEDIATE = "{}_chunk"  # a tile for later kernels, per token or chunk
    SAVED = "{}_saved"  # a tile that the forward stores for the backward, per token
    SEGMENT_END = "{}.end"  # a carry as each segment of a sequence ends


@dataclass(frozen=True, slots=True)
class BufferId:
    """A buffer: `of` names the output, operand, tile or carry."""

    kind: BufferKind
    of: str

    def __str__(self) -> str:
        return self.kind.value.format(self.of)

    @property
    def label(self) -> str:
        """Its name where nothing else is called so: an intermediate's is that of its tile."""
        is_tile = self.kind in (BufferKind.INTERMEDIATE, BufferKind.SAVED)
        return self.of if is_tile else str(self)


def gradient(operand: str) -> BufferId:
    """The gradient of an operand."""
    return BufferId(BufferKind.GRADIENT, operand)


def output(name: str) -> BufferId:
    """An output, called o where it is the only one."""
    return BufferId(BufferKind.OUTPUT, name)
