"""The benchmarks judge and report correctly, tested on a CPU with right and wrong peers."""

import json
import math
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import chunkwise as cw
import pytest
import torch
from torch import Tensor

from benchmarks import measure, registry, report, run, verify
from benchmarks.contest import BOTH, FORWARD, Contestant, Row, Settings, contest
from benchmarks.registry import CASES, SHAPES

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, torch.float32, bandwidth=1e10, repeats=2)
SMALL = replace(SHAPES["XS"], T=20, D=8)


def peer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    o: Tensor = cw.library.delta_rule(q, k, v, beta, cu_seqlens=cu_seqlens, engine="reference")[0]
    return o


def wrong_gradient(*operands: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    o = peer(*operands, cu_seqlens=cu_seqlens)
    return o.detach() + 2 * (o - o.detach())


def wrong_inference(*operands: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    o = peer(*operands, cu_seqlens=cu_seqlens)
    return o if torch.is_grad_enabled() else o + 1


def refusing(*operands: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    raise RuntimeError("not on this machine\nand a second line")


def rows_with(call: object) -> list[Row]:
    case = replace(CASES["delta_rule"], peer=call)
    return contest(case, cw.library.delta_rule, SMALL, SETTINGS)


def test_a_right_peer_gets_a_ratio() -> None:
    forward, both = rows_with(peer)
    assert (forward.mode, both.mode) == (FORWARD, BOTH)
    assert both.ours.ok
    assert both.peer.ok
    assert both.ratio is not None
    assert both.ratio == pytest.approx(both.peer.ms / both.ours.ms)
    assert both.ours.peak_mb is None  # a CPU has no such counter
    assert both.ours.first_s is not None


@pytest.mark.parametrize("call", [wrong_gradient, wrong_inference])
def test_a_wrong_peer_is_called_wrong(call: object) -> None:
    rows = rows_with(call)
    assert all(r.ours.ok and r.peer.ok is False for r in rows)
    assert "FAILED" in report.notes(rows)
    assert "yes / WRONG" in report.table(rows)


def test_a_peer_that_refuses_does_not_end_the_run() -> None:
    rows = rows_with(refusing)
    assert all(r.ours.ok and r.peer == Contestant() and r.ratio is None for r in rows)
    assert "peer: RuntimeError: not on this machine" in report.notes(rows)
    assert "second line" not in report.notes(rows)


def test_no_ratio_for_a_wrong_result_of_ours() -> None:
    ours = Contestant(ms=1.0, ok=False)
    row = Row("x", "F", FORWARD, ours, Contestant(ms=2.0, ok=True), 1.0)
    assert row.ratio is None
    assert row.device_ratio is None


def test_geometric_mean() -> None:
    assert report.geometric_mean([0.5, None, 8.0]) == pytest.approx(2.0)
    assert report.geometric_mean([None]) is None


def test_operands_are_drawn_as_models_have_them() -> None:
    drawn = registry.draw(CASES["gated_delta_rule"], SHAPES["XS"], torch.bfloat16, CPU)
    assert list(drawn) == ["q", "k", "v", "g", "beta"]
    assert [y.dtype for y in drawn.values()] == [torch.bfloat16] * 3 + [torch.float32] * 2
    q, k, _, g, beta = (y.detach().float() for y in drawn.values())
    assert float(q.square().mean()) == pytest.approx(1 / SHAPES["XS"].D, rel=0.1)
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 96, 2), atol=0.02, rtol=0)
    assert g.max() <= 0
    assert float(g.mean()) == pytest.approx(-0.4, abs=0.05)
    assert 0 <= beta.min() <= beta.max() <= 1


def test_what_a_peer_knows_by_itself_is_drawn_so() -> None:
    decay = registry.draw(CASES["retention"], SMALL, torch.float32, CPU)["g"]
    torch.testing.assert_close(decay, torch.tensor([1 - 2**-5, 1 - 2**-6]).log())
    assert not decay.requires_grad


def test_packed_shapes_are_checked_too() -> None:
    case = replace(CASES["delta_rule"], peer=None)
    shape = replace(SMALL, B=1, T=20, lengths=(3, 0, 16, 1))
    assert all(r.ours.ok for r in contest(case, cw.library.delta_rule, shape, SETTINGS))


@pytest.mark.parametrize(
    # bytes per token and head at K = V = 128, bfloat16, from the published shapes of the inputs:
    # q, k, v, o of 256 each; 4 for a gate or step size; 256 for a vector gate
    ("name", "forward", "backward"),
    [
        ("linear_attention", 1024, 1792),
        ("simple_gla", 1028, 1800),
        ("delta_rule", 1028, 1800),
        ("gated_delta_rule", 1032, 1808),
        ("gla", 1280, 2304),
    ],
)
def test_compulsory_bytes(name: str, forward: int, backward: int) -> None:
    shape = SHAPES["F"]
    units = shape.B * shape.T * shape.H
    counted = registry.compulsory_bytes(CASES[name], shape, torch.bfloat16)
    assert counted == (forward * units, backward * units)


def test_the_sample_is_fixed_and_within() -> None:
    assert verify.sample(SHAPES["F"]) == [(0, 0), (2, 8), (3, 15)]
    assert verify.sample(replace(SMALL, B=1, H=1)) == [(0, 0)]


def test_nan_is_not_right() -> None:
    assert not verify.TensorError("o", math.nan, 0.0, 1.0).ok


def test_sides_are_interleaved_and_reset() -> None:
    seen: list[str] = []
    sides = [
        measure.Side(lambda: seen.append("a"), lambda: seen.append("reset a")),
        measure.Side(lambda: seen.append("b"), lambda: seen.append("reset b")),
    ]
    measure.interleaved(sides, CPU, repeats=2, warmup=1)
    rounds = [seen[n : n + 4] for n in range(0, len(seen), 4)]
    assert len(rounds) == 3
    for order in rounds:  # each in turn, in an order of the round's own
        assert order in (["reset a", "a", "reset b", "b"], ["reset b", "b", "reset a", "a"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "out.json"
    command = ["--device", "cpu", "--shapes", "XS", "--ops", "delta_rule,gla", "--repeats", "2"]
    assert run.main([*command, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "x floor" in printed
    assert "processor:" in printed
    content = json.loads(path.read_text())
    assert [r["recurrence"] for r in content["rows"]] == ["delta_rule"] * 2 + ["gla"] * 2
    assert content["machine"]["versions"]["torch"] == metadata.version("torch")


def test_the_command_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--ops", "softmax"])
    assert "no recurrence 'softmax'" in capsys.readouterr().err


def test_the_command_of_cpus(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from benchmarks import cpu

    path = tmp_path / "cpu.json"
    threads = torch.get_num_threads()
    command = ["--ops", "linear_attention", "--channels", "16", "--tokens", "64", "--repeats", "1"]
    try:
        assert cpu.main([*command, "--only", "calls", "--threads", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    content = json.loads(path.read_text())
    assert content["command"].startswith("python -m benchmarks.cpu --ops linear_attention")
    assert content["machine"]["date"]
    assert [row["mode"] for row in content["rows"]] == ["forward", "forward+backward"]
    assert all(row["ratio"] > 0 for row in content["rows"])
