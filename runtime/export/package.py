"""Exports a recurrence: a Python package of kernels and an op that needs torch and triton only.

Everything is text, and a pure function of the declaration, the request and the artifacts found:
exporting again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from keyword import iskeyword
from pathlib import Path

import torch

from ...codegen.config import Config, Dims, Precision
from ...codegen.interface import Dtype, Signature
from ...codegen.plan import Hoist
from ...codegen.programs import transition_of
from ...codegen.triton.emit import emit
from ...codegen.triton.fit import H100_SHARED, untuned_config
from ...dsl.declaration import Declaration
from ...dsl.ir import Kind, Per, operands_of
from ...dsl.normal_form import NormalForm
from ...dsl.turns import angles, log_decays
from ..cache import write_atomically
from ..engines import EngineName
from ..triton.segments import LEAST, channels_of
from ..tuned.artifact import CallSize, Certificate, Key
from ..tuned.machine import Machine, machine_of
from ..tuned.selection import find, folders, nearest, select_config
from .contents import Package, Served
from .launches import print_launches
from .op import print_layer, print_on_cpu, print_op
from .readme import (
    LICENSE,
    hub_name,
    print_build,
    print_configs,
    print_init,
    print_metadata,
    print_readme,
)
from .reference import print_reference
from .test import print_test

# of several tuned configurations, that for about this size of call: training
TRAINING = CallSize(rows=64, tokens=4096)
_H100 = Machine("cuda", "sm_90", "NVIDIA H100 80GB HBM3")


class Layout(Enum):
    """Where the files go."""

    PACKAGE = "package"  # a Python package
    HUB = "hub"  # a repository that Hugging Face's `kernels` loads


@dataclass(frozen=True, slots=True)
class Request:
    """What to export.

    Attributes:
        target: the recurrence as command lines name it.
        name: the name of the function; None: the recurrence's.
        micro: micro-steps per token, where operands are tuples.
        config: a configuration to use in place of the tuned or default ones.
    """

    target: str
    dims: Sequence[Dims] = (Dims(128, 128),)
    dtypes: Sequence[Dtype] = (Dtype.BFLOAT16,)
    name: str | None = None
    micro: int = 1
    layout: Layout = Layout.PACKAGE
    config: Config | None = None


def export(declaration: Declaration, request: Request) -> dict[str, str]:
    """The files of the package by path, text by text.

    Raises:
        NotLowered: no kernels can be derived for the recurrence.
        EngineUnavailable: the default configuration was found wrong on this machine.
        ValueError: the name, or that of an operand, cannot be used in a package.
    """
    package = _package(declaration, request)
    if not package.name.isidentifier() or iskeyword(package.name) or package.name in _MODULES:
        raise ValueError(f"{package.name!r} cannot name the function: choose another (--name)")
    for operand in (*package.operands, *package.params):
        if operand in (*_USED, *_MODULES):
            raise ValueError(f"{operand!r} cannot name an operand of an exported op: rename it")
    files = _sources(package)
    hub = request.layout is Layout.HUB
    placed = _hub(package, files) if hub else files
    return {**placed, "README.md": print_readme(package, hub=hub), "LICENSE": LICENSE}


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files below `folder`; what else lies there stays."""
    for name, text in files.items():
        write_atomically(folder / name, text)


def _package(declaration: Declaration, request: Request) -> Package:
    form = declaration.normal_form(request.micro)
    narrow = _narrow(form)
    served = [
        _served(form, narrow, dtype, dims, request.config)
        for dtype in request.dtypes
        for dims in request.dims
    ]
    name = request.name or form.name
    command = _command(request, has_micro=declaration.has_micro)
    return Package(name, declaration, request.micro, command, narrow, tuple(served))


def _narrow(form: NormalForm) -> frozenset[str]:
    """Keys and Values per token, but for gates: what products take in the dtype of the call."""
    gates = operands_of(*(log_decay for _, log_decay in log_decays(form)), *angles(form))
    return frozenset(
        o.name
        for o in form.operands
        if o.per is Per.TOKEN and o.kind is not Kind.SCALAR and o.name not in gates
    )


def _served(
    form: NormalForm, narrow: frozenset[str], dtype: Dtype, dims: Dims, config: Config | None
) -> Served:
    source, certificate = "the caller's own", None
    if config is None:
        config, source, certificate = _configuration(form, dtype, dims)
    wide = tuple((o.name, Dtype.FLOAT32) for o in form.operands if o.name not in narrow)
    config = config.saving(Hoist.NOTHING)  # a package's op saves its inputs alone
    signature = Signature(dims, dtype, wide, Precision.TF32X3)
    emitted = emit(form, signature, config)
    how = transition_of(form, dims)
    if how is None:
        return Served(dtype, dims, config, source, emitted, certificate)
    segmented = emit(form, signature, config, segments=True)
    least, channels = LEAST[how], channels_of(form, dims)
    return Served(dtype, dims, config, source, emitted, certificate, segmented, least, channels)


def _configuration(
    form: NormalForm, dtype: Dtype, dims: Dims
) -> tuple[Config, str, Certificate | None]:
    """The configuration that serves training on this GPU (without one: on an H100); its origin."""
    machine, shared = _H100, H100_SHARED
    if torch.cuda.is_available() and not torch.version.hip:
        machine = machine_of(torch.device("cuda"))
        about = torch.cuda.get_device_properties("cuda")
        shared = about.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in stubs
    key = Key(form.digest, EngineName.TRITON, dtype.value, dims, machine)

    config = select_config(Config, key, TRAINING, lambda: untuned_config(form, dims, dtype, shared))
    artifact = find(key, folders()).artifact
    tuned = None if artifact is None else nearest(artifact, TRAINING)
    if artifact is None or tuned is None:
        return config, f"default for {machine.arch}, nothing was tuned", None
    bucket = tuned.bucket
    source = f"tuned on {artifact.key.machine} for {bucket.rows} rows of {bucket.tokens} tokens"
    return config, source, tuned.certificate


def _command(request: Request, *, has_micro: bool) -> str:
    """The command line that regenerates the package; it names a file without its folder."""
    file, colon, name = request.target.rpartition(":")
    target = f"{Path(file).name}:{name}" if colon else Path(request.target).name
    words = ["chunkwise", "export", target, "-o", "FOLDER"]
    for d in request.dims:
        words += ["--dims", f"K={d.K},V={d.V}"]
    words += ["--dtype", ",".join(d.value for d in request.dtypes)]
    if request.name is not None:
        words += ["--name", request.name]
    if has_micro:
        words += ["--micro", str(request.micro)]
    if request.layout is not Layout.PACKAGE:
        words += ["--layout", request.layout.value]
    return " ".join(words)


# files of the runtime that packages carry as they are (read, not imported: they need triton)
_CARRIED = (
    *("cannot_run.py", "packing.py", "rows.py", "shapes.py"),
    *("triton/descriptors.py", "triton/kernels.py", "triton/launch_plan.py"),
    "triton/segment_size.py",
    *("export/attention.py", "export/support.py", "export/token_loop.py"),
)
_MODULES = ("layers", "op", "reference", *(Path(name).stem for name in _CARRIED))
# what the printed functions that have operands as arguments use
_USED = (
    *("AXES", "OPS", "RECURRENCE", "STATES", "attention", "dtype", "kwargs", "operands"),
    *("self", "step", "torch"),
)


def _sources(package: Package) -> dict[str, str]:
    """The modules of the package, and its configurations."""
    files = {f"kernels_{s.suffix}.py": s.emitted.source for s in package.served}
    files |= {
        f"kernels_{s.suffix}_segments.py": s.segmented.source
        for s in package.served
        if s.segmented is not None
    }
    files |= {f"launch_{s.suffix}.py": print_launches(package, s) for s in package.served}
    files |= {Path(name).name: _carried(name) for name in _CARRIED}
    files["op.py"] = print_op(package, files)
    files["__init__.py"] = print_init(package)
    files["layers.py"] = print_layer(package)
    files["reference.py"] = print_reference(package)
    files[f"test_{package.name}.py"] = print_test(package)
    files["configs.json"] = print_configs(package)
    return files


def _carried(name: str) -> str:
    """The source of a file of the runtime, all that it imports of ours taken from beside it."""
    text = (Path(__file__).parent.parent / name).read_text(encoding="utf-8")
    text = re.sub(r"^from \.+\w*\.(\w+) import", r"from .\1 import", text, flags=re.MULTILINE)
    return re.sub(r"^from \.\.(\w*) import", r"from .\1 import", text, flags=re.MULTILINE)


# the modules of a hub's variant for CPUs, beside its op: without Triton
_ON_CPU = ("__init__.py", "attention.py", "layers.py", "reference.py", "token_loop.py")


def _hub(package: Package, files: Mapping[str, str]) -> dict[str, str]:
    """A hub repository: sources for its builder, and variants of a kernel without C++."""
    folder = hub_name(package).replace("-", "_")
    placed = {f"torch-ext/{folder}/{name}": text for name, text in files.items()}
    cuda = {n: text for n, text in files.items() if not n.startswith("test_")}
    cpu = {**{n: files[n] for n in _ON_CPU}, "op.py": print_on_cpu(package)}
    for device, variant in (("cuda", cuda), ("cpu", cpu)):
        digest = hashlib.blake2b(variant["op.py"].encode(), digest_size=6).hexdigest()
        variant["metadata.json"] = print_metadata(package, device, digest)
        placed |= {f"build/torch-{device}/{name}": text for name, text in variant.items()}
    return {"build.toml": print_build(package), **placed}
