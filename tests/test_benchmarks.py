"""The benchmarks judge and report correctly, tested on a CPU with right and wrong peers."""

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import chunkwise as cw
import chunkwise.fla
import pytest
import torch
from chunkwise.integrations import mamba_ssm
from torch import Tensor

from benchmarks import compare, measure, peers, registry, report, run, verify
from benchmarks.contest import BOTH, FORWARD, Contestant, Problem, Row, Settings, contest, rivals
from benchmarks.peers import Operands, Peer
from benchmarks.registry import CASES, SHAPES

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, torch.float32, bandwidth=1e10, repeats=2, engine="eager")
SMALL = replace(SHAPES["XS"], T=20, D=8)
DELTA = Problem(CASES["delta_rule"], SMALL, "", SETTINGS)


def token_loop(x: Operands, cu_seqlens: Tensor | None) -> Tensor:
    o: Tensor = cw.library.delta_rule(**x, cu_seqlens=cu_seqlens, engine="reference")[0]
    return o


def wrong_gradient(x: Operands, cu_seqlens: Tensor | None) -> Tensor:
    o = token_loop(x, cu_seqlens)
    return o.detach() + 2 * (o - o.detach())


def wrong_inference(x: Operands, cu_seqlens: Tensor | None) -> Tensor:
    o = token_loop(x, cu_seqlens)
    return o if torch.is_grad_enabled() else o + 1


def refusing(x: Operands, cu_seqlens: Tensor | None) -> Tensor:
    raise RuntimeError("not on this machine\nand a second line")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Row]]:
    """The rows of the delta rule against a double, which is registered as peers are."""

    def play(call: Any) -> list[Row]:
        double = Peer("double", "torch", call, devices=("cpu",))
        monkeypatch.setitem(peers.PEERS, "delta_rule", (double,))
        assert rivals(DELTA.case, CPU) == ["double"]
        return contest(DELTA, ["double"])

    return play


Play = Callable[[Any], list[Row]]


def test_a_right_peer_gets_a_ratio(played: Play) -> None:
    forward, both = played(token_loop)
    assert (forward.mode, both.mode) == (FORWARD, BOTH)
    assert both.ours.ok
    assert both.peer.ok
    assert both.ratio is not None
    assert both.ratio == pytest.approx(both.peer.ms / both.ours.ms)
    assert both.ours.peak_mb is None  # a CPU has no such counter
    assert both.ours.first_s is not None
    assert both.ours.spread is not None


@pytest.mark.parametrize("call", [wrong_gradient, wrong_inference])
def test_a_wrong_peer_is_called_wrong(call: object, played: Play) -> None:
    rows = played(call)
    assert all(r.ours.ok and r.peer.ok is False for r in rows)
    assert "FAILED" in report.notes(rows)
    assert "yes / WRONG" in report.table(rows)


def test_a_peer_that_refuses_does_not_end_the_run(played: Play) -> None:
    rows = played(refusing)
    assert all(r.ours.ok and r.peer == Contestant() and r.ratio is None for r in rows)
    assert "double: RuntimeError: not on this machine" in report.notes(rows)
    assert "second line" not in report.notes(rows)


DOUBLED = [(name, peer) for name, found in peers.PEERS.items() for peer in found]
OWN = ("gated_delta_product", "mamba2", "kda")  # whose peers have operands of their own, and quick


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        pytest.param(n, p, marks=[] if n in OWN else pytest.mark.long, id=f"{n}-{p.name}")
        for n, p in DOUBLED
    ],
)
def test_peers_are_called_with_what_they_take(
    name: str, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By functions of the same names and signatures, which compute the same."""
    install_doubles(monkeypatch)
    monkeypatch.setenv("CHUNKWISE_ENGINE", "eager")
    double = replace(peer, ready=lambda: None, devices=("cpu",))
    monkeypatch.setitem(peers.PEERS, name, (double,))
    case = CASES[name]
    rows = contest(Problem(case, SMALL, case.gates[0], SETTINGS), [peer.name])
    assert all(r.ours.ok and r.peer.ok for r in rows), report.notes(rows)


def install_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(module: str, function: str, value: object) -> None:
        made = ModuleType(module)
        setattr(made, function, value)
        monkeypatch.setitem(sys.modules, module, made)

    def packed(*operands: Tensor) -> tuple[Tensor, None]:
        """cuDNN's: tokens of all sequences in a row, with the default scale."""
        *given, boundaries = operands
        assert boundaries.dtype == torch.int32
        o, _ = cw.fla.chunk_kda(*(x[None] for x in given), cu_seqlens=boundaries.long())
        return o[0], None

    for module in [n for n in sys.modules if n.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, module)
    cw.fla.install()
    for module in [n for n in sys.modules if n.split(".")[0] == "fla"]:
        monkeypatch.setitem(sys.modules, module, sys.modules[module])
    add("cudnn.linear_attention", "kimi_delta_attention", packed)
    add("flash_qla", "chunk_gated_delta_rule", cw.fla.chunk_gated_delta_rule)
    add(
        "mamba_ssm.ops.triton.ssd_combined",
        "mamba_chunk_scan_combined",
        mamba_ssm.mamba_chunk_scan_combined,
    )


def test_another_recurrence_is_timed_beside() -> None:
    case = CASES["momentum_delta"]
    rows = contest(Problem(case, SMALL, "mild", SETTINGS), rivals(case, CPU))
    assert [r.against for r in rows] == ["gated_delta_rule"] * 2
    assert all(r.ours.ok and r.peer.ok for r in rows)
    assert rows[0].bar == 1 / 1.6


def row(
    ms: float,
    peer: float | None = None,
    *,
    ok: bool = True,
    spread: float = 0.02,
    against: str = "fla",
) -> Row:
    ours = Contestant(ms=ms, device_ms=ms, spread=spread, ok=ok)
    them = Contestant(ms=peer, device_ms=peer, spread=spread)
    against = None if peer is None else against
    return Row("kda", "mild", "F", "bfloat16", FORWARD, against, ours, them, 0.1)


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        (row(1.0), row(1.02), "same"),
        (row(1.0), row(1.05), "lost"),
        (row(1.0), row(1.05, spread=0.2), "same"),
        (row(1.0), row(0.9), "gained"),
        (row(1.0), row(0.9, ok=False), "lost"),
        (row(1.0, 2.0), row(1.1, 2.2), "same"),  # a slower machine
        (row(1.0, 2.0), row(1.0, 1.8), "lost"),
    ],
)
def test_what_lost_is_told_from_noise(
    before: Row, now: Row, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, made in (("before", before), ("now", now)):
        files.append(str(tmp_path / name))
        report.write(Path(files[-1]), ["x"], {"device": "a"}, [report.entry(made)])
    assert compare.main(files) == (1 if word == "lost" else 0)
    printed = capsys.readouterr().out
    assert f"lost: {int(word == 'lost')} of 1" in printed
    assert f"gained: {int(word == 'gained')} of 1" in printed


@pytest.mark.parametrize("peer", [None, 2.0])
def test_noise_is_below_a_loss_of_5_percent_and_above_what_equal_runs_differ_by(
    peer: float | None,
) -> None:
    """Repeats vary by 1.5 %, runs by 0.5 %, and a machine with peers by 2 % for both sides."""
    draw = random.Random(0)

    def timed(ms: float) -> tuple[float, float]:
        run = ms * draw.gauss(1, 0.005)
        samples = sorted(run * draw.gauss(1, 0.015) for _ in range(50))
        return samples[25], measure.spread(samples)

    def lost(factor: float) -> bool:
        rows = []
        for ours in (1.0, factor):
            drift = draw.gauss(1, 0.02) if peer else 1.0
            (ms, spread), (other, _) = timed(ours * drift), timed((peer or 1.0) * drift)
            rows.append(row(ms, peer and other, spread=spread))
        (change,) = compare.changes(rows[:1], rows[1:])
        return change.lost

    assert sum(lost(1.0) for _ in range(200)) <= 2
    assert sum(lost(1.05) for _ in range(200)) >= 180


def test_a_cell_without_a_common_peer_is_compared_by_our_times() -> None:
    alone, fla, qla = row(1.0), row(1.1, 2.2), row(1.1, 1.0, against="flash_qla")
    for before, now in (([alone], [fla, qla]), ([fla, qla], [alone]), ([alone], [qla])):
        (change,) = compare.changes(before, now)
        assert change.gain == pytest.approx(before[0].ours.ms / now[0].ours.ms)
    assert [c.gain for c in compare.changes([fla, qla], [fla, qla])] == [1.0, 1.0]
    (change,) = compare.changes([row(1.0, 2.0)], [row(1.0, 1.0)], ratios=False)
    assert change.gain == 1.0  # another version of the peer is faster
    beside = [replace(row(1.0, ms, against="gla"), bar=0.5) for ms in (2.0, 1.0)]
    assert compare.changes(beside[:1], beside[1:])[0].gain == 1.0  # so is another of ours


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other devices, nothing in common, and results that do not say against whom they are."""
    one, other = report.entry(row(1.0)), report.entry(replace(row(1.0), shape="C"))
    old = {name: x for name, x in one.items() if name != "against"}
    described: list[tuple[str, list[dict[str, object]], str]] = [
        ("b", [one], "b before, a now"),
        ("a", [other], "no cell is in both"),
        ("a", [old], "before 2026-11-28"),
    ]
    report.write(tmp_path / "now", ["x"], {"device": "a"}, [one])
    for device, rows, why in described:
        report.write(tmp_path / "before", ["x"], {"device": device}, rows)
        assert compare.main([str(tmp_path / "before"), str(tmp_path / "now")]) == 2
        assert why in capsys.readouterr().out
    report.write(tmp_path / "before", ["x"], {"device": "a"}, [one, other])
    assert compare.main([str(tmp_path / "before"), str(tmp_path / "now")]) == 0
    assert "not measured now: 1 cells" in capsys.readouterr().out
    report.write(tmp_path / "before", ["x"], {"device": "b"}, [one])
    assert run.main([*COMMAND, "--compare", str(tmp_path / "before")]) == 2  # nothing is measured
    assert "not comparable" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"rows": []}'])
def test_what_is_no_result_is_named(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "before.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    for command in (run.main, lambda argv: compare.main([argv[-1], argv[-1]])):
        with pytest.raises(SystemExit) as stopped:
            command([*COMMAND, "--compare", str(path)])
        assert stopped.value.code == 2
        assert "before.json' " in capsys.readouterr().err


def test_no_ratio_for_a_wrong_result_of_ours() -> None:
    wrong = row(1.0, 2.0, ok=False)
    assert wrong.ratio is None
    assert wrong.device_ratio is None


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


@pytest.mark.parametrize(
    ("name", "gates", "mean"),
    [
        *(("simple_gla", "mild", -0.4), ("simple_gla", "strong", -1.6)),
        *(("gla", "mild", -0.4), ("gla", "strong", -2.5)),
    ],
)
def test_gates_are_drawn_mild_and_strong(name: str, gates: str, mean: float) -> None:
    case = CASES[name]
    assert case.gates == ("mild", "strong")
    g = registry.draw(case, SHAPES["XS"], torch.float32, CPU, gates=gates)["g"].detach()
    assert float(g.mean()) == pytest.approx(mean, rel=0.1)
    assert name == "simple_gla" or float(g.min()) >= -5


def test_what_peers_compute_by_themselves_has_no_gates_to_draw() -> None:
    assert CASES["retention"].gates == ("",)
    assert CASES["delta_rule"].gates == ("",)


def test_packed_shapes_are_checked_too() -> None:
    shape = replace(SMALL, B=1, T=20, lengths=(3, 0, 16, 1))
    assert all(r.ours.ok for r in contest(replace(DELTA, shape=shape), []))


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
    assert verify.sample(CASES["gla"], SHAPES["F"]) == [(0, 0), (2, 8), (3, 15)]
    assert verify.sample(CASES["gla"], replace(SMALL, B=1, H=1)) == [(0, 0)]
    # gradients of heads are sums over the batch
    assert verify.sample(CASES["mamba2"], SHAPES["F"]) == [(b, 15) for b in range(4)]


def test_gradients_of_heads_are_checked() -> None:
    rows = contest(replace(DELTA, case=CASES["mamba2"]), [])
    assert all(r.ours.ok for r in rows)
    assert "dA_log" in report.notes(rows)


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


COMMAND = ["--device", "cpu", "--shapes", "XS", "--repeats", "2", "--engine", "eager"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "out.json"
    command = [*COMMAND, "--ops", "delta_rule,gla", "--gates", "mild", "--json", str(path)]
    assert run.main(command) == 0
    printed = capsys.readouterr().out
    assert "x floor" in printed
    assert "processor:" in printed
    content = json.loads(path.read_text())
    assert [r["recurrence"] for r in content["rows"]] == ["delta_rule"] * 2 + ["gla"] * 2
    assert content["machine"]["versions"]["torch"] == metadata.version("torch")


def test_the_command_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    command = [*COMMAND, "--ops", "delta_rule,retention", "--json", str(path)]
    assert run.main([*command[:-4], "--ops", "retention", *command[-2:]]) == 0
    before = json.loads(path.read_text())["rows"]
    assert run.main([*command, "--seconds", "0"]) == 0  # no time is left
    assert "1 of 1 cells are left" in capsys.readouterr().out
    assert run.main([*command, "--compare", str(path)]) == 0
    assert "lost: 0 of 2 cells" in capsys.readouterr().out  # compared with itself, of before
    after = json.loads(path.read_text())["rows"]
    assert after[:2] == before
    assert [r["recurrence"] for r in after] == ["retention"] * 2 + ["delta_rule"] * 2
    with pytest.raises(SystemExit, match=r"of settings .*: name another file"):
        run.main([*command, "--repeats", "3"])
    for name, value in (("versions", {"torch": "1.0"}), ("sources", "of another day")):
        content = json.loads(path.read_text())
        content["machine"][name] = value
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=rf"of {name} .*: name another file"):
            run.main([*command[:-1], str(tmp_path / "other.json")])


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
