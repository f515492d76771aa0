"""Makes a function of a flash-linear-attention signature: its arguments refused, or read, or run.

An argument means the same in all the functions that have it, so that a function is its signature,
and the steps that it may stand for with the arguments that are their operands.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dsl import errors
from ..call import boundaries
from ..recurrence import GivenStates, Recurrence, States
from ..sizes import check_packing
from .arguments import CHUNK_SIZES, docstring, is_per_token
from .rules import rule

Given = dict[str, Any]  # the arguments of a call by name
Result = tuple[Tensor, Tensor | None]
R = TypeVar("R", bound=tuple[Any, ...])

Layout = tuple[object, ...]

_MOST = 4096  # layouts that are kept, of each function
_CHUNK = 64  # tokens between the states that are returned, unless told otherwise
_PLAIN = frozenset({Tensor, type(None), bool, int, float})
_RENAMED = "transpose_state_layout is deprecated: its newer name is state_v_first"
_SAFE_GATE = -5.0  # the lower bound that `safe_gate=True` alone promises
# by argument: what was passed, why it is not offered, what to do instead
_REFUSED = {
    "head_first": ("head_first=True", "layouts are [B,T,H,D]", "x.transpose(1, 2)"),
    "cp_context": (
        "a cp_context",
        "sequences are split over devices by another option",
        "call the recurrence of chunkwise.library with group=..., or pass whole sequences",
    ),
}


@dataclass(frozen=True, slots=True)
class _Direct:
    """One token by the step of a recurrence, whose operands are arguments as they come."""

    step: Callable[..., tuple[Tensor, States]]
    operands: Callable[[Given], tuple[Tensor, ...]]
    scale: float

    def __call__(self, given: Given) -> tuple[Tensor, States | None]:
        """The output, and the final state where it is asked for."""
        o, new = self.step(*self.operands(given), scale=self.scale, state=given["initial_state"])
        return o, new if given["output_final_state"] else None


def _is_one_token(given: Given) -> bool:
    """Whether a call is of one token, which nobody records."""
    x = next(iter(given.values()))
    if type(x) is not Tensor or x.ndim < 2 or x.shape[1] != 1 or torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(
        x.requires_grad for x in given.values() if isinstance(x, Tensor)
    )


# arguments for which a token takes more than its step
_OTHERWISE = (*_REFUSED, "reverse", "return_intermediate_states", "state_v_first")


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
    direct: dict[Layout, _Direct | None] = {}  # by layouts of calls of one token

    def call(given: Given) -> R:
        kwargs = given.pop("kwargs", None) or {}
        if kwargs or not _is_one_token(given):
            return read_and_run(given, kwargs)
        layout = tuple([x.shape if type(x) is Tensor else x for x in given.values()])
        try:
            ready = direct.get(layout)
        except TypeError:  # a list, say, which is refused by name
            return read_and_run(given, kwargs)
        if ready is None and layout not in direct and _PLAIN.issuperset(map(type, given.values())):
            if len(direct) >= _MOST:
                direct.clear()
            if isinstance(means, Steps):
                ready = means.direct(given, _read(name, {**given}))
            direct[layout] = ready
        return read_and_run(given, kwargs) if ready is None else cast(R, ready(given))

    def read_and_run(given: Given, kwargs: Given) -> R:
        for extra in kwargs:
            if extra not in known and extra != "head_first":
                raise errors.UnknownOperand(extra, known, op=name)
        if "transpose_state_layout" in kwargs:
            warnings.warn(_RENAMED, DeprecationWarning, stacklevel=4)
        given |= kwargs
        size = given.get("chunk_size", _CHUNK)
        if size not in CHUNK_SIZES.get(name, (size,)):
            sizes = CHUNK_SIZES[name]
            allowed = "either " * (len(sizes) > 1) + " or ".join(map(str, sizes))
            expected = f"what the peer takes: `chunk_size` must be {allowed}"
            raise errors.BadOption("chunk_size", size, expected)
        for argument, (what, why, instead) in _REFUSED.items():
            if given.get(argument):
                raise errors.NotLowered(f"{name} got {what}", why, instead)
        given = _read(name, given)
        if given.get("reverse"):
            return _backwards(name, means, given)
        if given.get("return_intermediate_states"):
            return _with_states(name, means, given)
        return means(name, given)

    names = [p.partition("=")[0] for p in parameters.split(", ")]
    arguments = ", ".join(f"{n!r}: {n}" for n in (n.lstrip("*") for n in names))
    # a signature that is text becomes a function whose calls Python itself checks
    function: Callable[..., R] = eval(f"lambda {parameters}: call({{{arguments}}})", {"call": call})
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


def _with_states(name: str, means: Callable[[str, Given], R], given: Given) -> R:
    """The results, and last the states before each chunk of `chunk_size` tokens of each sequence.

    Each chunk is a call of its own, which begins with the state of the one before it.
    """
    size, cu = given.get("chunk_size") or _CHUNK, boundaries(given["cu_seqlens"])
    tokens = {n: x for n, x in given.items() if is_per_token(n) and x is not None}
    firsts = [n for n in ("initial_state", "initial_A_state") if n in given]
    bounds = [0, tokens["q"].shape[1]]
    if cu is not None:
        check_packing(cu, tokens["q"], "q")
        bounds = cu.tolist()
        for which in firsts:
            first, expected = given[which], f"{len(bounds) - 1}, as cu_seqlens has sequences"
            if first is not None and len(first) != len(bounds) - 1:
                raise errors.BadBatch(which, len(first), expected)
    outputs, finals, before = [], [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        states = [given[x] for x in firsts]
        if cu is not None:
            states = [None if x is None else x[n : n + 1] for x in states]
        for at in range(start, max(end, start + 1), size):
            first, chunk = states[0], slice(at, min(at + size, end))
            part = {x: y[:, chunk] for x, y in tokens.items()} | dict(
                zip(firsts, states, strict=True)
            )
            o, *states = means(
                name, {**given, **part, "cu_seqlens": None, "output_final_state": True}
            )
            outputs.append(o)
            if at < end:
                zero = torch.zeros_like(states[0])
                before.append(zero if first is None else first.to(zero.dtype))
        finals.append(states)
    each = [torch.cat(x) for x in zip(*finals, strict=True)]
    kept = torch.stack(before, 1) if before else each[0].unsqueeze(1)[:, :0]
    wanted = each if given["output_final_state"] else [None] * len(each)
    result: Any = (torch.cat(outputs, 1), *wanted, kept.to(tokens["k"].dtype))
    return cast(R, result)


class Steps:
    """A call of the first of the steps ("gla: q k v gk") whose operands were given, or the last.

    `first` makes operands of other arguments.
    """

    def __init__(self, *each: str, first: Callable[[Given], Given] | None = None) -> None:
        table = (s.partition(": ") for s in each)
        self._table = [(step, operands.split()) for step, _, operands in table]
        self._first = first

    def __call__(self, name: str, given: Given) -> Result:
        """The output and the final state."""
        if self._first is not None:
            given = {**given, **self._first(given)}
        step, operands = self._chosen(given)
        return run(step, [given[n] for n in operands], given)

    def _chosen(self, given: Given) -> tuple[str, list[str]]:
        complete = (row for row in self._table if all(given[n] is not None for n in row[1]))
        return next(complete, self._table[-1])

    def direct(self, asked: Given, given: Given) -> _Direct | None:
        """The step of one token, if its operands are arguments as they were `asked`."""
        if self._first is not None or given["cu_seqlens"] is not None:
            return None
        if any(given.get(n) for n in _OTHERWISE):
            return None
        step, names = self._chosen(given)
        if any(given[n] is not asked[n] for n in names):
            return None
        return _Direct(
            _variant(step, given).step, itemgetter(*names), scale_of(given, given[names[0]])
        )


def run(step: str, operands: list[Tensor], given: Given) -> Result:
    """A call of a step with one state; where `state_v_first`, the caller has it as `[N,HV,V,K]`."""
    state, v_first = given["initial_state"], given.get("state_v_first")
    op = _variant(step, given)
    first = state.transpose(-1, -2) if v_first and state is not None else state
    o, final = called(op, operands, given, first)
    if not given["output_final_state"]:
        return o, None
    assert not isinstance(final, tuple)
    if v_first and final is not None:
        final = final.transpose(-1, -2).contiguous()
    return o, final


def _variant(step: str, given: Given) -> Recurrence:
    l2 = bool(given.get("use_qk_l2norm_in_kernel"))
    return rule(step, l2, promised_bound(given), wide_steps(given))


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


def wide_steps(given: Given) -> tuple[str, ...]:
    """Step sizes by name, if there is one for each value channel."""
    beta = given.get("beta")
    return ("beta",) if beta is not None and beta.ndim == 4 else ()


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
            expected = "none beside state_v_first, its newer name"
            raise errors.BadOption("transpose_state_layout", True, expected)
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
    """Log-decays of a head, a token and its channels, added up."""
    g, gamma, gk, gv = (given.get(n) for n in ("g", "g_gamma", "gk", "gv"))
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
