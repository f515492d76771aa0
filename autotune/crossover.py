"""From which length chunks beat the token loop: noisy binary search over a monotone probability.

The model is Karp and Kleinberg's ("Noisy binary search and its applications", 2007): one paired
timing at length T is won by the chunks with a probability that rises with T, and nothing else is
assumed. `search` keeps a belief of where it passes 1/2, as in the Bayesian algorithm of Gretta and
Price ("Sharp noisy binary search with monotonic probabilities", 2023): each timing is taken at the
belief's median, and counts as a coin of probability 1/2 +- MARGIN would. A belief trusts that
model; so the two ends that it proposes are then tested by themselves (Wald's sequential test) and
moved outwards until they stand. The confidence is that of these tests.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol, cast

import torch
from torch import Tensor

from ..codegen.config import Dims
from ..dsl.declaration import Declaration
from ..runtime.call import Call
from ..runtime.engines import EngineName, load
from ..runtime.tuned.artifact import Configuration
from .inputs import Family, draw
from .validation import Under

# probabilities within 1/2 +- MARGIN count as even: either answer is right there
MARGIN = 0.25
_STEP = math.log((0.5 + MARGIN) / (0.5 - MARGIN))
# bits that a timing at the median tells
_CAPACITY = 1 + sum(p * math.log2(p) for p in (0.5 + MARGIN, 0.5 - MARGIN))
_SETTLED = 0.2  # what a belief may leave on either side of the ends that it proposes


Wins = Callable[[int], bool]
Run = Callable[[], object]
# microseconds of each run in each of so many rounds (`measure.Device.rounds`)
Rounds = Callable[[Sequence[Run], int], list[list[float]]]


class _Stepping(Protocol):
    """An engine that also computes a forward token by token."""

    def forward_by_token(self, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]: ...


@dataclass(frozen=True, slots=True)
class Bracket:
    """The lengths between which chunks begin to win; None: no length is short, or long, enough.

    At `low` they lose and at `high` they win, both at once with `confidence`, up to lengths where
    it is as good as even; `timings` paired timings were taken.
    """

    low: int | None
    high: int | None
    confidence: float
    timings: int


def geometric(least: int, most: int, per_octave: int = 4) -> tuple[int, ...]:
    """Lengths from `least` to `most`, so many to a factor of 2 where they are not the same."""
    steps = max(1, round(per_octave * math.log2(most / least)))
    return tuple(sorted({round(least * (most / least) ** (n / steps)) for n in range(steps + 1)}))


# what is tried of a recurrence: beyond, nothing that goes token by token was near
LENGTHS = geometric(1, 1024)


def search(wins: Wins, lengths: Sequence[int], confidence: float = 0.95) -> Bracket:
    """The crossing among `lengths`, which rise, by few timings `wins(T)`."""
    coin = _Coin(wins)
    belief = [1.0 / (len(lengths) + 1)] * (len(lengths) + 1)  # chunks win from the n-th length on
    for _ in range(_most(len(belief))):
        low, high = _quantile(belief, _SETTLED), _quantile(belief, 1 - _SETTLED)
        if low == high:
            break
        at = _median(belief)
        belief = _updated(belief, at, won=coin.flip(lengths[at]))
    doubt = (1 - confidence) / 2  # of each end
    return Bracket(
        _end(coin, lengths, _quantile(belief, _SETTLED) - 1, doubt, wanted=False),
        _end(coin, lengths, _quantile(belief, 1 - _SETTLED), doubt, wanted=True),
        confidence,
        coin.flips,
    )


def sweep(wins: Wins, lengths: Sequence[int], confidence: float = 0.95) -> Bracket:
    """The same by a majority of equally many timings at every length: what `search` spares."""
    coin = _Coin(wins)
    each = _majority((1 - confidence) / len(lengths))
    won = [2 * sum(coin.flip(T) for _ in range(each)) > each for T in lengths]
    first = won.index(True) if True in won else len(won)
    return Bracket(
        lengths[first - 1] if first else None,
        lengths[first] if first < len(won) else None,
        confidence,
        coin.flips,
    )


def _majority(doubt: float) -> int:
    """How many timings have a wrong majority with probability `doubt` at most, at the margin."""

    def wrong(n: int) -> float:
        right = 0.5 + MARGIN
        few = range(n // 2 + 1)
        return sum(math.comb(n, k) * right**k * (1 - right) ** (n - k) for k in few)

    return next(n for n in itertools.count(1, 2) if wrong(n) <= doubt)


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
    """Timings of the forward of `engine` under `config` beside its own token by token, here.

    `rows`: heads of the one sequence.
    """
    by_token = cast(_Stepping, load(engine)).forward_by_token
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
        runs = (partial(Under(engine, config).forward, call), partial(by_token, call))
        rounds(runs, 1)  # compiled, and warm
        return runs

    def wins(T: int) -> bool:
        (chunks,), (tokens,) = rounds(contestants(T), 1)
        return chunks < tokens

    return wins


class _Coin:
    """Counts the timings."""

    def __init__(self, wins: Wins) -> None:
        self._wins = wins
        self.flips = 0

    def flip(self, T: int) -> bool:
        self.flips += 1
        return self._wins(T)


def _most(places: int) -> int:
    """The timings that it takes to find one of so many: near even, a belief never settles."""
    return math.ceil((math.log2(places) - math.log2(_SETTLED)) / _CAPACITY)


def _median(belief: list[float]) -> int:
    """The length that parts the belief most evenly: places up to it are won there."""
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
    """The first length from `at` outwards that is tested to be won, or lost, as `wanted`.

    A wrong length is accepted with probability `doubt` in all: half of it for each test in turn.
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
    """Whether chunks win at T: wrong with probability `doubt` where it is not as good as even."""
    evidence, enough = 0.0, math.log((1 - doubt) / doubt)
    while abs(evidence) < enough:
        evidence += _STEP if coin.flip(T) else -_STEP
    return evidence > 0
