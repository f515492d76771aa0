"""The net catches what it should: its draws reach the whole language, and faults are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chunkwise import dsl
from chunkwise.dsl import errors
from chunkwise.runtime import eager as eager_engine

from tests import net
from tests.random_calls import RESETS, Boundaries, Layout, Loss, Probe
from tests.random_draws import Draw, Outcome, Verdict, examine

DRAWS = [net.numbered("eager", 0, n)[0] for n in range(600)]
KINDS = ("Key", "Value", "Scalar", "HeadKey", "HeadValue", "HeadScalar", "State", "KeyState")
TUPLES = ("tuple[Key, ...]", "tuple[Value, ...]", "tuple[Scalar, ...]")
NOT_FUNCTIONS = {*KINDS, "Declaration", "Step", "declaration", "normalise", "trace"}


def test_every_kind_and_function_is_drawn() -> None:
    text = "\n".join(d.rule.source for d in DRAWS)
    for kind in (*KINDS, *TUPLES, "float", "float = 0.7", "int = 2", "bool = True"):
        assert f": {kind}" in text, kind
    for function in set(dsl.__all__) - NOT_FUNCTIONS:
        assert f"{function}(" in text, function


def test_every_call_is_drawn() -> None:
    plans = [d.plan for d in DRAWS]
    for values, drawn in (
        (set(RESETS), {p.reset for p in plans}),
        (set(Layout), {x for p in plans for x in p.layouts}),
        (set(Layout), {p.cotangents for p in plans}),
        (set(Boundaries), {p.boundaries for p in plans}),
        (set(Loss), {p.loss for p in plans}),
        (set(Probe), {p.probe for p in plans}),
        ({1, 2, 3}, {p.micro for p in plans}),
        ({0, 1, 15, 16, 17}, {p.T for p in plans}),
        ({torch.float32, torch.float64}, {p.dtype for p in plans}),
        ({torch.float32, torch.float64, torch.bfloat16}, {p.default_dtype for p in plans}),
    ):
        assert values <= drawn
    assert {p.T for p in plans if p.T == p.K == p.V} >= {16, 64}
    assert any(p.lengths and 0 in p.lengths and any(p.lengths) for p in plans)


def test_a_draw_is_the_same_in_every_run() -> None:
    one, choices = net.numbered("eager", 3, 7)
    assert net.numbered("eager", 3, 7)[0] == one == net.replayed("eager", choices)[0]
    assert net.numbered("eager", 4, 7)[0] != one


def _a_run() -> Draw:
    """The first draw that the eager engine computes."""
    return next(
        d
        for d in DRAWS
        if d.plan.probe is Probe.RUN
        and d.plan.tokens
        and d.plan.check is None
        and examine(d, "eager") == Verdict(Outcome.AGREED)
    )


def _off(o: torch.Tensor) -> torch.Tensor:
    return o * (1 + 1e-3)


def _lost(o: torch.Tensor) -> torch.Tensor:
    return torch.full_like(o, torch.nan)


def _raises(o: torch.Tensor) -> torch.Tensor:
    raise IndexError("of our own making")


def _broken(o: torch.Tensor) -> torch.Tensor:
    raise errors.InvalidIR("a pass is wrong")


def _refused(o: torch.Tensor) -> torch.Tensor:
    raise errors.NotLowered("rule: too hard", "", "")


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        (_off, Outcome.WRONG, "o"),
        (_lost, Outcome.WRONG, "o (NaN)"),
        (_raises, Outcome.CRASHED, "IndexError"),
        (_broken, Outcome.CRASHED, "InvalidIR"),
        (_refused, Outcome.REFUSED, "NotLowered: too hard"),
    ],
)
def test_a_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[torch.Tensor], torch.Tensor],
    outcome: Outcome,
    reason: str,
) -> None:
    drawn, run = _a_run(), eager_engine._Run.__call__

    def faulty(self: Any, values: Any) -> Any:
        o, *finals = run(self, values)
        return [fault(o), *finals]

    monkeypatch.setattr(eager_engine._Run, "__call__", faulty)
    verdict = examine(drawn, "eager")
    assert verdict.outcome is outcome
    assert reason in verdict.reason


def test_a_failure_shrinks() -> None:
    """What does not matter goes; what does stays."""

    def fails(d: Draw) -> bool:
        one = d.rule.source.count(": State") == 1  # what groups of states need is longer
        return one and "l2norm" in d.rule.source and d.plan.T > 8

    index = next(n for n, d in enumerate(DRAWS) if fails(d))
    smallest = net.shrunk("eager", net.numbered("eager", 0, index)[1], fails, seconds=20.0)
    assert fails(smallest)
    assert len(smallest.rule.lines) < 6
    assert (smallest.plan.B, smallest.plan.K, smallest.plan.lengths) == (1, 2, None)


def test_a_campaign_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    given = ["--engine", "eager", "--json", str(file), "--jobs", "1"]
    kept = {"index": 0, "outcome": "wrong", "reason": "kept", "seconds": 0.0}
    file.write_text(json.dumps(kept) + "\n")
    assert net.main([*given, "--count", "3"]) == 1
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records[0] == kept
    assert [r["index"] for r in records] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "wrong" in printed
    assert "kept" in printed


def test_a_process_that_ends_is_a_crash() -> None:
    worker = net._Worker("eager", 0, 0.0)
    worker.index = 5
    record = worker.lost("the process ended")
    assert (record["index"], record["outcome"]) == (5, "crashed")
    worker.give(None)
    worker._process.join(60)
    assert worker._process.exitcode == 0
