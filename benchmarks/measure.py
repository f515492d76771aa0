"""Measures time and memory of callables that take turns, so that drift affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from chunkwise.autotune.measure import CpuDevice, CudaDevice, timing
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Side:
    """A contestant: `run` is timed; `reset` is called before each run, untimed."""

    run: Callable[[], object]
    reset: Callable[[], None]


def forward(call: Callable[[], Tensor]) -> Side:
    """The call under `no_grad`."""

    def run() -> None:
        with torch.no_grad():
            call()

    return Side(run, lambda: None)


def forward_backward(call: Callable[[], Tensor], leaves: Sequence[Tensor], do: Tensor) -> Side:
    """The call and `o.backward(do)`; the gradients of `leaves` are reset before each run."""

    def run() -> None:
        call().backward(do)

    def reset() -> None:
        for x in leaves:
            x.grad = None

    return Side(run, reset)


def first_call(side: Side, device: torch.device) -> float:
    """Seconds of one run, compilation and tuning included where nothing was cached."""
    side.reset()
    started = time.perf_counter()
    side.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


AHEAD = 32  # overwrites of the cache: together longer than any side's work on the host


def interleaved(
    sides: Sequence[Side],
    device: torch.device,
    repeats: int,
    warmup: int = 5,
    *,
    ahead: bool = False,
) -> list[list[float]]:
    """Milliseconds of each side's runs; the sides take turns, each on a flushed L2 cache.

    With `ahead`, the device is busy until the host has queued the run, as in a training step whose
    host runs ahead, so that the time is the device's alone. Otherwise it includes the device's
    waits for the host.
    """
    clock = CudaDevice(device, AHEAD if ahead else 1) if device.type == "cuda" else CpuDevice()
    runs, resets = [side.run for side in sides], [side.reset for side in sides]
    clock.rounds(runs, warmup, resets)
    return [[us / 1e3 for us in x] for x in clock.rounds(runs, repeats, resets)]


def medians(sides: Sequence[Side], device: torch.device, repeats: int) -> list[float]:
    """The median milliseconds of each side."""
    return [statistics.median(x) for x in interleaved(sides, device, repeats)]


def spread(samples: Sequence[float]) -> float:
    """How far the median is uncertain: the width of its 95 % interval, relative to it."""
    found = timing(samples)
    return (found.high - found.low) / found.median


def peak_bytes(side: Side, device: torch.device) -> int | None:
    """The bytes that a run allocates at its peak, beyond those allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    side.reset()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    side.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, reads plus writes; the memory floor assumes this rate."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    side = Side(lambda: target.copy_(source), lambda: None)
    return 2 * size / (medians([side], device, repeats=20)[0] * 1e-3)
