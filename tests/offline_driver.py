"""A CUDA driver for Triton that compiles for an H100, loads nothing and launches nothing."""

from __future__ import annotations

from typing import Any

from chunkwise.autotune.gpu import GPUS
from triton.backends.compiler import GPUTarget


class Driver:
    """In place of `triton.runtime.driver._active`; counts launches."""

    launches = 0

    def __init__(self) -> None:
        self.utils = self
        self.launcher_cls = self.launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": GPUS["h100"].shared_program}

    def load_binary(self, *_: object) -> tuple[int, ...]:
        return (0, 0, 32, 0, 1024)

    def launcher(self, *_: object) -> Any:
        def launch(*_: object) -> None:
            self.launches += 1

        return launch
