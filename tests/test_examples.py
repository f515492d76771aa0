"""The demo runs from declaration to plot, and its two tasks are as described."""

from pathlib import Path

import pytest
import torch

from examples import mqar, serving


def test_the_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "out" / "mqar.svg"
    assert mqar.main(["--steps", "3", "--out", str(plot), "--tune", "0"]) == 0
    printed = capsys.readouterr().out
    assert "rank 1 (one write, symmetric)" in printed  # explain()
    assert "additive attention   accuracy 0." in printed
    assert "</svg>" in plot.read_text(encoding="utf-8")
    assert printed.index("S = S + outer(k, v)") < printed.index("step ") < printed.index("rank 1")


def test_answers_are_the_last_binding() -> None:
    tokens, answers, bindings = mqar.text(8, torch.Generator().manual_seed(0))
    rows = zip(tokens.tolist(), answers.tolist(), bindings.tolist(), strict=True)
    for row, right, counts in rows:
        bound: dict[int, list[int]] = {}
        for i in range(0, 2 * mqar.PAIRS, 2):
            bound.setdefault(row[i], []).append(row[i + 1])
        queries = row[2 * mqar.PAIRS :]
        assert [bound[q][-1] for q in queries] == right
        assert [len(bound[q]) for q in queries] == counts


def test_the_delta_rule_forgets_where_addition_cannot() -> None:
    """The effect that the demo shows, without training: one key is bound twice and then read."""
    q = k = torch.eye(4)[None, [0, 0], None, :]
    v = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    added, _ = mqar.additive_attention(q, k, v)
    replaced, _ = mqar.delta_rule(q, k, v, torch.ones(1, 2, 1))
    assert added[0, 1, 0].tolist() == [1.0, 1.0]
    assert replaced[0, 1, 0].tolist() == [0.0, 1.0]


def test_continuous_batching_gives_the_tokens_of_the_plain_loop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert serving.main(["--requests", "5", "--slots", "3", "--layers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "5 requests" in printed
    assert "the same tokens" in printed
