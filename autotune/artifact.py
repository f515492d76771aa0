"""What the tuner puts into an artifact beside what it measured. The schema: `runtime.artifact`."""

from __future__ import annotations

import torch

from ..codegen.config import Dims
from ..dsl.normal_form import NormalForm
from ..runtime.artifact import Key, Versions
from ..runtime.engines import EngineName
from ..runtime.machine import assembler, driver, machine_of, version

_BACKENDS = {EngineName.TRITON: "triton", EngineName.TVM: "apache-tvm"}


def key_here(
    form: NormalForm, engine: EngineName, dtype: torch.dtype, dims: Dims, device: torch.device
) -> Key:
    """The key of what is tuned here, now (on a CPU: with this number of threads)."""
    name = str(dtype).removeprefix("torch.")
    return Key(form.digest, engine, name, dims, machine_of(device))


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
