"""flash-linear-attention's names of several states or passes, against loops of what they mean.

And what is the same in all its functions: time reversed, a step size per value channel.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import chunkwise as cw
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

B, T, H, HV, K, V, M = 2, 11, 2, 4, 5, 3, 6
Results = tuple[Tensor, ...]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(**given: Tensor) -> dict[str, Tensor]:
    return {n: x.requires_grad_() for n, x in given.items()}


def flat(*results: Any) -> Results:
    """The tensors of a result, tuples taken apart."""
    found: list[Tensor] = []
    for x in results:
        found += [x] if isinstance(x, Tensor) else flat(*x)
    return tuple(found)


def check(got: Results, want: Results, x: dict[str, Tensor]) -> None:
    """Results and the gradients of all operands agree."""
    assert [y.shape for y in got] == [y.shape for y in want]
    both = []
    for results in (got, want):
        loss = sum((y.double() * randn(*y.shape, seed=n)).sum() for n, y in enumerate(results))
        assert isinstance(loss, Tensor)
        both.append((*results, *torch.autograd.grad(loss, list(x.values()))))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, check_dtype=False)


# ---- slots ---------------------------------------------------------------------------------------


def slots_of(q: Tensor, k: Tensor, v: Tensor, s: Tensor, f: Tensor, keys: Tensor, values: Tensor):
    """Slots f kept and s written, head by head of q; `[N,H,K,M]` and `[N,H,M,V]` at the end."""
    outputs, each = [], q.shape[2] // k.shape[2]
    for t in range(q.shape[1]):
        w, kept = s[:, t, :, None], f[:, t, :, None]
        keys = keys * kept + k[:, t, :, :, None] * w
        values = values * kept.mT + w.mT * v[:, t, :, None]
        of_head = [
            (q[:, t, h, None] @ keys[:, h // each] * K**-0.5).softmax(-1) @ values[:, h // each]
            for h in range(q.shape[2])
        ]
        outputs.append(torch.cat(of_head, 1))
    return torch.stack(outputs, 1), keys, values


def slot_operands(queries: int) -> dict[str, Tensor]:
    return leaves(
        q=2 * randn(B, T, queries, K),
        k=randn(B, T, H, K, seed=1),
        v=randn(B, T, H, V, seed=2),
        s=randn(B, T, H, M, seed=3),
        keys=randn(B, H, K, M, seed=4),
        values=randn(B, H, M, V, seed=5),
    )


@pytest.mark.parametrize("name", ["chunk_gsa", "fused_recurrent_gsa"])
def test_gated_slots(name: str) -> None:
    x = slot_operands(HV) | leaves(g=-randn(B, T, H, M, seed=6).abs())
    *operands, keys, values, g = x.values()
    got = getattr(cw.fla, name)(*operands, g, initial_state=(keys, values), output_final_state=True)
    check(flat(got), slots_of(*operands, g.exp(), keys, values), x)


def averages(s: Tensor) -> tuple[Tensor, Tensor]:
    """What the averages with the weights exp(s) keep and write; the first token keeps all."""
    sums = s.exp().cumsum(1)
    kept = torch.cat([torch.ones_like(sums[:, :1]), sums[:, :-1] / sums[:, 1:]], 1)
    return s.exp() / sums, kept


@pytest.mark.parametrize("name", ["chunk_abc", "chunk_gsa"])
def test_slots_that_are_averages(name: str) -> None:
    x = slot_operands(H)
    q, k, v, s, keys, values = x.values()
    got = getattr(cw.fla, name)(q, k, v, s, initial_state=(keys, values), output_final_state=True)
    check(flat(got), slots_of(q, k, v, *averages(s), keys, values), x)


def test_packed_slots_that_are_averages() -> None:
    x = slot_operands(H)
    q, k, v, s, *_ = (y[:1] for y in x.values())
    cu = torch.tensor([0, 4, 4, T])
    o, (keys, _) = cw.fla.chunk_gsa(q, k, v, s, cu_seqlens=cu, output_final_state=True)
    alone, (want, _) = cw.fla.chunk_gsa(*(y[:, 4:] for y in (q, k, v, s)), output_final_state=True)
    torch.testing.assert_close(o[:, 4:], alone)
    torch.testing.assert_close(keys[2:], want)
    assert not keys[1].any()
    assert cw.fla.chunk_gsa(q, k, v, s)[1] == (None, None)
    assert cw.fla.chunk_abc(q, k, v, s)[1] is None


def test_slots_whose_scores_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax takes its maximum away: exp(200) is no float32."""
    q, k, v, s, *_ = (y.detach().float() for y in slot_operands(H).values())
    monkeypatch.setenv("CHUNKWISE_ENGINE", "eager")
    o, _ = cw.fla.chunk_gsa(300 * q, k, v, s, -torch.ones_like(s))
    assert o.isfinite().all()


# ---- sums per channel ----------------------------------------------------------------------------


@pytest.mark.parametrize("D", [7, 134])  # 134 is two heads of 67
def test_hgrn(D: int) -> None:
    x = leaves(x=randn(B, T, D), g=-randn(B, T, D, seed=1).abs(), h=randn(B, D, seed=2))
    added, g, h = x.values()
    outputs, state = [], h
    for t in range(T):
        state = g[:, t].exp() * state + added[:, t]
        outputs.append(state)
    got = cw.fla.fused_recurrent_hgrn(added, g, initial_state=h, output_final_state=True)
    check(got, (torch.stack(outputs, 1), state), x)


# ---- the delta rule: low rank, momentum, preconditioned ------------------------------------------


def delta_operands(*names: str) -> dict[str, Tensor]:
    drawn = {
        "q": randn(B, T, H, K),
        "k": randn(B, T, H, K, seed=1),
        "v": randn(B, T, HV, V, seed=2),
        "p": randn(B, T, H, K, seed=3),
        "a": 0.3 * randn(B, T, H, K, seed=3),
        "b": 0.3 * randn(B, T, H, K, seed=4),
        "g": -randn(B, T, HV, seed=5).abs(),
        "gk": -randn(B, T, HV, K, seed=5).abs(),
        "beta": randn(B, T, HV, seed=6).sigmoid(),
        "eta": randn(B, T, HV, seed=7).sigmoid(),
        "mu": -randn(B, T, HV, seed=8).abs(),
        "g_atk": -randn(B, T, H, seed=8).abs(),
        "beta_atk": randn(B, T, H, seed=9).sigmoid(),
        "S": randn(B, HV, K, V, seed=10),
        "moments": randn(2, B, HV, K, V, seed=10),
        "A": randn(B, H, K, seed=11).abs(),
        "centre": randn(H, seed=12),
    }
    return leaves(**{n: drawn[n] for n in names})


def per_value_head(x: Tensor, dim: int = 2) -> Tensor:
    return x.repeat_interleave(HV // H, dim)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def read(x: Tensor, S: Tensor) -> Tensor:
    return (x[..., None] * S).sum(-2)


@pytest.mark.parametrize("name", ["chunk_iplr_delta_rule", "fused_recurrent_iplr_delta_rule"])
def test_identity_plus_low_rank(name: str) -> None:
    x = delta_operands("q", "k", "v", "a", "b", "S")
    q, k, a, b = (per_value_head(x[n]) for n in ("q", "k", "a", "b"))
    S, outputs = x["S"], []
    for t in range(T):
        S = S + b[:, t, ..., None] * read(a[:, t], S)[..., None, :]
        S = S + k[:, t, ..., None] * x["v"][:, t, :, None]
        outputs.append(K**-0.5 * read(q[:, t], S))
    *operands, initial = x.values()
    got = getattr(cw.fla, name)(*operands, initial_state=initial, output_final_state=True)
    check(got, (torch.stack(outputs, 1), S), x)


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_momentum(norm: bool, decayed: bool) -> None:
    x = delta_operands("q", "k", "v", "g", "mu", "p", "beta", "eta", "moments")
    if not norm:  # so that states stay small
        for n in ("k", "p"):
            x[n] = normalize(x[n].detach(), dim=-1).requires_grad_()
    q, k, p = (per_value_head(unit(x[n]) if norm else x[n]) for n in ("q", "k", "p"))
    S, momentum = x["moments"]
    outputs = []
    for t in range(T):
        a, mu, eta, beta = (x[n][:, t, :, None, None] for n in ("g", "mu", "eta", "beta"))
        reader = p[:, t] * a[..., 0].exp() if decayed else p[:, t]
        error = read(reader, S) - x["v"][:, t]
        momentum = mu.exp() * momentum + eta * k[:, t, ..., None] * error[..., None, :]
        S = a.exp() * S - beta * momentum
        outputs.append(0.5 * read(q[:, t], S))
    *operands, initial = x.values()
    got = cw.fla.chunk_momentum_delta_rule(
        *operands, 0.5, initial, True,
        use_qk_l2norm_in_kernel=norm, use_p_times_alpha=decayed,
    )  # fmt: skip
    check(got, (torch.stack(outputs, 1), torch.stack([S, momentum])), x)


def test_momentum_with_its_defaults() -> None:
    x = delta_operands("q", "k", "v", "g", "mu", "beta")
    q, k, v, g, mu, beta = x.values()
    given = cw.fla.fused_recurrent_momentum_delta_rule(
        q, k, v, g, mu, k, torch.ones_like(beta), torch.ones_like(beta)
    )
    plain = cw.fla.fused_recurrent_momentum_delta_rule(q, k, v, g, mu)
    assert torch.equal(plain[0], given[0])
    assert plain[1] is None


def preconditioned(x: dict[str, Tensor], gates: Tensor, norm: bool, centre: Any, most: float):
    """By the decayed sum of squares of a key channel: the key, times `most` to a squashed power."""
    q, k = (unit(x[n]) if norm else x[n] for n in ("q", "k"))
    S, A, outputs = x["S"], x["A"], []
    for t in range(T):
        A = x["g_atk"][:, t, :, None].exp() * A + x["beta_atk"][:, t, :, None] * k[:, t] ** 2
        r = (A + 1e-6).log() - centre
        p = per_value_head(k[:, t] * most ** -(r / (1 + r.abs())), 1)
        S = gates[:, t].exp() * S
        error = x["v"][:, t] - read(per_value_head(k[:, t], 1), S)
        S = S + x["beta"][:, t, :, None, None] * p[..., None] * error[..., None, :]
        outputs.append(K**-0.5 * read(per_value_head(q[:, t], 1), S))
    return torch.stack(outputs, 1), S, A


_PRECONDITIONED: dict[str, tuple[bool, dict[str, Any]]] = {
    "chunk_precond_gated_delta_rule": (True, {}),
    "fused_recurrent_precond_gated_delta_rule": (True, {"x": 2.0}),
    "chunk_precond_kda": (True, {"solve_tril_precision": "ieee"}),
    "fused_recurrent_precond_kda": (False, {"use_qk_l2norm_in_kernel": False}),
}


@pytest.mark.parametrize("name", _PRECONDITIONED)
def test_preconditioned(name: str) -> None:
    norm, options = _PRECONDITIONED[name]
    gate = "gk" if "kda" in name else "g"
    x = delta_operands("q", "k", "v", gate, "beta", "g_atk", "beta_atk", "S", "A", "centre")
    if not norm:
        x["k"] = normalize(x["k"].detach(), dim=-1).requires_grad_()
    gates = x[gate][..., None] if gate == "gk" else x[gate][..., None, None]
    want = preconditioned(x, gates, norm, x["centre"][:, None], options.get("x", 1.5))
    function = getattr(cw.fla, name)
    operands = {"g" if n == "gk" else n: y for n, y in x.items() if n not in ("S", "A", "centre")}
    states = {"initial_state": x["S"], "initial_A_state": x["A"], "output_final_state": True}
    got = function(**operands, **states, **options, log_atk_scale=x["centre"])
    check(got, want, x)
    states["initial_state"] = x["S"].mT.contiguous()
    o, S, _ = function(
        **operands, **states, **options, log_atk_scale=x["centre"], transpose_state_layout=True
    )
    torch.testing.assert_close((o, S.mT), got[:2])
    o, S, A = function(**operands, **options)
    assert S is None
    assert A is None
    if name == "chunk_precond_kda":  # an argument that comes by **kwargs
        torch.testing.assert_close(
            function(**operands, **options, use_qk_l2norm_in_kernel=True)[0], o, rtol=0, atol=0
        )
    zero = {**x, "S": 0 * x["S"], "A": 0 * x["A"]}
    torch.testing.assert_close(o, preconditioned(zero, gates, norm, -0.2, options.get("x", 1.5))[0])


# ---- in all functions ----------------------------------------------------------------------------

_REVERSIBLE = [
    n for n in cw.fla.__all__ if "reverse" in inspect.signature(getattr(cw.fla, n)).parameters
]


def _operands(name: str) -> dict[str, Tensor]:
    """The operands that `name` asks for, of one number of heads."""
    per_channel = {"g", "gk", "w", "s"} if "gsa" in name else {"gk", "w"}
    shapes = {"v": (V,), "beta": (), "g": ()} | dict.fromkeys(per_channel, (K,))
    found = {}
    for n, (parameter, p) in enumerate(inspect.signature(getattr(cw.fla, name)).parameters.items()):
        given = p.default is inspect.Parameter.empty or parameter in ("g", "beta", "gk")
        if not given or p.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if parameter == "u":
            found[parameter] = randn(H, K)
        elif parameter not in ("layer_idx", "num_layers"):
            drawn = randn(1, T, H, *shapes.get(parameter, (K,)), seed=n)
            gate = parameter in ("g", "gk", "w")
            found[parameter] = -drawn.abs() if gate else 0.3 * drawn
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", _REVERSIBLE)
def test_reversed_in_time(name: str, packed: bool) -> None:
    """From the end of each sequence to its start."""
    function: Callable[..., Any] = getattr(cw.fla, name)
    x, bounds = _operands(name), [0, 4, 4, T] if packed else [0, T]
    numbers = {"layer_idx": 1, "num_layers": 4} if "lightning" in name else {}
    options = {"cu_seqlens": torch.tensor(bounds)} if packed else {}
    o, final = function(**x, **numbers, **options, reverse=True, output_final_state=True)
    turned = {
        n: y if n == "u" else torch.cat([p.flip(1) for p in _parts(y, bounds)], 1)
        for n, y in x.items()
    }
    want, states = function(**turned, **numbers, **options, output_final_state=True)
    want = torch.cat([p.flip(1) for p in _parts(want, bounds)], 1)
    torch.testing.assert_close(o, want)
    for a, b in zip(flat(final), flat(states), strict=True):
        torch.testing.assert_close(a, b)


def _parts(x: Tensor, bounds: list[int]) -> list[Tensor]:
    return [x[:, a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("v_first", [False, True])
def test_a_step_size_per_value_channel(v_first: bool) -> None:
    x = delta_operands("q", "k", "v", "g", "S")
    x["k"] = normalize(x["k"].detach(), dim=-1).requires_grad_()
    x |= leaves(beta=randn(B, T, HV, V, seed=6).sigmoid())
    q, k = (per_value_head(x[n]) for n in ("q", "k"))
    S, outputs = x["S"], []
    for t in range(T):
        S = x["g"][:, t, :, None, None].exp() * S
        error = x["beta"][:, t] * (x["v"][:, t] - read(k[:, t], S))
        S = S + k[:, t, ..., None] * error[..., None, :]
        outputs.append(K**-0.5 * read(q[:, t], S))
    o, final = cw.fla.fused_recurrent_gated_delta_rule(
        **{n: y for n, y in x.items() if n != "S"},
        initial_state=x["S"].mT.contiguous() if v_first else x["S"],
        output_final_state=True,
        state_v_first=v_first,
    )
    check((o, final.mT if v_first else final), (torch.stack(outputs, 1), S), x)
