"""Expressions whose parts come again and again: each part is looked at once."""

from __future__ import annotations

import chunkwise as cw
from chunkwise import Key, Scalar, State, Value, exp, logsigmoid, outer, sigmoid
from chunkwise.codegen.chunk import derive
from chunkwise.codegen.config import Dims, KernelConfig
from chunkwise.codegen.gluon.emit import emit, in_gluon
from chunkwise.codegen.interface import Dtype
from chunkwise.codegen.triton.fit import H100_SHARED, untuned_config
from chunkwise.codegen.triton.offline import signature_for
from chunkwise.codegen.triton.resources import Target
from chunkwise.dsl.ir import Kind
from chunkwise.dsl.stages import stages_of

from tests.codegen.forms import check_engine
from tests.harness import Sizes

_OFTEN = 40  # 2^40 terms


@cw.recurrence
def doubled(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v)
    o = q @ S
    for _ in range(_OFTEN):
        o = o + o
    return S, 2.0**-_OFTEN * o


@cw.recurrence
def summed(S: State, q: Key, p: Key, k: Key, v: Value, g: Scalar):
    """Reads that are joined, beside summands that come twice or cancel."""
    S = exp(g) * S + outer(k, v)
    return S, v - (q @ S - v) + (p @ S) - 3.0 * v + v - v


def test_a_sum_of_its_own_sums() -> None:
    def far(S: State, q: Key, p: Key, k: Key, v: Value):  # type: ignore[no-untyped-def]
        S = S + outer(k, v)
        o = q @ S + p @ S
        for _ in range(_OFTEN):
            o = o + o
        return S, o

    for op in (doubled, cw.recurrence(far)):
        derive(op.declaration.normal_form())


def test_summands_that_come_again() -> None:
    check_engine(summed, Sizes(H=1, HV=2, T=67, K=5, V=3, initial=True), "eager")


def _two_states(S: State, Z: State, q: Key, k: Key, v: Value):  # type: ignore[no-untyped-def]
    S = S + outer(k, v)
    given = q @ S
    Z = Z + outer(k, given)
    o = q @ Z
    for _ in range(_OFTEN):
        o = o * sigmoid(o) + given
    return (S, Z), o


def test_what_a_last_stage_makes_of_its_reads() -> None:
    op = cw.recurrence(_two_states)
    assert len(stages_of(op.declaration.normal_form())) == 2


def test_a_key_and_a_log_decay_that_are_the_same_are_two_operands() -> None:
    """The one is in the dtype of Keys, the other in float32."""

    @cw.recurrence
    def same(Z: State, S: State, q: Key, k: Key, x: Value, v: Value):
        Z = Z + outer(k, x)
        read = logsigmoid(Z @ x)
        S = exp(read) * S + outer(read, v)
        return (Z, S), q @ S

    *_, last = stages_of(same.declaration.normal_form())
    assert sorted(m.decays for m in last.made if m.operand.kind is Kind.KEY) == [False, True]


def test_vectors_of_a_scan_in_gluon_that_are_computed_too_often() -> None:
    """They are computed where they are used."""

    @cw.recurrence
    def repeated(S: State, q: Key, k: Key, v: Value, b: Scalar):
        for _ in range(_OFTEN):
            b = b * sigmoid(b)
        S = S + outer(k, b * v)
        return S, q @ S

    form, dims = repeated.declaration.normal_form(), Dims(128, 128)
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    default = untuned_config(form, dims, Dtype.BFLOAT16, H100_SHARED)
    made = emit(form, signature, in_gluon(form, default, KernelConfig(64, 4, 2)))
    assert made is not None
    assert dict(made.refused)["forward_scan"].startswith("it would compute a vector by")
