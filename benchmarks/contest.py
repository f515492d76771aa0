"""Measures one recurrence at one shape: checks the results of all sides, then times them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import chunkwise
import torch
from torch import Tensor

from . import measure, verify
from .peers import PEERS, Peer
from .registry import CASES, Case, Shape, compulsory_bytes, cotangent, cu_seqlens, draw

FORWARD, BOTH = "fwd", "fwd+bwd"


@dataclass(frozen=True, slots=True)
class Contestant:
    """The measurements of one side; None if it was not run or failed (see `Row.notes`).

    Attributes:
        ms, device_ms: the median time of a call, with and without the device's waits for the host.
        spread: the width of the 95 % interval of device_ms, relative to it.
        peak_mb: MiB allocated during a call.
        first_s: seconds of the first call, which compiles.
        ok: whether its results were right.
    """

    ms: float | None = None
    device_ms: float | None = None
    spread: float | None = None
    peak_mb: float | None = None
    first_s: float | None = None
    ok: bool | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: ours and one other side, of the same rounds.

    Attributes:
        gates: how log-decays were drawn, of `registry.GATES`, or empty.
        against: the peer, or another recurrence of the library; None if ours was timed alone.
        floor_ms: the time of compulsory traffic at copy bandwidth.
        bar: the least ratio that the project aims at, where it has an aim of its own.
    """

    recurrence: str
    gates: str
    shape: str
    dtype: str
    mode: str
    against: str | None
    ours: Contestant
    peer: Contestant
    floor_ms: float
    bar: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The peer's time over ours (above 1: ours is faster); None if our results were wrong."""
        return self._ratio(self.ours.ms, self.peer.ms)

    @property
    def device_ratio(self) -> float | None:
        """The ratio of the device's times."""
        return self._ratio(self.ours.device_ms, self.peer.device_ms)

    def _ratio(self, ours: float | None, peer: float | None) -> float | None:
        return None if ours is None or peer is None or not self.ours.ok else peer / ours


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run; `bandwidth` is in bytes per second."""

    device: torch.device
    dtype: torch.dtype
    bandwidth: float
    repeats: int = 50
    engine: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One call that all sides of a contest make; operands and cotangent are drawn by the seed."""

    case: Case
    shape: Shape
    gates: str
    settings: Settings

    def operands(self) -> dict[str, Tensor]:
        s = self.settings
        return draw(self.case, self.shape, s.dtype, s.device, s.seed, self.gates)

    def do(self) -> Tensor:
        s = self.settings
        return cotangent(self.shape, s.dtype, s.device, s.seed + 1)

    def ours(self) -> verify.Side:
        """The library's op."""
        op, operands = getattr(chunkwise.library, self.case.name), self.operands()
        values = tuple(operands.values())
        packed = cu_seqlens(self.shape, self.settings.device)

        def call() -> Tensor:
            o: Tensor = op(*values, cu_seqlens=packed, engine=self.settings.engine)[0]
            return o

        return verify.Side(call, operands, operands)

    def theirs(self, peer: Peer) -> verify.Side:
        """The peer's kernels, on leaves of their own where their operands are not ours."""
        operands = self.operands()
        packed, note = cu_seqlens(self.shape, self.settings.device), peer.ready()
        if peer.own is None:
            return verify.Side(lambda: peer.call(operands, packed), operands, operands, note=note)
        made = peer.own(operands)
        own = {name: _leaf(x) for name, x in made.items()}
        return verify.Side(lambda: peer.call(own, packed), operands, own, made, note)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_(x.requires_grad)


def rivals(case: Case, device: torch.device, wanted: Sequence[str] | None = None) -> list[str]:
    """The names of the peers that run here, of those wanted (None: all), and `Case.beside`."""
    peers = [p.name for p in PEERS.get(case.name, ()) if p.runs_on(device)]
    return [*(n for n in peers if wanted is None or n in wanted), *case.beside]


OURS = "ours"


def sides(problem: Problem, against: Sequence[str]) -> dict[str, Callable[[], verify.Side]]:
    """How each side is made, by name: ours and those against it."""
    made: dict[str, Callable[[], verify.Side]] = {OURS: problem.ours}
    for peer in PEERS.get(problem.case.name, ()):
        if peer.name in against:
            made[peer.name] = partial(problem.theirs, peer)
    for other in problem.case.beside:
        if other in against:
            made[other] = _beside(problem, other).ours
    return made


def _beside(problem: Problem, other: str) -> Problem:
    case = CASES[other]
    gates = problem.gates if problem.gates in case.gates else case.gates[0]
    return replace(problem, case=case, gates=gates)


def contest(problem: Problem, against: Sequence[str]) -> list[Row]:
    """The rows of one recurrence at one shape: its forward, and its forward and backward."""
    settings, case, do = problem.settings, problem.case, problem.do()
    expected = _oracle(problem)
    played: dict[str, verify.Side] = {}
    said: dict[str | None, str] = {}
    seen: dict[str, dict[str, Contestant]] = {m: {} for m in (FORWARD, BOTH)}
    for name, make in sides(problem, against).items():
        judged = _beside(problem, name) if name in case.beside else problem
        try:
            side = make()
            first = measure.first_call(timed(side, do, BOTH), settings.device)
            wanted = expected if judged is problem else _oracle(judged)
            pairs = verify.sample(judged.case, judged.shape)
            errors = verify.compare(side, judged.case, do, wanted, pairs)
        except Exception as error:  # whatever a peer raises does not end the run
            said[name] = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
            continue
        played[name] = side
        ok = all(e.ok for e in errors)
        seen[BOTH][name] = Contestant(first_s=first, ok=ok)
        seen[FORWARD][name] = Contestant(ok=ok)
        said[name] = f"{name}: {', '.join(map(str, errors))}"

    forward, backward = compulsory_bytes(case, problem.shape, settings.dtype)
    floors = {FORWARD: forward, BOTH: forward + backward}
    rows = []
    for mode in (FORWARD, BOTH):
        _time(played, do, mode, settings, seen[mode])
        for rival in against or (None,):
            row = Row(
                recurrence=case.name,
                gates=problem.gates,
                shape=problem.shape.name,
                dtype=str(settings.dtype).removeprefix("torch."),
                mode=mode,
                against=rival,
                ours=seen[mode].get(OURS, Contestant()),
                peer=seen[mode].get(rival or "", Contestant()),
                floor_ms=floors[mode] / settings.bandwidth * 1e3,
                bar=1 / case.beside[rival] if rival and rival in case.beside else None,
                notes=tuple(said[n] for n in (OURS, rival) if n in said),
            )
            note = None if rival not in played else played[rival].note
            if mode == BOTH and note is not None:
                row = replace(row, notes=(*row.notes, note))
            rows.append(row)
    return rows


def _oracle(problem: Problem) -> dict[str, Tensor]:
    op: Any = getattr(chunkwise.library, problem.case.name)
    packed = cu_seqlens(problem.shape, problem.settings.device)
    pairs = verify.sample(problem.case, problem.shape)
    return verify.oracle(op, problem.case, problem.operands(), problem.do(), packed, pairs)


def timed(side: verify.Side, do: Tensor, mode: str) -> measure.Side:
    """What is timed of a side."""
    if mode == FORWARD:
        return measure.forward(side.call)
    return measure.forward_backward(side.call, side.leaves, do)


def _time(
    played: Mapping[str, verify.Side],
    do: Tensor,
    mode: str,
    settings: Settings,
    seen: dict[str, Contestant],
) -> None:
    """Add times and memory to what was seen of the sides."""
    runs = {name: timed(side, do, mode) for name, side in played.items()}
    if not runs:
        return
    taking_turns = [*runs.values()]
    alone = called = measure.interleaved(taking_turns, settings.device, settings.repeats)
    if settings.device.type == "cuda":
        alone = measure.interleaved(taking_turns, settings.device, settings.repeats, ahead=True)
    for (name, side), ms, device_ms in zip(runs.items(), called, alone, strict=True):
        peak = measure.peak_bytes(side, settings.device)
        seen[name] = replace(
            seen[name],
            ms=statistics.median(ms),
            device_ms=statistics.median(device_ms),
            spread=measure.spread(device_ms),
            peak_mb=None if peak is None else peak / 2**20,
        )
