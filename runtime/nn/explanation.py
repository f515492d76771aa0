"""What a layer makes of each operand, as text: `RecurrentLayer.explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...codegen.text.table import table
from ...dsl.ir import Per
from ...dsl.normal_form import Operand
from ...dsl.step import output_names
from ..inputs import Range
from .roles import FEATURES, OperandRole

if TYPE_CHECKING:
    from .layers import RecurrentLayer

_FUNCTIONS = {
    OperandRole.FEATURE: "silu({})",
    OperandRole.POSITIVE: "elu({}) + 1",
    OperandRole.LINEAR: "{}",
}


def explain(layer: RecurrentLayer) -> str:
    """A line per operand: its name, its kind, its role, the expression that makes it."""
    sizes = f"H {layer.heads}, HV {layer.value_heads}, K {layer.key_dim}, V {layer.value_dim}"
    hidden = layer.project.in_features
    rows = [(x.name, x.spelled, layer.roles[x.name].name, _made(layer, x)) for x in layer.operands]
    gate = " · silu(W x)" if layer.gate is not None else ""
    norms = [f"rms norm of {name}{gate}" for name in output_names(len(layer.widths))]
    output = norms[0] if len(norms) == 1 else f"[{', '.join(norms)}]"
    head = f"{layer.op.__name__} in a layer: hidden {hidden}, {sizes}"
    return "\n".join([head, *table(rows), f"output  W {output}"])


def _made(layer: RecurrentLayer, x: Operand) -> str:
    role = layer.roles[x.name]
    if role in FEATURES and x.per is Per.TOKEN:
        inner = "conv(W x)" if layer.convolve is not None else "W x"
        made = _FUNCTIONS[role].format(inner)
        return f"l2norm({made})" if x.name in layer.normalise else made
    if role is OperandRole.PAIRED:
        pair = layer.found.pairs[x.name]
        return f"{'-' if pair.sign < 0 else ''}{pair.of} · sigmoid(W x)"
    if role is OperandRole.LOG_DECAY and x.per is Per.TOKEN:
        floor = layer.decays[x.name].floor
        return "-e^b' softplus(W x + b)" if floor is None else f"{floor:g} sigmoid(W x + b)"
    inner = "p" if x.per is Per.HEAD else "W x + b" if x.name in layer.biases else "W x"
    made = _in_range(layer.found.range_of(x.name), inner)
    if x.per is Per.HEAD:
        p = layer.per_head[x.name].detach()
        low, high = float(p.min()), float(p.max())
        made += f", p from {low:.3g}" + (f" to {high:.3g}" if low != high else "")
    return made


def _in_range(found: Range, inner: str) -> str:
    text = found.text("@")
    for torchs, short in (
        ("softplus(@)", f"softplus({inner})"),
        ("@.sigmoid()", f"sigmoid({inner})"),
    ):
        text = text.replace(torchs, short)
    return text.replace("@", inner)
