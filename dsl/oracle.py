"""The meaning of a declaration: its step, token by token, in float64. Everything is judged by it.

A normal form runs token by token too: the tests of this folder's passes compare the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import errors
from .elementwise import ELEMENTWISE
from .ir import Kind, Node, Op, Per, operands_of, topological
from .normal_form import (
    Correction,
    NormalForm,
    Operand,
    Phase,
    StateDecl,
    Update,
    expressions,
    levels_of,
    of_update,
    result_leaf,
)
from .step import Step, operand_leaf, param_leaf, state_leaf

_Env = dict[Node, Tensor]
_CHECKPOINT_ABOVE = 64  # tokens; below, autograd's own tape is smaller than the bookkeeping


@dataclass(frozen=True, slots=True)
class CallDims:
    """Sizes of a call: batch, tokens, value heads, key and value channels, micro-steps."""

    batch: int
    tokens: int
    heads: int
    key: int
    value: int
    micro: int

    def channels(self, kind: Kind) -> list[int]:
        """The channels of a value of that kind."""
        return [{"K": self.key, "V": self.value}[a] for a in kind.axes]


# ---------------------------------------------------------------- ops on tensors

_FUNCTIONS: dict[Op, Callable[..., Tensor]] = {
    op: eval(f"lambda x, y=None: {row.torch.format(x='x', y='y')}", {"torch": torch})
    for op, row in ELEMENTWISE.items()
}


def _lifted(x: Tensor, have: Kind, want: Kind) -> Tensor:
    """A value with trailing axes of 1 so that it broadcasts against one of kind `want`."""
    if have is Kind.VALUE and want is Kind.STATE:
        return x.unsqueeze(-2)
    for _ in range(len(want.axes) - len(have.axes)):
        x = x.unsqueeze(-1)
    return x


def apply(node: Node, args: Sequence[Tensor]) -> Tensor:
    """One op of StepIR on tensors whose leading axes agree (or broadcast)."""
    op = node.op
    if op in _FUNCTIONS:
        lifted = (_lifted(t, a.kind, node.kind) for t, a in zip(args, node.args, strict=True))
        return _FUNCTIONS[op](*lifted)
    if op is Op.SUM:
        return args[0].sum(-1)
    if op is Op.SCALE:
        return args[0] * _lifted(args[1], node.args[1].kind, node.kind)
    if op is Op.OUTER:
        if node.kind is Kind.KEY_STATE:
            return args[0] * args[1].unsqueeze(-1)
        return args[0].unsqueeze(-1) * args[1].unsqueeze(-2)
    if op is Op.READ:
        if node.kind is Kind.SCALAR:
            return (args[0] * args[1]).sum(-1)
        return (args[0].unsqueeze(-2) @ args[1]).squeeze(-2)
    if op is Op.READ_VALUE:
        return (args[0] @ args[1].unsqueeze(-1)).squeeze(-1)
    raise errors.InvalidIR("an op without a value", op.name)


def evaluate(roots: Sequence[Node], env: _Env) -> list[Tensor]:
    """The values of expressions; `env` holds the leaves, and receives what is computed."""
    _extend(topological(*roots), env)
    return [env[r] for r in roots]


def _extend(order: Sequence[Node], env: _Env) -> None:
    """Adds the values of `order` (arguments first) to `env`."""
    like = next(iter(env.values()))
    for node in order:
        if node in env:
            continue
        if node.op is Op.CONST:
            value = node.attrs[0]
            env[node] = torch.tensor(value, dtype=like.dtype, device=like.device)
        else:
            env[node] = apply(node, [env[a] for a in node.args])


# ---------------------------------------------------------------- operands


def dims_of(
    declared: Sequence[Operand],
    operands: Mapping[str, Tensor],
    states: Sequence[StateDecl] = (),
    initial: Sequence[Tensor | None] | None = None,
) -> CallDims:
    """Sizes from the operands' shapes (layouts: `dsl.kinds`). Raises MissingOperand, BadShape."""
    batch, tokens, heads, key, value, micro = 1, -1, 1, 1, 1, 1
    for o in declared:
        if o.name not in operands:
            raise errors.MissingOperand(o.name, o.kind.name, "of its kind's shape")
        shape = list(operands[o.name].shape)
        if len(shape) != len(o.axes):
            raise errors.BadShape(o.name, shape, f"{len(o.axes)} axes")
        if o.kind.axes:
            last = shape.pop()
            key, value = (last, value) if o.kind is Kind.KEY else (key, last)
        heads = max(heads, shape.pop())
        if o.micro:
            micro = shape.pop()
        if o.per is Per.TOKEN:
            batch, tokens = shape
    for s, x in zip(states, initial or (), strict=False):
        if x is not None:
            heads, key = max(heads, x.shape[1]), x.shape[2]
            value = x.shape[3] if s.kind is Kind.STATE else value
    if tokens < 0:
        raise errors.MissingOperand("a per-token operand", "Key, Value or Scalar", "[B,T,H,…]")
    return CallDims(batch, tokens, heads, key, value, micro)


def leaves(
    form: Step | NormalForm,
    operands: Mapping[str, Tensor],
    params: Mapping[str, float | Tensor],
    dtype: torch.dtype,
    dims: CallDims | None = None,
) -> dict[Node, Tensor]:
    """Operands as `[B,T,HV,…]` in `dtype`, Keys repeated to the value heads; floats.

    `dims`: where states may say more than operands. Raises HeadMismatch, MissingOperand.
    """
    dims = dims or dims_of(form.operands, operands)
    env: _Env = {}
    device = next(iter(operands.values())).device if operands else torch.device("cpu")
    for o in form.operands:
        x = operands[o.name].to(dtype)
        if o.per is Per.HEAD:
            x = x[None, None]
        axis = -1 if o.kind is Kind.SCALAR else -2
        have = x.shape[axis]
        if have != dims.heads:
            if have == 0 or dims.heads % have:
                raise errors.HeadMismatch(o.name, have, f"a divisor of {dims.heads}")
            x = x.repeat_interleave(dims.heads // have, dim=axis)
        if o.micro:
            env |= {operand_leaf(o, i): x[:, :, i] for i in range(dims.micro)}
        else:
            env[operand_leaf(o)] = x
    for p in form.params:
        given = params.get(p.name, p.default)
        if given is None:
            raise errors.MissingOperand(p.name, "float", "or a default")
        env[param_leaf(p)] = torch.as_tensor(given, dtype=dtype, device=device)
    return env


def _zero_state(state: StateDecl, count: int, dims: CallDims, like: Tensor) -> Tensor:
    return like.new_zeros([count, dims.heads, *dims.channels(state.kind)])


def _state_dependent(roots: Sequence[Node]) -> dict[Node, None]:
    found: dict[Node, None] = {}
    for node in topological(*roots):
        if node.op in (Op.STATE, Op.RESULT) or any(a in found for a in node.args):
            found[node] = None
    return found


# ---------------------------------------------------------------- one token

_Token = Callable[[_Env, list[Tensor]], tuple[Tensor, list[Tensor]]]


def _step_token(step: Step) -> _Token:
    leaves = [state_leaf(s) for s in step.states]
    order = list(_state_dependent(step.roots))

    def token(env: _Env, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        local = dict(env) | dict(zip(leaves, states, strict=True))
        _extend(order, local)
        return local[step.output], [local[n] for n in step.next_states]

    return token


def _form_token(form: NormalForm) -> _Token:
    """One token of a normal form: mathematics, (1) and (2), as written."""
    kinds = {s.name: s.kind for s in form.states}
    order = [s.name for s in form.states]
    levels = levels_of(form)

    def scaled(x: Tensor, name: str, multiplier: Tensor, kind: Kind) -> Tensor:
        return x * _lifted(multiplier, kind, kinds[name])

    def read(state: Tensor, key: Tensor, kind: Kind, name: str) -> Tensor:
        if kinds[name] is Kind.KEY_STATE:
            return (key * state).sum(-1)
        if kind is Kind.KEY:
            return torch.einsum("nhk,nhkv->nhv", key, state)
        return torch.einsum("nhv,nhkv->nhk", key, state)

    def token(env: _Env, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        current = dict(zip(order, states, strict=True))
        local = dict(env)
        moments: dict[tuple[str, int, Phase], Tensor] = {}
        for level in levels:
            for m, micro in enumerate(form.micro_steps):
                updates = [u for u in micro.updates if u.state in level.states]
                _extend(_missing([n for u in updates for n in of_update(u)], local), local)
                current |= update(updates, m, current, local, moments)
            for i in level.reads:
                r = form.reads[i]
                _extend(_missing([r.key], local), local)
                state = moments[r.state, r.micro_step, r.phase]
                local[result_leaf(form, i)] = read(state, local[r.key], r.key.kind, r.state)
        _extend(_missing([form.output], local), local)
        return local[form.output], [current[n] for n in order]

    def update(
        updates: Sequence[Update],
        m: int,
        current: Mapping[str, Tensor],
        local: _Env,
        moments: dict[tuple[str, int, Phase], Tensor],
    ) -> dict[str, Tensor]:
        decayed: dict[str, Tensor] = {}
        for u in updates:
            s = current[u.state]
            moments[u.state, m, Phase.BEFORE] = s
            if u.log_decay is not None:
                s = scaled(s, u.state, local[u.log_decay].exp(), u.log_decay.kind)
            moments[u.state, m, Phase.DECAYED] = decayed[u.state] = s
        after: dict[str, Tensor] = {}
        for u in updates:
            s = decayed[u.state]
            for mix in u.mixes:
                s = s + scaled(current[mix.state], u.state, local[mix.factor], mix.factor.kind)
            for w in u.writes:
                value = None if w.value is None else local[w.value]
                if w.correction is not None:
                    seen = decayed if w.correction.decayed else current
                    back = _correction(w.correction, seen, local, read)
                    value = back if value is None else value + back
                s = s + _written(w.key, local[w.key], value, kinds[u.state])
            after[u.state] = s
            moments[u.state, m, Phase.AFTER] = s
        return after

    return token


def _missing(roots: Sequence[Node], env: _Env) -> list[Node]:
    """What is left to evaluate of `roots`, arguments first."""
    found: dict[Node, None] = {}
    for root in roots:
        if root not in env:
            found |= dict.fromkeys(_missing(root.args, env) if root.args else [])
            found[root] = None
    return list(found)


def _correction(
    f: Correction,
    states: Mapping[str, Tensor],
    env: _Env,
    read: Callable[[Tensor, Tensor, Kind, str], Tensor],
) -> Tensor:
    x = read(states[f.state], env[f.key], f.key.kind, f.state)
    scale = env[f.scale]
    return x * (scale.unsqueeze(-1) if x.dim() > scale.dim() else scale)


def _written(key_node: Node, key: Tensor, value: Tensor | None, kind: Kind) -> Tensor:
    if value is None:
        raise errors.InvalidIR("a write without value or correction")
    if kind is Kind.KEY_STATE:
        return key * value.unsqueeze(-1)
    row, col = (key, value) if key_node.kind is Kind.KEY else (value, key)
    return row.unsqueeze(-1) * col.unsqueeze(-2)


# ---------------------------------------------------------------- all tokens


def run(
    form: Step | NormalForm,
    operands: Mapping[str, Tensor],
    params: Mapping[str, float | Tensor] | None = None,
    initial: Sequence[Tensor | None] | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The declared step, or a normal form, token by token; differentiable.

    `operands` by name in the layouts of `kinds` (a micro operand is `[B,T,n,…]`); `initial` one
    state per sequence, `[N,HV,K,V]` or `[N,HV,K]`, None for zeros; `cu_seqlens` packs N sequences
    into B = 1. Returns o `[B,T,HV,V]` in `dtype`, and the final states. Gradients are checkpointed
    every √T tokens. Raises MissingOperand, BadShape, HeadMismatch.
    """
    if isinstance(form, Step):
        token, roots = _step_token(form), list(form.roots)
    else:
        token, roots = _form_token(form), [*expressions(form), form.output]
    dims = dims_of(form.operands, operands, form.states, initial)
    env = leaves(form, operands, params or {}, dtype, dims)
    dependent = _state_dependent(roots)
    # the preamble runs once for all tokens; expressions of the state run token by token
    preamble = [n for n in topological(*roots) if n not in dependent]
    _extend(preamble, env)
    needed = {a for n in dependent for a in n.args if a not in dependent}
    needed |= {r for r in roots if r not in dependent}
    names = [n for n in preamble if n in needed]
    # per token, [B,T,HV,…]; the rest (per head, numbers) is the same for all tokens
    moving = [n for n in names if env[n].dim() >= 3 and _has_tokens(n, form)]
    fixed = {n: env[n][:, 0] if env[n].dim() >= 3 else env[n] for n in names if n not in moving}
    columns = [env[n] for n in moving]
    like = next(iter(env.values()))
    count = dims.batch if cu_seqlens is None else len(cu_seqlens) - 1
    states = [
        _zero_state(s, count, dims, like) if x is None else x.to(dtype)
        for s, x in zip(form.states, initial or [None] * len(form.states), strict=True)
    ]
    shape = [dims.batch, dims.heads, *dims.channels(form.output.kind)]

    def scan(columns: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outs = []
        for values in zip(*(c.unbind(1) for c in columns), strict=True):
            out, states = token(fixed | dict(zip(moving, values, strict=True)), states)
            outs.append(out.expand(shape))
        return outs, states

    def sequence(columns: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        length = columns[0].shape[1]
        if length <= _CHECKPOINT_ABOVE or not torch.is_grad_enabled():
            return scan(columns, states)
        outs: list[Tensor] = []
        for parts in zip(*(torch.split(c, math.isqrt(length), 1) for c in columns), strict=True):
            new, states = checkpoint(scan, list(parts), states, use_reentrant=False)
            outs += new
        return outs, states

    if cu_seqlens is None:
        outs, states = sequence(columns, states) if dims.tokens else ([], states)
    else:
        outs, ends = [], []
        bounds = [int(n) for n in cu_seqlens.tolist()]
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            own = [s[i : i + 1] for s in states]
            if end > start:
                new, own = sequence([c[:, start:end] for c in columns], own)
                outs += new
            ends.append(own)
        states = [torch.cat(list(x)) for x in zip(*ends, strict=True)]
    if not outs:
        return like.new_zeros([shape[0], dims.tokens, *shape[1:]]), tuple(states)
    return torch.stack(outs, 1), tuple(states)


def _has_tokens(node: Node, form: Step | NormalForm) -> bool:
    per_token = {o.name for o in form.operands if o.per is Per.TOKEN}
    return not per_token.isdisjoint(operands_of(node))
