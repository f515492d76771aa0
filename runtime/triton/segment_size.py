"""How long segments are where a GPU's scans run on them: as many as keep it busy.

This file imports nothing, because exported packages carry it as it is.
"""

from __future__ import annotations

_V_TILE = 64  # channels of the value axis that a scan's program is taken to have
_TOKENS = 1024  # of a segment, at least: its program has to bring its state from the others' ends


def most_segments(channels: int, rows: int, tokens: int, multiprocessors: int) -> int:
    """The segments of a sequence for which a GPU has room: a program on each multiprocessor.

    Args:
        channels: of the value axis, as scans hold it, padded.
        rows: sequences times value heads.
        tokens: of a sequence, micro-steps counted.
        multiprocessors: of the GPU.
    """
    programs = rows * -(-channels // _V_TILE)
    return min(multiprocessors // max(programs, 1), tokens // _TOKENS)


def segment_tokens(least: int, segments: int, tokens: int) -> int:
    """Tokens of a segment of so many `segments`; 0: fewer than `least`, so that there are none."""
    return 0 if segments < least else -(-tokens // segments)
