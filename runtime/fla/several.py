"""What flash-linear-attention's names of several states or passes mean, in steps of the library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dsl import errors
from ..recurrence import Recurrence
from ..wide import l2norm, wide
from .adapter import Given, called, promised_bound, scale_of, wide_steps
from .rules import rule

_CENTRE = -0.2  # the logarithm of a sum of squares at which a preconditioner is 1
Pair = tuple[Tensor, Tensor] | tuple[None, None]


def gsa(name: str, given: Given) -> tuple[Tensor, Pair]:
    """Slot attention in two passes: scores of the slots' keys, then the slots' values by softmax.

    Between them are scores `[B,T,HQ,M]` in memory, so that any size of them is right.
    """
    q, k, v, s, g = (given[n] for n in ("q", "k", "v", "s", "g"))
    if g is None:
        s, g = _averages(s, given["cu_seqlens"], k.dtype)
    A, S = given["initial_state"] or (None, None)
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v, s, g = (x.repeat_interleave(groups, 2) for x in (k, v, s, g))
        A, S = (x if x is None else x.repeat_interleave(groups, 1) for x in (A, S))
    scores, A = _pass(rule("value_gla"), (q, k, s, g), A, scale_of(given, q), given)
    o, S = _pass(rule("gla"), (scores.softmax(-1), s, v, g), S, 1.0, given)
    if A is None or S is None:
        return o, (None, None)
    return o, (A[:, ::groups], S[:, ::groups])


def abc(name: str, given: Given) -> tuple[Tensor, Pair | None]:
    """Slots that are averages, by gsa."""
    o, states = gsa(name, {**given, "g": None, "scale": None, "cu_seqlens": None})
    return o, states if given["output_final_state"] else None


def _pass(
    op: Recurrence, operands: Sequence[Tensor], state: Tensor | None, scale: float, given: Given
) -> tuple[Tensor, Tensor | None]:
    """One call of a step with one state, which is returned where states are asked for."""
    o, final = called(op, [*operands], {**given, "scale": scale}, state)
    assert not isinstance(final, tuple)
    return o, final if given["output_final_state"] else None


def _averages(s: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights and log-decays with which slots are averages with the weights exp(s), `[B,T,H,M]`.

    The first token's log-decay is 0: it leaves an initial state as it is.
    """
    lengths = [s.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    s = wide(s)
    weights, decays = [], []
    for part in s.split(lengths, 1):
        z = part.logcumsumexp(1)
        weights.append((part - z).exp())
        decays.append(torch.cat((z[:, :1], z[:, :-1]), 1) - z)
    return torch.cat(weights, 1).to(dtype), torch.cat(decays, 1)


def hgrn(name: str, given: Given) -> tuple[Tensor, Tensor | None]:
    """Gated sums per channel, `[B,T,D]`; channels are the values of as many heads as it takes."""
    x, state = given["x"], given["initial_state"]
    D = x.shape[-1]
    width = next(n for n in range(min(D, 128), 0, -1) if D % n == 0)
    one = torch.ones((*x.shape[:2], 1, 1), dtype=x.dtype, device=x.device)
    channels = (y.unflatten(-1, (-1, width)) for y in (x, given["g"]))
    state = None if state is None else state.unflatten(-1, (-1, 1, width))
    o, final = _pass(rule("hgrn"), (one, *channels), state, 1.0, given)
    return o.flatten(2), None if final is None else final.flatten(1)


def momentum(name: str, given: Given) -> tuple[Tensor, Tensor | None]:
    """The delta rule with momentum; both states in one tensor `[2,N,HV,K,V]`."""
    q, k, v, a, mu, p, beta, eta = (
        given[n] for n in ("q", "k", "v", "log_alpha", "log_mu", "p", "beta", "eta")
    )
    eta = torch.ones_like(beta) if eta is None else eta
    step = "momentum_decayed" if given["use_p_times_alpha"] else "momentum"
    initial = given["initial_state"]
    o, finals = called(
        rule(step, given["use_qk_l2norm_in_kernel"]),
        [q, k, v, k if p is None else p, a, mu, beta, eta],
        {**given, "scale": scale_of(given, k)},
        None if initial is None else tuple(initial),
    )
    assert isinstance(finals, tuple)
    return o, torch.stack([*finals]) if given["output_final_state"] else None


def preconditioned(name: str, given: Given) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A delta rule that writes with keys divided by powers of the decayed sums of their squares.

    Two passes: the sums, `[B,T,H,K]`, and the delta rule.
    """
    for n in ("g_atk", "beta_atk"):
        if given[n] is None:
            raise errors.MissingOperand(n, "Scalar", "[B,T,H]", op=name)
    gates = given["g"] if given.get("gk") is None else given["gk"]
    if gates is None:
        raise errors.MissingOperand("g", "Scalar", "[B,T,HV]", op=name)
    q, k, g_sum = given["q"], given["k"], given["g_atk"]
    if given.get("use_qk_l2norm_in_kernel", True):  # where it is no argument, it is always done
        q, k = l2norm(q), l2norm(k)
    if g_sum.shape[2] > k.shape[2]:
        q, k = (x.repeat_interleave(g_sum.shape[2] // x.shape[2], 2) for x in (q, k))
    one = torch.ones((*k.shape[:3], 1), dtype=k.dtype, device=k.device)
    A, S = given["initial_A_state"], given["initial_state"]
    A = None if A is None else A.unsqueeze(-1)
    sums, A = _pass(rule("sums_of_squares"), (k, one, g_sum, given["beta_atk"]), A, 1.0, given)
    centre = given["log_atk_scale"]
    r = (sums + given["eps"]).log() - _per_head(_CENTRE if centre is None else centre)
    p = (k * torch.exp(-math.log(given["x"]) * r / (1 + r.abs()))).to(k.dtype)
    turned = given["state_v_first"]
    S = S.mT if turned and S is not None else S
    channels = (*wide_steps(given), *["g"] * (gates.ndim == 4))
    op = rule("preconditioned_delta", False, promised_bound(given), channels)
    o, final = _pass(op, (q, k, p, given["v"], gates, given["beta"]), S, scale_of(given, k), given)
    if final is None or A is None:
        return o, None, None
    return o, final.mT.contiguous() if turned else final, A.squeeze(-1)


def _per_head(x: Any) -> Any:
    return x.unsqueeze(-1) if isinstance(x, Tensor) else x
