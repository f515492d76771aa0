"""Launches where shared memory falls short: fewer stages, then a message."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from chunkwise.codegen.config import KernelConfig
from chunkwise.codegen.plan import Loop
from chunkwise.codegen.triton.kernel import TritonKernel
from chunkwise.runtime.triton.launch_plan import STAGES, LoadedKernel
from chunkwise.runtime.triton.printed import kernel_of
from triton.runtime.errors import OutOfResources

SCAN = kernel_of(
    TritonKernel(
        name="forward_scan",
        loop=Loop.FORWARD,
        source="",
        parameters=(),
        v_programs=1,
        constants=(),
        config=KernelConfig(stages=4),
        stores=(),
        functions=frozenset(),
    )
)


class Fits:
    """A kernel that fits with so many stages, and remembers what it was launched with."""

    arg_names = ("x_ptr", STAGES)

    def __init__(self, stages: int) -> None:
        self.fits = stages
        self.launched: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., str]:
        def launch(
            *arguments: object, num_warps: int, num_stages: int, enable_fp_fusion: bool
        ) -> str:
            assert enable_fp_fusion
            self.launched.append((grid, *arguments, num_warps, num_stages))
            if num_stages > self.fits:
                raise OutOfResources(300_000, 232_448, "shared memory")
            return "machine code"

        return launch


def test_fewer_stages_and_no_second_try() -> None:
    function = Fits(2)
    loaded = LoadedKernel(SCAN, function)
    assert loaded.launch((8, 1, 1), ["x", None]) == "machine code"
    assert [x[2:] for x in function.launched] == [(4, 4, 4), (3, 4, 3), (2, 4, 2)]
    loaded.launch((8, 1, 1), ["x", None])
    assert len(function.launched) == 4


def test_what_never_fits_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"forward_scan does not fit this GPU.*232448"):
        LoadedKernel(SCAN, Fits(0)).launch((8, 1, 1), ["x", None])
