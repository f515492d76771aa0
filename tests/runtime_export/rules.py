"""A recurrence of one's own, to be exported from its file."""

from __future__ import annotations

import chunkwise as cw
from chunkwise import HeadScalar, Key, State, Value, exp, outer, softplus


@cw.recurrence
def slow_decay(S: State, q: Key, k: Key, v: Value, a: HeadScalar):
    """Forgets at a learnt rate."""
    S = exp(-softplus(a)) * S + outer(k, v)
    return S, q @ S
