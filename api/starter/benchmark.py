"""The time of `my_rule`, forward and backward, on this machine's engine and as torch operations.

Run it: python benchmark.py
"""

from __future__ import annotations

import statistics
import time

import torch
from inputs import operands
from my_rule import my_rule

B, T, H, K, V = 4, 1024, 4, 64, 64


def milliseconds(engine: str | None, device: str, rounds: int = 10) -> float:
    """The median time of a call and its gradients."""
    leaves = {n: x.to(device).requires_grad_() for n, x in operands(B, T, H, K, V).items()}
    times = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        o, _ = my_rule(**leaves, engine=engine)
        o.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[2:])  # the first calls compile


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own, eager = (milliseconds(engine, device) for engine in (None, "eager"))
    size = f"B={B} T={T} H={H} K={K} V={V} float32 on {device}"
    print(f"my_rule  {size}: {own:.1f} ms, as torch operations {eager:.1f} ms")


if __name__ == "__main__":
    main()
