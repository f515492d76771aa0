"""Every mistake of a caller is named: the operand, what it got, what was expected."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import chunkwise as cw
import numpy as np
import pytest
import torch
from torch import Tensor

E = cw.errors
Change = Callable[[dict[str, Tensor]], dict[str, Any]]


@cw.recurrence
def scaled(
    S: cw.State,
    q: cw.Key,
    k: cw.Key,
    v: cw.Value,
    u: cw.HeadKey,
    *,
    scale: float,
    twice: bool = False,
) -> tuple[cw.State, cw.Value]:
    S = S + cw.outer(u * k, v)
    return S, scale * (q @ S) * (2.0 if twice else 1.0)


def _with(**changed: Any) -> Change:
    return lambda x: {**x, **{n: f(x[n]) if callable(f) else f for n, f in changed.items()}}


def _without(name: str) -> Change:
    return lambda x: {n: t for n, t in x.items() if n != name}


def _cu(*bounds: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(bounds, dtype=dtype)


# gated_delta_rule with B = 2, T = 5, H = 2, HV = 4, K = 3, V = 6
BAD: dict[str, tuple[Change, type[Exception], tuple[str, ...]]] = {
    "axes missing": (
        _with(q=lambda q: q[0]),
        E.BadShape,
        ("'q'", "declared Key", "[5, 2, 3]", "[B,T,H|HV,K]"),
    ),
    "a gate per channel for a Scalar": (
        _with(g=lambda g: g[..., None].expand(-1, -1, -1, 3)),
        E.BadShape,
        ("'g'", "declared Scalar", "[2, 5, 4, 3]", "[B,T,HV]", "`g: Key`"),
    ),
    "another length": (
        _with(v=lambda v: v[:, :4]),
        E.BadShape,
        ("'v'", "[2, 4, 4, 6]", "T = 5", "operand 'q'"),
    ),
    "another batch": (_with(k=lambda k: k[:1]), E.BadShape, ("'k'", "[1, 5, 2, 3]", "B = 2")),
    "another key size": (
        _with(k=lambda k: k[..., :2]),
        E.BadShape,
        ("'k'", "[2, 5, 2, 2]", "K = 3"),
    ),
    "another number of value heads": (
        _with(beta=lambda b: b[..., :2]),
        E.BadShape,
        ("'beta'", "[2, 5, 2]", "HV = 4", "operand 'v'"),
    ),
    "value heads not a multiple": (
        _with(
            q=lambda q: q[:, :, :1].expand(-1, -1, 3, -1),
            k=lambda k: k[:, :, :1].expand(-1, -1, 3, -1),
        ),
        E.HeadMismatch,
        ("'q'", "3 heads", "4", "divisor"),
    ),
    "two kinds of grouping": (
        _with(k=lambda k: k[:, :, :1]),
        E.HeadMismatch,
        ("'k'", "1 heads", "2 as operand 'q'", "4 as operand 'v'"),
    ),
    "integers": (_with(v=lambda v: v.long()), E.BadDtype, ("'v'", "torch.int64", "float32")),
    "complex": (_with(q=lambda q: q + 0j), E.BadDtype, ("'q'", "torch.complex", "bfloat16")),
    "bool": (_with(g=lambda g: g > 0), E.BadDtype, ("'g'", "torch.bool")),
    "not a tensor": (_with(v=[1.0]), E.BadDtype, ("'v'", "list", "[B,T,HV,V]")),
    "another device": (_with(k=lambda k: k.to("meta")), E.BadDevice, ("'k'", "meta", "cpu")),
    "missing": (_without("beta"), E.MissingOperand, ("'beta'", "Scalar", "[B,T,HV]")),
    "unknown": (
        lambda x: {**x, "gamma": x["g"]},
        E.UnknownOperand,
        ("'gamma'", "q, k, v, g, beta"),
    ),
    "state of another shape": (
        lambda x: {**x, "initial_state": torch.zeros(2, 4, 6, 3)},
        E.BadShape,
        ("initial_state (S)", "[2, 4, 6, 3]", "[N,HV,K,V] = [2, 4, 3, 6]"),
    ),
    "state of integers": (
        lambda x: {**x, "initial_state": torch.zeros(2, 4, 3, 6).int()},
        E.BadDtype,
        ("initial_state (S)", "torch.int32"),
    ),
    "state elsewhere": (
        lambda x: {**x, "initial_state": torch.zeros(2, 4, 3, 6, device="meta")},
        E.BadDevice,
        ("initial_state (S)", "meta", "cpu"),
    ),
    "state of numbers": (
        lambda x: {**x, "initial_state": (0.0,)},
        E.BadDtype,
        ("initial_state (S)", "float", "a tensor"),
    ),
    "too many states": (
        lambda x: {**x, "initial_state": (None, None)},
        E.BadBatch,
        ("initial_state", "2", "1 tensors", "S"),
    ),
    "packed with a batch": (
        lambda x: {**x, "cu_seqlens": _cu(0, 5)},
        E.BadBatch,
        ("batch size 2", "expected 1", "[1, B*T, ...]"),
    ),
    "sparse": (_with(q=lambda q: q.to_sparse()), E.BadLayout, ("'q'", "sparse_coo", "to_dense")),
    "mkldnn": (_with(q=lambda q: q.to_mkldnn()), E.BadLayout, ("'q'", "_mkldnn", "to_dense")),
    "nested": (
        _with(v=lambda v: torch.nested.nested_tensor(list(v), layout=torch.jagged)),
        E.BadLayout,
        ("'v'", "a nested tensor", "cu_seqlens"),
    ),
    "sparse state": (
        lambda x: {**x, "initial_state": torch.ones(2, 4, 3, 6).to_sparse()},
        E.BadLayout,
        ("initial_state (S)", "sparse_coo"),
    ),
    "a number for a state": (
        lambda x: {**x, "initial_state": 0.0},
        E.BadDtype,
        ("'initial_state'", "float", "a tensor"),
    ),
    "a word for check": (
        lambda x: {**x, "check": "yes"},
        E.BadOption,
        ("'check'", "'yes'", "True, False or None"),
    ),
    "an engine nobody knows": (
        lambda x: {**x, "engine": "cuda"},
        E.EngineUnavailable,
        ("'cuda'", "reference, eager, triton"),
    ),
}

BAD_PACKINGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a list": ([0, 5], ("a list", "int32 or int64")),
    "of floats": (torch.tensor([0.0, 5.0]), ("torch.float32", "int32 or int64")),
    "of two axes": (_cu(0, 5)[None], ("[1, 2]", "[N+1]")),
    "of one entry": (_cu(5), ("[1]", "[N+1]")),
    "empty": (_cu(), ("[0]", "[N+1]")),
    "below 0": (_cu(0, -1, 5), ("-1 at [1] after 0", "do not decrease")),
    "not from 0": (_cu(1, 5), ("1 at [0]", "0")),
    "decreasing": (_cu(0, 4, 3, 5), ("3 at [2] after 4", "do not decrease")),
    "short of T": (_cu(0, 2, 4, dtype=torch.int32), ("4 at [2]", "T = 5")),
    "beyond T": (_cu(0, 2, 6), ("6 at [2]", "T = 5")),
}


def _operands(kit: Any, **sizes: Any) -> dict[str, Tensor]:
    all_sizes = kit.Sizes(**{"T": 5, "HV": 4, "K": 3, "V": 6, "dtype": torch.float32, **sizes})
    made = kit.make_inputs(cw.library.gated_delta_rule, all_sizes).operands
    return {n: x.detach() for n, x in made.items()}


def _assert_names(error: BaseException, fragments: tuple[str, ...]) -> None:
    for fragment in fragments:
        assert fragment in str(error), f"{fragment!r} is not in: {error}"


@pytest.mark.parametrize("case", BAD)
def test_bad_call(kit: Any, case: str) -> None:
    change, expected, fragments = BAD[case]
    with pytest.raises(expected) as raised:
        cw.library.gated_delta_rule(**change(_operands(kit)))
    _assert_names(raised.value, fragments)
    assert isinstance(raised.value, (ValueError, TypeError))


@pytest.mark.parametrize("case", BAD_PACKINGS)
def test_bad_packing(kit: Any, engine: str, case: str) -> None:
    cu_seqlens, fragments = BAD_PACKINGS[case]
    with pytest.raises(E.BadCuSeqlens) as raised:
        # on a GPU as well: a CPU tensor is looked into without waiting for the device
        cw.library.gated_delta_rule(**_operands(kit, B=1), cu_seqlens=cu_seqlens, engine=engine)
    _assert_names(raised.value, fragments)


_OF_CALLS = ("state", "check", "packed", "length")  # what a step has no argument for


@pytest.mark.parametrize("case", [c for c in BAD if not any(word in c for word in _OF_CALLS)])
def test_bad_step(kit: Any, case: str) -> None:
    """`step` names the same mistakes, with T = 1."""
    change, expected, _ = BAD[case]
    x = change({n: x[:, :1] for n, x in _operands(kit).items()})
    with pytest.raises(expected):
        cw.library.gated_delta_rule.step(**x)


@pytest.mark.parametrize("state", [0.0, {}, (0.0,), "S"], ids=repr)
@torch.no_grad()
def test_bad_state_of_a_step(kit: Any, state: Any) -> None:
    x = {n: t[:, 0] for n, t in _operands(kit).items()}
    with pytest.raises(E.BadDtype, match="initial_state"):
        cw.library.gated_delta_rule.step(**x, state=state)


def test_boundaries_elsewhere(kit: Any, engine: str) -> None:
    """They may come from the host, but not from another device, nor without numbers."""
    x = {n: t.to(kit.engine.device) for n, t in _operands(kit, B=1).items()}
    for wrong, error in (
        (torch.empty(2, dtype=torch.int32, device="meta"), E.BadDevice),
        (_cu(0, 5).to_sparse(), E.BadLayout),
    ):
        with pytest.raises(error, match="cu_seqlens"):
            cw.library.gated_delta_rule(**x, cu_seqlens=wrong, engine=engine)


def test_operands_by_position(kit: Any) -> None:
    x = _operands(kit)
    with pytest.raises(E.UnknownOperand, match="number 6"):
        cw.library.gated_delta_rule(*x.values(), x["g"])
    with pytest.raises(E.UnknownOperand, match="beta \\(again\\)"):
        cw.library.gated_delta_rule(*x.values(), beta=x["beta"])


@pytest.mark.parametrize(
    ("change", "expected", "fragments"),
    [
        ({"scale": None}, E.MissingOperand, ("'scale'", "float")),
        ({"scale": torch.tensor(1.0)}, E.BadDtype, ("'scale'", "Tensor", "HeadScalar")),
        ({"scale": "1"}, E.BadDtype, ("'scale'", "str", "number")),
        ({"scale": True}, E.BadDtype, ("'scale'", "bool", "number")),
        ({"scale": float("nan")}, E.BadNumber, ("'scale'", "nan", "a finite number")),
        ({"scale": np.float32("inf")}, E.BadNumber, ("'scale'", "inf", "a finite number")),
        ({"scale": 10**400}, E.BadNumber, ("'scale'", "inf", "a finite number")),
        ({"scale": np.ones(1)}, E.BadDtype, ("'scale'", "ndarray", "number")),
        ({"twice": 0.5}, E.BadDtype, ("'twice'", "float", "int or bool")),
        ({"u": lambda u: u[0]}, E.BadShape, ("'u'", "declared HeadKey", "[HV,K]")),
        ({"u": lambda u: u[:1]}, E.BadShape, ("'u'", "[1, 8]", "HV = 2")),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_numbers_and_head_operands(
    kit: Any, change: dict[str, Any], expected: type[Exception], fragments: tuple[str, ...]
) -> None:
    x = {n: t.detach() for n, t in kit.make_inputs(scaled, kit.Sizes()).operands.items()}
    with pytest.raises(expected) as raised:
        scaled(**_with(**change)({**x, "scale": 1.0, "twice": True}))
    _assert_names(raised.value, fragments)


@pytest.mark.parametrize(
    "scale", [2, np.float32(2), np.float64(2), np.int64(2), np.array(2.0), np.array(2)], ids=repr
)
def test_numbers_of_numpy(kit: Any, engine: str, scale: Any) -> None:
    sizes = kit.Sizes(T=1, dtype=torch.float32)
    x = {n: t.detach() for n, t in kit.make_inputs(scaled, sizes).operands.items()}
    want, _ = scaled(**x, scale=2.0, twice=True, engine=engine)
    got, _ = scaled(**x, scale=scale, twice=np.bool_(True), engine=engine)
    assert torch.equal(got, want)
    kernel = None if engine == "eager" else engine
    for kind in (scale, 2.0):
        step, _ = scaled.step(**x, scale=kind, twice=True, engine=kernel)
        torch.testing.assert_close(step, want, rtol=1e-5, atol=1e-6)


def test_micro_steps_agree(kit: Any) -> None:
    op = cw.library.delta_product
    x = {n: t.detach() for n, t in kit.make_inputs(op, kit.Sizes(micro=3)).operands.items()}
    with pytest.raises(E.BadShape, match=r"'beta'.*n = 3"):
        op(**{**x, "beta": x["beta"][:, :, :2]}, engine="reference")
    with pytest.raises(E.BadShape, match="at least one micro-step"):
        op(**{n: t[:, :, :0] if n != "q" else t for n, t in x.items()}, engine="reference")


@pytest.mark.parametrize("name", ["engine", "o", "d_q", "S_chunk"])
def test_names_of_options_and_results_are_reserved(name: str) -> None:
    def unlucky(S: cw.State, q: cw.Key, k: cw.Key, v: cw.Value) -> tuple[cw.State, cw.Value]:
        S = S + cw.outer(k, v)
        return S, q @ S

    kinds = {name if n == "v" else n: kind for n, kind in unlucky.__annotations__.items()}
    renamed = types.FunctionType(
        unlucky.__code__.replace(co_varnames=("S", "q", "k", name)), unlucky.__globals__
    )
    renamed.__annotations__ = kinds
    with pytest.raises(E.ReservedName, match=name):
        cw.recurrence(renamed)


def test_no_operand_is_named_like_an_entry_of_a_tuple() -> None:
    """Kernels call an entry so: one of the two would be read for both."""

    def entries(S: cw.State, q: cw.Key, k: tuple[cw.Key, ...], v: cw.Value, k_at1: cw.Key):
        for key in k:
            S = S + cw.outer(key, v)
        return S + cw.outer(k_at1, v), q @ S

    with pytest.raises(E.ReservedName, match="k_at1"):
        cw.recurrence(entries)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Triton's interpreter is numpy
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_names_the_first_nan(
    kit: Any, engine: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = _operands(kit)
    x["v"][1, 2, 3, 4] = value
    cw.library.gated_delta_rule(**x, engine=engine)
    with pytest.raises(E.NanOperand) as raised:
        cw.library.gated_delta_rule(**x, engine=engine, check=True)
    _assert_names(raised.value, ("'v'", str(value), "[1, 2, 3, 4]"))
    monkeypatch.setenv("CHUNKWISE_CHECK", "1")
    with pytest.raises(E.NanOperand):
        cw.library.gated_delta_rule(**x, engine=engine)
    cw.library.gated_delta_rule(**x, engine=engine, check=False)
    monkeypatch.setenv("CHUNKWISE_CHECK", "0")
    cw.library.gated_delta_rule(**x, engine=engine)


# Triton's interpreter is numpy
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_check_names_what_overflows(kit: Any, engine: str) -> None:
    """States beyond float16, of float16 operands: right where they stay wide, named elsewhere."""
    op = cw.library.simple_gla
    x = {n: t.half() for n, t in _operands(kit).items() if n != "beta"}
    x["q"] *= 1e-4
    state = torch.full((2, 4, 3, 6), 262144.0, device=kit.engine.device)
    options = {"initial_state": state, "engine": engine, "output_final_state": True}
    if engine == "triton":
        with pytest.raises(E.Overflow) as raised:
            op(**x, **options, check=True)
        _assert_names(raised.value, ("output of simple_gla", "65504", "bfloat16 or float32"))
        x = {n: t.float() for n, t in x.items()}
    o, end = op(**x, **options, check=True)
    wide = {n: t.double() for n, t in x.items()}
    want, final = op(**wide, **{**options, "engine": "reference"})
    torch.testing.assert_close(o.double(), want, rtol=5e-3, atol=1e-2)
    torch.testing.assert_close(end.double(), final, rtol=1e-3, atol=1e-2)
    # what the last token writes is read by none: only the final state shows it
    late = {n: x[n].float() for n in ("q", "k", "v")}
    late["k"][:, -1] = late["v"][:, -1] = 1e30
    late["q"][:, -1] = 0.0
    late |= {"w": torch.zeros_like(late["k"]), "u": torch.zeros_like(late["k"][0, 0, :1])}
    late["u"] = late["u"].expand(4, -1)
    with pytest.raises(E.Overflow, match=r"final state \(S\).*inf at"):
        cw.library.rwkv6(**late, engine=engine, output_final_state=True, check=True)


def test_check_looks_at_the_initial_state(kit: Any) -> None:
    state = torch.zeros(2, 4, 3, 6)
    state[1, 0, 0, 0] = float("nan")
    with pytest.raises(E.NanOperand, match="initial_state"):
        cw.library.gated_delta_rule(**_operands(kit), initial_state=state, check=True)


def test_check_names_the_gate_that_grows(kit: Any, engine: str) -> None:
    x = _operands(kit)
    x["g"][0, 1, 2] = 0.25
    with pytest.raises(E.PositiveGate) as raised:
        cw.library.gated_delta_rule(**x, engine=engine, check=True)
    _assert_names(raised.value, ("'g'", "0.25", "[0, 1, 2]", "at most 0"))
    x["g"][0, 1, 2] = -20.0
    cw.library.gated_delta_rule(**x, engine=engine, check=True)


def test_check_looks_behind_the_preamble(kit: Any) -> None:
    """The gate is what the step computes, not what the call passes: here -slope, per head."""
    op = cw.library.lightning_attention
    inputs = kit.make_inputs(op, kit.Sizes())
    x = {n: t.detach() for n, t in inputs.operands.items()}
    op(**x, check=True)
    with pytest.raises(E.PositiveGate, match="'slope'"):
        op(**{**x, "slope": -x["slope"]}, check=True)


def test_check_holds_promises(kit: Any) -> None:
    op = cw.library.hgrn2
    x = {n: t.detach() for n, t in kit.make_inputs(op, kit.Sizes()).operands.items()}
    op(**x, check=True, engine="reference")
    with pytest.raises(E.PositiveGate, match=r"within.*'f'.*\[0.0, 1.0\]"):
        op(**{**x, "f": 1.5 * x["f"] + 0.5}, check=True, engine="reference")


@pytest.mark.parametrize("name", ["simple_gla", "gla", "mamba2"])
def test_a_reset_is_no_nan(kit: Any, engine: str, name: str) -> None:
    """A gate may hold -inf, the log of 0; nothing else may, and no log-decay is NaN."""
    op = getattr(cw.library, name)
    gate = "dt" if name == "mamba2" else "g"
    x = {n: t.detach() for n, t in kit.make_inputs(op, kit.Sizes()).operands.items()}
    x[gate][:, 3] = float("-inf")
    op(**x, engine=engine, check=True)
    # a gate alone may hold inf, for all that is known of it: it is a decay that grows
    grows = E.NanOperand if name == "mamba2" else E.PositiveGate
    cases = (
        (gate, "nan", E.NanOperand),
        (gate, "inf", grows),
        (next(iter(x)), "-inf", E.NanOperand),
    )
    for other, value, error in cases:
        y = {**x, other: x[other].clone()}
        y[other][0, 2] = float(value)
        with pytest.raises(error) as raised:
            op(**y, engine=engine, check=True)
        _assert_names(raised.value, (repr(other), value))


def test_a_rate_may_be_infinite(kit: Any, engine: str) -> None:
    """The log-decay is then -inf, and nothing else takes the operand."""
    op = cw.library.lightning_attention
    x = {n: t.detach() for n, t in kit.make_inputs(op, kit.Sizes()).operands.items()}
    x["slope"][0] = float("inf")
    op(**x, engine=engine, check=True)


@cw.recurrence
def skipped(
    S: cw.State, q: cw.Key, k: cw.Key, v: cw.Value, D: cw.HeadScalar
) -> tuple[cw.State, cw.Value]:
    S = S + cw.outer(k, v)
    return S, q @ S + D * v


def test_another_number_of_heads_of_what_has_one_axis() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 6)
    with pytest.raises(E.BadShape, match=r"'D'.*\[3\].*HV = 4"):
        skipped(q, k, v, torch.randn(3))
