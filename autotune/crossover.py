"""Finds the length from which chunks beat the token loop, by noisy binary search.

The model is Karp and Kleinberg's ("Noisy binary search and its applications", 2007): in one paired
timing at length T, the chunks win with a probability that rises with T; nothing else is assumed.
`search` keeps a belief (a distribution) over the length at which this probability passes 1/2, as
the Bayesian algorithm of Gretta and Price does ("Sharp noisy binary search with monotonic
probabilities", 2023): each timing is taken at the belief's median and updates it like the flip of
a coin of probability 1/2 +- MARGIN. Because the belief relies on that model, Wald's sequential test
then checks both ends of the proposed interval and moves them outwards until they pass. The reported
confidence is the confidence of these tests.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from ..codegen.config import Dims
from ..dsl.declaration import Declaration
from ..runtime.engines import EngineName, load
from ..runtime.tuned.artifact import Configuration
from .inputs import Family, draw
from .validation import ConfiguredEngine

# where the probability lies within 1/2 +- MARGIN, either answer counts as right
MARGIN = 0.25
_STEP = math.log((0.5 + MARGIN) / (0.5 - MARGIN))
# bits of information in a timing at the median
_CAPACITY = 1 + sum(p * math.log2(p) for p in (0.5 + MARGIN, 0.5 - MARGIN))
_SETTLED = 0.2  # the belief's probability beyond either end of the proposed interval


Wins = Callable[[int], bool]
Run = Callable[[], object]
# takes runs and a number of rounds, returns microseconds by run and round (`Device.rounds`)
Rounds = Callable[[Sequence[Run], int], list[list[float]]]


@dataclass(frozen=True, slots=True)
class Bracket:
    """The interval of lengths, in tokens, within which chunks begin to win.

    Chunks lose at `low` (None: at no length tried) and win at `high` (None: at no length tried).
    Both statements hold together with probability `confidence`, except at lengths where both sides
    are about equally fast. `timings` is the number of paired timings taken.
    """

    low: int | None
    high: int | None
    confidence: float
    timings: int


def geometric(least: int, most: int, per_octave: int = 4) -> tuple[int, ...]:
    """Lengths from `least` to `most`, `per_octave` to each factor of 2, without duplicates."""
    steps = max(1, round(per_octave * math.log2(most / least)))
    return tuple(sorted({round(least * (most / least) ** (n / steps)) for n in range(steps + 1)}))


# the lengths tried: beyond 1024 tokens, no token loop came close to the chunks
LENGTHS = geometric(1, 1024)


def search(wins: Wins, lengths: Sequence[int], confidence: float = 0.95) -> Bracket:
    """The crossing among the ascending `lengths`, found with few timings `wins(T)`."""
    coin = _Coin(wins)
    # belief[n]: the probability that chunks win from lengths[n] on, and not before
    belief = [1.0 / (len(lengths) + 1)] * (len(lengths) + 1)
    for _ in range(_most(len(belief))):
        low, high = _quantile(belief, _SETTLED), _quantile(belief, 1 - _SETTLED)
        if low == high:
            break
        at = _median(belief)
        belief = _updated(belief, at, won=coin.flip(lengths[at]))
    doubt = (1 - confidence) / 2  # the error probability allowed at each end
    return Bracket(
        _end(coin, lengths, _quantile(belief, _SETTLED) - 1, doubt, wanted=False),
        _end(coin, lengths, _quantile(belief, 1 - _SETTLED), doubt, wanted=True),
        confidence,
        coin.flips,
    )


def contest(
    declaration: Declaration,
    engine: EngineName,
    config: Configuration,
    dims: Dims,
    dtype: torch.dtype,
    device: torch.device,
    rounds: Rounds,
    *,
    rows: int,
) -> Wins:
    """A function of T that times both forwards once and says whether the chunks won.

    One forward runs in chunks under `config`, the other is the engine's token loop. The call has
    one sequence of T tokens with `rows` heads.
    """
    by_token = load(engine).forward_by_token
    micro = declaration.default_micro
    inputs = partial(
        draw,
        declaration,
        declaration.normal_form(micro),
        Family.ORDINARY,
        dims,
        dtype,
        device,
        micro=micro,
        batch=1,
        heads=rows,
    )

    @cache
    def contestants(T: int) -> tuple[Run, Run]:
        call = inputs(tokens=T)
        runs = (partial(ConfiguredEngine(engine, config).forward, call), partial(by_token, call))
        rounds(runs, 1)  # compiles, and warms the caches
        return runs

    def wins(T: int) -> bool:
        (chunks,), (tokens,) = rounds(contestants(T), 1)
        return chunks < tokens

    return wins


class _Coin:
    """Counts the timings taken."""

    def __init__(self, wins: Wins) -> None:
        self._wins = wins
        self.flips = 0

    def flip(self, T: int) -> bool:
        self.flips += 1
        return self._wins(T)


def _most(places: int) -> int:
    """The limit of timings for a search of `places`: near even odds, a belief never settles."""
    return math.ceil((math.log2(places) - math.log2(_SETTLED)) / _CAPACITY)


def _median(belief: list[float]) -> int:
    """The index of the length that divides the belief most evenly."""
    below = list(itertools.accumulate(belief[:-1]))
    return min(range(len(below)), key=lambda n: abs(below[n] - 0.5))


def _quantile(belief: list[float], q: float) -> int:
    return min(bisect.bisect_left(list(itertools.accumulate(belief)), q), len(belief) - 1)


def _updated(belief: list[float], at: int, *, won: bool) -> list[float]:
    weights = [
        b * (0.5 + MARGIN if (place <= at) == won else 0.5 - MARGIN)
        for place, b in enumerate(belief)
    ]
    total = sum(weights)
    return [w / total for w in weights]


def _end(coin: _Coin, lengths: Sequence[int], at: int, doubt: float, *, wanted: bool) -> int | None:
    """The first length from `at` outwards whose test says `wanted` (True: chunks win); else None.

    All tests together accept a wrong length with probability at most `doubt`, because each test may
    err with half the probability of the test before it.
    """
    stride = 1
    while 0 <= at < len(lengths):
        doubt /= 2
        if _tested(coin, lengths[at], doubt) == wanted:
            return lengths[at]
        at += stride if wanted else -stride
        stride *= 2
    return None


def _tested(coin: _Coin, T: int, doubt: float) -> bool:
    """Whether chunks win at T; outside the margin it errs with probability at most `doubt`."""
    evidence, enough = 0.0, math.log((1 - doubt) / doubt)
    while abs(evidence) < enough:
        evidence += _STEP if coin.flip(T) else -_STEP
    return evidence > 0
