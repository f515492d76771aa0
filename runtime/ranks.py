"""Which tokens of which sequences a rank has, and that the calls of all ranks fit together."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh

from ..dsl import errors
from ..dsl.ir import Per
from .call import Call

_TEXT = 320  # bytes of what a rank says of its call
_SIZES = ("B", "H", "HV", "K", "V", "micro", "N")
_NUMBERS = 12  # of what a rank says: those of `_SIZES`, and a few


@dataclass(frozen=True, slots=True)
class Share:
    """The tokens of one rank.

    Attributes:
        enters: whether sequences go on here that began on a rank before; `leaves`: whether they go
            on behind it; `spans`: whether those are the same ones.
        carried: how many sequences go over a border of ranks: of a packed batch one, else all.
        rows: of a packed batch, which of its sequences the rank has; `boundaries`: of these.
        first_tokens: tokens of what enters; `last_from`: the first token of what leaves.
    """

    enters: bool
    leaves: bool
    spans: bool
    carried: int
    rows: slice | None
    boundaries: Tensor | None
    first_tokens: int
    last_from: int


def share_of(call: Call, bounds: Sequence[int] | None, tokens: Sequence[int], rank: int) -> Share:
    """The share of a rank, of batches that have so many `tokens` on each rank."""
    enters, leaves = rank > 0, rank < len(tokens) - 1
    T = tokens[rank]
    if bounds is None:
        return Share(enters, leaves, enters and leaves, call.B, None, None, T, 0)
    begin, N = sum(tokens[:rank]), len(bounds) - 1
    end = begin + T
    starts = [n for n in range(N) if bounds[n] >= begin]
    first, last = min(starts, default=N), N
    enters = any(a < begin < b for a, b in pairwise(bounds))
    if leaves:
        last = min((n for n in range(N) if bounds[n] >= end), default=N)
        leaves = any(a < end < b for a, b in pairwise(bounds))
    first -= enters
    own = [min(max(b, begin), end) - begin for b in bounds[first : last + 1]]
    spans = enters and leaves and last - first == 1
    boundaries = torch.tensor(own, dtype=torch.int64, device="cpu")
    return Share(enters, leaves, spans, 1, slice(first, last), boundaries, own[1], own[-2])


def tokens_of(call: Call, begin: int, end: int | None) -> dict[str, Any]:
    """The operands of a stretch of tokens."""
    per_token = {x.name for x in call.step.operands if x.per is Per.TOKEN}
    return {n: x[:, begin:end] if n in per_token else x for n, x in call.operands.items()}


def group_of(given: object) -> dist.ProcessGroup:
    """The process group that a call names.

    Raises:
        BadOption: it is none, or one without this rank.
    """
    expected = "a process group, or a mesh of one axis"
    if not dist.is_available() or not dist.is_initialized():
        raise errors.BadOption("group", given, f"{expected}, after init_process_group")
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            names = given.mesh_dim_names or ("axis",)
            got = f"a mesh of shape {tuple(given.shape)}"
            raise errors.BadOption("group", got, f"{expected}: mesh[{names[-1]!r}]")
        given = given.get_group()
    if given is dist.GroupMember.NON_GROUP_MEMBER or (
        isinstance(given, dist.ProcessGroup) and dist.get_rank(given) < 0
    ):
        raise errors.BadOption("group", "one of other ranks", f"one with rank {dist.get_rank()}")
    if not isinstance(given, dist.ProcessGroup):
        raise errors.BadOption("group", given, expected)
    return given


def refuse_transforms(title: str) -> None:
    """Refuse to exchange what torch.func or forward mode looks at.

    Raises:
        NoTransform: one of them does.
    """
    by_func = torch._C._are_functorch_transforms_active()
    if by_func or forward_ad._current_level >= 0:
        raise errors.NoTransform(
            title,
            "torch.func or forward mode, with a group",
            why="what ranks exchange is seen by autograd's backward alone",
            help="call backward(), or leave group out",
        )


def agree(
    group: dist.ProcessGroup, call: Call | None, refused: Exception | None
) -> tuple[list[int], list[int] | None]:
    """How many tokens each rank has, and the boundaries of packed sequences, read on the host.

    Every rank says what its call is, or why it was `refused`, so that all of them end alike.

    Raises:
        RankMismatch: another rank's call was refused, or is of another kind.
    """
    if call is None:
        return compared(group, "", 0, {}, None, refused), None
    dtypes = ", ".join(f"{n} {str(x.dtype)[6:]}" for n, x in call.operands.items())
    text = f"{call.declaration.name} of {dtypes}, { ({**call.params, **dict(call.static)}) }"
    sizes = {n: getattr(call, n) for n in _SIZES}
    tokens = compared(group, text, call.T, sizes, call.cu_seqlens, refused)
    return tokens, None if call.cu_seqlens is None else call.cu_seqlens.tolist()


def compared(
    group: dist.ProcessGroup,
    text: str,
    tokens: int,
    sizes: Mapping[str, int],
    cu_seqlens: Tensor | None = None,
    refused: Exception | None = None,
) -> list[int]:
    """How many `tokens` each rank has, of calls that are else alike: in text, sizes, boundaries.

    Raises:
        RankMismatch: another rank's call was refused, or is of another kind.
    """
    bounds = None if cu_seqlens is None or refused else cu_seqlens.tolist()
    checksum = 0 if bounds is None else zlib.crc32(repr(bounds).encode())
    alike = {**sizes, "cu_seqlens (a checksum)": checksum}
    numbers = [refused is None, tokens, *alike.values()]
    said = text if refused is None else f"{type(refused).__name__}: {refused}"
    letters = list(said.encode()[:_TEXT].ljust(_TEXT))
    rows = told([*letters, *numbers, *[0] * (_NUMBERS - len(numbers))], group)
    texts = [bytes(row[:_TEXT]).decode(errors="ignore").rstrip() for row in rows]
    found = [row[_TEXT:] for row in rows]
    if refused is not None:
        raise refused
    for rank, ((served, *_), text) in enumerate(zip(found, texts, strict=True)):
        if not served:
            raise errors.RankMismatch(rank, "its call", f"refused ({text})", "like this rank's")
    for rank, (row, text) in enumerate(zip(found, texts, strict=True)):
        if text != texts[0]:
            raise errors.RankMismatch(rank, "its call", text, f"{texts[0]} as on rank 0")
        for name, got, expected in zip(alike, row[2:], found[0][2:], strict=False):
            if got != expected:
                raise errors.RankMismatch(rank, name, str(got), f"{expected} as on rank 0")
    return [row[1] for row in found]


def told(own: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """What every rank says, on the host; no GPU is waited for, and none waits."""
    ranks = _on_the_host(group)
    mine = torch.tensor(own, dtype=torch.int64, device="cpu")
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=ranks)
    return [x.tolist() for x in every]


@lru_cache(maxsize=64)
def _on_the_host(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks whose collectives take tensors of the host."""
    if dist.get_backend(group) != "nccl":
        return group
    ranks = dist.get_process_group_ranks(group)
    made: dist.ProcessGroup = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return made
