"""Which kernels are Gluon's if nobody chose: a rule from measurements (65, 80, 94)."""

from __future__ import annotations

from dataclasses import replace

from ...dsl.classify import DecayClass, LowRank, classify
from ...dsl.normal_form import NormalForm
from ..config import Config, Dims, KernelConfig
from ..interface import Dtype, Signature
from ..plan import Hoist, Plan
from .emit import emit, in_gluon
from .refusal import NO_PRODUCTS

_MEASURED = Dims(128, 128)
_LONG = 4096  # tokens of the shortest sequences that were measured
_FEW, _MANY = KernelConfig(64, 4, 3), KernelConfig(128, 8, 2)
_CHUNKS = {"backward_gradients": KernelConfig(64, 8, 3)}
# of vector gates, whose chunks all kernels have or none: tokens, and tiles
_DECAYED_CHUNK = 64
_DECAYED_SCANS = KernelConfig(64, 4, 2)
_DECAYED = dict.fromkeys(
    ("forward_prep", *(f"backward_{n}" for n in ("prep", "sums", "values", "gradients"))),
    KernelConfig(64, 8, 3),
)
# the classes that were measured
_RANKS = (LowRank.NONE, LowRank.SYMMETRIC)
_DECAYS = (DecayClass.NONE, DecayClass.PER_HEAD, DecayClass.SCALAR)


def _scored(plan: Plan) -> Plan:
    """`plan`, but products of operands stay in the scan."""
    return replace(plan, hoist=plan.hoist & ~Hoist.PRODUCTS)


def _of_vector_gates(form: NormalForm, config: Config, signature: Signature) -> Config | None:
    """`config` in longer chunks than Triton's; None if a kernel with products cannot be Gluon's.

    What a forward might keep for its backward was not measured in these.
    """
    longer = replace(config.saving(Hoist.NOTHING), chunk=_DECAYED_CHUNK)
    wanted = in_gluon(form, longer, _DECAYED_SCANS, chunks=_DECAYED)
    made = emit(form, signature, wanted)
    if made is None or any(why != NO_PRODUCTS for _, why in made.refused):
        return None
    return in_gluon(form, longer, _DECAYED_SCANS, frozenset(n for n, _ in made.refused), _DECAYED)


def _of_scans(form: NormalForm, config: Config, signature: Signature) -> Config | None:
    """`config` with all scans in Gluon, in the chunks that it has; None if one cannot be."""
    wanted = in_gluon(form, config, _FEW)
    made = emit(form, signature, wanted)
    return None if made is None or made.refused else wanted


def preferred(
    form: NormalForm,
    config: Config,
    signature: Signature,
    rows: int,
    tokens: int,
    multiprocessors: int,
) -> Config | None:
    """`config` with kernels in Gluon, for `rows` sequences and heads; None where Triton's are kept.

    Programs of scans with 64 values each are few if all of them run at once. More, with 128 values
    each, read Keys half as often. Few scans that solve no system gain nothing.
    """
    if signature.dims != _MEASURED or signature.dtype is not Dtype.BFLOAT16 or tokens < _LONG:
        return None
    found = classify(form)
    (state, *others) = found.states
    plain = not others and found.micro_steps == 1 and not found.transposed
    if not plain or state.low_rank not in _RANKS:
        return None
    if state.decay is DecayClass.KEY and state.low_rank is LowRank.NONE:
        return _of_vector_gates(form, config, signature)
    if state.decay is DecayClass.KEY:
        return _of_scans(form, config, signature)
    if state.decay not in _DECAYS:
        return None
    few = rows * signature.dims.V // _FEW.v_tile <= multiprocessors
    scans: KernelConfig | None = _FEW if few else _MANY
    if few and state.low_rank is LowRank.NONE:
        scans = None
    elif state.decay is DecayClass.NONE:  # scores cost a scan less than a buffer of them
        config = replace(config, forward=_scored(config.forward), backward=_scored(config.backward))
    made = emit(form, signature, in_gluon(form, config, scans, chunks=_CHUNKS))
    if made is None or not made.kernels:
        return None
    refused = frozenset(name for name, _ in made.refused)
    return in_gluon(form, config, scans, refused, _CHUNKS)
