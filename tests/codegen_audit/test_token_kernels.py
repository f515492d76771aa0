"""The token form's kernels compile for every target, within its shared memory, without spills."""

from __future__ import annotations

import pytest
from chunkwise import library
from chunkwise.codegen.config import Dims
from chunkwise.codegen.interface import Dtype
from chunkwise.codegen.triton.emit import emit_token
from chunkwise.codegen.triton.offline import Job, compile_job, signature_for
from chunkwise.codegen.triton.resources import Target

# a scalar and a vector gate, sums over the value axis, two states, micro-steps
NAMES = ["gated_delta_rule", "rwkv7", "oja", "momentum_delta", "gated_delta_product"]


@pytest.mark.parametrize("target", list(Target), ids=lambda t: t.name)
@pytest.mark.parametrize("name", NAMES)
def test_compiles_and_fits(name: str, target: Target) -> None:
    _compiles(name, target, pooled=False)


# vectors beside a matrix too, which one program has to hold
@pytest.mark.parametrize("name", ["gated_delta_rule", "mlstm"])
def test_compiles_on_states_of_a_pool(name: str) -> None:
    _compiles(name, Target.SM90, pooled=True)


def _compiles(name: str, target: Target, *, pooled: bool) -> None:
    declaration = getattr(library, name).declaration
    micro = declaration.default_micro
    step, form = declaration.step(micro), declaration.normal_form(micro)
    signature = signature_for(form, Dims(128, 128), Dtype.BFLOAT16, target)
    emitted = emit_token(step, signature, pooled=pooled)
    (kernel,) = emitted.forward
    for packed in (False, True):
        outcome = compile_job(
            Job(kernel, tuple(emitted.buffers(kernel).items()), signature, target, packed)
        )
        assert outcome.fits, outcome.error
        assert outcome.resources is not None
        assert not outcome.resources.spills
