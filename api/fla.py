"""Names and signatures of flash-linear-attention 0.6, so that a model changes engine by an import.

What differs on purpose: nothing is ignored silently. Hints of how to compute (`chunk_size`,
`cu_seqlens_cpu`, `disable_recompute`, ...) are accepted, since they do not change the result; what
Packed sequences, `reverse` and step sizes per value channel are offered where fla has them or not.
is offered too, where it falls out: packed sequences, `reverse`, step sizes per value channel.

In all of them q, k are `[B,T,H,K]`, v `[B,T,HV,V]`, gates natural-log decays, `scale=None` means
K^-0.5, and the result is `(o, final_state)` with final_state None unless asked for; those of
several states say what they have instead.
"""

from __future__ import annotations

from .runtime.fla import *  # noqa: F403
from .runtime.fla import __all__ as __all__
