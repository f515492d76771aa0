"""Noisy binary search finds the crossing with the confidence that it claims, by few timings."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunkwise import cli, library
from chunkwise.autotune import store
from chunkwise.autotune.crossover import MARGIN, Bracket, geometric, search
from chunkwise.codegen.config import Dims
from chunkwise.runtime import reference
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.tuned import selection
from chunkwise.runtime.tuned.artifact import Artifact, CallSize, Crossover
from chunkwise.runtime.tuned.selection import key_here, token_loop_wins
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.autotune.fake import StoodStill

LENGTHS = geometric(1, 4096)
CPU = torch.device("cpu")
# how fast the probability rises, per octave: a step; paired timings, which are nearly one; noise
SHARPNESS = [1000.0, 8.0, 1.0]


def _monotone(crossing: float, sharpness: float) -> Callable[[int], float]:
    def probability(T: int) -> float:
        x = sharpness * math.log2(T / crossing)
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, x))))

    return probability


def sweep(wins: Callable[[int], bool]) -> Bracket:
    """The crossing by equally many timings at every length, with confidence 0.95: the baseline."""
    each = _majority(0.05 / len(LENGTHS))
    won = [2 * sum(wins(T) for _ in range(each)) > each for T in LENGTHS]
    first = won.index(True) if True in won else len(won)
    return Bracket(
        LENGTHS[first - 1] if first else None,
        LENGTHS[first] if first < len(won) else None,
        0.95,
        each * len(LENGTHS),
    )


def _majority(doubt: float) -> int:
    """The number of timings whose majority errs with probability at most `doubt`, at MARGIN."""

    def wrong(n: int) -> float:
        right = 0.5 + MARGIN
        few = range(n // 2 + 1)
        return sum(math.comb(n, k) * right**k * (1 - right) ** (n - k) for k in few)

    return next(n for n in itertools.count(1, 2) if wrong(n) <= doubt)


def _holds(bracket: Bracket, probability: Callable[[int], float]) -> bool:
    """Neither end lies on the wrong side, except where the odds are within MARGIN of even."""
    low_right = bracket.low is None or probability(bracket.low) < 0.5 + MARGIN
    return low_right and (bracket.high is None or probability(bracket.high) > 0.5 - MARGIN)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_right_as_often_as_stated_and_five_times_fewer_timings(sharpness: float) -> None:
    """The baseline takes a majority of timings at every length, with the same confidence."""
    wrong = timings = of_sweeps = 0
    octaves = []
    for seed in range(100):
        coin = random.Random(seed)
        probability = _monotone(2 ** coin.uniform(1, 11), sharpness)

        def wins(T: int) -> bool:
            return coin.random() < probability(T)  # noqa: B023

        bracket = search(wins, LENGTHS, confidence=0.95)
        assert bracket.low is not None
        assert bracket.high is not None
        wrong += not _holds(bracket, probability)
        timings += bracket.timings
        octaves.append(math.log2(bracket.high / bracket.low))
        of_sweeps += sweep(wins).timings
    assert wrong <= 5
    assert of_sweeps >= 5 * timings
    assert sorted(octaves)[50] <= max(0.5, 3 / sharpness)


@given(st.floats(0.1, 10000), st.sampled_from(SHARPNESS), st.integers(0, 1 << 30))
def test_any_crossing(crossing: float, sharpness: float, seed: int) -> None:
    coin = random.Random(seed)
    probability = _monotone(crossing, sharpness)
    bracket = search(lambda T: coin.random() < probability(T), LENGTHS)
    assert 0 < bracket.timings < 1000
    if bracket.low is not None and bracket.high is not None:
        assert bracket.low < bracket.high
    assert (bracket.low, bracket.high) != (None, None)


def test_nothing_to_find() -> None:
    """If chunks always win, or never, the interval is open at that end."""
    always, never = search(lambda T: True, LENGTHS), search(lambda T: False, LENGTHS)
    assert (always.low, always.high) == (None, 1)
    assert (never.low, never.high) == (4096, None)
    assert search(lambda T: T >= 7, (7,)).high == 7


def test_without_noise_it_is_a_bisection() -> None:
    for crossing in (2, 3, 60, 1000, 4000):

        def wins(T: int) -> bool:
            return crossing <= T  # noqa: B023

        bracket = search(wins, LENGTHS)
        assert bracket.low is not None
        assert bracket.high is not None
        assert bracket.low < crossing <= bracket.high
        assert bracket == replace(sweep(wins), timings=bracket.timings)


def test_geometric() -> None:
    assert geometric(1, 16, 1) == (1, 2, 4, 8, 16)
    assert geometric(8, 16, 2) == (8, 11, 16)
    assert geometric(1, 4, 100) == (1, 2, 3, 4)


class OneMicrosecondEach(TorchDispatchMode):
    """Moves a clock by a microsecond for each of torch's operations."""

    def __init__(self, clock: StoodStill) -> None:
        super().__init__()
        self._clock = clock

    def __torch_dispatch__(  # type: ignore[override]  # torch's own is not annotated
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._clock.sleep(1e-6)
        return func(*args, **(kwargs or {}))


def test_eager_against_the_token_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunks win by far at 1024 tokens; the crossover is saved in an artifact."""
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    clock = StoodStill()
    monkeypatch.setattr("chunkwise.autotune.measure.time", clock)
    asked = ["linear_attention", "--dims", "K=8,V=8", "--heads", "2", "--engine", "eager"]
    with OneMicrosecondEach(clock):
        assert cli.main(["crossover", *asked, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert cli.main(["crossover", *asked]) == 0
    assert "with 95 % confidence" in capsys.readouterr().out
    (found,) = selection.read(Path(printed["file"])).crossovers
    assert found.low is not None
    assert found.high is not None
    assert 1 <= found.low < found.high <= 64
    assert (found.rows, found.confidence) == (2, 0.95)
    assert printed["crossover"]["timings"] == found.timings


def test_what_has_no_crossover_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["crossover", "kda", "--engine", "reference"]) == 1
    assert "it is the token loop" in capsys.readouterr().err


def test_short_calls_run_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    op = library.simple_gla
    form = op.declaration.normal_form()
    key = key_here(form, EngineName.EAGER, torch.float32, Dims(5, 7), CPU)
    store.save(Artifact("simple_gla", key, crossovers=(Crossover(4, 6, 8, 0.95, 50),)))
    assert token_loop_wins(key, CallSize(4, 6))
    assert token_loop_wins(key, CallSize(1000, 6))  # the nearest that is known
    assert not token_loop_wins(key, CallSize(4, 7))
    assert not token_loop_wins(replace(key, dtype="float64"), CallSize(4, 6))
    looped = []
    original = reference.forward
    monkeypatch.setattr(reference, "forward", lambda call: looped.append(call.T) or original(call))
    for T in (6, 7):
        q, k = torch.randn(1, T, 4, 5), torch.randn(1, T, 4, 5)
        v, g = torch.randn(1, T, 4, 7), -torch.rand(1, T, 4)
        o, _ = op(q, k, v, g, engine="eager")
        want, _ = op(q.double(), k.double(), v.double(), g.double(), engine="eager")
        assert torch.allclose(o.double(), want, atol=1e-5)
    assert looped == [6]
