"""What the adapters of the flash-linear-attention names share: refusals, scale, gates, layouts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dsl import errors
from ..recurrence import Recurrence

_SAFE_GATE = -5.0  # what `safe_gate=True` alone promises
Result = tuple[Tensor, Tensor | None]


def refuse(what: str, why: str, instead: str) -> None:
    raise errors.NotLowered(what, why, instead)


def no_extras(function: str, extras: dict[str, Any], taken: frozenset[str] = frozenset()) -> None:
    """`**kwargs` of the original: hints pass, the rest is refused."""
    for name in extras:
        if name == "head_first":
            refuse(f"{function} got head_first", "layouts are [B,T,H,D]", "x.transpose(1, 2)")
        if name not in taken | {"chunk_size"}:
            raise errors.UnknownOperand(name, sorted(taken | {"chunk_size"}), op=function)


def no_reverse(function: str, reverse: bool) -> None:
    if reverse:
        refuse(
            f"{function} got reverse=True",
            "a recurrence runs forward in time",
            "flip the operands and the output along T (per sequence, if packed)",
        )


def no_context(function: str, cp_context: object) -> None:
    if cp_context is not None:
        refuse(
            f"{function} got a cp_context",
            "sequences are not split over devices",
            "pass whole sequences; heads and batch may be sharded",
        )


def no_states(function: str, return_intermediate_states: bool) -> None:
    if return_intermediate_states:
        refuse(
            f"{function} got return_intermediate_states=True",
            "which states are stored is the planner's choice",
            "call with output_final_state=True on the prefixes of interest",
        )


def run(
    rule: Recurrence,
    *operands: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    state_v_first: bool = False,
) -> Result:
    """One state; `state_v_first` means that the caller stores it `[N,HV,V,K]`."""
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    o, final = rule(
        *operands,
        scale=operands[0].shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    assert not isinstance(final, tuple)
    if state_v_first and final is not None:
        final = final.transpose(-1, -2).contiguous()
    return o, final


def v_first(function: str, state_v_first: bool, extras: dict[str, Any]) -> bool:
    """`state_v_first`, also under the name it had before."""
    if "transpose_state_layout" not in extras:
        return state_v_first
    if state_v_first:
        raise errors.UnknownOperand(
            "transpose_state_layout", ["state_v_first, its newer name"], op=function
        )
    return bool(extras["transpose_state_layout"])


def log_decay(
    g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> Tensor:
    """The gate of its raw input: `-exp(A_log) softplus(g + dt_bias)`, or the bounded form."""
    g = g.float()
    heads = g.shape[2:]
    if dt_bias is not None:
        g = g + dt_bias.float().reshape(heads)
    rate = None
    if A_log is not None:
        rate = A_log.float().exp().reshape(heads[0], *(1 for _ in heads[1:]))
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(g if rate is None else rate * g)
    if rate is None:
        raise errors.MissingOperand("A_log", "HeadScalar", "[HV]", op="use_gate_in_kernel=True")
    return -rate * F.softplus(g)


def write_strength(beta: Tensor | None, v: Tensor, logits: bool, negative: bool) -> Tensor:
    """beta, as given or as the sigmoid of its logits; 1 where there is none."""
    if beta is None:
        return torch.ones(v.shape[:3], dtype=v.dtype, device=v.device)
    if negative and not logits:
        raise errors.UnknownOperand(
            "allow_neg_eigval", ["it together with use_beta_sigmoid_in_kernel=True"]
        )
    if not logits:
        return beta
    return beta.float().sigmoid() * (2.0 if negative else 1.0)


def promised_bound(from_raw_gate: bool, safe_gate: bool, lower_bound: float | None) -> float | None:
    """The lower bound of the log-decay, if the gate has one by construction or by promise."""
    if lower_bound is not None and (from_raw_gate or safe_gate):
        return float(lower_bound)
    return _SAFE_GATE if safe_gate else None
