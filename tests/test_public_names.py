"""Every public name says what it is: its parameters, shapes, results, errors and sources."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chunkwise as cw
import griffe
import pytest
from chunkwise.integrations import causal_conv1d, mamba_ssm, transformers

MODULES = {
    "chunkwise": cw,
    "chunkwise.nn": cw.nn,
    "chunkwise.fla": cw.fla,
    "chunkwise.library": cw.library,
    "chunkwise.errors": cw.errors,
    **{m.__name__: m for m in (transformers, mamba_ssm, causal_conv1d)},
}
SECTIONS = griffe.DocstringSectionKind
_SHAPE = re.compile(r"`\[[^`]*\]`")
_YEAR = re.compile(r"\b(1[89]|20)\d\d\b")


def _names(module: Any) -> list[str]:
    if module is cw.library:
        return list(dir(module))
    if module is cw.errors:
        found = vars(module).items()
        return [n for n, x in found if isinstance(x, type) and issubclass(x, Exception)]
    return list(module.__all__)


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Its own public methods and properties; what torch or Python define is theirs to explain."""
    for name, x in vars(cls).items():
        if not name.startswith("_") and (inspect.isfunction(x) or isinstance(x, property)):
            yield name, x


def public() -> dict[str, Any]:
    """Every public name, and the public methods of public classes, by their paths."""
    found: dict[str, Any] = {"chunkwise.abs": cw.abs, "chunkwise.sum": cw.sum}
    for path, module in MODULES.items():
        found[path] = module
        for name in _names(module):
            x = getattr(module, name)
            found[f"{path}.{name}"] = x
            if inspect.isclass(x):
                found |= {f"{path}.{name}.{n}": m for n, m in _methods(x)}
    found["chunkwise.Recurrence.__call__"] = cw.Recurrence.__call__
    return found


PUBLIC = public()


class Described:
    """A docstring, parsed: its first line, its sections by kind."""

    def __init__(self, x: Any) -> None:
        self.text = inspect.getdoc(x.fget if isinstance(x, property) else x) or ""
        own = getattr(type(x), "__doc__", None)
        if not inspect.isclass(x) and not callable(x) and self.text == inspect.cleandoc(own or ""):
            self.text = ""  # that of its class
        sections = griffe.Docstring(self.text, parser="google").parse(
            warnings=False, returns_multiple_items=False
        )
        self.sections = {s.kind: s for s in sections}

    def rows(self, kind: griffe.DocstringSectionKind) -> dict[str, str]:
        section = self.sections.get(kind)
        rows = [] if section is None else section.value
        return {str(getattr(r, "name", "") or r.annotation): r.description for r in rows}


def _parameters(path: str, x: Any) -> dict[str, inspect.Parameter]:
    if inspect.isclass(x) and (issubclass(x, Exception) or _is_protocol(x) or _is_enum(x)):
        return {}
    if (
        isinstance(x, property)
        or not callable(x)
        or _is_kind(x)
        or path.startswith("chunkwise.library.")
    ):
        return {}
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    function = x.__init__ if inspect.isclass(x) and "__init__" in vars(x) else x
    given = inspect.signature(function).parameters.values()
    return {kinds.get(p.kind, "") + p.name: p for p in given if p.name != "self"}


def _is_kind(x: Any) -> bool:
    return hasattr(x, "__metadata__")


def _is_protocol(x: type) -> bool:
    return bool(getattr(x, "_is_protocol", False))


def _is_enum(x: type) -> bool:
    return hasattr(x, "__members__")


def _returns(x: Any) -> object:
    function = x.fget if isinstance(x, property) else x
    return getattr(function, "__annotations__", {}).get("return")


def _raised(x: Any) -> set[str]:
    """The errors that its own lines raise."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(x)))
    except (OSError, TypeError, SyntaxError):
        return set()
    calls = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise)]
    names = [c.func for c in calls if isinstance(c, ast.Call)]
    return {n.attr if isinstance(n, ast.Attribute) else n.id for n in names}  # type: ignore[attr-defined]


def lacks(path: str, x: Any) -> list[str]:
    """What the docstring of a public name lacks, a phrase each."""
    described = Described(x)
    if not described.text:
        return ["a docstring"]
    missing = []
    rows = described.rows(SECTIONS.parameters)
    if inspect.isclass(x):
        rows |= described.rows(SECTIONS.attributes)
    for name, parameter in _parameters(path, x).items():
        if not rows.get(name):
            missing.append(f"the parameter {name}")
        elif (
            name[:2] != "**"
            and "Tensor" in str(parameter.annotation)
            and not _SHAPE.search(rows[name])
        ):
            missing.append(f"the shape of {name}")
    if inspect.isclass(x) or not callable(x) or _is_kind(x):
        return missing
    returned = str(_returns(x))
    if returned not in ("None", "NoReturn") and path != "chunkwise.recurrence":
        text = " ".join(described.rows(SECTIONS.returns).values())
        if not text:
            missing.append("what it returns")
        elif "Tensor" in returned and not _SHAPE.search(text):
            missing.append("the shape of what it returns")
    raises = " ".join(described.rows(SECTIONS.raises))
    missing += [f"the error {e}" for e in sorted(_raised(x)) if e not in raises]
    return missing


def test_every_public_name_is_documented() -> None:
    """Counts: names without a docstring, parameters without a word, tensors without a shape."""
    missing = {path: found for path, x in PUBLIC.items() if (found := lacks(path, x))}
    listed = "\n".join(f"{path} lacks {', '.join(found)}" for path, found in missing.items())
    assert not missing, f"{len(missing)} of {len(PUBLIC)} public names:\n{listed}"


def test_the_page_of_the_api_is_current() -> None:
    path = Path(__file__).resolve().parent.parent / "docs" / "api.py"
    spec = importlib.util.spec_from_file_location("docs_api", path)
    assert spec is not None
    assert spec.loader is not None
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    page = api.page()
    assert page == api.PAGE.read_text(encoding="utf-8"), "run `make docs`"
    for path in PUBLIC.keys() - {"chunkwise"}:
        name = path.removeprefix("chunkwise.errors.").split(".")[0]  # a row for each error
        assert f"`{path}`" in page or f"`{name}`" in page, path


@pytest.mark.parametrize("name", cw.fla.__all__)
def test_functions_of_fla_name_their_source(name: str) -> None:
    first = inspect.getdoc(getattr(cw.fla, name)).splitlines()[0]
    assert _YEAR.search(first) or "s `chunk_" in first


@pytest.mark.parametrize("name", cw.library.names())
def test_recurrences_name_their_source(name: str) -> None:
    doc = getattr(cw.library, name).declaration.doc
    assert _YEAR.search(doc), f"{name}: {doc}"
    assert len(doc.splitlines()[0]) <= 100


def test_a_star_import_leaves_pythons_own_names() -> None:
    names: dict[str, object] = {}
    exec("from chunkwise import *", names)
    assert "outer" in names
    assert not {"sum", "abs"} & names.keys()
    assert cw.sum.__module__ == cw.abs.__module__ == "chunkwise.dsl.functions"
    kinds = {n: names[n] for n in ("Key", "Value", "Scalar", "HeadScalar", "State", "KeyState")}
    assert len({k.__doc__ for k in kinds.values()}) == len(kinds)


def test_no_public_module_is_left_out() -> None:
    folder = Path(cw.__file__).parent
    files = [*folder.glob("*.py"), *folder.glob("integrations/*.py")]
    modules = {".".join(p.relative_to(folder).with_suffix("").parts) for p in files}
    found = {n for n in modules if not n.endswith("__")}
    commands = {n for n in found if n.startswith("cli")} | {
        *("audit", "environment", "interrupts", "reporting")
    }
    assert {f"chunkwise.{n}" for n in found - commands} == MODULES.keys() - {"chunkwise"}
