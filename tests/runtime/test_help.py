"""What help, signatures, repr and notebooks show of a recurrence."""

from __future__ import annotations

import inspect
import pydoc
import xml.etree.ElementTree as ElementTree

import chunkwise as cw
import pytest
from chunkwise.runtime.recurrence import OPTIONS


def test_signature_and_repr() -> None:
    op = cw.library.linear_attention_normalised
    parameters = inspect.signature(op).parameters
    assert list(parameters)[:4] == ["q", "k", "v", "eps"]
    assert parameters["eps"].default == 1e-10
    assert parameters["initial_state"].kind is inspect.Parameter.KEYWORD_ONLY
    assert repr(op) == (
        "<recurrence linear_attention_normalised(q: Key, k: Key, v: Value, *, eps): "
        "S: no decay, no low rank, z: no decay, no low rank, one micro-step, 2 states>"
    )
    assert "linear_attention_normalised" in op.explain()


def test_help_shows_the_operands() -> None:
    """With kinds, shapes and what they must hold: of the op, its call and its step."""
    op = cw.library.gated_delta_product
    assert str(inspect.signature(op.__call__)) == str(inspect.signature(op))
    assert str(inspect.signature(op)).startswith("(q: Key[B,T,H,K], k: Key[B,T,n,H,K], v: Value[")
    assert str(inspect.signature(op.step)).startswith("(q: Key[B,H,K], k: Key[B,n,H,K], v: Value[")
    for shown in (pydoc.render_doc(op), pydoc.render_doc(op.__call__)):
        assert "Gated DeltaProduct (Siems et al. 2025)" in shown
        assert "k (tuple[Key, ...]): `[B,T,n,H,K]`, or `[B,T,n,HV,K]`." in shown
        assert "g (Scalar): `[B,T,HV]`; the log-decay of S, at most 0." in shown
        assert "Returns:\n" in shown
        assert "BadShape: " in shown
    assert "g (Scalar): `[B,HV]`; the log-decay of S" in pydoc.render_doc(op.step)
    assert "f (Key): `[B,T,H,K]`, or `[B,T,HV,K]`; promised to lie in [0.0, 1.0]." in (
        cw.library.hgrn2.__doc__ or ""
    )
    slow = cw.recurrence(engine="reference")(_squashed)
    assert repr(slow).endswith("token by token>")


@pytest.mark.parametrize("name", ["gated_delta_product", "linear_attention_normalised", "oja"])
def test_notebooks_show_equations(name: str) -> None:
    op = getattr(cw.library, name)
    page = ElementTree.fromstring(op._repr_html_())
    assert page.find("{http://www.w3.org/1998/Math/MathML}math") is not None
    rows = [[cell.text for cell in row] for row in page.iter("tr")]
    names = [*inspect.signature(op).parameters][: -len(OPTIONS)]
    assert [row[0] for row in rows] == names + [s.name for s in op.declaration.states]


def _squashed(S: cw.State, q: cw.Key, k: cw.Key, v: cw.Value):
    S = S + cw.outer(k, cw.tanh(v - k @ S))
    return S, q @ S
