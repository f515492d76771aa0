"""flash-linear-attention's names: its exact signatures, its meaning in terms of the library."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import chunkwise as cw
import pytest
import torch
import torch.nn.functional as F
from chunkwise.runtime.decode import Stepper
from torch import Tensor

# recorded with inspect from flash-linear-attention 0.6.0
SIGNATURES: dict[str, str] = json.loads(Path(__file__).with_name("fla_signatures.json").read_text())

B, T, H, HV, K, V = 2, 9, 2, 4, 5, 3


def _spelled(parameter: inspect.Parameter) -> str:
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}"


@pytest.mark.parametrize("name", cw.fla.__all__)
def test_signature(name: str) -> None:
    """Callers filter keyword arguments by `inspect.signature`: names, order and defaults agree."""
    ours = inspect.signature(getattr(cw.fla, name)).parameters.values()
    assert ", ".join(_spelled(p) for p in ours) == SIGNATURES[name]


@pytest.fixture
def x() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "q": draw(B, T, H, K),
        "k": F.normalize(draw(B, T, H, K), dim=-1),
        "v": draw(B, T, HV, V),
        "p": F.normalize(draw(B, T, H, K), dim=-1),
        "a": 0.3 * draw(B, T, H, K),
        "b": 0.3 * draw(B, T, H, K),
        "g": -F.softplus(draw(B, T, HV)),
        "gk": -F.softplus(draw(B, T, HV, K)),
        "gv": -F.softplus(draw(B, T, HV, V)),
        "beta": draw(B, T, HV).sigmoid(),
        "logits": draw(B, T, HV),
        "raw": draw(B, T, HV),
        "raw_k": draw(B, T, HV, K),
        "A_log": draw(HV),
        "bias": draw(HV),
        "bias_k": draw(HV * K),
        "gamma": -draw(HV).abs(),
        "u": draw(HV, K),
        "w": draw(B, T, HV, V).sigmoid(),
        "S": draw(B, HV, K, V),
    }


def _library(rule: str, *operands: Tensor, state: Any = None, scale: float = K**-0.5) -> Any:
    o, final = getattr(cw.library, rule)(
        *operands, initial_state=state, output_final_state=True, engine="reference"
    )
    return scale * o, final


def _l2(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _calls(x: dict[str, Tensor]) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """What an adapter gives, and what the library says it should be."""
    f, lib = cw.fla, _library
    q, k, v, g, beta, S = (x[n] for n in ("q", "k", "v", "g", "beta", "S"))
    state = {"initial_state": S, "output_final_state": True}
    heads = torch.arange(H, dtype=torch.float64)
    few = v[:, :, :H]  # the rules whose decay counts q's heads
    few_state = {"initial_state": S[:, :H], "output_final_state": True}
    softgate = -x["A_log"].exp() * F.softplus(x["raw"] + x["bias"])
    rate = x["A_log"].exp()[:, None]
    biased = x["raw_k"] + x["bias_k"].view(HV, K)
    return {
        "linear": lambda: (
            f.chunk_linear_attn(q, k, v, normalize=False, **state),
            lib("linear_attention", q, k, v, state=S),
        ),
        "retention": lambda: (
            f.chunk_retention(q, k, few, **few_state, chunk_size=64),
            lib("retention", q, k, few, (1 - 2 ** (-5 - heads)).log(), state=S[:, :H]),
        ),
        "recurrent retention": lambda: (
            f.fused_recurrent_retention(q, k, few, scale=0.5, **few_state),
            lib("retention", q, k, few, (1 - 2 ** (-5 - heads)).log(), state=S[:, :H], scale=0.5),
        ),
        "lightning": lambda: (
            f.chunk_lightning_attn(q, k, few, 1, 4, **few_state),
            lib("lightning_attention", q, k, few, 8 / H * (1 - 1 / 4) * heads, state=S[:, :H]),
        ),
        "simple_gla": lambda: (
            f.chunk_simple_gla(q, k, v, g, **state),
            lib("simple_gla", q, k, v, g, state=S),
        ),
        "simple_gla with both decays": lambda: (
            f.fused_recurrent_simple_gla(q, k, v, g, x["gamma"], **state),
            lib("simple_gla", q, k, v, g + x["gamma"], state=S),
        ),
        "simple_gla with a fixed decay": lambda: (
            f.fused_chunk_simple_gla(q, k, v, g_gamma=x["gamma"], **state),
            lib("retention", q, k, v, x["gamma"], state=S),
        ),
        "gla": lambda: (
            f.chunk_gla(q, k, v, x["gk"], **state),
            lib("gla", q, k, v, x["gk"], state=S),
        ),
        "recurrent gla": lambda: (
            f.fused_recurrent_gla(q, k, v, x["gk"], **state),
            lib("gla", q, k, v, x["gk"], state=S),
        ),
        "recurrent gla with both gates": lambda: (
            f.fused_recurrent_gla(q, k, v, x["gk"], x["gv"], **state),
            lib("gla_both", q, k, v, x["gk"], x["gv"], state=S),
        ),
        "rwkv6": lambda: (
            f.chunk_rwkv6(q, k, v, x["gk"], x["u"], **state),
            lib("rwkv6", q, k, v, x["gk"], x["u"], state=S),
        ),
        "delta": lambda: (
            f.chunk_delta_rule(q, k, v, beta, **state),
            lib("delta_rule", q, k, v, beta, state=S),
        ),
        "delta without beta": lambda: (
            f.fused_recurrent_delta_rule(q, k, v, use_qk_l2norm_in_kernel=True, **state),
            lib("delta_rule", _l2(q), _l2(k), v, torch.ones_like(beta), state=S),
        ),
        "gated delta": lambda: (
            f.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, **state),
            lib("gated_delta_rule", _l2(q), _l2(k), v, g, beta, state=S),
        ),
        "gated delta from logits": lambda: (
            f.chunk_gated_delta_rule(
                q,
                k,
                v,
                x["raw"],
                x["logits"],
                use_gate_in_kernel=True,
                A_log=x["A_log"],
                dt_bias=x["bias"],
                use_beta_sigmoid_in_kernel=True,
                allow_neg_eigval=True,
                **state,
            ),
            lib("gated_delta_rule", q, k, v, softgate, 2 * x["logits"].sigmoid(), state=S),
        ),
        "gated delta with a key gate": lambda: (
            f.fused_recurrent_gated_delta_rule(q, k, v, g, gk=x["gk"], beta=beta, **state),
            lib("kda", q, k, v, x["gk"] + g[..., None], beta, state=S),
        ),
        "gated delta without a gate": lambda: (
            f.fused_recurrent_gdn(q, k, v, beta=beta, **state),
            lib("delta_rule", q, k, v, beta, state=S),
        ),
        "kda": lambda: (
            f.chunk_kda(q, k, v, x["gk"].clamp(min=-5), beta, safe_gate=True, **state),
            lib("kda", q, k, v, x["gk"].clamp(min=-5), beta, state=S),
        ),
        "kda from logits": lambda: (
            f.fused_recurrent_kda(
                q,
                k,
                v,
                x["raw_k"],
                beta,
                x["A_log"],
                x["bias_k"],
                use_gate_in_kernel=True,
                **state,
            ),
            lib("kda", q, k, v, -rate * F.softplus(biased), beta, state=S),
        ),
        "kda from bounded logits": lambda: (
            f.chunk_kda(
                q,
                k,
                v,
                x["raw_k"],
                beta,
                use_gate_in_kernel=True,
                lower_bound=-4.0,
                A_log=x["A_log"],
                dt_bias=x["bias_k"],
                **state,
            ),
            lib("kda", q, k, v, -4 * (rate * biased).sigmoid(), beta, state=S),
        ),
        "comba": lambda: (
            f.chunk_comba(q, k, v, x["p"], g, beta, **state),
            lib("comba", q, k, v, x["p"], g, beta, state=S),
        ),
        "recurrent comba": lambda: (
            f.fused_recurrent_comba(q, k, x["p"], v, g, **state),
            lib("comba", q, k, v, x["p"], g, torch.ones_like(beta), state=S),
        ),
        "dplr": lambda: (  # ours: a is written, b reads; theirs the other way round
            f.chunk_dplr_delta_rule(q, k, v, x["a"], x["b"], x["gk"], **state),
            lib("dplr", q, k, v, x["b"], x["a"], x["gk"], state=S),
        ),
        "rwkv7": lambda: (
            f.chunk_rwkv7(q, x["gk"], k, v, x["a"], x["b"], **state),
            lib("dplr", q, k, v, x["b"], x["a"], x["gk"], state=S, scale=1.0),
        ),
        "recurrent rwkv7": lambda: (
            f.fused_recurrent_rwkv7(q, x["gk"], k, v, x["a"], x["b"], initial_state=S),
            lib("dplr", q, k, v, x["b"], x["a"], x["gk"], state=S),
        ),
        "gdn2": lambda: (
            f.chunk_gdn2(q, k, v, x["gk"], x["b"], x["w"], **state),
            lib("gdn2", q, k, v, x["gk"], x["b"], x["w"], state=S),
        ),
        "recurrent gdn2": lambda: (
            f.fused_recurrent_gdn2(q, k, v, x["gk"], x["b"], x["w"], **state),
            lib("gdn2", q, k, v, x["gk"], x["b"], x["w"], state=S),
        ),
    }


CASES = (
    "linear",
    "retention",
    "recurrent retention",
    "lightning",
    "simple_gla",
    "simple_gla with both decays",
    "simple_gla with a fixed decay",
    "gla",
    "recurrent gla",
    "recurrent gla with both gates",
    "rwkv6",
    "delta",
    "delta without beta",
    "gated delta",
    "gated delta from logits",
    "gated delta with a key gate",
    "gated delta without a gate",
    "kda",
    "kda from logits",
    "kda from bounded logits",
    "comba",
    "recurrent comba",
    "dplr",
    "rwkv7",
    "recurrent rwkv7",
    "gdn2",
    "recurrent gdn2",
)


@pytest.mark.parametrize("case", CASES)
def test_meaning(x: dict[str, Tensor], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_ENGINE", "reference")
    monkeypatch.setenv("CHUNKWISE_CHECK", "1")
    calls = _calls(x)
    assert tuple(calls) == CASES
    (o, final), (want, want_final) = calls[case]()
    # fixed decays and raw gates are formed in float32, as the original does
    torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final, want_final, rtol=1e-5, atol=1e-6)


def test_normalised_linear_attention(x: dict[str, Tensor]) -> None:
    """The state is (S, z), and z comes back even where the final state was not asked for."""
    q, k, v = x["q"].exp(), x["k"].exp(), x["v"][:, :, :H]
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    want = torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), v)
    o, (S, z) = cw.fla.fused_recurrent_linear_attn(q, k, v, normalize=True)
    torch.testing.assert_close(o, want)
    assert S is None
    torch.testing.assert_close(z, k.sum(1, keepdim=True), check_dtype=False)
    assert z.shape == (B, 1, H, K)
    half, state = cw.fla.chunk_linear_attn(q[:, :4], k[:, :4], v[:, :4], output_final_state=True)
    rest, _ = cw.fla.chunk_linear_attn(q[:, 4:], k[:, 4:], v[:, 4:], initial_state=state)
    torch.testing.assert_close(torch.cat((half, rest), 1), want)


def test_several_steps_per_token(x: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_ENGINE", "reference")
    n = 3
    q = x["q"][:, ::n]
    k, v, beta, g = x["k"], x["v"][:, :, :H], x["beta"][:, :, :H], x["g"][:, ::n, :H]
    for gate, rule in ((g, "gated_delta_product"), (None, "delta_product")):
        o, final = cw.fla.chunk_gated_delta_product(q, k, v, gate, beta, n, output_final_state=True)
        split = [t.unflatten(1, (-1, n)) for t in (k, v)]
        gates = () if gate is None else (gate,)
        want, want_final = _library(rule, q, *split, *gates, beta.unflatten(1, (-1, n)))
        torch.testing.assert_close(o, want)
        torch.testing.assert_close(final, want_final)


def test_state_v_first(x: dict[str, Tensor]) -> None:
    q, k, v, g, beta, S = (x[n] for n in ("q", "k", "v", "g", "beta", "S"))
    o, final = cw.fla.chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=S, output_final_state=True
    )
    swapped = S.transpose(-1, -2).contiguous()
    run = partial(cw.fla.chunk_gated_delta_rule, q, k, v, g, beta)
    run = partial(run, initial_state=swapped, output_final_state=True)
    with pytest.warns(DeprecationWarning, match="newer name") as warned:
        old = run(transpose_state_layout=True)
    assert warned[0].filename == __file__
    for o_v, final_v in (old, run(state_v_first=True)):
        torch.testing.assert_close(o_v, o)
        torch.testing.assert_close(final_v.transpose(-1, -2), final)
    _, nothing = cw.fla.chunk_gated_delta_rule(q, k, v, g, beta, state_v_first=True)
    assert nothing is None


def test_packed(x: dict[str, Tensor]) -> None:
    one = {n: x[n][:1] for n in ("q", "k", "v", "g", "beta")}
    cu_seqlens = torch.tensor([0, 4, 9])
    o, final = cw.fla.chunk_gated_delta_rule(
        **one, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens, output_final_state=True
    )
    assert final.shape == (2, HV, K, V)
    alone, _ = cw.fla.chunk_gated_delta_rule(**{n: t[:, 4:] for n, t in one.items()})
    torch.testing.assert_close(o[:, 4:], alone)


@pytest.mark.parametrize(
    ("name", "operands", "options", "message"),
    [
        ("chunk_retention", "qkv", {"head_first": True}, r"\[B,T,H,D\]"),
        ("chunk_gated_delta_rule", ("q", "k", "v", "g", "beta"), {"cp_context": 1}, "devices"),
        ("chunk_gated_delta_rule", ("q", "k", "v", "g", "beta"), {"h0": 1}, "'h0'"),
        (
            "chunk_gated_delta_rule",
            ("q", "k", "v", "g", "beta"),
            {"use_gate_in_kernel": True},
            "A_log",
        ),
        (
            "chunk_gated_delta_rule",
            ("q", "k", "v", "g", "beta"),
            {"allow_neg_eigval": True},
            "use_beta_sigmoid_in_kernel",
        ),
        ("chunk_kda", ("q", "k", "v", "gk", "beta"), {"chunk_size": 16}, "either 32 or 64"),
        ("fused_recurrent_gdn", ("q", "k", "v", "g", "gk", "gv"), {}, "columns"),
        ("fused_recurrent_gdn", ("q", "k", "v", "g", "none", "gv"), {}, "columns"),
        (
            "fused_recurrent_precond_gated_delta_rule",
            ("q", "k", "v", "g", "none", "none", "beta"),
            {},
            "g_atk",
        ),
        (
            "chunk_linear_attn",
            "qkv",
            {"normalize": False, "initial_state": (None, None)},
            "initial_state",
        ),
    ],
    ids=str,
)
def test_what_is_not_offered_is_refused(
    x: dict[str, Tensor], name: str, operands: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(cw.errors.ChunkwiseError, match=message):
        getattr(cw.fla, name)(*(x.get(n) for n in operands), **options)


@torch.no_grad()
def test_one_token_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient; with one, the op itself has it by kernels."""
    steps = []
    original = Stepper.one

    def counted(self: Stepper, *args: Any) -> Any:
        steps.append(self)
        return original(self, *args)

    monkeypatch.setattr(Stepper, "one", counted)
    q, k, v = torch.randn(3, 2, 1, 2, 8).unbind(0)
    g, beta = -torch.rand(2, 1, 2), torch.rand(2, 1, 2)
    f = cw.fla
    for n, call in enumerate(
        (
            lambda: f.fused_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta),
            lambda: f.fused_recurrent_kda(q, k, v, g[..., None].expand(-1, -1, -1, 8), beta),
            lambda: f.fused_recurrent_linear_attn(q, k, v, normalize=True),
            lambda: f.chunk_delta_rule(q, k, v, beta),
        ),
        1,
    ):
        o, final = call()
        assert (o.shape, final) == (v.shape, None) or final[0] is None
        assert len(steps) == n
    with torch.enable_grad():
        o, _ = f.fused_recurrent_delta_rule(q.clone().requires_grad_(), k, v, beta)
        o.sum().backward()
    assert len(steps) == 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3, "output_final_state": False},
        {"initial_state": torch.ones(2, 2, 4, 4)},
        {"initial_state": torch.ones(2, 2, 4, 4), "state_v_first": True},
        {"beta": None},
        {"use_beta_sigmoid_in_kernel": True},
        {"gk": -torch.ones(2, 1, 2, 4)},
        {"use_qk_l2norm_in_kernel": True},
        {"cu_seqlens": torch.tensor([0, 1])},
    ],
    ids=str,
)
@torch.no_grad()
def test_what_is_kept_of_one_token(options: dict[str, Any]) -> None:
    """It serves a call as the arguments say, which `chunk_size` has read one by one."""
    q, k, v = torch.randn(3, 2, 1, 2, 4).unbind(0)
    given = {"g": -torch.rand(2, 1, 2), "beta": torch.rand(2, 1, 2), "output_final_state": True}
    x = {"q": q, "k": k, "v": v, **given, **options}
    if "cu_seqlens" in options:
        x = {n: y[:1] if isinstance(y, Tensor) and y.ndim > 1 else y for n, y in x.items()}
    call = cw.fla.fused_recurrent_gated_delta_rule
    call(**{**x, "output_final_state": True}), call(**{**x, "k": x["q"]})
    for _ in range(2):
        for got, want in zip(call(**x), call(**x, chunk_size=64), strict=True):
            assert torch.equal(got, want) if want is not None else got is None
    with pytest.raises(cw.errors.ChunkwiseError):
        call(**{**x, "cu_seqlens": [0, 1]})


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("cu", [None, torch.tensor([0, 30, 30, 72])])
def test_states_before_each_chunk(x: dict[str, Tensor], cu: Tensor | None, v_first: bool) -> None:
    """They are final states of what comes before them, of each sequence."""
    rows = B if cu is None else 1
    q, k, v, g, beta = (torch.cat([x[n][:rows]] * 8, 1) for n in ("q", "k", "v", "gk", "beta"))
    bounds = [0, 72] if cu is None else cu.tolist()
    shape = (V, K) if v_first else (K, V)
    first = torch.randn(B if cu is None else 3, HV, *shape, dtype=torch.float64)
    options = {"initial_state": first, "state_v_first": v_first}
    o, final, states = cw.fla.chunk_kda(
        q, k, v, g, beta, chunk_size=32, cu_seqlens=cu, output_final_state=True,
        return_intermediate_states=True, **options,
    )  # fmt: skip
    given = {"cu_seqlens": cu, "output_final_state": True}
    want, last = cw.fla.chunk_kda(q, k, v, g, beta, **given, **options)
    torch.testing.assert_close((o, final), (want, last))
    at = 0
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = {**options, "initial_state": first if cu is None else first[n : n + 1]}
        for stop in range(start, end, 32):
            part = (y[:, start:stop] for y in (q, k, v, g, beta))
            _, before = cw.fla.chunk_kda(*part, output_final_state=True, **own)
            torch.testing.assert_close(states[:, at], before)
            at += 1
    assert at == states.shape[1]
    part, nothing, _ = cw.fla.chunk_kda(q, k, v, g, beta, return_intermediate_states=True)
    assert nothing is None


def test_states_before_each_chunk_of_what_is_not_packed_so() -> None:
    q, k, v = torch.randn(3, 1, 8, HV, K)
    g, beta, first = -torch.rand(q.shape), torch.rand(1, 8, HV), torch.randn(2, HV, K, K)
    for bounds, said in (
        ([0, 5], "expected T = 8"),
        ([2, 5, 8], "expected 0"),
        ([0, 5, 3, 8], "do not decrease"),
        ([0, 1, 5, 8], "expected 3, as cu_seqlens has sequences"),
    ):
        for cu in (bounds, torch.tensor(bounds)):
            what = said if isinstance(cu, Tensor) else "cu_seqlens is a list"
            with pytest.raises(cw.errors.CallError, match=what):
                cw.fla.chunk_kda(
                    *(q, k, v, g, beta), cu_seqlens=cu, initial_state=first,
                    return_intermediate_states=True,
                )  # fmt: skip
    rows = [torch.cat([y, y]) for y in (q, k, v, g, beta)]
    cu = torch.tensor([0, 5, 8])
    with pytest.raises(cw.errors.BadBatch, match="packs sequences"):
        cw.fla.chunk_kda(*rows, cu_seqlens=cu, return_intermediate_states=True)
    *_, states = cw.fla.chunk_kda(
        *(q, k, v, g, beta), initial_state=first[:1].bfloat16(), return_intermediate_states=True
    )
    assert states.dtype == k.dtype


def test_what_is_promised_of_gates_is_not_of_those_of_squares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is a step size per value channel one of the sums of squares."""
    monkeypatch.setenv("CHUNKWISE_CHECK", "1")
    q, k, v = torch.randn(3, 1, 9, 2, 4).unbind(0)
    beta, b_sum = torch.rand(2, 1, 9, 2)
    g_sum = -20 - torch.rand(1, 9, 2)
    call = cw.fla.chunk_precond_gated_delta_rule
    want, *_ = call(q, k, v, g_atk=g_sum, g=-beta, beta_atk=b_sum, beta=beta)
    per_channel = beta[..., None].expand(v.shape)
    got, *_ = call(q, k, v, g_atk=g_sum, g=-beta, beta_atk=b_sum, beta=per_channel)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    gates = {"g": -torch.rand(q.shape), "safe_gate": True}
    o, *_ = cw.fla.chunk_precond_kda(q, k, v, g_atk=g_sum, beta_atk=b_sum, beta=beta, **gates)
    assert o.isfinite().all()


def test_submodules_are_found_and_installed() -> None:
    from chunkwise.fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
    from chunkwise.fla.ops.generalized_delta_rule.chunk import chunk_dplr_delta_rule

    assert fused_recurrent_gated_delta_rule is cw.fla.fused_recurrent_gated_delta_rule
    assert chunk_dplr_delta_rule is cw.fla.chunk_dplr_delta_rule
    assert {n for n in vars(cw.fla.ops) if "_" in n and not n.startswith("_")} >= set(
        cw.fla.__all__
    )
    before = {n: m for n, m in sys.modules.items() if n == "fla" or n.startswith("fla.")}
    for name in before:  # another test may have the library itself
        del sys.modules[name]
    try:
        names = cw.fla.install()
        assert names == cw.fla.install()
        assert {"fla", "fla.ops", "fla.ops.kda", "fla.ops.kda.chunk"} <= set(names)
        assert importlib.import_module("fla.ops.kda").chunk_kda is cw.fla.chunk_kda
        assert importlib.import_module("fla.ops.simple_gla.fused_chunk").fused_chunk_simple_gla
        with pytest.raises(ModuleNotFoundError, match=r"fla\.layers"):
            importlib.import_module("fla.layers")
        cw.fla.uninstall()
        assert not [n for n in sys.modules if n.startswith("fla.")]
        sys.modules["fla"] = ModuleType("fla")
        with pytest.raises(cw.errors.PackageUnavailable, match=r"fla cannot.*\n.*is imported"):
            cw.fla.install()
        cw.fla.uninstall()  # leaves alone what is not its own
        del sys.modules["fla"]
    finally:
        sys.modules.update(before)
