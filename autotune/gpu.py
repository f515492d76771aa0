"""The numbers of a GPU that the cost model needs, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..codegen.interface import Dtype

_KIB = 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        bandwidth: bytes per second of its memory.
        half, tf32: FLOP/s of dense matrix products in bfloat16 or float16, and in tf32.
        shared, shared_program: bytes of shared memory of a multiprocessor, and of one program.
        registers: 32-bit registers of a multiprocessor.
        warps, warp: warps that a multiprocessor holds at most, and threads of a warp.
        hopper: whether its compute capability is 9.0.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    half: float
    tf32: float
    shared: int
    shared_program: int
    registers: int = 65536
    warps: int = 64
    warp: int = 32
    hopper: bool = False

    def flops(self, dtype: Dtype) -> float:
        """FLOP/s of products of `dtype`; a float32 product takes three products of tf32."""
        return self.tf32 / 3 if dtype is Dtype.FLOAT32 else self.half


# vendors' data sheets: dense rates, without sparsity
GPUS = {
    g.name: g
    for g in (
        Gpu("a100", 108, 2.0e12, 312e12, 156e12, 164 * _KIB, 163 * _KIB),
        Gpu("h100", 132, 3.35e12, 989e12, 494e12, 228 * _KIB, 227 * _KIB, hopper=True),
        Gpu("h200", 132, 4.8e12, 989e12, 494e12, 228 * _KIB, 227 * _KIB, hopper=True),
        Gpu("b200", 148, 8.0e12, 2250e12, 1125e12, 228 * _KIB, 227 * _KIB),
        Gpu("rtx5090", 170, 1.79e12, 210e12, 105e12, 100 * _KIB, 99 * _KIB, warps=48),
        Gpu("mi300x", 304, 5.3e12, 1307e12, 653e12, 64 * _KIB, 64 * _KIB, 131072, 32, 64),
    )
}
# the nearest entry for models that the table lacks, by major compute capability
_ARCHITECTURES = {8: "a100", 9: "h100", 10: "b200", 12: "rtx5090"}


def gpu_of(device: torch.device, shared_program: int) -> Gpu:
    """The table's entry for `device` by name, else by architecture.

    The name and the number of multiprocessors are the device's own. `shared_program` is the shared
    memory that a program may use, in bytes.
    """
    about = torch.cuda.get_device_properties(device)
    label = about.name.lower().replace(" ", "")
    known = next((g for name, g in GPUS.items() if name in label), None)
    if known is None:
        known = GPUS["mi300x" if torch.version.hip else _ARCHITECTURES.get(about.major, "a100")]
    return replace(
        known,
        name=about.name,
        multiprocessors=about.multi_processor_count,
        shared_program=shared_program,
    )
