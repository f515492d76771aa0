"""A short forward and backward of each class of recurrence, to be run under compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitize
compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitize kda
"""

from __future__ import annotations

import sys

import chunkwise as cw
import torch

from .registry import CASES, Shape, draw

# ends of sequences within a chunk, and tiles that are wider than the operand
SHAPE = Shape("sanitize", 1, 130, 2, 48)


def main() -> None:
    """Run the named recurrences, or all that are measured."""
    for name in sys.argv[1:] or list(CASES):
        operands = draw(CASES[name], SHAPE, torch.bfloat16, torch.device("cuda"), 0)
        o, _ = getattr(cw.library, name)(*operands.values())
        o.sum().backward()
        torch.cuda.synchronize()
        print(f"{name}: ran")


if __name__ == "__main__":
    main()
