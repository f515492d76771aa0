"""The proof of tiles holds for the library, and refuses wrong rules of differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from chunkwise import cli, dsl
from chunkwise.codegen import chunk, differentiate, evaluate, factor, gates, prove, tile
from chunkwise.codegen.elementwise import FUNCTIONS, Cotangents, Function, Rule
from chunkwise.codegen.gates import Gate, decayed_dot
from chunkwise.codegen.tile import Axis, Tile, TileOp
from chunkwise.dsl import (
    Declaration,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    dot,
    errors,
    exp,
    library,
    log,
    maximum,
    minimum,
    outer,
    rsqrt,
    sigmoid,
    sqrt,
    within,
)
from chunkwise.dsl import prove as forms
from chunkwise.dsl.ir import Op
from hypothesis import HealthCheck, given, reject, settings

from tests.random_rules import Rule as RandomRule
from tests.random_rules import rules


def by_id(d: Declaration) -> str:
    return d.name


# ---- what is right is proved ----------------------------------------------------------------


@pytest.mark.parametrize("d", library.all_declarations(), ids=by_id)
def test_library(d: Declaration) -> None:
    _, gradients, *_ = prove.prove_tiles(d)
    names = [*(o.name for o in d.operands), *(f"the initial {s.name}" for s in d.states)]
    assert gradients.endswith(": " + ", ".join(names))


@pytest.mark.parametrize(
    ("name", "where"),
    [("simple_gla", "g = -Infinity"), ("gla", "g = -Infinity"), ("hgrn2", "f = 0")],
)
def test_resets(name: str, where: str) -> None:
    """A decay that is exactly 0, and its gradient there."""
    *_, claim = prove.prove_tiles(library.by_name(name), chunk=2)
    assert claim == f"and so they do where {where}"


def test_resets_that_do_not_exist() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, f: Scalar):
        f = within(f, 0.0, 1.0)
        return f * S + outer(k, log(f) * v), q @ S

    def key(S: State, q: Key, k: Key, v: Value, w: Key):
        return exp(w) * S + outer(k - w, v), q @ S

    assert len(prove.prove_tiles(Declaration(rule), chunk=2)) == 2
    assert len(prove.prove_tiles(Declaration(key), chunk=2)) == 2
    assert len(prove.prove_tiles(library.retention, chunk=2)) == 2, "of a head: no token's"


def test_both_proofs() -> None:
    proof = prove.prove(library.delta_rule, chunk=2)
    assert proof.claims == (
        *forms.prove(library.delta_rule, chunk=2).claims,
        *prove.prove_tiles(library.delta_rule, chunk=2),
    )
    assert proof.left_out == ()


def test_without_tiles_the_form_is_proved_and_it_says_so() -> None:
    def fading_mix(A: State, B: State, q: Key, k: Key, v: Value, g: Key, s: Scalar):
        A, B = A + s * B + outer(k, v), B - s * A
        A = exp(g) * A
        A = A - outer(k, k @ A)
        return (A, B), q @ A

    rule = Declaration(fading_mix)
    proof = prove.prove(rule, chunk=2)
    assert proof.claims == forms.prove(rule, chunk=2).claims
    reason = "no tiles, and no gradient: states that mix carry a gate per channel"
    assert str(proof).endswith(f"– {reason}")


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["prove", "simple_gla", "--chunk", "2"]) == 0
    assert "equal its gradient: q, k, v, g, the initial S" in capsys.readouterr().out
    monkeypatch.setitem(FUNCTIONS, Op.EXP, Function(unscaled))
    assert cli.main(["prove", "simple_gla", "--chunk", "2"]) == 1
    assert "ProofFailed: simple_gla: the gradient of g of tiles" in capsys.readouterr().err


def test_random_rules() -> None:
    @settings(max_examples=16, suppress_health_check=list(HealthCheck))
    @given(rule=rules())
    def check(rule: RandomRule) -> None:
        try:
            declared = rule.declare()
            chunk.derive(declared.normal_form(declared.default_micro))
        except errors.ChunkwiseError:
            reject()  # what is refused has no tiles
        prove.prove_tiles(declared, chunk=2)

    check()


def recalled_key_state(z: KeyState, q: Key, k: Key, v: Value, g: Scalar, b: Scalar):
    z = z + b * outer(k, g - k @ z)
    return z, dot(q, z) * v


def recalled_normaliser(S: State, z: KeyState, q: Key, k: Key, v: Value, b: Scalar):
    S = S + b * outer(k, v - k @ S)
    z = z + b * outer(k, 1.0 - k @ z)
    return (S, z), (q @ S) / (1 + dsl.abs(dot(q, z)))


def divided_recall(S: State, q: Key, k: Key, v: Value, b: Scalar):
    """The scale is 1/0 in rows beyond the end."""
    S = S + b / dot(k, k) * outer(k, v - k @ S)
    return S, q @ S


def constant_decays(S: State, q: Key, k: Key, v: Value, f: Scalar, w: Key):
    """Their logarithms are computed in float64 before there are tiles."""
    S = 0.9 * sqrt(sigmoid(f)) * (1 - sigmoid(w)) * S
    return S + outer(k, v - k @ S), q @ S


def promised(S: State, q: Key, k: Key, v: Value, f: Scalar, w: Key, c: Value):
    """Decays that are one only where operands lie where they are said to."""
    S = within(f, 0.25, 0.5) * within(w * w, 0.0, 1.0) * S
    return S + outer(k, v * log(within(c, lo=2.0))), q @ S


def growing(S: State, q: Key, k: Key, v: Value, w: Key):
    """A gate that is far from a log-decay where operands are drawn large."""
    S = exp(dsl.expm1(w)) * S
    return S + outer(k, v), q @ S


@pytest.mark.parametrize(
    "rule",
    [
        recalled_key_state,
        recalled_normaliser,
        divided_recall,
        constant_decays,
        promised,
        growing,
    ],
)
def test_rules(rule: Callable[..., object]) -> None:
    prove.prove_tiles(Declaration(rule))


def test_no_point() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, c: Scalar):
        return S + outer(k, v * within(c * c + 2.0, 0.0, 1.0)), q @ S

    with pytest.raises(errors.NotLowered, match="keep its promises"):
        prove.prove_tiles(Declaration(rule), chunk=2)


# ---- what is wrong is refused ---------------------------------------------------------------


def of(function: Callable[[Value, Value], Value]) -> Declaration:
    """A rule whose writes are a function of two operands."""

    def rule(S: State, q: Key, k: Key, v: Value, y: Value):
        return S + outer(k, function(v, y)), q @ S

    return Declaration(rule)


USES: dict[Op, Declaration] = {
    Op.ADD: of(lambda v, y: (v + y) * v),
    Op.SUB: of(lambda v, y: (v - y) * v),
    Op.MUL: of(lambda v, y: v * y),
    Op.DIV: of(lambda v, y: v / y),
    Op.MAXIMUM: of(maximum),
    Op.MINIMUM: of(minimum),
    Op.AT_LEAST: of(lambda v, y: dsl.clamp(v, 0.2, None) + y),
    Op.AT_MOST: of(lambda v, y: dsl.clamp(v, None, 0.2) + y),
    Op.NEG: of(lambda v, y: exp(-v) + y),
    Op.EXP: of(lambda v, y: exp(v) + y),
    Op.LOG: of(lambda v, y: log(2 + v * v) + y),
    Op.EXPM1: of(lambda v, y: dsl.expm1(v) + y),
    Op.LOG1P: of(lambda v, y: dsl.log1p(v * v) + y),
    Op.SIGMOID: of(lambda v, y: sigmoid(v) + y),
    Op.LOGSIGMOID: of(lambda v, y: dsl.logsigmoid(v) + y),
    Op.SOFTPLUS: of(lambda v, y: dsl.softplus(v) + y),
    Op.TANH: of(lambda v, y: dsl.tanh(v) + y),
    Op.SQRT: of(lambda v, y: sqrt(1 + v * v) + y),
    Op.RSQRT: of(lambda v, y: rsqrt(1 + v * v) + y),
    Op.ABS: of(lambda v, y: dsl.abs(v) + y),
    Op.COS: of(lambda v, y: dsl.cos(v) + y),
    Op.SIN: of(lambda v, y: dsl.sin(v) + y),
}


def negated(rule: Rule) -> Rule:
    """The last argument's part with the other sign."""

    def wrong(z: Tile, g: Tile) -> Cotangents:
        *parts, (x, last) = rule(z, g)
        return [*parts, (x, tile.neg(last))]

    return wrong


def unscaled(z: Tile, g: Tile) -> Cotangents:
    """Every part without its factor."""
    return [(x, g) for x in z.args]


def swapped(rule: Rule) -> Rule:
    """Each argument gets the other's part."""

    def wrong(z: Tile, g: Tile) -> Cotangents:
        (x, first), (y, second) = rule(z, g)
        return [(x, second), (y, first)]

    return wrong


def wrong_maps() -> list[object]:
    """Every rule of a function, wrong in each way that is one."""
    found = []
    for op, function in FUNCTIONS.items():
        rule = function.gradient
        bounded = op in (Op.AT_LEAST, Op.AT_MOST)  # by a number, which has no gradient
        ways = {} if bounded else {"negated": negated(rule)}
        if op is not Op.ADD:
            ways["unscaled"] = unscaled
        if op in (Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.MINIMUM) or bounded:
            ways["swapped"] = swapped(rule)
        found += [pytest.param(op, wrong, id=f"{op.name} {way}") for way, wrong in ways.items()]
    return found


def refused(d: Declaration, message: str = "the gradient of") -> None:
    with pytest.raises(errors.ProofFailed, match=message):
        prove.prove_tiles(d)


@pytest.mark.parametrize(("op", "wrong"), wrong_maps())
def test_wrong_functions(op: Op, wrong: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    prove.prove_tiles(USES[op], chunk=2)
    monkeypatch.setitem(FUNCTIONS, op, Function(wrong))
    refused(USES[op])


@pytest.mark.parametrize(
    ("op", "d"),
    [
        (TileOp.DOT, library.linear_attention),
        (TileOp.MASK, library.linear_attention),
        (TileOp.RENAME, library.linear_attention),
        (TileOp.SUM, library.simple_gla),
        (TileOp.CUMSUM, library.simple_gla),
        (TileOp.DECAY, library.simple_gla),
        (TileOp.ROWS, library.retention),
        (TileOp.DECAYED_DOT, library.gla),
        (TileOp.DECAYED_DOT, library.hgrn2),
        (TileOp.PHASE, library.gated_delta_product),
    ],
    ids=lambda x: x.name,
)
def test_wrong_tiles(op: TileOp, d: Declaration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(differentiate._RULES, op, negated(differentiate._RULES[op]))
    refused(d)


def test_a_prefix_sum_the_wrong_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(z: Tile, g: Tile) -> Cotangents:
        reverse, exclusive = z.attrs
        return [(z.args[0], gates.cumsum(g, reverse=bool(reverse), exclusive=bool(exclusive)))]

    monkeypatch.setitem(differentiate._RULES, TileOp.CUMSUM, wrong)
    refused(library.simple_gla, "the gradient of g ")


def test_a_mask_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(differentiate._RULES, TileOp.MASK, unscaled)
    refused(library.linear_attention)


@pytest.mark.parametrize("part", [0, 1], ids=["dX", "dL"])
def test_a_wrong_solve(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = differentiate._solve_rule

    def wrong(z: Tile, g: Tile) -> Cotangents | None:
        parts = rule(z, g)
        if parts is None:
            return None
        return [(x, tile.neg(p) if n == part else p) for n, (x, p) in enumerate(parts)]

    monkeypatch.setattr(differentiate, "_solve_rule", wrong)
    refused(library.delta_rule)


def test_a_broadcast_that_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    to_axes = differentiate._to_axes

    def wrong(g: Tile, x: Tile) -> Tile:
        result = to_axes(g, x)
        return result if result is g else tile.mul(tile.const(2.0), result)

    monkeypatch.setattr(differentiate, "_to_axes", wrong)
    refused(library.simple_gla)


def test_a_factor_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differentiation gives is right, and what engines run is not."""
    leaving = factor._leaving

    def wrong(x: Tile, over: Axis) -> tuple[Tile, list[Tile]]:
        rest, out = leaving(x, over)
        return rest, out[1:]

    monkeypatch.setattr(factor, "_leaving", wrong)
    refused(library.gated_delta_rule, "of tiles derived and factored")


def test_a_reset_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """-inf - (-inf) is not a number."""
    monkeypatch.setattr(chunk, "_bounded", lambda log_decay: log_decay)
    refused(library.simple_gla, "the output of tiles derived")


def test_a_gradient_that_stops_at_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(z: Tile, g: Tile) -> Cotangents:
        (x,), (least,) = z.args, z.attrs
        assert isinstance(least, float)
        return [(x, tile.mul(g, tile.step(tile.sub(x, tile.const(least)))))]

    monkeypatch.setitem(differentiate._RULES, TileOp.FLOOR, wrong)
    refused(library.hgrn2, "the gradient of f ")


def test_a_wrong_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    cumsum = gates.cumsum
    monkeypatch.setattr(
        gates, "cumsum", lambda x, *, reverse=False, exclusive=False: cumsum(x, reverse=reverse)
    )
    refused(library.simple_gla, "the final S of tiles derived, in chunks of 2 rows")


# ---- the evaluator --------------------------------------------------------------------------


def test_every_op_has_a_meaning() -> None:
    leaves = {TileOp.TOKEN, TileOp.HEAD, TileOp.PARAM, TileOp.CARRY}
    assert set(evaluate._TILES) | leaves == set(TileOp)


def test_a_value_without_its_axes_is_refused() -> None:
    wrong = Tile(TileOp.SUM, (tile.head("x", (Axis.K,)),), ((Axis.K,),), (Axis.K,))
    sizes = evaluate.Sizes(2, 2, 3)
    with pytest.raises(errors.InvalidIR, match="a tile over"):
        evaluate.evaluate([wrong], lambda t: evaluate.number(1.0).repeat(2, axis=2), sizes)


def test_prefix_sums_of_another_gate_are_refused() -> None:
    g, x = tile.token("g", (Axis.K,)), tile.token("x", (Axis.K,))
    before = Gate(g, gates.cumsum(g), gates.cumsum(g), exclusive=True, factor=False)
    with pytest.raises(errors.InvalidIR, match="prefix sums that are not"):
        evaluate.evaluate(
            [decayed_dot(x, x, before)],
            lambda t: evaluate.number(0.5).repeat(2, axis=0).repeat(2, axis=2),
            evaluate.Sizes(2, 2, 3),
        )
