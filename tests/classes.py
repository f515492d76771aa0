"""The recurrences and plans over which the compiler's tests run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from chunkwise.codegen.plan import Plan, backward_plans, forward_plans
from chunkwise.codegen.programs import chunk_program
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.errors import NotLowered
from chunkwise.dsl.library import by_name
from chunkwise.dsl.library_states import DECLARATIONS

# one recurrence per class
CLASSES = (
    "linear_attention",  # no decay
    "linear_attention_normalised",  # two states
    "simple_gla",  # scalar gate
    "gla",  # vector gate
    "delta_rule",  # a solve
    "gated_delta_rule",  # a solve under a scalar gate
    "kda",  # a solve under a vector gate
    "comba",  # the correction reads the undecayed state
    "dplr",  # general rank one
    "oja",  # transposed: a solve under a vector gate, a read over the other axis
)


# a step whose chunk form is not derived: a file for the command line
NOT_LOWERED = """
from chunkwise import Key, Scalar, State, Value, exp, outer, recurrence


@recurrence
def fading_mix(A: State, B: State, q: Key, k: Key, v: Value, g: Key, s: Scalar):
    A, B = A + s * B + outer(k, v), B - s * A
    A = exp(g) * A
    A = A - outer(k, k @ A)
    return (A, B), q @ A
"""


def costly(names: Iterable[str]) -> list[Any]:
    """Parameters of a test that takes minutes over the library; some are left to `make test-all`.

    These are the recurrences of several states or recalls: test_literature.py asks whether they
    are right, and test_groups.py and test_cascades.py ask every engine about forms like theirs.
    """
    several = {d.name for d in DECLARATIONS}
    return [_long(n) if n in several else n for n in names]


def by_class(names: Iterable[str]) -> list[Any]:
    """Parameters of a test that `make test` asks of one recurrence per class alone."""
    return [n if n in CLASSES else _long(n) for n in names]


def _long(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.long)


def lowered(declaration: Declaration) -> bool:
    """Whether the compiler derives a chunk form for `declaration`."""
    try:
        chunk_program(declaration.normal_form(declaration.default_micro))
    except NotLowered:
        return False
    return True


def plan_pairs(name: str) -> list[tuple[int, tuple[Plan, Plan]]]:
    """Every plan of each direction, in numbered pairs of a forward and a backward.

    One launch or several is a matter of the printer: the plans are otherwise the same.
    """
    body = chunk_program(by_name(name).normal_form())
    forward = forward_plans(body)
    backward = [p for p in backward_plans(body) if not p.together]
    count = max(len(forward), len(backward))
    return [(n, (forward[n % len(forward)], backward[n % len(backward)])) for n in range(count)]
