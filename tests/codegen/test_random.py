"""The net in little: numbered random calls of random recurrences, on every engine.

`python -m tests.net --engine eager --count 5000` draws more of them.
"""

from __future__ import annotations

import pytest

from tests.net import block
from tests.random_draws import Outcome, Verdict

# of a block; a refusal is an error of the catalogue, and some steps are meant to be refused
REFUSED, MOOT = 0.3, 0.15


pytestmark = pytest.mark.usefixtures("short_chunks")


def _holds(verdicts: list[Verdict]) -> None:
    """That most draws were compared."""
    outcomes = [v.outcome for v in verdicts]
    assert outcomes.count(Outcome.REFUSED) <= REFUSED * len(outcomes)
    assert outcomes.count(Outcome.MOOT) <= MOOT * len(outcomes)


@pytest.mark.parametrize("first", range(0, 300, 30))
def test_eager(first: int) -> None:
    _holds(block("eager", first, 30))


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_tvm(first: int) -> None:
    _holds(block("tvm", first, 25))


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("first", range(0, 30, 15))
def test_triton(first: int) -> None:
    _holds(block("triton", first, 15))
