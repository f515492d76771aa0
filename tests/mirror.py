"""Declarations with Keys and Values exchanged: states transposed, rows acted on as columns were."""

from __future__ import annotations

import ast

_OTHER = {"Key": "Value", "HeadKey": "HeadValue"}
_OTHER |= {b: a for a, b in _OTHER.items()}


class _Mirror(ast.NodeTransformer):
    """Exchanges the roles of Keys and Values in a declaration without KeyStates."""

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(_OTHER.get(node.id, node.id), node.ctx)

    def visit_BinOp(self, node: ast.BinOp) -> ast.BinOp:
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            node.left, node.right = node.right, node.left
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "outer":
            node.args.reverse()
        return node


def mirror(source: str) -> str:
    """The declaration of the transposed states: what is done to rows is done to columns."""
    return ast.unparse(_Mirror().visit(ast.parse(source))) + "\n"
