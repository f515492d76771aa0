"""A few tokens on a CPU whose states lie in a pool, which kernels read and write in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ...codegen.interface import Role
from ...codegen.tir.kernel import SEQUENCE, TirKernel
from ..engine import Task
from ..prepared import Values
from .allocator import empty
from .build import Function
from .threads import SHARED, Room, Work, run

_OWN = ("before", "after", "sequences", "chunks", "room", "heads", "begin", "items")


class PooledTokens:
    """The kernel of single tokens, run for each of a few; a token starts where the last one ended.

    A sequence whose slot is negative is left out.
    """

    def __init__(self, task: Task, kernel: TirKernel, function: Function) -> None:
        call, pool = task.call, task.call.pool
        assert pool is not None
        self._function, self._wide = function, pool.indices.ndim == 2
        self._indices, self._accepted = (feed.at for feed in task.slots)
        outputs = call.output_shapes
        self._rows = [(B * T, *rest) for B, T, *rest in outputs.values()]
        self._shapes = [(B, T, *r) if task.time else (B, *r) for B, T, *r in outputs.values()]
        self._dtype, self._scratch = call.dtype, kernel.scratch
        self._room = Room(kernel.scratch)
        self._items = call.B * call.HV * kernel.v_programs
        numbers = call.B * sum(math.prod(x.shape[1:]) for x in pool.states)
        self._alone = self._items == 1 or numbers < SHARED
        self._tables = [_table(call.B, call.T, t) for t in range(call.T)]
        chunks = torch.zeros(call.B, 2, dtype=torch.int64, device="cpu")
        chunks[:, 0] = torch.arange(call.B, dtype=torch.int64, device="cpu")
        self._fixed = chunks, call.HV, 0, self._items
        # values of tokens and what is made of values, each by a number behind those of its own
        makes: list[tuple[int, Callable[[Any], Tensor]]] = []
        own = {name: n for n, name in enumerate((*outputs, *_OWN))}
        places, self._tokens = {}, []
        count = len(own) + self._accepted + 1 + len(task.params)
        for name, feed in (*task.operands.items(), *task.pools.items()):
            places[name] = len(own) + feed.at
            if feed.make is not None:
                places[name] = count + len(makes)
                makes.append((feed.at, feed.make))
            if task.time and name in task.operands.keys() - task.per_head:
                self._tokens.append(places[name])
        self._makes = makes
        taken = []
        for p in kernel.parameters:
            of = own if p.role in (Role.SLOTS, Role.BUFFER) else places
            taken.append(of[str(p.of)])
        self._scratch_at = len(taken) + 2
        taken += [own[n] for n in ("sequences", "chunks", "room", "heads")]
        taken += [len(own) + task.params[name] for name in kernel.numbers]
        self._take = itemgetter(*taken, own["begin"], own["items"])

    def __call__(self, values: Values) -> list[Tensor]:
        """The outputs; states are left in the pool."""
        indices, accepted = values[self._indices], values[self._accepted]
        if indices.dtype is not torch.int64:
            indices = indices.long()
        made = [torch.zeros(shape, dtype=self._dtype, device="cpu") for shape in self._rows]
        before = indices[:, 0] if self._wide else indices
        if accepted is not None and self._wide:
            before = indices.gather(1, accepted.long()[:, None] - 1)[:, 0]
        own = self._room.tensor if self._alone else None
        every = [*values, *(make(values[at]) for at, make in self._makes)]
        for t, table in enumerate(self._tables):
            after = indices[:, min(t, indices.shape[1] - 1)] if self._wide else indices
            fixed = table, self._fixed[0], own, *self._fixed[1:]
            given = [*made, before, after, *fixed, *every]
            for at in self._tokens:
                given[at] = given[at].select(1, t)
            arguments = self._take(given)
            if self._alone:
                self._function(*arguments)
            else:
                threads = torch.get_num_threads()
                rooms = {self._scratch_at: empty(threads, self._scratch)}
                run([Work(self._function, arguments[:-2], rooms)], self._items, threads)
            before = after
        return [x.view(shape) for x, shape in zip(made, self._shapes, strict=True)]


def _table(B: int, T: int, t: int) -> Tensor:
    """The table of sequences for token t of each, whose output is a row of all tokens."""
    table = torch.zeros(B, len(SEQUENCE), dtype=torch.int64, device="cpu")
    sequences = torch.arange(B, dtype=torch.int64, device="cpu")
    table[:, SEQUENCE.index("batch")] = sequences
    table[:, SEQUENCE.index("tokens")] = 1
    for column in ("first token of all", "first chunk of all"):
        table[:, SEQUENCE.index(column)] = sequences * T + t
    return table
