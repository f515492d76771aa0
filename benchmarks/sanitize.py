"""A short forward and backward of each class of recurrence, to be run under compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitize
compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitize kda
compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitize --segments kda
"""

from __future__ import annotations

import argparse

import chunkwise as cw
import torch
from chunkwise.autotune.certificate_inputs import Family, draw
from chunkwise.codegen.config import Dims
from chunkwise.codegen.emit import passing
from chunkwise.runtime import triton_engine

# one per class: no decay, two states, a scalar gate, a vector gate; solves under each of them; a
# correction that reads the undecayed state, a general low rank, several micro-steps
CLASSES = (
    "linear_attention",
    "linear_attention_normalised",
    "simple_gla",
    "gla",
    "delta_rule",
    "gated_delta_rule",
    "kda",
    "comba",
    "dplr",
    "gated_delta_product",
)


def main() -> None:
    """Run the named recurrences, or one per class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=CLASSES)
    parser.add_argument("--segments", action="store_true", help="scans of segments of one chunk")
    options = parser.parse_args()
    for name in options.names:
        d = getattr(cw.library, name).declaration
        micro = 2 if d.has_micro else 1
        # ends of sequences within a chunk, and tiles that are wider than the operand
        call = draw(
            d, d.normal_form(micro), Family.RAGGED, Dims(48, 48), torch.bfloat16,
            torch.device("cuda"), tokens=130, micro=micro,
        )  # fmt: skip
        config = segment = None
        if options.segments:  # calls as short as these are not scanned so by themselves
            dims = Dims(call.K, call.V)
            config = triton_engine.configuration(call.form, dims, call.dtype)
            segment = 64 if passing(call.form, dims) else 0
        o, finals = triton_engine.forward(call, config, segment=segment)
        dfinals = tuple(map(torch.randn_like, finals))
        triton_engine.backward(call, torch.randn_like(o), dfinals, config, segment=segment)
        triton_engine.forward_by_token(call)
        torch.cuda.synchronize()
        print(f"{name}: ran")


if __name__ == "__main__":
    main()
