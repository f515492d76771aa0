"""A traced step: the recurrence exactly as declared, before anything is derived from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from .ir import Kind, Node, Op
from .normal_form import Operand, Param, StateDecl


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `next_states[i]` is the new value of `states[i]`; `micro` the length of tuples."""

    name: str
    operands: tuple[Operand, ...]
    params: tuple[Param, ...]
    states: tuple[StateDecl, ...]
    next_states: tuple[Node, ...]
    outputs: tuple[Node, ...]
    micro: int = 1

    @property
    def roots(self) -> tuple[Node, ...]:
        """Everything that the step computes."""
        return (*self.next_states, *self.outputs)

    @property
    def digest(self) -> str:
        """Names the step in every process (source locations do not count)."""
        text = repr((self.operands, self.params, self.states, [n.key for n in self.roots]))
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def output_names(count: int) -> tuple[str, ...]:
    """The names of so many outputs: o alone, else o_1, o_2, ..."""
    return ("o",) if count == 1 else tuple(f"o_{n + 1}" for n in range(count))


@lru_cache(maxsize=4096)
def state_leaf(state: StateDecl) -> Node:
    """The incoming value of a state."""
    return Node(Op.STATE, (), (state.name,), state.kind)


@lru_cache(maxsize=4096)
def operand_leaf(operand: Operand, index: int | None = None) -> Node:
    """An operand; of a micro operand, its entry for one micro-step."""
    return Node(Op.OPERAND, (), (operand.name, index), operand.kind)


@lru_cache(maxsize=4096)
def param_leaf(param: Param) -> Node:
    """A run-time float."""
    return Node(Op.PARAM, (), (param.name,), Kind.SCALAR)
