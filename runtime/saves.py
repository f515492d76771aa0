"""What a forward keeps for the backward of the same call: tiles that both would compute.

A configuration says so (`Plan.saves`); the ops hand the tiles over as one tensor. An op is told
what is kept, and its kernels keep that, so that two directions of a call never disagree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..codegen.config import Config
from ..codegen.plan import Hoist
from ..codegen.programs import saved_by

if TYPE_CHECKING:
    from .call import Call
    from .tuned.artifact import Configuration


class Saved(NamedTuple):
    """The kinds of C x C tiles that are kept, and the rows of a chunk, C."""

    kinds: Hoist
    chunk: int

    def shape(self, call: Call) -> tuple[int, ...]:
        """Of all tiles in one tensor, `[tiles,B,T,HV,C]` in the dtype of the call, T in rows."""
        rows = call.T * len(call.form.micro_steps)
        return (len(self.names(call)), call.B, rows, call.HV, self.chunk)

    def names(self, call: Call) -> tuple[str, ...]:
        """The names of the tiles' buffers."""
        return tuple(str(name) for name, _ in saved_by(call.form, self.kinds))


def saved_under(config: Configuration | None, call: Call) -> Saved | None:
    """What forwards like `call` keep under this configuration; None: nothing."""
    if not (isinstance(config, Config) and config.forward.saves):
        return None
    saved = Saved(config.forward.saves, config.chunk)
    return saved if saved.names(call) else None
