"""Complete artifacts with invented numbers, for tests."""

from __future__ import annotations

from chunkwise.codegen.config import Config, Dims, EagerConfig, KernelConfig
from chunkwise.codegen.plan import Hoist, Plan
from chunkwise.codegen.tir.config import TvmConfig
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.tuned.artifact import (
    Artifact,
    CallSize,
    Certificate,
    Configuration,
    Crossover,
    Error,
    KernelReport,
    Key,
    Rejected,
    Study,
    Tuned,
    Versions,
)
from chunkwise.runtime.tuned.machine import Machine

H200 = Machine("cuda", "sm_90", "NVIDIA H200")
H100 = Machine("cuda", "sm_90", "NVIDIA H100 80GB HBM3")
A100 = Machine("cuda", "sm_80", "NVIDIA A100-SXM4-80GB")
KEY = Key("0123456789ab", EngineName.TRITON, "bfloat16", Dims(128, 128), H200)
VERSIONS = Versions("0.1.0", "2.13.0", "triton 3.7.1", "release 12.9", "570.1")
PLAN = Plan(Hoist.PREFIXES | Hoist.SOLVES, outputs_in_scan=True)
CONFIG = Config(
    64, PLAN, Plan(Hoist.ALL), KernelConfig(), (("forward_scan", KernelConfig(32, 8, 3)),)
)


def config(chunk: int) -> Config:
    """A configuration like any other."""
    return Config(chunk, PLAN, Plan(Hoist.NOTHING), KernelConfig())


def tuned(
    rows: int,
    tokens: int,
    config: Configuration = CONFIG,
    *,
    time_us: float = 812.5,
    versions: Versions = VERSIONS,
    faults: tuple[str, ...] = (),
) -> Tuned:
    """The winner for one size of call."""
    certificate = Certificate((("o", Error(0.001, 0.004, 0.005)),), ("ordinary",), faults)
    kernels = (("forward_scan", KernelReport(100.5, 128, 0, 65536)),)
    study = Study("2026-01-02T03:04:05+00:00", 120, 60.0, "journal")
    bucket = CallSize(rows, tokens)
    return Tuned(
        bucket, config, time_us, 800.0, 820.0, 900.0, kernels, certificate, versions, study
    )


def rejected(config: Configuration, versions: Versions = VERSIONS) -> Rejected:
    """A configuration in quarantine."""
    return Rejected(config, versions, "two runs differ: d k")


ARTIFACT = Artifact(
    "gated_delta_rule",
    KEY,
    (tuned(64, 4096), tuned(512, 1024, config(32))),
    (rejected(config(128)),),
    (Crossover(64, 24, 32, 0.95, 87),),
)
CPU = Machine("cpu", "x86-64-v3", "Some CPU @ 2 GHz", 2)
TVM = Artifact(
    "gated_delta_rule",
    Key("0123456789ab", EngineName.TVM, "float32", Dims(64, 64), CPU),
    (tuned(8, 2048, TvmConfig(64, PLAN, Plan(Hoist.NOTHING), 16, 8, 2)),),
)
EAGER = Artifact(
    "gated_delta_rule",
    Key(
        "0123456789ab",
        EngineName.EAGER,
        "float32",
        Dims(64, 64),
        Machine("cpu", "x86-64-v3", "Some CPU @ 2 GHz", 2),
    ),
    (tuned(8, 2048, EagerConfig(32)),),
)
