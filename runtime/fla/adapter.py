"""Makes a function of a flash-linear-attention signature: its arguments refused, or read, or run.

An argument means the same in all the functions that have it, so that a function is its signature,
and the steps that it may stand for with the arguments that are their operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dsl import errors
from ..recurrence import GivenStates, Recurrence, States
from .arguments import docstring, is_per_token
from .rules import rule

Given = dict[str, Any]  # the arguments of a call by name
Result = tuple[Tensor, Tensor | None]
R = TypeVar("R", bound=tuple[Any, ...])

_SAFE_GATE = -5.0  # the lower bound that `safe_gate=True` alone promises
# by argument: what was passed, why it is not offered, what to do instead
_REFUSED = {
    "head_first": ("head_first=True", "layouts are [B,T,H,D]", "x.transpose(1, 2)"),
    "cp_context": (
        "a cp_context",
        "sequences are split over devices by another option",
        "call the recurrence of chunkwise.library with group=..., or pass whole sequences",
    ),
    "return_intermediate_states": (
        "return_intermediate_states=True",
        "which states are stored is the planner's choice",
        "call with output_final_state=True on the prefixes of interest",
    ),
}


def adapter(
    name: str,
    parameters: str,
    means: Callable[[str, Given], R],
    doc: str,
    extras: str = "",
    **own: str,
) -> Callable[..., R]:
    """The function `name` with the peer's own `parameters`, as Python spells them.

    `means` computes the result from the name and the arguments; `extras` are those that may come as
    `**kwargs` beside `chunk_size`; `own` describes arguments that mean something else here.
    """
    known = sorted({"chunk_size", *extras.split()})

    def call(**given: Any) -> R:
        kwargs = given.pop("kwargs", {})
        for extra in kwargs:
            if extra not in known and extra != "head_first":
                raise errors.UnknownOperand(extra, known, op=name)
        given |= kwargs
        for argument, (what, why, instead) in _REFUSED.items():
            if given.get(argument):
                raise errors.NotLowered(f"{name} got {what}", why, instead)
        given = _read(name, given)
        return _backwards(name, means, given) if given.get("reverse") else means(name, given)

    names = [p.partition("=")[0] for p in parameters.split(", ")]
    arguments = ", ".join("{0}={0}".format(n.lstrip("*")) for n in names)
    # a signature that is text becomes a function whose calls Python itself checks
    function: Callable[..., R] = eval(f"lambda {parameters}: call({arguments})", {"call": call})
    function.__name__ = function.__qualname__ = name
    function.__module__, function.__doc__ = (
        __package__,
        docstring(
            doc, names, {"**kwargs": f"may hold {', '.join(known)}; others are refused.", **own}
        ),
    )
    return function


def _backwards(name: str, means: Callable[[str, Given], R], given: Given) -> R:
    """The call with each sequence's tokens in the opposite order: from its last to its first."""
    cu = given.get("cu_seqlens")

    def turned(x: Tensor) -> Tensor:
        if cu is None:
            return x.flip(1)
        at = torch.arange(x.shape[1], dtype=cu.dtype, device=x.device)
        sequence = torch.searchsorted(cu, at, right=True)
        return x.index_select(1, cu[sequence - 1] + cu[sequence] - 1 - at)

    tokens = {n: turned(x) for n, x in given.items() if is_per_token(n) and x is not None}
    o, *states = means(name, {**given, **tokens})
    result: Any = (turned(o), *states)
    return cast(R, result)


def steps(
    *each: str, first: Callable[[Given], Given] | None = None
) -> Callable[[str, Given], Result]:
    """A call of the first of the steps ("gla: q k v gk") whose operands were given, or the last.

    `first` makes operands of other arguments.
    """
    table = [(step, operands.split()) for step, _, operands in (s.partition(": ") for s in each)]

    def means(name: str, given: Given) -> Result:
        if first is not None:
            given = {**given, **first(given)}
        complete = (row for row in table if all(given[n] is not None for n in row[1]))
        step, operands = next(complete, table[-1])
        return run(step, [given[n] for n in operands], given)

    return means


def run(step: str, operands: list[Tensor], given: Given) -> Result:
    """A call of a step with one state; where `state_v_first`, the caller has it as `[N,HV,V,K]`."""
    state, v_first = given["initial_state"], given.get("state_v_first")
    l2 = bool(given.get("use_qk_l2norm_in_kernel"))
    op = rule(step, l2, promised_bound(given), by_channel(given))
    first = state.transpose(-1, -2) if v_first and state is not None else state
    o, final = called(op, operands, given, first)
    if not given["output_final_state"]:
        return o, None
    assert not isinstance(final, tuple)
    if v_first and final is not None:
        final = final.transpose(-1, -2).contiguous()
    return o, final


def called(
    op: Recurrence, operands: list[Tensor], given: Given, initial: GivenStates
) -> tuple[Tensor, States | None]:
    """The output and the final state, by `step` where there is one token and no gradient."""
    scale, packed = scale_of(given, operands[0]), given["cu_seqlens"]
    states = (initial,) if initial is None or isinstance(initial, Tensor) else initial
    recorded = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*operands, *states)
    )
    if packed is None and operands[0].shape[1] == 1 and not recorded:
        return op.step(*operands, scale=scale, state=initial)
    return op(
        *operands, scale=scale, initial_state=initial, output_final_state=True, cu_seqlens=packed
    )


def scale_of(given: Given, q: Tensor) -> float:
    """The scale of the output: K^-0.5 unless told otherwise."""
    scale: float | None = given["scale"]
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def by_channel(given: Given) -> bool:
    """Whether there is a step size for each value channel."""
    beta = given.get("beta")
    return beta is not None and beta.ndim == 4


def promised_bound(given: Given) -> float | None:
    """The lower bound of the log-decay, if the gate has one by construction or by promise."""
    bound, safe = given.get("lower_bound"), given.get("safe_gate", False)
    # without that option, `lower_bound` speaks of the gate as it is given
    if bound is not None and (safe or given.get("use_gate_in_kernel", True)):
        return float(bound)
    return _SAFE_GATE if safe else None


def _read(name: str, given: Given) -> Given:
    """The arguments with gates and step sizes as the steps take them, layouts by one name."""
    if "transpose_state_layout" in given:
        if given.get("state_v_first"):
            raise errors.UnknownOperand(
                "transpose_state_layout", ["state_v_first, its newer name"], op=name
            )
        given["state_v_first"] = bool(given["transpose_state_layout"])
    if given.get("use_gate_in_kernel"):
        given["g"] = _log_decay(name, given)
    if "beta" in given:
        given["beta"] = _step_size(name, given)
    given |= _joined(name, given)
    return given


def _log_decay(name: str, given: Given) -> Tensor:
    """The gate of its raw input: `-exp(A_log) softplus(g + dt_bias)`, or the bounded form."""
    if given["g"] is None:
        raise errors.MissingOperand("g", "Scalar", "[B,T,HV]", op=name)
    g: Tensor = given["g"].float()
    A_log, dt_bias, lower_bound = (given.get(n) for n in ("A_log", "dt_bias", "lower_bound"))
    heads = g.shape[2:]
    if dt_bias is not None:
        g = g + dt_bias.float().reshape(heads)
    rate: Tensor | None = None
    if A_log is not None:
        rate = A_log.float().exp().reshape(heads[0], *(1 for _ in heads[1:]))
    if lower_bound is not None:
        bounded: Tensor = lower_bound * torch.sigmoid(g if rate is None else rate * g)
        return bounded
    if rate is None:
        raise errors.MissingOperand("A_log", "HeadScalar", "[HV]", op="use_gate_in_kernel=True")
    decay: Tensor = -rate * F.softplus(g)
    return decay


def _step_size(name: str, given: Given) -> Tensor:
    """beta, as given or as the sigmoid of its logits; 1 where there is none."""
    beta: Tensor | None = given["beta"]
    logits, negative = (
        given.get(n, False) for n in ("use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    )
    if beta is None:
        v: Tensor = given["v"]
        return torch.ones(v.shape[:3], dtype=v.dtype, device=v.device)
    if negative and not logits:
        raise errors.UnknownOperand(
            "allow_neg_eigval", ["it together with use_beta_sigmoid_in_kernel=True"]
        )
    return beta.float().sigmoid() * (2.0 if negative else 1.0) if logits else beta


def _joined(name: str, given: Given) -> Given:
    """Log-decays of a head, a token and its channels, added up; those of two axes are refused."""
    g, gamma, gk, gv = (given.get(n) for n in ("g", "g_gamma", "gk", "gv"))
    if gk is not None and gv is not None:
        raise errors.NotLowered(
            f"{name} got both gk and gv",
            "a chunk factorises decays along one axis of the state",
            "one of the two gates",
        )
    if gv is not None and "beta" in given:
        raise errors.NotLowered(
            f"{name} got gv",
            "a delta rule acts on the rows of the state, such a gate on its columns",
            "gk, a gate per key channel, or g",
        )
    if g is None:
        return {}
    return {
        "g": g if gamma is None else g + gamma,
        "gk": None if gk is None else gk + g.unsqueeze(-1),
    }
