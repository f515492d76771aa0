"""The recurrence `my_rule`: one step, from which chunkwise derives everything else.

Print what the compiler makes of it: chunkwise explain my_rule.py
"""

from __future__ import annotations

import chunkwise as cw
from chunkwise import Key, Scalar, State, Value, exp, outer


@cw.recurrence
def my_rule(S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar) -> tuple[State, Value]:
    S = exp(g) * S  # forget: g is a log-decay, at most 0
    S = S + beta * outer(k, v - k @ S)  # move what k recalls towards v
    return S, q @ S  # the new state, then the output
