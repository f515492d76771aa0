"""Digests of every kernel that is printed: what a change of the compiler leaves as it was.

    python -m benchmarks.digests -o before.json
    python -m benchmarks.digests --against before.json

Triton's and TVM's kernels of every recurrence of the library that has a chunk form, K = V = 64 and
K = 128, V = 72, in bfloat16 and float32, as chosen by default, scanned in segments, one token at a
time, and under every shipped configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import chunkwise.runtime
from chunkwise import library
from chunkwise.codegen.config import Config, Dims, Precision
from chunkwise.codegen.interface import Dtype, Signature
from chunkwise.codegen.programs import (
    backward_program,
    chunk_program,
    forward_program,
    transition_of,
)
from chunkwise.codegen.tir.config import TvmConfig
from chunkwise.codegen.tir.config import default_config as tvm_default
from chunkwise.codegen.tir.kernel import print_tir
from chunkwise.codegen.triton.defaults import default_config
from chunkwise.codegen.triton.emit import emit, emit_token
from chunkwise.codegen.triton.fit import H100_SHARED, fit
from chunkwise.dsl import errors
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime.tuned import selection

SIZES = (Dims(64, 64), Dims(128, 72))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _triton(form: NormalForm, signature: Signature, config: Config) -> Iterator[tuple[str, str]]:
    yield "whole", emit(form, signature, config).source
    if transition_of(form, signature.dims) is not None:
        yield "segments", emit(form, signature, config, segments=True).source


def _tir(form: NormalForm, signature: Signature, config: TvmConfig) -> str:
    programs = (forward_program(form, config.forward), backward_program(form, config.backward))
    printed = [print_tir(k, signature, config) for p in programs for k in p.kernels]
    return "\n".join(str(f.script()) for k in printed for f in (*k.parts, k.function))


def of(name: str) -> dict[str, str]:
    """The digests of one recurrence."""
    declared = getattr(library, name).declaration
    micro = 2 if declared.has_micro else 1
    form = declared.normal_form(micro)
    found: dict[str, str] = {}
    for dims in SIZES:
        for dtype in (Dtype.BFLOAT16, Dtype.FLOAT32):
            at = f"{name} K={dims.K} V={dims.V} {dtype.value}"
            signature = Signature(dims, dtype, (), Precision.TF32X3)
            token = emit_token(declared.step(micro), signature).source
            found[f"{at} triton token"] = _digest(token)
            try:
                body = chunk_program(form)
            except errors.NotLowered:
                continue
            wide = dtype is Dtype.FLOAT32
            config = default_config(body, dims, wide_dtype=wide)
            config = fit(form, config, dims, 4 if wide else 2, H100_SHARED)
            for what, source in _triton(form, signature, config):
                found[f"{at} triton {what}"] = _digest(source)
            if wide:
                on_cpu = Signature(dims, dtype, (), Precision.IEEE)
                found[f"{at} tvm"] = _digest(_tir(form, on_cpu, tvm_default(lanes=8)))
    folder = Path(chunkwise.runtime.__file__).parent / "artifacts"
    for path in sorted((folder / form.digest).glob("*.json")):
        artifact = selection.read(path)
        key = artifact.key
        dtype = next((d for d in Dtype if d.value == key.dtype), Dtype.FLOAT32)
        for n, tuned in enumerate(artifact.tuned):
            if isinstance(tuned.config, Config):
                signature = Signature(key.dims, dtype, (), Precision.TF32X3)
                for what, source in _triton(form, signature, tuned.config):
                    found[f"{name} {path.stem} {n} {what}"] = _digest(source)
            elif isinstance(tuned.config, TvmConfig):
                signature = Signature(key.dims, dtype, (), Precision.IEEE)
                found[f"{name} {path.stem} {n}"] = _digest(_tir(form, signature, tuned.config))
    return found


def main() -> int:
    """Writes them, or compares with what was written; 1 if any differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument("names", nargs="*", help="of the library; all of it by default")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    names = options.names or list(library.names())
    with ProcessPoolExecutor(options.jobs) as pool:
        found = {k: d for one in pool.map(of, names) for k, d in one.items()}
    print(f"{len(found)} digests")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    if options.names:
        before = {k: d for k, d in before.items() if k.split()[0] in names}
    differ = sorted(k for k in before.keys() | found.keys() if before.get(k) != found.get(k))
    print(f"{len(differ)} differ", *differ, sep="\n")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
