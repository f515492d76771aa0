"""What the tuner puts into an artifact beside what it measured. The schema: `runtime.artifact`."""

from __future__ import annotations

import torch

from ..runtime.artifact import Versions
from ..runtime.engines import EngineName
from ..runtime.machine import assembler, driver, version

_BACKENDS = {EngineName.TRITON: "triton", EngineName.TVM: "apache-tvm"}


def versions_here(engine: EngineName) -> Versions:
    """What compiles and runs the kernels of `engine` on this machine."""
    package = _BACKENDS.get(engine)
    on_gpu = engine is EngineName.TRITON
    return Versions(
        chunkwise=version("chunkwise") or "not installed",
        torch=torch.__version__,
        backend=None if package is None else f"{package} {version(package)}",
        assembler=assembler() if on_gpu else None,
        driver=driver() if on_gpu else None,
    )
