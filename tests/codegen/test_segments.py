"""Scans of segments: which states allow them, what the kernels hand on, when they serve."""

from __future__ import annotations

import chunkwise as cw
import pytest
import torch
from chunkwise.autotune.subject import Size, example
from chunkwise.autotune.validation import ConfiguredEngine
from chunkwise.codegen.config import Config, Dims, EagerConfig, KernelConfig, Precision
from chunkwise.codegen.interface import Dtype, Signature, ends_before, ends_stored
from chunkwise.codegen.plan import Hoist, Loop, Plan, Program
from chunkwise.codegen.programs import Transition, backward_program, forward_program, transition_of
from chunkwise.codegen.segments import Start
from chunkwise.codegen.tile import TileOp
from chunkwise.codegen.triton.emit import emit
from chunkwise.dsl import Key, KeyState, Scalar, State, Value
from chunkwise.dsl.classify import LowRank, classify
from chunkwise.dsl.ir import Kind
from chunkwise.dsl.library import all_declarations, by_name
from chunkwise.dsl.normal_form import NormalForm, levels_of
from chunkwise.runtime.engine import task_of
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.prepared import Request, Way
from chunkwise.runtime.triton.launch import Launch
from chunkwise.runtime.triton.segments import in_parts, segment_of
from chunkwise.runtime.tuned.artifact import CallSize

from tests.classes import CLASSES, lowered, plan_pairs

DIMS = Dims(64, 64)
H100 = 132  # multiprocessors
CPU = torch.device("cpu")


@cw.recurrence
def corrected_normaliser(z: KeyState, q: Key, k: Key, v: Value, beta: Scalar):  # type: ignore[no-untyped-def]
    """What the normaliser recalls is taken back: its map is a matrix, and it has no columns."""
    z = z + beta * (1 - k @ z) * k
    return z, (q @ z) * v


@cw.recurrence
def unlucky(  # type: ignore[no-untyped-def]
    S: State, S_fade: State, q: Key, S_end: Key, S_ptr: Value, S_fade_end: Scalar, S_end_ptr: Scalar
):
    """Two states and operands called like what kernels call their ends."""
    S = cw.dsl.exp(S_fade_end) * S + S_end_ptr * cw.dsl.outer(S_end, S_ptr)
    S_fade = S_fade + cw.dsl.outer(S_end, S_ptr)
    return (S, S_fade), q @ S + q @ S_fade


def _forms() -> list[NormalForm]:
    declared = [d for d in all_declarations() if lowered(d)]
    return [d.normal_form(d.default_micro) for d in declared]


def test_states_fade_unless_something_is_corrected() -> None:
    for form in _forms():
        updates = [u for m in form.micro_steps for u in m.updates]
        vectors = {s.name for s in form.states if s.kind is Kind.KEY_STATE}
        found = [(u.state, w.correction) for u in updates for w in u.writes if w.correction]
        apart = any(c.scale.kind is Kind.VALUE for _, c in found)  # a matrix for each column
        apart |= any(u.columns is not None for u in updates)  # rows and columns fade
        cascade = len(levels_of(form)) > 1
        if apart or cascade or vectors & {s for s, _ in found} or any(u.mixes for u in updates):
            assert transition_of(form, DIMS) is None, form.name
            continue
        plain = all(s.low_rank is LowRank.NONE for s in classify(form).states)
        want = Transition.DIAGONAL if plain else Transition.MATRIX
        assert transition_of(form, DIMS) is want, form.name
        # the matrix of 256 keys is too large for a program
        wide = Dims(64, 256) if form.transposed else Dims(256, 64)
        assert transition_of(form, wide) is (want if plain else None), form.name


def test_a_corrected_vector_has_no_transition() -> None:
    form = corrected_normaliser.declaration.normal_form()
    assert transition_of(form, DIMS) is None
    assert segment_of(form, DIMS, CallSize(1, 1 << 20), H100) == 0


def test_names_of_operands_are_no_names_of_ends() -> None:
    """However a rule calls its operands, a kernel has one parameter for each thing."""
    form = unlucky.declaration.normal_form()
    tiles = KernelConfig(v_tile=16)
    config = Config(16, Plan(Hoist.NOTHING, outputs_in_scan=True), Plan(Hoist.NOTHING), tiles)
    low = Dtype.FLOAT32
    signature = Signature(Dims(16, 16), low, (), Precision.IEEE)
    emitted = emit(form, signature, config, segments=True)
    for kernel in (*emitted.forward, *emitted.backward):
        names = [p.name for p in kernel.parameters]
        assert len(set(names)) == len(names)
        assert len({(p.role, p.of) for p in kernel.parameters}) == len(names)


def test_a_segment_is_whole_chunks() -> None:
    """Of 256 tokens too, of which 1152 is no multiple."""
    call = example(by_name("simple_gla"), Dims(16, 16), torch.float32, Size(1, 2304, 1), CPU)
    layout = Launch(task_of(Request(call, Way.CHUNKS)), (), 256, 1152)._layout
    assert (layout.segment, layout.sizes["segments"]) == (5, 2)


def test_validation_is_in_segments_too() -> None:
    config = Config(16, Plan(Hoist.NOTHING), Plan(Hoist.NOTHING), KernelConfig())
    call = example(by_name("kda"), Dims(16, 16), torch.float32, Size(1, 64, 1), CPU)
    whole, cut = ConfiguredEngine(EngineName.TRITON, config).ways(call)
    assert whole.segment is None
    assert cut.segment
    wide = example(by_name("kda"), Dims(256, 16), torch.float32, Size(1, 64, 1), CPU)
    assert len(ConfiguredEngine(EngineName.TRITON, config).ways(wide)) == 1
    assert len(ConfiguredEngine(EngineName.EAGER, EagerConfig(16)).ways(call)) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_every_end_is_stored_before_it_is_read(name: str) -> None:
    form = by_name(name).normal_form()
    for _, (forward, backward) in plan_pairs(name):
        _check(forward_program(form, forward, segments=True))
        _check(backward_program(form, backward, segments=True))


def _check(program: Program) -> None:
    stored: set[object] = set()
    for kernel in program.kernels:
        assert (kernel.segments is None) == (kernel.loop is Loop.PARALLEL)
        assert stored.issuperset(ends_before(kernel)), kernel.name
        assert stored.isdisjoint(ends_stored(kernel)), kernel.name
        stored |= {*ends_stored(kernel)}
        if kernel.segments is not None and kernel.segments.start is Start.IDENTITY:
            carries = {t for t in kernel.order if t.op is TileOp.CARRY}
            assert carries == {c.start for c in kernel.carried}, "A depends on the state"
        elif kernel.segments is not None and kernel.segments.ends:
            assert not kernel.stores
    whole = [k for k in program.kernels if k.segments is None or not k.segments.ends]
    assert len(whole) < len(program.kernels)


@pytest.mark.parametrize("name", ["linear_attention", "gated_delta_rule"])
@pytest.mark.parametrize("dims", [DIMS, Dims(128, 128)], ids=str)
def test_segments_are_of_long_sequences_with_few_heads(name: str, dims: Dims) -> None:
    form = by_name(name).normal_form()
    for rows in (1, 4, 8, 16, 32, 64, 256):
        for tokens in (1, 64, 1000, 4096, 32768, 100001):
            segment, parts = in_parts(form, dims, CallSize(rows, tokens), H100)
            if segment == 0:
                assert parts == CallSize(rows, tokens)
                continue
            count = parts.rows // rows
            assert segment >= 1024
            assert (count - 1) * segment < tokens <= count * segment
            assert parts.rows * -(-dims.V // 64) <= H100, "more programs than multiprocessors"
    assert segment_of(form, dims, CallSize(8, 32768), H100)
    assert not segment_of(form, dims, CallSize(128, 32768), H100)
    assert not segment_of(form, dims, CallSize(8, 1024), H100)
