"""Names and signatures of flash-linear-attention 0.6, so that a model changes engine by an import.

What differs on purpose: nothing is ignored silently. Hints of how to compute (`chunk_size`,
`cu_seqlens_cpu`, `disable_recompute`, ...) are accepted, since they do not change the result; what
would change it and is not offered (`cp_context`, `head_first`, ...) is refused. Packed sequences,
`reverse` and step sizes per value channel are offered where fla has them or not.

In all of them q, k are `[B,T,H,K]`, v `[B,T,HV,V]`, gates natural-log decays, `scale=None` means
K^-0.5, and the result is `(o, final_state)` with final_state None unless asked for; those of
several states say what they have instead.

The functions are in submodules too, by the peer's names: `chunkwise.fla.ops.kda.chunk_kda`.
"""

from __future__ import annotations

import sys

from .runtime import fla as _functions
from .runtime.fla import *  # noqa: F403
from .runtime.fla import __all__ as __all__
from .runtime.fla import modules as _modules


def install() -> list[str]:
    """Have `import fla` find these functions, under the names of flash-linear-attention's modules.

    `fla.ops`, a module for each family (`fla.ops.kda`) and for each kind (`fla.ops.kda.chunk`)
    exist from then on; what chunkwise does not have (`fla.layers`, `fla.modules`) is not found.

    Returns:
        The names of the modules that exist now, sorted.

    Raises:
        EngineUnavailable: flash-linear-attention itself has been imported.
    """
    return _modules.install({name: getattr(_functions, name) for name in __all__})


def uninstall() -> None:
    """Take back what `install` did, so that `import fla` finds the library again, if there is one.

    Who imported a function meanwhile keeps it.
    """
    _modules.uninstall()


_made = _modules.modules(
    __name__, {name: getattr(_functions, name) for name in __all__}, "Functions of"
)
ops = _made[f"{__name__}.ops"]
sys.modules.update(_made)
