"""The recurrence whose stages docs/explanation/architecture.md prints."""

from __future__ import annotations

import chunkwise as cw
from chunkwise import Key, Scalar, State, Value, exp, outer


@cw.recurrence
def gated_delta_rule(
    S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar
) -> tuple[State, Value]:
    S = exp(g) * S  # forget
    S = S + beta * outer(k, v - k @ S)  # move what k recalls towards v
    return S, q @ S
