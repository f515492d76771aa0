"""The table of equivalences of the literature: one recurrence with special operands is another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from chunkwise.dsl import library, oracle
from chunkwise.dsl.declaration import Declaration
from torch import Tensor
from torch.nn.functional import logsigmoid

Operands = dict[str, Tensor]
B, T, H, K, V = 2, 6, 2, 4, 3


def draw() -> Operands:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(B, T, H, *shape, generator=generator, dtype=torch.float64)

    k = randn(K)
    return {
        "q": randn(K),
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": randn(V),
        "g": -randn().abs(),
        "vector": -randn(K).abs(),
        "beta": randn().sigmoid(),
        "p": randn(K),
        "w": randn(V).sigmoid(),
        "a": randn(),
        "b": randn(),
    }


def channels(x: Tensor, n: int = K) -> Tensor:
    return x[..., None].expand(B, T, H, n)


def qkv(x: Operands, **more: Tensor) -> Operands:
    return {n: x[n] for n in ("q", "k", "v")} | more


def ssm(x: Operands, **more: Tensor) -> Operands:
    rate = torch.tensor([-0.3, 0.4], dtype=torch.float64)
    return {"C": x["q"], "B": x["k"], "x": x["v"], "dt": x["a"], "A_log": rate} | more


Side = tuple[Declaration, Callable[[Operands], Operands]]
L = library
TABLE: dict[str, tuple[Side, Side]] = {
    "gla with equal channels is simple_gla": (
        (L.gla, lambda x: qkv(x, g=channels(x["g"]))),
        (L.simple_gla, lambda x: qkv(x, g=x["g"])),
    ),
    "kda with equal channels is gated_delta_rule": (
        (L.kda, lambda x: qkv(x, g=channels(x["g"]), beta=x["beta"])),
        (L.gated_delta_rule, lambda x: qkv(x, g=x["g"], beta=x["beta"])),
    ),
    "gated_delta_rule without decay is delta_rule": (
        (L.gated_delta_rule, lambda x: qkv(x, g=0 * x["g"], beta=x["beta"])),
        (L.delta_rule, lambda x: qkv(x, beta=x["beta"])),
    ),
    "delta_rule with orthogonal keys and β = 1 is linear_attention on first writes": (
        (L.delta_rule, lambda x: qkv(x, k=first_writes(), beta=torch.ones_like(x["beta"]))),
        (L.linear_attention, lambda x: qkv(x, k=first_writes())),
    ),
    "dplr with a = −βk, b = e^g∘k, k = βk is kda": (
        (
            L.dplr,
            lambda x: qkv(
                x,
                k=x["beta"][..., None] * x["k"],
                a=-x["beta"][..., None] * x["k"],
                b=x["vector"].exp() * x["k"],
                g=x["vector"],
            ),
        ),
        (L.kda, lambda x: qkv(x, g=x["vector"], beta=x["beta"])),
    ),
    "delta_product with one step is delta_rule": (
        (
            L.delta_product,
            lambda x: {"q": x["q"]} | {n: x[n][:, :, None] for n in ("k", "v", "beta")},
        ),
        (L.delta_rule, lambda x: qkv(x, beta=x["beta"])),
    ),
    "comba with p = k and no decay is delta_rule": (
        (L.comba, lambda x: qkv(x, p=x["k"], g=0 * x["g"], beta=x["beta"])),
        (L.delta_rule, lambda x: qkv(x, beta=x["beta"])),
    ),
    "gdn2 with equal gates is kda": (
        (
            L.gdn2,
            lambda x: qkv(x, g=x["vector"], b=channels(x["beta"]), w=channels(x["beta"], V)),
        ),
        (L.kda, lambda x: qkv(x, g=x["vector"], beta=x["beta"])),
    ),
    # μ = 0 is −∞ in log space: e^−200 is 0 to every digit
    "momentum_delta with μ = 0, p = αk, β = 1 is gated_delta_rule": (
        (
            L.momentum_delta,
            lambda x: qkv(
                x,
                p=x["g"].exp()[..., None] * x["k"],
                log_alpha=x["g"],
                log_mu=-200.0 * torch.ones_like(x["g"]),
                beta=torch.ones_like(x["beta"]),
                eta=x["beta"],
            ),
        ),
        (L.gated_delta_rule, lambda x: qkv(x, g=x["g"], beta=x["beta"])),
    ),
    "titans is momentum_delta with p = k, β = 1": (
        (L.by_name("titans"), lambda x: qkv(x, alpha=x["a"], eta=x["b"], theta=x["beta"])),
        (
            L.momentum_delta,
            lambda x: qkv(
                x,
                p=x["k"],
                log_alpha=logsigmoid(-x["a"]),
                log_mu=logsigmoid(x["b"]),
                beta=torch.ones_like(x["beta"]),
                eta=2 * x["beta"],
            ),
        ),
    ),
    "titans by mini-batches of one token is titans": (
        (
            L.by_name("titans_batches"),
            lambda x: qkv(
                x, first=torch.ones_like(x["a"]), alpha=x["a"], eta=x["b"], theta=x["beta"]
            ),
        ),
        (L.by_name("titans"), lambda x: qkv(x, alpha=x["a"], eta=x["b"], theta=x["beta"])),
    ),
    "ttt by mini-batches of one token is delta_rule with β = 2η": (
        (L.by_name("ttt"), lambda x: qkv(x, first=torch.ones_like(x["a"]), eta=x["beta"] / 2)),
        (L.delta_rule, lambda x: qkv(x, beta=x["beta"])),
    ),
    "omega with a window of one token is comba with p = k": (
        (
            L.by_name("omega"),
            lambda x: (
                {"q": x["q"], "g": x["g"]} | {n: x[n][:, :, None] for n in ("k", "v", "beta")}
            ),
        ),
        (L.comba, lambda x: qkv(x, p=x["k"], g=x["g"], beta=x["beta"])),
    ),
    # sigmoid(40) is 1 to every digit
    "mamba3_trapezoid with λ = 1 is mamba2 without its skip and bias": (
        (
            L.by_name("mamba3_trapezoid"),
            lambda x: ssm(x, lam=40.0 * torch.ones_like(x["a"])),
        ),
        (L.mamba2, lambda x: ssm(x, dt_bias=torch.zeros(H).double(), D=torch.zeros(H).double())),
    ),
    "mamba3_mimo with one input and output is simple_gla": (
        (
            L.by_name("mamba3_mimo"),
            lambda x: (
                {"g": x["g"]}
                | {n: x[m][:, :, None] for n, m in (("C", "q"), ("B", "k"), ("x", "v"))}
                | {"c": torch.ones_like(x["v"])[:, :, None]}
            ),
        ),
        (L.simple_gla, lambda x: qkv(x, g=x["g"])),
    ),
    "retention is simple_gla with a constant gate": (
        (L.retention, lambda x: qkv(x, g=torch.tensor([-0.1, -0.2], dtype=torch.float64))),
        (
            L.simple_gla,
            lambda x: qkv(x, g=torch.tensor([-0.1, -0.2], dtype=torch.float64).expand(B, T, H)),
        ),
    ),
}


def first_writes() -> Tensor:
    """The first K tokens write to orthogonal keys, the rest write nothing."""
    rows = torch.cat([torch.eye(K), torch.zeros(T - K, K)]).double()
    return rows[None, :, None].expand(B, T, H, K)


@pytest.mark.parametrize("name", TABLE)
def test_equivalence(name: str) -> None:
    x = draw()
    results = []
    for declared, operands in TABLE[name]:
        o, finals = oracle.run(declared.normal_form(), operands(x))
        results.append((o, finals[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
