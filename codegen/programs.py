"""The middle end: from a normal form to its chunk, adjoint and kernels, for every target."""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import TypeVar

from ..dsl.normal_form import NormalForm
from .chunk import ChunkProgram, Named, derive
from .config import Dims, held
from .differentiate import Adjoint, differentiate
from .factor import factor_adjoint, factor_chunk
from .plan import Hoist, Plan, Program, plan_backward, plan_forward
from .saves import saved_tiles
from .segments import segment_transitions
from .verify import verify_tiles

_WIDEST = 128  # channels of keys: a K x K matrix in float32 has to fit shared memory


@lru_cache(maxsize=512)
def chunk_program(form: NormalForm, *, reassociate: bool = False) -> ChunkProgram:
    """The chunk of `form`, derived; NotLowered outside the lowered classes."""
    return _verified(derive(form, hoist_products=reassociate))


@lru_cache(maxsize=512)
def chunk_adjoint(form: NormalForm, *, reassociate: bool = False) -> Adjoint:
    """The adjoint of the chunk of `form`."""
    return _verified(differentiate(chunk_program(form, reassociate=reassociate)))


@lru_cache(maxsize=512)
def forward_program(form: NormalForm, plan: Plan, *, segments: bool = False) -> Program:
    """The kernels of the forward under `plan`; `segments`: scans of segments (`transition_of`)."""
    body = factor_chunk(chunk_program(form, reassociate=plan.reassociate))
    saved = saved_by(form, plan.saves)
    return _verified_kernels(plan_forward(body, plan, segments=segments, saved=saved))


@lru_cache(maxsize=512)
def backward_program(form: NormalForm, plan: Plan, *, segments: bool = False) -> Program:
    """The kernels of the backward under `plan`; `segments`: scans of segments (`transition_of`)."""
    body = factor_chunk(chunk_program(form, reassociate=plan.reassociate))
    adjoint = factor_adjoint(chunk_adjoint(form, reassociate=plan.reassociate))
    saved = saved_by(form, plan.saves)
    return _verified_kernels(plan_backward(body, adjoint, plan, segments=segments, saved=saved))


@lru_cache(maxsize=512)
def saved_by(form: NormalForm, kinds: Hoist) -> Named:
    """The tiles of these kinds that a forward can store for the backward, by their buffers."""
    if not kinds:
        return ()
    return saved_tiles(
        factor_chunk(chunk_program(form)), factor_adjoint(chunk_adjoint(form)), kinds
    )


def savings(form: NormalForm) -> tuple[Hoist, ...]:
    """The kinds of tiles that a forward can keep, from nothing to all, where they differ."""
    found: dict[int, Hoist] = {}
    for kinds in (Hoist.NOTHING, Hoist.SOLVES, Hoist.PRODUCTS, Hoist.SOLVES | Hoist.PRODUCTS):
        found.setdefault(len(saved_by(form, kinds)), kinds)
    return tuple(found.values())


def _verified_kernels(program: Program) -> Program:
    for kernel in program.kernels:
        verify_tiles(kernel)
    return program


_Part = TypeVar("_Part", ChunkProgram, Adjoint)


def _verified(part: _Part) -> _Part:
    verify_tiles(part)
    return part


class Transition(Enum):
    """The A of `codegen.segments`, for all states of a recurrence."""

    DIAGONAL = "scaled"
    MATRIX = "multiplied by a matrix"


@lru_cache(maxsize=512)
def transition_of(form: NormalForm, dims: Dims) -> Transition | None:
    """The transition of states over a segment; None if scans cannot run on segments at once."""
    body = factor_chunk(chunk_program(form))
    found = segment_transitions(body.carried)
    if found is None:
        return None
    if not any(p is not None and p.matrix for p in found):
        return Transition.DIAGONAL
    keys = held(dims, transposed=body.transposed).K
    return Transition.MATRIX if keys <= _WIDEST else None
