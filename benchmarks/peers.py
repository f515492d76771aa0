"""The kernels of other projects, called with our operands and no implicit scale."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

Operands = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Peer:
    """Kernels of another project that compute a recurrence of the library.

    Attributes:
        name: how tables call it.
        package: what is imported, at its first call.
        call: the output `[B,T,HV,V]`, of its operands by name and boundaries of packed sequences.
        own: its operands, made of ours outside the timed part; None if they are ours.
        ready: called before anything else; returns a note on its backward, or None.
        devices: the types of devices that it runs on.
        parts: how many processes compile it ahead, each its share of what Triton's autotuners try.
    """

    name: str
    package: str
    call: Callable[[Operands, Tensor | None], Tensor]
    own: Callable[[Operands], dict[str, Tensor]] | None = None
    ready: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] = ("cuda",)
    parts: int = 1

    def runs_on(self, device: torch.device) -> bool:
        """Whether the package is installed and serves the device."""
        if device.type not in self.devices:
            return False
        return importlib.util.find_spec(self.package) is not None


@cache
def lift_refusal() -> str | None:
    """Make fla run the gated backward that it refuses on Triton 3.4.0 to 3.7.0 on Hopper.

    The backward's time is valid although its result may be wrong; the harness checks the result
    like any other and marks it.
    """
    module: Any = importlib.import_module("fla.ops.common.chunk_o")
    if module.IS_NVIDIA_HOPPER and module.TRITON_ABOVE_3_4_0 and not module.TRITON_ABOVE_3_7_1:
        module.TRITON_ABOVE_3_7_1 = True
        return "† fla refuses this backward here; timed with the refusal lifted"
    return None


def _fla(
    path: str,
    operands: str,
    own: Callable[[Operands], dict[str, Tensor]] | None = None,
    ready: Callable[[], str | None] = lambda: None,
    **settings: Any,
) -> Peer:
    """`fla.ops.<path>`, called with the operands of these names in this order."""
    module, _, function = path.rpartition(".")

    def call(x: Operands, cu_seqlens: Tensor | None) -> Tensor:
        found = getattr(importlib.import_module(f"fla.ops.{module}"), function)
        given = (x[name] for name in operands.split())
        o: Tensor = found(*given, scale=1.0, cu_seqlens=cu_seqlens, **settings)[0]
        return o

    return Peer("fla", "fla", call, own, ready, parts=4)


def _flash_qla(x: Operands, cu_seqlens: Tensor | None) -> Tensor:
    function = importlib.import_module("flash_qla").chunk_gated_delta_rule
    given = (x[name] for name in ("q", "k", "v", "g", "beta"))
    o: Tensor = function(*given, scale=1.0, cu_seqlens=cu_seqlens)[0]
    return o


@cache
def _boundaries(B: int, T: int, device: torch.device) -> Tensor:
    return torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=device)


def _cudnn_kda(x: Operands, cu_seqlens: Tensor | None) -> Tensor:
    """Sequences are packed, whatever the batch."""
    function = importlib.import_module("cudnn.linear_attention").kimi_delta_attention
    B, T = x["q"].shape[:2]
    packed = _boundaries(B, T, x["q"].device) if cu_seqlens is None else cu_seqlens.int()
    given = (x[name].flatten(0, 1) for name in ("q", "k", "v", "g", "beta"))
    o: Tensor = function(*given, packed)[0]
    return torch.unflatten(o, 0, (B, T))


def _cudnn_own(x: Operands) -> dict[str, Tensor]:
    """Its backward knows the scale K^-0.5 only, which q undoes, and gates in float32 only."""
    return {**x, "q": x["q"] * x["q"].shape[-1] ** 0.5, "g": x["g"].float()}


def _mamba_ssm(x: Operands, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        raise ValueError("packed sequences are not called")
    module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    given = (x[name] for name in ("x", "dt", "A", "B", "C"))
    o: Tensor = module.mamba_chunk_scan_combined(
        *given, chunk_size=256, D=x["D"], dt_bias=x["dt_bias"], dt_softplus=True
    )
    return o


def _rates(x: Operands) -> dict[str, Tensor]:
    return {**x, "A": -x["A_log"].exp()}


_RWKV7 = -0.6065306597126334  # log-decays are this times a sigmoid


def _rwkv7(x: Operands) -> dict[str, Tensor]:
    made = {"w": (_RWKV7 * x["w"].float().sigmoid()).to(x["w"].dtype)}
    return {**x, **made, "a": -x["k_hat"], "b": x["a"] * x["k_hat"]}


def _interleaved(x: Operands) -> dict[str, Tensor]:
    """Micro-steps as tokens: `[B,T*n,...]` of `[B,T,n,...]`."""
    return {**x, **{name: x[name].flatten(1, 2) for name in ("k", "v", "beta")}}


# fla's momentum_delta_rule is no row: it runs as torch operations
PEERS: dict[str, tuple[Peer, ...]] = {
    "linear_attention": (_fla("linear_attn.chunk_linear_attn", "q k v", normalize=False),),
    "retention": (_fla("retention.chunk_retention", "q k v"),),  # computes the decay of heads
    "simple_gla": (_fla("simple_gla.chunk_simple_gla", "q k v g", ready=lift_refusal),),
    "delta_rule": (_fla("delta_rule.chunk_delta_rule", "q k v beta"),),
    "gated_delta_rule": (
        _fla("gated_delta_rule.chunk_gated_delta_rule", "q k v g beta", ready=lift_refusal),
        Peer("flash_qla", "flash_qla", _flash_qla),
    ),
    "gla": (_fla("gla.chunk_gla", "q k v g"),),
    "kda": (
        _fla("kda.chunk_kda", "q k v g beta"),
        Peer("cudnn", "cudnn", _cudnn_kda, _cudnn_own),
    ),
    # fla's a reads and its b is written, ours the other way round
    "dplr": (_fla("rwkv7.chunk_rwkv7", "q g k v b a"),),
    "rwkv7": (_fla("rwkv7.chunk_rwkv7", "r w k v a b", _rwkv7, lower_bound=_RWKV7),),
    "comba": (_fla("comba.chunk_comba", "q k v p g beta", ready=lift_refusal),),
    "gated_delta_product": (
        _fla(
            "gated_delta_product.chunk_gated_delta_product",
            "q k v g beta",
            _interleaved,
            lift_refusal,
            num_householder=2,
        ),
    ),
    "mamba2": (Peer("mamba_ssm", "mamba_ssm", _mamba_ssm, _rates, parts=4),),
    "gsa": (_fla("gsa.chunk_gsa", "q k v s g"),),
}
NAMES = sorted({peer.name for peers in PEERS.values() for peer in peers})


def shorten_tuning(ms: float) -> None:
    """Have peers' autotuners time a configuration for `ms`, and a quarter of that unmeasured.

    Triton's own are 100 and 25: minutes for a peer of some hundred configurations.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    Autotuner.do_bench = property(lambda self: partial(do_bench, warmup=ms / 4, rep=ms))
