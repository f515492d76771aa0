"""Has models of Hugging Face's transformers run on chunkwise, by one line.

A model file of transformers marks each function that another package may have a faster one of with
a decorator, which says the function's name there and the package: fla, mamba_ssm or causal_conv1d.
The decorated function looks the other one up when the file is imported, and keeps it in its
closure. `patch` puts chunkwise's there, in files imported before and after, whatever the model.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any, cast

from .. import fla
from ..dsl import errors
from ..runtime.extras import how_to_install
from . import causal_conv1d, mamba_ssm

__all__ = ["patch", "replaced", "unpatch"]

_PACKAGES = {"fla": fla, "mamba_ssm": mamba_ssm, "causal_conv1d": causal_conv1d}
_PLACES = ("transformers.integrations.hub_kernels", "transformers.integrations")
_DECORATOR = "use_kernel_func_from_hub_with_fallback"
# what a decorated function holds of the function that it calls
_HELD = ("implementation", "applicable_params", "is_new_implementation")
_READ = ("func_name", "package", "torch_function")
# short cuts through several functions: without them a model calls these, and masks padding between
_SHORT_CUTS = ("mamba_split_conv1d_scan_combined", "mamba_inner_fn")

_Decorator = Callable[..., Callable[[Any], Any]]
_original: _Decorator | None = None  # while models are patched
_before: dict[FunctionType, dict[str, Any]] = {}  # what patched functions held


def patch() -> list[str]:
    """Have models call chunkwise, whether their files are imported already or will be.

    All functions that models look for in fla, mamba_ssm or causal_conv1d are replaced, if
    `chunkwise.fla` or `chunkwise.integrations` has them, also where these packages are installed.
    Keyword arguments that a function does not have are left out, as transformers does. Kernels from
    Hugging Face's hub, where a model was loaded with `use_kernels=True`, go first as before. A
    second call adds what a file has decorated since that had transformers' decorator already.

    Returns:
        As `replaced`.

    Raises:
        PackageUnavailable: transformers is not installed, or a version that works in another way.
    """
    global _original
    if _original is None:
        original = _installed()
        for place in _PLACES:
            setattr(importlib.import_module(place), _DECORATOR, _serving(original))
        _original = original
    for function in _decorated(_original):
        _replace(function)
    return replaced()


def unpatch() -> None:
    """Take back what `patch` did, in models that exist too."""
    global _original
    if _original is None:
        return
    for place in _PLACES:
        setattr(importlib.import_module(place), _DECORATOR, _original)
    _original = None
    for function, held in _before.items():
        cells = _cells(function)
        for name, content in held.items():
            cells[name].cell_contents = content
    _before.clear()


def replaced() -> list[str]:
    """The functions of imported models that call chunkwise now, each with the one that it calls.

    Returns:
        `module.function: package.function`, sorted.
    """
    found = []
    for function in _before:
        held = {name: cell.cell_contents for name, cell in _cells(function).items()}
        own = f"{held['package']}.{held['func_name']}"
        found.append(f"{function.__module__}.{function.__name__}: {own}")
    return sorted(found)


def _installed() -> _Decorator:
    """The decorator of the installed transformers."""
    try:
        hub = importlib.import_module(_PLACES[0])
    except ImportError:
        raise errors.PackageUnavailable(
            "transformers", "it is not installed", help=how_to_install("hf")
        ) from None
    decorator: _Decorator | None = getattr(hub, _DECORATOR, None)
    if decorator is None or _made_code(decorator) is None:
        version = importlib.import_module("transformers").__version__
        raise errors.PackageUnavailable(
            "transformers",
            f"models of version {version} look for functions of other packages in another way",
            help=how_to_install("hf"),
        )
    return decorator


def _serving(original: _Decorator) -> _Decorator:
    """The decorator, whose functions call chunkwise."""

    @functools.wraps(original)
    def decorator(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        decorate = original(*args, **kwargs)

        def made(torch_function: Any) -> Any:
            function = decorate(torch_function)
            if _original is None:  # a file has kept this decorator, and models are unpatched
                return function
            # `kernels`, where it is installed, makes a module of the function
            for found in [function] if type(function) is FunctionType else _decorated(original):
                _replace(found)
            return function

        return made

    return decorator


def _made_code(decorator: _Decorator) -> CodeType | None:
    """The code that all functions made by the decorator share; it is within the decorator's."""
    pending = [cast(FunctionType, decorator).__code__]
    for code in pending:
        if {*_HELD, *_READ} <= {*code.co_freevars}:
            return code
        pending += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return None


def _decorated(decorator: _Decorator) -> list[FunctionType]:
    """The functions that the decorator has made, whoever has them."""
    code = _made_code(decorator)
    return [f for f in gc.get_referrers(code) if type(f) is FunctionType and f.__code__ is code]


def _replace(function: FunctionType) -> None:
    """Have a decorated function call chunkwise's, if there is one."""
    cells = _cells(function)
    name, source, torch_function = (cells[read].cell_contents for read in _READ)
    package = _PACKAGES.get(source)
    if function in _before or package is None:
        return
    if name in _SHORT_CUTS:
        own = torch_function  # which returns None: the model then goes step by step
    elif name in package.__all__:
        own = getattr(package, name)
    else:
        return
    _before[function] = {held: cells[held].cell_contents for held in _HELD}
    contents = own, tuple(inspect.signature(own).parameters), True
    for held, content in zip(_HELD, contents, strict=True):
        cells[held].cell_contents = content


def _cells(function: FunctionType) -> dict[str, CellType]:
    """The variables of a function's closure."""
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
