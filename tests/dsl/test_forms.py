"""What the normal forms look like: the cheapest structure, not only the right numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from chunkwise.dsl import (
    Declaration,
    HeadKey,
    Key,
    Scalar,
    State,
    Value,
    clamp,
    dot,
    exp,
    library,
    logsigmoid,
    outer,
    sigmoid,
    sqrt,
    within,
)
from chunkwise.dsl.classify import DecayClass, LowRank, classify
from chunkwise.dsl.errors import InvalidIR
from chunkwise.dsl.intervals import Interval
from chunkwise.dsl.ir import Kind, Node, Op
from chunkwise.dsl.normal_form import NormalForm, Phase, Read, Update
from chunkwise.dsl.printing import infix
from chunkwise.dsl.step import Step
from chunkwise.dsl.verify import verify_form, verify_step

CLASSES = {
    "linear_attention": (DecayClass.NONE, LowRank.NONE),
    "linear_attention_normalised": (DecayClass.NONE, LowRank.NONE),
    "retention": (DecayClass.PER_HEAD, LowRank.NONE),
    "lightning_attention": (DecayClass.PER_HEAD, LowRank.NONE),
    "simple_gla": (DecayClass.SCALAR, LowRank.NONE),
    "mamba2": (DecayClass.SCALAR, LowRank.NONE),
    "gla": (DecayClass.KEY, LowRank.NONE),
    "hgrn2": (DecayClass.KEY, LowRank.NONE),
    "hgrn": (DecayClass.VALUE, LowRank.NONE),
    "rwkv4": (DecayClass.VALUE, LowRank.NONE),
    "rwkv6": (DecayClass.KEY, LowRank.NONE),
    "rwkv7": (DecayClass.KEY, LowRank.GENERAL),
    "mlstm": (DecayClass.SCALAR, LowRank.NONE),
    "delta_rule": (DecayClass.NONE, LowRank.SYMMETRIC),
    "gated_delta_rule": (DecayClass.SCALAR, LowRank.SYMMETRIC),
    "kda": (DecayClass.KEY, LowRank.SYMMETRIC),
    "comba": (DecayClass.SCALAR, LowRank.ONE_WRITE),
    "dplr": (DecayClass.KEY, LowRank.GENERAL),
    "delta_product": (DecayClass.NONE, LowRank.SYMMETRIC),
    "gated_delta_product": (DecayClass.SCALAR, LowRank.SYMMETRIC),
    "gdn2": (DecayClass.KEY, LowRank.ONE_WRITE),
    "oja": (DecayClass.VALUE, LowRank.SYMMETRIC),
    "longhorn": (DecayClass.NONE, LowRank.SYMMETRIC),
    "longhorn_channels": (DecayClass.NONE, LowRank.SYMMETRIC),
    "momentum_delta": (DecayClass.SCALAR, LowRank.ONE_WRITE),
    "gated_lms": (DecayClass.NONE, LowRank.SYMMETRIC),
    "delta_rule_normalised": (DecayClass.NONE, LowRank.SYMMETRIC),
    "mamba3_trapezoid": (DecayClass.SCALAR, LowRank.NONE),
    "mamba3_mimo": (DecayClass.SCALAR, LowRank.NONE),
    "gla_both": (DecayClass.KEY, LowRank.NONE),
    "kalman_linear_attention": (DecayClass.KEY, LowRank.NONE),
    "mamba3": (DecayClass.SCALAR, LowRank.NONE),
    "titans": (DecayClass.SCALAR, LowRank.ONE_WRITE),
    "ttt": (DecayClass.NONE, LowRank.GENERAL),
    "titans_batches": (DecayClass.SCALAR, LowRank.GENERAL),
    "gsa": (DecayClass.KEY, LowRank.NONE),
    "abc": (DecayClass.NONE, LowRank.NONE),
    "residual_linear_attention": (DecayClass.SCALAR, LowRank.NONE),
    "preconditioned_delta": (DecayClass.SCALAR, LowRank.NONE),
    "preconditioned_kda": (DecayClass.SCALAR, LowRank.NONE),
    "omega": (DecayClass.SCALAR, LowRank.GENERAL),
}
ONE_ROW = {"omega", "mamba3_mimo"}  # their tuples meet in one row
COUPLED = {"momentum_delta", "titans", "titans_batches", "ttt", "mamba3_trapezoid", "mamba3"}


@pytest.mark.parametrize("d", library.all_declarations(), ids=lambda d: d.name)
def test_class(d: Declaration) -> None:
    form = d.normal_form(3 if d.has_micro else 1)
    verify_form(form)
    found = classify(form)
    assert (found.states[0].decay, found.states[0].low_rank) == CLASSES[d.name]
    assert found.micro_steps == (3 if d.has_micro and d.name not in ONE_ROW else 1)
    assert found.coupled is (d.name in COUPLED)
    assert found.transposed is (d.name in {"oja", "hgrn", "rwkv4"})


def only_update(form: NormalForm) -> Update:
    ((update,),) = [m.updates for m in form.micro_steps]
    return update


def form_of(step: Callable[..., object]) -> NormalForm:
    return Declaration(step).normal_form()


def test_one_write_keeps_beta_off_the_key() -> None:
    (write,) = only_update(library.gated_delta_rule.normal_form()).writes
    assert write.correction is not None
    assert write.value is not None
    texts = [write.key, write.value, write.correction.key, write.correction.scale]
    assert [infix(n) for n in texts] == ["k", "beta*v", "k", "-beta"]
    assert write.correction.decayed


def test_comba_reads_the_undecayed_state() -> None:
    (write,) = only_update(library.comba.normal_form()).writes
    assert write.correction is not None
    assert infix(write.correction.key) == "p"
    assert not write.correction.decayed


def test_a_partial_decay_is_folded_into_the_key() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, g: Key, h: Key):
        S = exp(g) * S
        S = S + outer(k, v - k @ S)
        S = exp(h) * S
        return S, q @ S

    update = only_update(form_of(rule))
    assert update.log_decay is not None
    assert infix(update.log_decay) == "h + g"
    (write,) = update.writes
    assert write.correction is not None
    assert infix(write.key) == "exp(h)*k"
    assert infix(write.correction.key) == "exp(g)*k"
    assert not write.correction.decayed


def test_several_recalls_of_one_write_become_one() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, p: Key, b: Scalar):
        S = S + outer(k, v - b * (k @ S) + 0.5 * (p @ S))
        return S, q @ S

    (write,) = only_update(form_of(rule)).writes
    assert write.correction is not None
    assert infix(write.correction.key) == "0.5*p - b*k"
    assert infix(write.correction.scale) == "1"


def test_a_normalised_key_stays_whole_but_a_gain_leaves_it() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, i: Scalar):
        k = k / sqrt(dot(k, k))
        return S + outer(i * k, v), q @ S

    (write,) = only_update(form_of(rule)).writes
    assert write.value is not None
    assert infix(write.value) == "i*v"
    assert "dot(k, k)" in infix(write.key)


def test_the_bonus_is_a_feed_through() -> None:
    form = library.rwkv6.normal_form()
    assert [(infix(r.key), r.phase) for r in form.reads] == [("q", Phase.BEFORE)]
    assert infix(form.outputs[0]) == "dot(q, u*k)*v + r0"


@pytest.mark.parametrize(
    ("which", "phase", "key"),
    [
        (0, Phase.BEFORE, "q"),
        (1, Phase.DECAYED, "q"),
        (2, Phase.AFTER, "q"),
        (3, Phase.BEFORE, "0.5*q"),
    ],
)
def test_the_value_read_is_the_moment(which: int, phase: Phase, key: str) -> None:
    def rule(S: State, q: Key, k: Key, v: Value, g: Scalar):
        decayed = exp(g) * S
        new = decayed + outer(k, v)
        return new, q @ (S, decayed, new, 0.5 * S)[which]

    (read,) = form_of(rule).reads
    assert (read.phase, infix(read.key)) == (phase, key)


def test_a_read_between_micro_steps_is_expanded() -> None:
    """What is written before it is no state that a row begins with: one micro-step is left."""

    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + outer(k, v - k @ S)
        o = q @ S
        S = S + outer(q, v - q @ S)
        return S, o

    form = form_of(rule)
    assert len(form.micro_steps) == 1
    assert {infix(r.key): r.phase for r in form.reads} == dict.fromkeys("qk", Phase.BEFORE)


def test_either_axis_may_be_read() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, u: HeadKey):
        S = S + outer(k, v)
        return S, u * (S @ v) + q

    form = form_of(rule)
    assert [r.other_axis for r in form.reads] == [True]
    assert form.outputs[0].kind is Kind.KEY


@pytest.mark.parametrize(
    ("gate", "log", "bound"),
    [
        (lambda f: exp(f), "f", Interval()),
        (lambda f: sigmoid(f), "logsigmoid(f)", Interval(-math.inf, 0.0)),
        (lambda f: 1 - sigmoid(f), "logsigmoid(-f)", Interval(-math.inf, 0.0)),
        (lambda f: exp(-5 * sigmoid(f)), "-5*sigmoid(f)", Interval(-5.0, 0.0)),
        (lambda f: exp(f) * sigmoid(f), "f + logsigmoid(f)", Interval()),
        (lambda f: exp(clamp(f, -5, 0)), "at_most(at_least(f, -5), 0)", Interval(-5.0, 0.0)),
        (
            lambda f: 0.5 * exp(logsigmoid(f)),
            "-0.693147 + logsigmoid(f)",
            Interval(-math.inf, math.log(0.5)),
        ),
        (
            lambda f: within(f, 0.25, 1),
            "log(maximum(within(f, 0.25, 1), 2^-126))",
            Interval(math.log(0.25), 0.0),
        ),
        (lambda f: sqrt(sigmoid(f)), "0.5*logsigmoid(f)", Interval(-math.inf, 0.0)),
        (lambda f: 1 / exp(f), "-f", Interval()),
        (lambda f: 1 / (1 / exp(f)), "f", Interval()),
        (lambda f: 1 / (2 * sqrt(exp(f))), "-(0.693147 + 0.5*f)", Interval()),
    ],
)
def test_log_decays(gate: Callable[[Scalar], Scalar], log: str, bound: Interval) -> None:
    def rule(S: State, q: Key, k: Key, v: Value, f: Scalar):
        return gate(f) * S + outer(k, v), q @ S

    update = only_update(form_of(rule))
    assert update.log_decay is not None
    assert infix(update.log_decay) == log
    assert update.bound.lo == pytest.approx(bound.lo)
    assert update.bound.hi == pytest.approx(bound.hi)


def test_a_factor_of_one_is_no_decay() -> None:
    def rule(S: State, q: Key, k: Key, v: Value):
        return 1.0 * S + outer(k, v), q @ S

    assert only_update(form_of(rule)).log_decay is None


def test_subtracting_a_part_of_the_state_is_a_decay() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, f: Scalar):
        return S - sigmoid(f) * S + outer(k, v), q @ S

    log = only_update(form_of(rule)).log_decay
    assert log is not None
    assert infix(log) == "logsigmoid(-f)"


def test_reading_an_older_state_is_expanded() -> None:
    """Where no cut separates the step, the form stays one micro-step."""

    def rule(S: State, q: Key, k: Key, v: Value, p: Key):
        first = S + outer(k, v)
        return first + outer(p, v - p @ S), q @ S

    assert len(only_update(form_of(rule)).writes) == 2


def test_momentum_mixes() -> None:
    ((S, M),) = [m.updates for m in library.momentum_delta.normal_form().micro_steps]
    ((mix,), no_mix) = S.mixes, M.mixes
    assert (mix.state, infix(mix.factor)) == ("M", "beta*exp(log_mu)")
    assert no_mix == ()
    (write,) = M.writes
    assert write.correction is not None
    assert (write.correction.state, write.correction.decayed) == ("S", False)


def test_equal_rules_have_one_digest() -> None:
    def again(S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar):
        decayed = exp(g) * S
        S = decayed + beta * outer(k, v - k @ decayed)
        return S, q @ S

    assert form_of(again).digest == library.gated_delta_rule.normal_form().digest


def test_where_beta_is_written_does_not_matter() -> None:
    def on_the_key(S: State, q: Key, k: Key, v: Value, beta: Scalar):
        return S + outer(beta * k, v - k @ S), q @ S

    def on_the_value(S: State, q: Key, k: Key, v: Value, beta: Scalar):
        return S + outer(k, beta * (v - k @ S)), q @ S

    assert form_of(on_the_key).digest == form_of(on_the_value).digest


def broken_forms() -> list[NormalForm]:
    good = library.gated_delta_rule.normal_form()
    state = Node(Op.STATE, (), ("S",), Kind.STATE)
    v = Node(Op.OPERAND, (), ("v", None), Kind.VALUE)

    def with_reads(*reads: Read) -> NormalForm:
        return NormalForm(
            good.name,
            good.operands,
            good.params,
            good.states,
            good.micro_steps,
            reads,
            good.outputs,
        )

    def with_output(output: Node) -> NormalForm:
        return NormalForm(
            good.name,
            good.operands,
            good.params,
            good.states,
            good.micro_steps,
            good.reads,
            (output,),
        )

    read_of_state = Node(Op.READ, (good.reads[0].key, state), (), Kind.VALUE)
    return [
        with_reads(),
        with_reads(good.reads[0], good.reads[0]),
        with_reads(Read("S", v, 0, Phase.AFTER)),
        with_reads(Read("S", good.reads[0].key, 1, Phase.AFTER)),
        with_output(v),
        with_output(read_of_state),
        with_output(Node(Op.RESULT, (), (1,), Kind.VALUE)),
        with_output(Node(Op.OPERAND, (), ("nobody", None), Kind.VALUE)),
    ]


@pytest.mark.parametrize("form", broken_forms())
def test_the_verifier_refuses_broken_forms(form: NormalForm) -> None:
    with pytest.raises(InvalidIR):
        verify_form(form)


def test_the_verifier_refuses_broken_steps() -> None:
    step = library.delta_rule.step()
    q, S = (Node(Op.OPERAND, (), ("q", None), Kind.KEY), step.next_states[0])
    for output in (
        Node(Op.ADD, (q, step.outputs[0]), (), Kind.VALUE),
        Node(Op.READ, (S, q), (), Kind.VALUE),
        Node(Op.RESULT, (), (0,), Kind.VALUE),
        Node(Op.EXP, (), (), Kind.VALUE),
        S,
    ):
        parts = (step.name, step.operands, step.params, step.states, step.next_states)
        broken = Step(*parts, (output,))
        with pytest.raises(InvalidIR):
            verify_step(broken)
