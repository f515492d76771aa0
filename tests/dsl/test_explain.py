"""What is printed of the gated delta rule (golden), and what the other pages must say."""

from __future__ import annotations

import chunkwise as cw
import pytest
from chunkwise.dsl import Declaration, Key, Scalar, State, Value, explain, library, outer, tanh
from chunkwise.dsl.equations import equations as typeset
from chunkwise.dsl.explain import equations, print_form, print_step

STEP = """\
step gated_delta_rule(S[K,V]; q[K], k[K], v[V], g[], beta[])
   %1 = exp g                          : 1
   %2 = scale S by %1                  : K×V
   %3 = k @ %2                         : V
   %4 = v - %3                         : V
   %5 = outer k, %4                    : K×V
   %6 = scale %5 by beta               : K×V
   %7 = %2 + %6                        → S
   %8 = q @ %7                         → o"""

FORM = """\
decay   e^g                               scalar decay per token, bound unknown
write   k ⊗ beta·(v − kᵀS')               symmetric, reads the decayed state
read    q                                 r0, after the update
class   scalar decay, rank 1 (one write, symmetric), one micro-step, one state"""


def test_step() -> None:
    lines = print_step(library.gated_delta_rule.step()).splitlines()
    assert "library.py:" in lines[1]
    assert "\n".join(x.partition("library.py")[0].rstrip() for x in lines) == STEP


def test_form() -> None:
    assert print_form(library.gated_delta_rule.normal_form()) == FORM


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gated_delta_rule", ["Yang, Kautz", "v     Value              [B,T,HV,V]", "must be ≤ 0"]),
        ("gla", ["summed exactly within a chunk"]),
        ("mamba2", ["log-decay in [-inf, 0]", "output  r0 + D*x", "[HV]"]),
        ("hgrn2", ["log(max(f, 2^-126))", "is a promise"]),
        ("rwkv7", ["log-decay in [-0.6065, 0]", "a*k_hat ⊗ −(k_hatᵀS)"]),
        ("oja", ["beta·(k − S'v) ⊗ v", "handled transposed"]),
        ("momentum_delta", ["mix     beta*exp(log_mu) · M", "2 coupled states"]),
        ("delta_product", ["micro-step 1", "k(2)[K]", "[B,T,n,H,K]"]),
        ("linear_attention_normalised", ["default 1e-10", "r0/(r1 + eps)", "KeyState"]),
    ],
)
def test_pages(name: str, says: list[str]) -> None:
    page = explain.explain(library.by_name(name))
    for text in says:
        assert text in page


def test_every_page_prints_and_fits() -> None:
    for d in library.all_declarations():
        page = explain.explain(d)
        form = d.normal_form(d.default_micro)
        assert print_form(form) in page
        assert explain.explain(form).startswith(d.name)


def test_reference_only() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, g: Scalar):
        return S + outer(k, tanh(k @ S) + g * v), q @ S

    assert "token by token" in explain.explain(Declaration(rule, any_step=True))


@cw.recurrence
def squared(S: State, q: Key, k: Key, v: Value, f: Scalar):
    f = cw.within(f, -1, 1)
    for _ in range(40):
        f = f * f
    return f * S + cw.outer(k, v), q @ S


@cw.recurrence
def deep(S: State, k: Key, v: Value, g: Scalar, b: Scalar):
    for _ in range(40):
        k = cw.sigmoid(k) * k + b * k
        g = g * cw.sigmoid(g)
    S = cw.exp(g) * S
    return S + b * cw.outer(k, v - k @ S), k @ S


@pytest.mark.parametrize("op", [squared, deep], ids=["squared", "deep"])
def test_parts_that_come_again_are_printed_once(op: cw.Recurrence) -> None:
    """Forty levels: there are 2^40 ways through these expressions."""
    declaration = op.declaration
    page = print_form(declaration.normal_form())
    assert "part    x1 = " in page
    assert len(page) < 8_000
    assert max(map(len, page.splitlines())) < 500
    texts = [*equations(declaration.step()), *(e.right for e in typeset(declaration.step()))]
    assert sum(map(len, texts)) < 30_000


def test_an_error_names_parts_of_long_expressions() -> None:
    def grows(S, q, k, v, f):  # type: ignore[no-untyped-def]
        for _ in range(40):
            f = f * f + 1.5
        return f * S + cw.outer(k, v), q @ S

    grows.__annotations__ = {"S": State, "q": Key, "k": Key, "v": Value, "f": Scalar}
    with pytest.raises(cw.errors.DeclarationError, match=r"where x1 = .*f\*f \+ 1.5") as error:
        cw.recurrence(grows)
    assert len(str(error.value)) < 4_000
