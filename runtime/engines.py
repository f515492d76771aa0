"""Which engine serves a call: by device or by name, and never silently another one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING

from ..dsl import errors
from ..dsl.diagnostic import did_you_mean
from .extras import how_to_install

if TYPE_CHECKING:
    from .engine import Engine

ENGINE_VARIABLE = "CHUNKWISE_ENGINE"
# what os.environ holds: asked itself for a variable that is not set, it raises and catches two
# exceptions, which take a tenth of the time of a step
_VARIABLES: dict[object, object] = os.environ._data  # type: ignore[attr-defined]
_VARIABLE = os.environ.encodekey(ENGINE_VARIABLE)


class EngineName(Enum):
    """The engines; the value is what a user writes in `engine=`."""

    REFERENCE = "reference"
    EAGER = "eager"
    TRITON = "triton"
    TVM = "tvm"


# the table that a new engine joins: its module, and the devices that choose it by themselves
_MODULES = {
    EngineName.REFERENCE: "reference",
    EngineName.EAGER: "eager",
    EngineName.TRITON: "triton.engine",
    EngineName.TVM: "tvm.engine",
}
# "meta" tensors have shapes only, and shapes do not depend on the engine
_BY_DEVICE = {"cpu": EngineName.TVM, "meta": EngineName.EAGER, "cuda": EngineName.TRITON}
_LOG = logging.getLogger(__name__)


def engine_of_environment() -> str | None:
    """What CHUNKWISE_ENGINE names now; None if it is empty or not set."""
    return os.environ[ENGINE_VARIABLE] or None if _VARIABLE in _VARIABLES else None


@cache
def _has_tvm() -> bool:
    """Whether CPU calls can be compiled; says once what installing TVM would bring."""
    if importlib.util.find_spec("tvm") is not None:
        return True
    _LOG.warning(
        "CPU calls run as torch operations; TVM compiles them, several times as fast: %s",
        how_to_install("tvm"),
    )
    return False


def choose(
    device_type: str, requested: EngineName | str | None = None, *, double: bool = False
) -> EngineName:
    """The engine of a call: `requested`, else `CHUNKWISE_ENGINE`, else the device's own.

    `double`: operands of float64, which only torch's own operations compute.

    Raises:
        EngineUnavailable: the name is unknown, or the device has no engine of its own.
    """
    if requested is None:
        requested = engine_of_environment()
    if requested is None:
        own = _BY_DEVICE.get(device_type)
        if own is None:
            raise errors.EngineUnavailable(
                "default",
                f"no engine is chosen by itself on a device of type {device_type!r}",
                help='engine="eager" runs it with torch operations there',
            )
        if own is EngineName.TVM and (double or not _has_tvm()):
            return EngineName.EAGER
        return own
    try:
        return EngineName(requested)
    except ValueError:
        names = [n.value for n in EngineName]
        help = f"{did_you_mean(str(requested), names)} engines: {', '.join(names)}".strip()
        raise errors.EngineUnavailable(
            str(requested), "there is no engine of that name", help=help
        ) from None


@cache
def load(name: EngineName) -> Engine:
    """The engine, its module imported when it is first needed.

    Raises:
        EngineUnavailable: what the engine is built on (triton, say) is not installed.
    """
    try:
        module = importlib.import_module(f".{_MODULES[name]}", __package__)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        how = how_to_install("tvm") if package.startswith("tvm") else f"pip install {package}"
        raise errors.EngineUnavailable(
            name.value, f"it needs the module {package!r}, which is not installed: {how}"
        ) from missing
    engine: Engine = module.ENGINE
    return engine


def available() -> dict[EngineName, str | None]:
    """Every engine of this version: None if it can be loaded here, else the reason why not."""
    found: dict[EngineName, str | None] = {}
    for name in _MODULES:
        try:
            load(name)
        except errors.EngineUnavailable as why:
            found[name] = why.why
        else:
            found[name] = None
    return found
