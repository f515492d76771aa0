"""The meaning of a declaration: its step, token by token, in float64. Everything is judged by it.

A normal form runs as the step that it describes: the tests of this folder's passes compare the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import errors
from .elementwise import ELEMENTWISE
from .equations import as_step
from .ir import Kind, Node, Op, Per, operands_of, topological
from .normal_form import NormalForm, Operand, StateDecl
from .step import Step, operand_leaf, param_leaf, state_leaf

_Env = dict[Node, Tensor]
_CHECKPOINT_ABOVE = 64  # tokens; below, autograd's own tape is smaller than the bookkeeping


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


def sizes_of(
    declared: Sequence[Operand],
    operands: Mapping[str, Tensor],
    states: Sequence[StateDecl] = (),
    initial: Sequence[Tensor | None] | None = None,
) -> dict[str, int]:
    """Sizes by letter, from the shapes of operands and states. Raises MissingOperand, BadShape."""
    sizes = {"B": 1, "n": 1, "HV": 0, "K": 1, "V": 1}

    def see(axes: Sequence[str], shape: Sequence[int]) -> None:
        for letter, size in zip(axes, shape, strict=True):
            if letter in ("H", "HV"):
                sizes["HV"] = max(sizes["HV"], size)
            else:
                sizes[letter] = size

    for o in declared:
        if o.name not in operands:
            raise errors.MissingOperand(o.name, o.kind.name, "of its kind's shape")
        shape = operands[o.name].shape
        if len(shape) != len(o.axes):
            raise errors.BadShape(o.name, shape, f"{len(o.axes)} axes")
        see(o.axes, shape)
    for s, x in zip(states, initial or (), strict=False):
        if x is not None:
            see(s.axes, x.shape)
    if "T" not in sizes:
        raise errors.MissingOperand("a per-token operand", "Key, Value or Scalar", "[B,T,H,…]")
    return sizes


def leaves(
    form: Step | NormalForm,
    operands: Mapping[str, Tensor],
    params: Mapping[str, float | Tensor],
    dtype: torch.dtype,
    sizes: Mapping[str, int] | None = None,
) -> dict[Node, Tensor]:
    """Operands as `[B,T,HV,…]` in `dtype`, Keys repeated to the value heads; floats.

    `sizes`: where states may say more than operands. Raises HeadMismatch, MissingOperand.
    """
    sizes = sizes or sizes_of(form.operands, operands)
    heads = sizes["HV"]
    env: _Env = {}
    device = next(iter(operands.values())).device if operands else torch.device("cpu")
    for o in form.operands:
        x = operands[o.name].to(dtype)
        if o.per is Per.HEAD:
            x = x[None, None]
        axis = -1 if o.kind is Kind.SCALAR else -2
        have = x.shape[axis]
        if have != heads:
            if have == 0 or heads % have:
                raise errors.HeadMismatch(o.name, have, f"a divisor of {heads}")
            x = x.repeat_interleave(heads // have, dim=axis)
        if o.micro:
            env |= {operand_leaf(o, i): x[:, :, i] for i in range(sizes["n"])}
        else:
            env[operand_leaf(o)] = x
    for p in form.params:
        given = params.get(p.name, p.default)
        if given is None:
            raise errors.MissingOperand(p.name, "float", "or a default")
        env[param_leaf(p)] = torch.as_tensor(given, dtype=dtype, device=device)
    return env


@dataclass(frozen=True, slots=True)
class _Parts:
    """The expressions of a step by when they are computed, each list in order.

    Attributes:
        preamble: those without a state, once for all tokens.
        token: those of a state, token by token.
        moving, fixed: of the preamble, what a token needs: its own, and the same for all.
    """

    preamble: tuple[Node, ...]
    token: tuple[Node, ...]
    moving: tuple[Node, ...]
    fixed: tuple[Node, ...]


@lru_cache(maxsize=1024)
def _parts(step: Step) -> _Parts:
    order, token = topological(*step.roots), dict[Node, None]()
    for node in order:
        if node.op is Op.STATE or any(a in token for a in node.args):
            token[node] = None
    preamble = [n for n in order if n not in token]
    needed = {a for n in token for a in n.args} | {*step.roots}
    names = [n for n in preamble if n in needed]
    per_token = {o.name for o in step.operands if o.per is Per.TOKEN}
    moving = [n for n in names if not per_token.isdisjoint(operands_of(n))]
    fixed = (n for n in names if n not in moving)
    return _Parts(tuple(preamble), tuple(token), tuple(moving), tuple(fixed))


# ---------------------------------------------------------------- one token

_Token = Callable[[_Env, list[Tensor]], tuple[Tensor, list[Tensor]]]


def joined(outputs: Sequence[Tensor], step: Step) -> Tensor:
    """Several outputs side by side along channels, of which a Scalar has one; one as it is."""
    if len(outputs) == 1:
        return outputs[0]
    kinds = [n.kind for n in step.outputs]
    return torch.cat(
        [x if k.axes else x.unsqueeze(-1) for x, k in zip(outputs, kinds, strict=True)], -1
    )


def _token(step: Step, shapes: Sequence[Sequence[int]]) -> _Token:
    leaves = [state_leaf(s) for s in step.states]
    order = _parts(step).token

    def token(env: _Env, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        local = dict(env) | dict(zip(leaves, states, strict=True))
        _extend(order, local)
        outputs = [local[n].expand(shape) for n, shape in zip(step.outputs, shapes, strict=True)]
        return joined(outputs, step), [local[n] for n in step.next_states]

    return token


# ---------------------------------------------------------------- all tokens


def run(
    form: Step | NormalForm,
    operands: Mapping[str, Tensor],
    params: Mapping[str, float | Tensor] | None = None,
    initial: Sequence[Tensor | None] | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    known: Mapping[str, int] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The declared step, or a normal form, token by token; differentiable.

    `operands` by name in the layouts of `kinds` (a micro operand is `[B,T,n,…]`); `initial` one
    state per sequence, `[N,HV,K,V]` or `[N,HV,K]`, None for zeros; `cu_seqlens` packs N sequences
    into B = 1. Returns o `[B,T,HV,V]` in `dtype` (several outputs `joined`), and the final states.
    `known`: as of `sizes_of`, which is not called then. Gradients are checkpointed every √T tokens.
    Raises MissingOperand, BadShape, HeadMismatch.
    """
    step = form if isinstance(form, Step) else as_step(form)
    parts = _parts(step)
    sizes = dict(known or sizes_of(form.operands, operands, form.states, initial))
    shapes = [[sizes[a] for a in ("B", "HV", *n.kind.axes)] for n in step.outputs]
    env = leaves(form, operands, params or {}, dtype, sizes)
    _extend(parts.preamble, env)
    columns = [env[n] for n in parts.moving]  # [B,T,HV,…]
    fixed = {n: env[n][:, 0] if env[n].dim() >= 3 else env[n] for n in parts.fixed}
    like = next(iter(env.values()))
    sizes["N"] = sizes["B"] if cu_seqlens is None else len(cu_seqlens) - 1
    states = [
        like.new_zeros([sizes[a] for a in s.axes]) if x is None else x.to(dtype)
        for s, x in zip(form.states, initial or [None] * len(form.states), strict=True)
    ]
    token = _token(step, shapes)

    def scan(columns: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outs = []
        for values in zip(*(c.unbind(1) for c in columns), strict=True):
            out, states = token(fixed | dict(zip(parts.moving, values, strict=True)), states)
            outs.append(out)
        return outs, states

    def sequence(columns: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        length = columns[0].shape[1]
        if length <= _CHECKPOINT_ABOVE or not torch.is_grad_enabled():
            return scan(columns, states)
        outs: list[Tensor] = []
        for pieces in zip(*(torch.split(c, math.isqrt(length), 1) for c in columns), strict=True):
            new, states = checkpoint(scan, list(pieces), states, use_reentrant=False)
            outs += new
        return outs, states

    if cu_seqlens is None:
        outs, states = sequence(columns, states) if sizes["T"] else ([], states)
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
        none = joined([like.new_zeros(shape) for shape in shapes], step)
        return none.new_zeros([none.shape[0], sizes["T"], *none.shape[1:]]), tuple(states)
    return torch.stack(outs, 1), tuple(states)
