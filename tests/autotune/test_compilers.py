"""Compilations in other processes: their outcomes, their crashes, and their end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from chunkwise.autotune.compilers import Compilers
from chunkwise.autotune.tunable import Built, Job

from tests.autotune.fake import StoodStill

AN_HOUR = 3600.0


@dataclass(frozen=True)
class Sleep:
    """A compilation that takes `seconds`, and reports its process."""

    seconds: float

    def __call__(self) -> Built:
        time.sleep(self.seconds)
        return Built(code=str(os.getpid()))


def crash() -> Built:
    """A compilation that crashes its process."""
    os._exit(11)


def all_done(
    compilers: Compilers[str],
    orders: dict[str, tuple[Job, ...]],
    waiting: Callable[[set[str]], None] = lambda left: None,
) -> dict[str, list[Built]]:
    """The results of `orders`; `waiting` is called with the orders that are left."""
    for key, jobs in orders.items():
        compilers.order(key, jobs)
    found: dict[str, list[Built]] = {}
    while compilers.orders:
        for key, built in compilers.done(1.0):
            found[key] = list(built)
        waiting(orders.keys() - found.keys())
    return found


def test_a_crash_and_a_delay_are_outcomes_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StoodStill()
    monkeypatch.setattr("chunkwise.autotune.compilers.time", clock)

    def late(left: set[str]) -> None:
        if left == {"late"}:
            clock.sleep(3)

    orders: dict[str, tuple[Job, ...]] = {
        "crash": (crash,),
        "late": (Sleep(AN_HOUR),),
        "fine": (Sleep(0), Sleep(0)),
        "nothing": (),
    }
    with Compilers[str](2, limit_s=2.0) as compilers:
        found = all_done(compilers, orders, late)
        again = all_done(compilers, {"fine": (Sleep(0),)})
    assert found["crash"][0].error == "the compiler crashed"
    assert found["late"][0].error == "the compiler took more than 2 s"
    assert [b.error for b in found["fine"]] == [None, None]
    assert found["nothing"] == []
    assert again["fine"][0].error is None


def test_processes_are_used_again_and_killed_at_the_end() -> None:
    with Compilers[str](1) as compilers:
        found = all_done(compilers, {str(n): (Sleep(0),) for n in range(3)})
        pids = {int(b.code or 0) for several in found.values() for b in several}
        assert len(pids) == 1
        compilers.order("long", (Sleep(AN_HOUR),))
        assert compilers.hungry  # one more may wait
    (pid,) = pids
    assert not os.path.exists(f"/proc/{pid}") or os.name != "posix"
