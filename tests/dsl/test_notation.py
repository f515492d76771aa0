"""A printed expression means what was printed: Python reads it back, in both notations."""

from __future__ import annotations

import ast
import operator
from fractions import Fraction

from chunkwise.dsl.ir import Kind, Node, Op, constant
from chunkwise.dsl.notation import PYTHON, Text, read
from chunkwise.dsl.printing import infix
from hypothesis import given
from hypothesis import strategies as st

VALUE = {
    Op.ADD: operator.add,
    Op.SUB: operator.sub,
    Op.MUL: operator.mul,
    Op.DIV: operator.truediv,
    Op.NEG: operator.neg,
}
NAMES = {"x": Fraction(3, 7), "y": Fraction(-5, 11), "z": Fraction(13, 2)}


def node(op: Op, *args: Node) -> Node:
    return Node(op, args, (), Kind.SCALAR)


leaf = st.one_of(
    st.sampled_from([Node(Op.OPERAND, (), (n, None), Kind.SCALAR) for n in NAMES]),
    st.sampled_from([constant(-2.0), constant(3.0), constant(1e-05)]),
)
expressions = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(node, st.just(Op.NEG), inner),
        st.builds(node, st.sampled_from([op for op in VALUE if op.arity == 2]), inner, inner),
    ),
    max_leaves=9,
)


def value(n: Node) -> Fraction:
    if n.op is Op.OPERAND:
        return NAMES[str(n.attrs[0])]
    if n.op is Op.CONST:
        return Fraction(str(n.attrs[0]))
    return VALUE[n.op](*map(value, n.args))


def python(n: Node) -> Text:
    """As kernels print it: from texts alone."""
    if not n.args:
        return read(str(n.attrs[0]))
    args = [read(python(a).text) for a in n.args]
    return PYTHON.negative(*args) if n.op is Op.NEG else PYTHON.binary(n.op, *args)


def evaluated(text: str) -> Fraction:
    class Exact(ast.NodeTransformer):
        def visit_Constant(self, n: ast.Constant) -> ast.AST:
            name = ast.Name("Fraction", ast.Load())
            return ast.Call(name, [ast.Constant(str(n.value))], [])

    tree = ast.fix_missing_locations(Exact().visit(ast.parse(text, mode="eval")))
    return eval(compile(tree, "", "eval"), {"Fraction": Fraction, **NAMES})


@given(expressions)
def test_python_reads_what_was_printed(n: Node) -> None:
    try:
        expected = value(n)
    except ZeroDivisionError:
        return
    for text in (infix(n), python(n).text):
        assert evaluated(text) == expected, text
        assert read(text).text == text


@given(expressions)
def test_the_level_is_read_from_the_text(n: Node) -> None:
    """So a printer may hand texts on, instead of texts with levels."""
    assert read(python(n).text).level == python(n).level


def test_few_parentheses() -> None:
    a, b, c = (Node(Op.OPERAND, (), (n, None), Kind.SCALAR) for n in "abc")
    assert infix(node(Op.ADD, a, node(Op.ADD, b, node(Op.MUL, b, c)))) == "a + b + b*c"
    assert infix(node(Op.SUB, a, node(Op.SUB, b, c))) == "a - (b - c)"
    assert infix(node(Op.MUL, node(Op.DIV, a, b), node(Op.DIV, b, c))) == "a/b*(b/c)"
    assert infix(node(Op.DIV, a, node(Op.MUL, b, c))) == "a/(b*c)"
    assert infix(node(Op.MUL, node(Op.NEG, a), node(Op.NEG, b))) == "-a*(-b)"
