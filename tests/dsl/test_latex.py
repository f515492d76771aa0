"""Equations in LaTeX and MathML: a golden, and what holds of those of every recurrence."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from chunkwise.codegen.programs import chunk_program
from chunkwise.codegen.text.mathematics import chunk_equations
from chunkwise.dsl import Declaration, library, oracle
from chunkwise.dsl.equations import as_step, equations
from chunkwise.dsl.functions import outer, softplus, sqrt, tanh
from chunkwise.dsl.kinds import Key, State, Value
from chunkwise.dsl.latex import Equation, aligned, mathml
from chunkwise.runtime.inputs import draw, ranges, usual_params

DECLARED = library.all_declarations()
NAMES = [d.name for d in DECLARED]

GATED_DELTA_RULE = r"""\begin{aligned}
\bar{S}_{t} &= e^{g_{t}}\,S_{t-1} \\
S_{t} &= \bar{S}_{t} + \beta_{t}\,k_{t}\,(v_{t} - \bar{S}_{t}^{\top} k_{t})^{\top} \\
o_{t} &= S_{t}^{\top} q_{t}
\end{aligned}"""


def test_golden() -> None:
    assert aligned(equations(library.gated_delta_rule.step())) == GATED_DELTA_RULE


def rows(declared: Declaration) -> dict[str, str]:
    return {e.left: e.right for e in equations(declared.step(declared.default_micro))}


def test_notation_of_papers() -> None:
    assert rows(library.gla)["S_{t}"] == (r"\text{Diag}(e^{g_{t}})\,S_{t-1} + k_{t}\,v_{t}^{\top}")
    assert rows(library.oja)[r"\bar{S}_{t}"] == r"S_{t-1}\,\text{Diag}(e^{g_{t}})"
    assert r"\frac{S_{t}^{\top} q_{t}}" in rows(library.mlstm)["o_{t}"]
    assert r"k_{t}^{(2)}\,(v_{t}^{(2)} - " in rows(library.delta_product)["S_{t}"]


def test_a_step_without_normal_form() -> None:
    def rule(S: State, q: Key, k: Key, v: Value) -> object:
        S = tanh(S + outer(k, v))
        return S, (q @ S) / sqrt(softplus(q @ S) * 1e-10)

    found = rows(Declaration(rule, any_step=True))
    assert found["S_{t}"] == r"\tanh(S_{t-1} + k_{t}\,v_{t}^{\top})"
    assert found["o_{t}"].endswith(r"{\sqrt{10^{-10}\,\text{softplus}(S_{t}^{\top} q_{t})}}")


def test_parentheses_around_fractions_stretch() -> None:
    display = aligned([Equation("x", r"a\,(\frac{b}{c} + (d + e))^{\top}")])
    assert r"\left(\frac{b}{c} + (d + e)\right)^{\top}" in display


@pytest.mark.parametrize("declared", DECLARED, ids=NAMES)
def test_every_recurrence_has_well_formed_mathml(declared: Declaration) -> None:
    micro = declared.default_micro
    pages = [equations(declared.step(micro)), equations(as_step(declared.normal_form(micro)))]
    pages.append(chunk_equations(chunk_program(declared.normal_form(micro))))
    for page in pages:
        latex = aligned(page)
        assert latex.count("{") == latex.count("}")
        assert latex.count(r"\left(") == latex.count(r"\right)")
        element = ElementTree.fromstring(mathml(latex))
        table = next(iter(element))
        assert len(table) == len(page)
        text = "".join(element.itertext())
        assert "\\" not in text
        assert "None" not in text


@pytest.mark.parametrize("declared", DECLARED, ids=NAMES)
def test_the_normal_form_as_a_step(declared: Declaration) -> None:
    micro = declared.default_micro
    form = declared.normal_form(micro)
    params = usual_params(form)
    sizes = {"B": 2, "T": 5, "n": micro, "H": 1, "HV": 2, "K": 3, "V": 4}
    inputs = draw(form, ranges(form, params), sizes, torch.Generator().manual_seed(0))
    expected = oracle.run(declared.step(micro), inputs, params)
    found = oracle.run(as_step(form), inputs, params)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
