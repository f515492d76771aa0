"""Every new tensor names its dtype and its device: neither follows the user's defaults by chance.

A buffer whose dtype is torch's default is handed to a kernel that takes it for float32.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import chunkwise as cw
import pytest
from chunkwise.codegen.config import Dims
from chunkwise.codegen.interface import Dtype
from chunkwise.runtime.export.package import Request, export

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("api", "autotune", "codegen", "dsl", "report", "runtime")
# functions of torch whose result has torch's default dtype or device where neither is named
FACTORIES = frozenset(
    (
        *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye"),
        *("frombuffer", "full", "linspace", "logspace", "normal", "ones", "rand", "randint"),
        *("randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
    )
)


def unnamed(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each factory that is not called with both `dtype=` and `device=`."""
    tree = ast.parse(source)
    named = {
        id(x)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and {"dtype", "device"} <= {k.arg for k in node.keywords}
        for x in (node.func, *node.args)  # functools.partial calls what it is given
    }
    for node in ast.walk(tree):
        factory = isinstance(node, ast.Attribute) and node.attr in FACTORIES
        if factory and ast.unparse(node.value) == "torch" and id(node) not in named:
            yield node.lineno, ast.unparse(node)


def test_the_rule_sees_calls_and_references() -> None:
    text = "a = torch.empty(3)\nb = map(torch.zeros, a)\nc = torch.ones(2, dtype=d, device=e)\n"
    assert list(unnamed(text)) == [(1, "torch.empty"), (2, "torch.zeros")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_product_names_dtype_and_device(folder: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file in sorted((ROOT / folder).glob("**/*.py"))
        if "starter" not in file.parts  # what `chunkwise new` writes is the user's own
        for line, what in unnamed(file.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["gated_delta_product", "mamba2", "linear_attention_normalised"])
def test_exported_packages_name_dtype_and_device(name: str) -> None:
    micro = 2 if name == "gated_delta_product" else 1
    request = Request(name, micro=micro, dims=(Dims(16, 16),), dtypes=(Dtype.FLOAT32,))
    files = export(getattr(cw.library, name).declaration, request)
    found = [
        f"{file}:{line}: {what}"
        for file, text in files.items()
        if file.endswith(".py")
        for line, what in unnamed(text)
    ]
    assert not found, "\n".join(found)
