"""What a tensor holds is only looked at here: boundaries on the host, the rest under `check`."""

from __future__ import annotations

import os

from .call import Call, check_boundaries

CHECK_VARIABLE = "CHUNKWISE_CHECK"


def check_contents(call: Call, check: bool | None) -> None:
    """Look at the contents of a call, as far as that costs no wait, or everything if asked to.

    Args:
        call: with `cu_seqlens` still where the user had it.
        check: everything (which waits for the device); by default as CHUNKWISE_CHECK says.

    Raises:
        BadCuSeqlens: the boundaries do not rise from 0 to T.
        NanOperand, PositiveGate: the first offender, where it is and what it holds.
    """
    if check is None:
        check = os.environ.get(CHECK_VARIABLE, "") not in ("", "0")
    bounds = call.cu_seqlens
    if bounds is not None and (check or bounds.device.type == "cpu"):
        check_boundaries(bounds, call.T)
