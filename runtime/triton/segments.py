"""When a GPU's scans run on segments of sequences: too few programs would leave most of it idle.

A scan has one program per sequence, value head and part of the value axis. Of a long sequence with
few heads that is a fraction of the multiprocessors, each of which could hold two such programs.
"""

from __future__ import annotations

from ...codegen.config import Dims, held, padded
from ...codegen.programs import Transition, chunk_program, transition_of
from ...dsl.normal_form import NormalForm
from ..tuned.artifact import CallSize
from .segment_size import most_segments, segment_tokens

# segments, at least: states that fade are scanned twice, others three times (docs/measured.md)
LEAST = {Transition.DIAGONAL: 2, Transition.MATRIX: 4}


def segment_of(form: NormalForm, dims: Dims, size: CallSize, multiprocessors: int) -> int:
    """Tokens of a segment for calls of `size` (launches round up to whole chunks); 0: no segments.

    As many segments as there are multiprocessors for. A pure function of the call's sizes and the
    kind of GPU: all ranks of a job choose alike.
    """
    segments, tokens = _at_most(form, dims, size, multiprocessors)
    if segments < min(LEAST.values()):
        return 0
    how = transition_of(form, dims)
    return 0 if how is None else segment_tokens(LEAST[how], segments, tokens)


def joined_segment(form: NormalForm, dims: Dims, size: CallSize, multiprocessors: int) -> int:
    """The same of a rank's part of sequences, whose transition is wanted anyhow: one at least."""
    segments, tokens = _at_most(form, dims, size, multiprocessors)
    return -(-tokens // max(segments, 1))


def _at_most(form: NormalForm, dims: Dims, size: CallSize, multiprocessors: int) -> tuple[int, int]:
    """The segments of a sequence for which a GPU has room, and its tokens."""
    tokens = size.tokens * len(form.micro_steps)
    return most_segments(channels_of(form, dims), size.rows, tokens, multiprocessors), tokens


def channels_of(form: NormalForm, dims: Dims) -> int:
    """Channels of the value axis as scans hold it, padded."""
    return padded(held(dims, transposed=chunk_program(form).transposed).V)


def in_parts(
    form: NormalForm, dims: Dims, size: CallSize, multiprocessors: int
) -> tuple[int, CallSize]:
    """The tokens of a segment (0: none), and the size of a call that has segments for sequences.

    Each micro-step of a token counts as a token.
    """
    segment = segment_of(form, dims, size, multiprocessors)
    tokens = size.tokens * len(form.micro_steps)
    parts = -(-tokens // segment) if segment else 1
    return segment, CallSize(size.rows * parts, -(-tokens // parts))
