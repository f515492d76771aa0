"""The functions of the package mamba_ssm by which models scan: Mamba-1 and -2, on any device.

States are `[B,H,P,N]` there: N channels of what is written and read, P of a head's values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dsl import errors
from ..dsl.functions import exp, outer
from ..dsl.kinds import HeadKey, HeadScalar, Key, Scalar, State, Value
from ..runtime.axes import check, measure
from ..runtime.recurrence import recurrence
from ..runtime.wide import wide

__all__ = ["mamba_chunk_scan_combined", "selective_scan_fn", "selective_state_update"]


@recurrence
def ssd(
    S: State, C: Key, B: Key, x: Value, dt: Scalar, g: Scalar, D: HeadScalar
) -> tuple[State, Value]:
    """Mamba-2 (Dao, Gu 2024), whose step sizes dt and log-decays g are given."""
    S = exp(g) * S + outer(B, dt * x)
    return S, C @ S + D * x


@recurrence
def ssd_in_place(S: State, C: Value, B: Value, x: Key, dt: Scalar, g: Scalar) -> tuple[State, Key]:
    """The same with states as they lie there, `[P,N]`: a step of it writes into a pool of them."""
    S = exp(g) * S + outer(dt * x, B)
    return S, S @ C


@recurrence
def selective(S: State, C: Key, B: Key, x: Value, dt: Scalar, A: HeadKey) -> tuple[State, Value]:
    """Mamba-1 (Gu, Dao 2023), each of whose channels is a head with one value."""
    S = exp(dt * A) * S + outer(B, dt * x)
    return S, C @ S


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1 over whole sequences.

    Args:
        u: values, `[B,D,T]`.
        delta: step sizes, `[B,D,T]`.
        A: rates of decay, `[D,N]`, below 0.
        B: keys with which values are written, `[B,N,T]`, or `[B,G,N,T]`, D a multiple of G.
        C: keys with which they are read, `[B,N,T]` or `[B,G,N,T]`.
        D: weights of the skip connection, `[D]`.
        z: the output is multiplied by silu of it, `[B,D,T]`.
        delta_bias: added to delta, `[D]`.
        delta_softplus: take softplus of delta.
        return_last_state: return the state after the last token too.

    Returns:
        `[B,D,T]` in u's dtype; with `return_last_state` a pair of it and `[B,D,N]` in float32.

    Raises:
        BadShape: B or C has other axes.
        CallError: what every call of a recurrence raises of its operands.
    """
    sizes = measure("BDT", u=u)
    check(sizes, "BDT", delta=delta, z=z)
    check(sizes, "D", D=D, delta_bias=delta_bias)
    for name, keys in (("B", B), ("C", C)):
        if keys.ndim not in (3, 4):
            raise errors.BadShape(name, keys.shape, "[B,N,T] or [B,G,N,T]")
    dt = _step_sizes(delta.mT, delta_bias, delta_softplus)
    B, C = (x.mT.unsqueeze(2) if x.ndim == 3 else x.permute(0, 3, 1, 2) for x in (B, C))
    o, final = selective(*(C, B, u.mT.unsqueeze(-1), dt, A), output_final_state=return_last_state)
    o = _finished(o.squeeze(-1).mT, u, None if D is None else D.unsqueeze(-1), z)
    if not return_last_state:
        return o
    assert isinstance(final, Tensor)
    return o, final.squeeze(-1)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2 over whole sequences.

    Args:
        x: values, `[B,T,H,P]`.
        dt: step sizes, `[B,T,H]`.
        A: rates of decay, `[H]`, below 0.
        B: keys with which values are written, `[B,T,G,N]`, H a multiple of G.
        C: keys with which they are read, `[B,T,G,N]`.
        chunk_size: a hint, which does not change the result.
        D: weights of the skip connection, `[H]` or `[H,P]`.
        z: the output is multiplied by silu of it, `[B,T,H,P]`.
        dt_bias: added to dt, `[H]`.
        initial_states: the states before the first token, `[B,H,P,N]`.
        seq_idx: int `[B,T]`, the number of each token's sequence, if several lie one behind
            another; each but the first begins with a state of zeros.
        cu_seqlens: int `[N+1]` in the package; refused unless None, as `seq_idx` tells
            sequences apart.
        dt_softplus: take softplus of dt.
        dt_limit: the least and the largest step size.
        return_final_states: return the states after the last token of each row too.
        return_varlen_states: refused unless False, as `cu_seqlens`.

    Returns:
        `[B,T,H,P]` in x's dtype; with `return_final_states` a pair of it and `[B,H,P,N]` in
        float32.

    Raises:
        CallError: what every call of a recurrence raises of its operands.
        BadOption: `cu_seqlens`, or `return_varlen_states`.
    """
    sizes = measure("BTHP", x=x)
    check(sizes, "BTH", dt=dt)
    check(sizes, "H", A=A, dt_bias=dt_bias)
    check(sizes, "H" if D is None or D.ndim == 1 else "HP", D=D)
    check(sizes, "BTHP", z=z)
    check(sizes, "BT", seq_idx=seq_idx)
    if cu_seqlens is not None or return_varlen_states:
        name = "return_varlen_states" if cu_seqlens is None else "cu_seqlens"
        raise errors.BadOption(name, "given", "not there: seq_idx tells sequences apart")
    dt = _step_sizes(dt, dt_bias, dt_softplus)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    g = dt * wide(A)
    if seq_idx is not None:  # a decay to nothing begins a sequence
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        g = g.masked_fill(begins.unsqueeze(-1), -math.inf)
    skip = torch.zeros_like(wide(A))
    if D is not None and D.ndim == 1:
        skip, D = wide(D), None
    o, final = ssd(
        *(C, B, x, dt, g, skip),
        initial_state=None if initial_states is None else initial_states.mT,
        output_final_state=return_final_states,
    )
    o = _finished(o, x, D, z)
    if not return_final_states:
        return o
    assert isinstance(final, Tensor)
    return o, final.mT.contiguous()


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of Mamba-1 or -2, whose state is changed in place.

    It is Mamba-2's where a head has one rate and one step size, which strides of 0 say.

    Args:
        state: `[B,H,P,N]`, or with indices `[slots,H,P,N]`; of Mamba-1 without H, as all that
            follows.
        x: `[B,H,P]`.
        dt: `[B,H,P]`.
        A: `[H,P,N]`.
        B: `[B,G,N]`.
        C: `[B,G,N]`.
        D: `[H,P]`.
        z: the output is multiplied by silu of it, `[B,H,P]`.
        dt_bias: added to dt, `[H,P]`.
        dt_softplus: take softplus of dt.
        state_batch_indices: int32 or int64 `[B]`, the slot of each sequence; none where it is
            negative: that sequence's output means nothing. On a GPU they are checked where
            `CHUNKWISE_CHECK` asks for it.

    Returns:
        `[B,H,P]` in x's dtype.

    Raises:
        CallError: what every step of a recurrence raises of its operands.
        BadSlots: two sequences have one slot, or there is none of that number.
        BadLayout: H and P of a state do not lie as one axis.
    """
    if state.ndim == 3:
        by_head = [None if y is None else y.unsqueeze(-2) for y in (x, dt, B, C, D, z, dt_bias)]
        x, dt, B, C, D, z, dt_bias = by_head  # type: ignore[assignment]
        one = state.unsqueeze(1)
        A = A.unsqueeze(0)
        return selective_state_update(
            one, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        ).squeeze(1)
    sizes = measure("BHP", x=x) | {"N": state.shape[-1]}
    check(sizes, "BHP", dt=dt, z=z)
    check(sizes, "HPN", A=A)
    check(sizes, "HP", D=D, dt_bias=dt_bias)
    slots = state_batch_indices
    pooled = slots is not None
    check({**sizes, "slots": state.shape[0]}, ("slots" if pooled else "B", *"HPN"), state=state)
    if slots is None:
        slots = torch.arange(state.shape[0], dtype=torch.int64, device=state.device)
    if _has_one_rate(A, dt, dt_bias):
        A, bias = wide(A[:, 0, 0]), None if dt_bias is None else dt_bias[:, 0]
        dt = _step_sizes(dt[..., 0], bias, dt_softplus)
        C, B = (y.repeat_interleave(sizes["H"] // y.shape[1], 1) for y in (C, B))
        o, _ = ssd_in_place.step(C, B, x, dt, dt * A, state=state, state_indices=slots)
    else:
        dt = _step_sizes(dt, dt_bias, dt_softplus).flatten(1)
        H, P = sizes["H"], sizes["P"]
        if 1 not in (H, P) and state.stride(1) != P * state.stride(2):
            # flattened it is a copy, which nobody would see changed
            how = f"strides {tuple(state.stride())}"
            raise errors.BadLayout("state", how, help="H and P have to lie as one axis")
        channels, of_channels = x.flatten(1).unsqueeze(-1), state.flatten(1, 2).unsqueeze(-1)
        o, _ = selective.step(
            *(C, B, channels, dt, A.flatten(0, 1)), state=of_channels, state_indices=slots
        )
        o = o.view(x.shape)
    return _finished(o, x, D, z)


def _has_one_rate(A: Tensor, dt: Tensor, dt_bias: Tensor | None) -> bool:
    """Whether the channels of a head decay alike: their entries lie in one place."""
    of_a_head = [(A, 1), (A, 2), (dt, 2), *([] if dt_bias is None else [(dt_bias, 1)])]
    return all(x.shape[axis] == 1 or x.stride(axis) == 0 for x, axis in of_a_head)


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = wide(dt) if bias is None else wide(dt) + wide(bias)
    return F.softplus(dt) if softplus else dt


def _finished(o: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The output `o` with the skip connection of `x`, gated, in x's dtype."""
    if D is not None:
        o = wide(o) + wide(D) * wide(x)
    return (o if z is None else wide(o) * F.silu(wide(z))).to(x.dtype)
