"""Where in the user's file a traced expression was written."""

from __future__ import annotations

import dis
import linecache
import re
import sys
from itertools import islice
from types import CodeType, FrameType

from .ir import Loc

# frames of these modules build expressions; the user's line is in the first frame outside them
_BUILDERS = frozenset(
    f"{__package__}.{m}" for m in ("source", "traced", "functions", "trace", "declaration")
)


def _builds(module: str) -> bool:
    return module in _BUILDERS or module.partition(".")[0] in ("torch", "numpy")


def here() -> Loc | None:
    """The innermost line that is not part of the tracing machinery."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _builds(str(frame.f_globals.get("__name__"))):
        frame = frame.f_back
    if frame is None:
        return None
    code = frame.f_code
    line, col, end_col = frame.f_lineno, None, None
    if sys.version_info >= (3, 11) and frame.f_lasti >= 0:
        found = next(islice(code.co_positions(), frame.f_lasti // 2, None), None)
        if found is not None and found[0] is not None:
            start, end, col, end_col = found
            line = start
            if end != start:
                end_col = None
    return Loc(code.co_filename, line, code.co_name, col, end_col)


def raised_in(error: BaseException, code: CodeType) -> Loc | None:
    """The line of `code` that raised `error`; None if it was raised elsewhere."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code is not code:
        return None
    return Loc(code.co_filename, last.tb_lineno, code.co_name)


def definition(code: CodeType, parameter: str = "") -> Loc:
    """The `def` line of a function (below its decorators), or where it names `parameter`."""
    linecache.checkcache(code.co_filename)  # the file may have changed since it was read
    first = code.co_firstlineno
    lines = {n: linecache.getline(code.co_filename, n) for n in range(first, first + 60)}
    at = next((n for n, text in lines.items() if text.lstrip().startswith("def ")), first)
    # the signature ends where the first line of the body begins
    body = min((n for _, _, n in code.co_lines() if n is not None and n > at), default=at + 1)
    for n in range(at, max(body, at + 1)) if parameter else ():
        start = lines[n].find("(") if n == at else 0
        found = re.compile(rf"\b{re.escape(parameter)}\b").search(lines[n], max(start, 0))
        if found is not None:
            prefix = lines[n][: found.start()].encode()
            col = len(prefix)
            return Loc(code.co_filename, n, code.co_name, col, col + len(parameter.encode()))
    return Loc(code.co_filename, at, code.co_name)


def last_return(code: CodeType) -> Loc:
    """The line of the last `return` of a function; its first line if there is none."""
    line = code.co_firstlineno
    returns = {i.offset for i in dis.get_instructions(code) if i.opname.startswith("RETURN_")}
    for start, end, at in code.co_lines():
        if at is not None and any(start <= offset < end for offset in returns):
            line = max(line, at)
    return Loc(code.co_filename, line, code.co_name)
