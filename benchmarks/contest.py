"""Measures one recurrence at one shape: checks the results of both sides, then times both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import measure, peers, verify
from .registry import Case, Shape, compulsory_bytes, cu_seqlens, draw

FORWARD, BOTH = "fwd", "fwd+bwd"


@dataclass(frozen=True, slots=True)
class Contestant:
    """The measurements of one side; None if it was not run or failed (see `Row.notes`).

    Attributes:
        ms, device_ms: the median time of a call, with and without the device's waits for the host.
        peak_mb: MiB allocated during a call.
        first_s: seconds of the first call, which compiles.
        ok: whether its results were right.
    """

    ms: float | None = None
    device_ms: float | None = None
    peak_mb: float | None = None
    first_s: float | None = None
    ok: bool | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; `floor_ms` is the time of compulsory traffic at copy bandwidth."""

    recurrence: str
    shape: str
    mode: str
    ours: Contestant
    peer: Contestant
    floor_ms: float
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The peer's time over ours (above 1: ours is faster); None if our results were wrong."""
        if self.ours.ms is None or self.peer.ms is None or not self.ours.ok:
            return None
        return self.peer.ms / self.ours.ms

    @property
    def device_ratio(self) -> float | None:
        """The ratio of the device's times."""
        if self.ours.device_ms is None or self.peer.device_ms is None or not self.ours.ok:
            return None
        return self.peer.device_ms / self.ours.device_ms


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run; `bandwidth` is in bytes per second."""

    device: torch.device
    dtype: torch.dtype
    bandwidth: float
    repeats: int = 50
    peer: bool = True
    engine: str | None = None
    seed: int = 0


Calls = dict[str, Callable[[], Tensor]]


def failures() -> tuple[type[BaseException], ...]:
    """The exceptions of a side that do not end the run."""
    known: tuple[type[BaseException], ...] = (RuntimeError, ValueError, TypeError)
    try:
        from triton import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


def contest(case: Case, op: Callable[..., Any], shape: Shape, settings: Settings) -> list[Row]:
    """The rows of one recurrence at one shape: its forward, and its forward and backward."""
    device = settings.device
    operands = draw(case, shape, settings.dtype, device, settings.seed)
    packed = cu_seqlens(shape, device)
    generator = torch.Generator(device=device).manual_seed(settings.seed + 1)
    do = torch.randn(operands["v"].shape, generator=generator, device=device).to(settings.dtype)
    values = tuple(operands.values())

    def ours() -> Tensor:
        o: Tensor = op(*values, cu_seqlens=packed, engine=settings.engine)[0]
        return o

    calls: Calls = {"ours": ours}
    notes = []
    peer = case.peer if settings.peer else None
    if peer is not None:
        if case.peer_backward_refused and peers.lift_refusal():
            notes.append("† the peer refuses this backward here; timed with the refusal lifted")
        calls["peer"] = lambda: peer(*values, cu_seqlens=packed)

    pairs = verify.sample(shape)
    expected = verify.oracle(op, case, operands, do, packed, pairs)
    seen: dict[str, dict[str, Contestant]] = {m: {} for m in (FORWARD, BOTH)}
    for name, call in list(calls.items()):
        try:
            both, note = _check(call, case, operands, do, expected, pairs, settings)
        except failures() as error:
            notes.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            del calls[name]
            continue
        seen[BOTH][name] = both
        seen[FORWARD][name] = replace(both, first_s=None)
        notes.append(f"{name}: {note}")
    del expected

    leaves = [x for x in operands.values() if x.requires_grad]
    rows = []
    floors = _floors(case, shape, settings)
    for mode in (FORWARD, BOTH):
        sides = {
            n: measure.forward(c) if mode == FORWARD else measure.forward_backward(c, leaves, do)
            for n, c in calls.items()
        }
        if sides:
            timed = list(sides.values())
            times = measure.interleaved(timed, device, settings.repeats)
            alone = times
            if device.type == "cuda":
                alone = measure.interleaved(timed, device, settings.repeats, ahead=True)
            for (name, side), ms, device_ms in zip(sides.items(), times, alone, strict=True):
                peak = measure.peak_bytes(side, device)
                mb = None if peak is None else peak / 2**20
                seen[mode][name] = replace(seen[mode][name], ms=ms, device_ms=device_ms, peak_mb=mb)
        us, them = (seen[mode].get(n, Contestant()) for n in ("ours", "peer"))
        rows.append(Row(case.name, shape.name, mode, us, them, floors[mode], tuple(notes)))
    return rows


def _check(
    call: Callable[[], Tensor],
    case: Case,
    operands: dict[str, Tensor],
    do: Tensor,
    expected: dict[str, Tensor],
    pairs: list[tuple[int, int]],
    settings: Settings,
) -> tuple[Contestant, str]:
    """The time of the side's first call, and the errors of its second one as a note."""
    leaves = [x for x in operands.values() if x.requires_grad]
    side = measure.forward_backward(call, leaves, do)
    first = measure.first_call(side, settings.device)
    errors = verify.compare(call, case, operands, do, expected, pairs)
    ok = all(e.ok for e in errors)
    return Contestant(first_s=first, ok=ok), ", ".join(str(e) for e in errors)


def _floors(case: Case, shape: Shape, settings: Settings) -> dict[str, float]:
    forward, backward = compulsory_bytes(case, shape, settings.dtype)
    return {
        FORWARD: forward / settings.bandwidth * 1e3,
        BOTH: (forward + backward) / settings.bandwidth * 1e3,
    }
