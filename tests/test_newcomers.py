"""Mistakes of the first hour: each has its class, and a help that names what to write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import chunkwise as cw
import numpy as np
import pytest
import torch
from chunkwise import HeadScalar, Key, Scalar, State, Value, errors, exp, outer, softplus
from torch import Tensor

B, T, H, K, V = 2, 8, 3, 4, 6
Mistake = tuple[type[errors.ChunkwiseError], str, Callable[[], object]]
MISTAKES: list[Mistake] = []


def mistake(
    error: type[errors.ChunkwiseError], said: str
) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Registers code that must fail with `error` and a message that contains `said`."""

    def register(code: Callable[[], object]) -> Callable[[], object]:
        MISTAKES.append((error, said, code))
        return code

    return register


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32)


def call(**changed: object) -> object:
    """A right call of the gated delta rule, but for what is changed."""
    operands: dict[str, object] = {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "g": -normal(B, T, H).abs(),
        "beta": normal(B, T, H).sigmoid(),
    }
    return cw.library.gated_delta_rule(**{**operands, **changed})


# ---- declarations --------------------------------------------------------------------------------


@mistake(errors.OuterOrder, "for `outer(k, k) @ S` write `outer(k, k @ S)`")
def the_papers_notation() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, beta: Scalar):
        S = S - beta * outer(k, k) @ S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.WrongSide, "write `k @ S`")
def state_before_key() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, beta: Scalar):
        S = S + beta * outer(k, v - S @ k)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.MatmulOfVectors, "the matrix k vᵀ is `outer(k, v)`")
def key_at_value() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + k @ v
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.KeyTimesValue, "the matrix k vᵀ is `outer(k, v)`")
def key_times_value() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + k * v
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.InPlace, "give the new value a name: `S = S + outer(k, v)`")
def slice_assignment() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S[:] = S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.InPlace, ".add_() changes a traced value in place")
def in_place_method() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S.add_(outer(k, v))
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.UnknownName, "functions of a step are abs, clamp")
def function_that_is_not_there() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + outer(softmax(k), v)  # noqa: F821
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.UnknownName, "import it: `from chunkwise import sigmoid`")
def function_that_was_not_imported() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, x: Scalar):
        S = sigmoid(x) * S + outer(k, v)  # noqa: F821
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.ForeignFunction, "from chunkwise import sigmoid")
def function_of_torch() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, x: Scalar):
        S = torch.sigmoid(x) * S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.ForeignFunction, "test_newcomers.py")  # not a line of torch
def einsum() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + torch.einsum("k,v->kv", k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.NoAttribute, "write `sigmoid(x)`")
def method_of_a_tensor() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, x: Scalar):
        S = x.sigmoid() * S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.NoAttribute, "did you mean softplus?")
def method_with_a_typo() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, x: Scalar):
        S = exp(-x.sofplus()) * S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.TracedBranch, "use `maximum`, `minimum` or `clamp`")
def branch_on_a_symbol() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, g: Scalar):
        if g > 0:
            S = exp(g) * S
        return S + outer(k, v), q @ S

    return cw.recurrence(rule)


@mistake(errors.NothingReturned, "end with `return S, o`")
def missing_return() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + outer(k, v)
        q @ S

    return cw.recurrence(rule)


@mistake(errors.ReturnOrder, "write `return S, o`")
def output_first() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + outer(k, v)
        return q @ S, S

    return cw.recurrence(rule)


@mistake(errors.MissingAnnotation, "say what it is: State, KeyState, Key")
def no_kinds() -> object:
    def rule(S, q, k, v):
        return S + outer(k, v), q @ S

    return cw.recurrence(rule)


@mistake(errors.MissingAnnotation, "a step is a plain function")
def method_of_a_class() -> object:
    def rule(self, S: State, q: Key, k: Key, v: Value):
        return S + outer(k, v), q @ S

    return cw.recurrence(rule)


@mistake(errors.BadAnnotation, "kinds are State, KeyState, Key")
def annotated_as_a_tensor() -> object:
    def rule(S: State, q: Key, k: Tensor, v: Value):
        return S + outer(k, v), q @ S

    return cw.recurrence(rule)


@mistake(errors.CapturedTensor, "HeadScalar, HeadKey or HeadValue")
def tensor_from_outside() -> object:
    decay = torch.full((H,), 0.9, dtype=torch.float32)

    def rule(S: State, q: Key, k: Key, v: Value):
        S = S * decay + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.NotAffine, 'run it token by token with engine="reference"')
def step_that_is_not_affine() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + outer(k, v - cw.tanh(k @ S))
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.StateGrows, "is a sign forgotten?")
def forgotten_sign() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, x: Scalar, a: HeadScalar):
        S = exp(exp(a) * softplus(x)) * S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.BadPower, "write `exp(x * math.log(0.9))`")
def number_to_a_traced_power() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, g: Scalar):
        S = 0.9**g * S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.NoAttribute, "scale operands before the call")
def sizes_within_a_step() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + outer(k, v)
        return S, (q * q.shape[-1] ** -0.5) @ S

    return cw.recurrence(rule)


@mistake(errors.BadAnnotation, "a number is `*, g: float = 1.0`")
def operand_with_a_default() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, g: Scalar = 0.0):
        S = exp(g) * S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.BadAnnotation, "put a `*` before them")
def number_that_is_positional() -> object:
    def rule(S: State, q: Key, k: Key, v: Value, decay: float):
        S = decay * S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.KindMismatch, "a matrix is `outer(k, v)`")
def key_plus_value() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + outer(k, v + k)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.NoAttribute, "there is nothing to transpose")
def transposed_state() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S + outer(k, v)
        return S, S.T @ q

    return cw.recurrence(rule)


@mistake(errors.BadReturn, "end with `return S, o`")
def state_without_output() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        return S + outer(k, v)

    return cw.recurrence(rule)


@mistake(errors.WrongSide, "a state meets vectors only")
def square_of_a_state() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = S - S @ S + outer(k, v)
        return S, q @ S

    return cw.recurrence(rule)


@mistake(errors.MissingAnnotation, "a lambda has no annotations, so write a `def`")
def lambda_for_a_step() -> object:
    return cw.recurrence(lambda S, q, k, v: (S + outer(k, v), q @ S))


@mistake(errors.NotATensor, "a step cannot call a recurrence: write its lines here")
def recurrence_within_a_step() -> object:
    def rule(S: State, q: Key, k: Key, v: Value):
        S, o = cw.library.linear_attention(S, q, k, v)
        return S, o

    return cw.recurrence(rule)


@mistake(errors.CapturedTensor, "outside a step call torch")
def function_on_a_tensor() -> object:
    return exp(normal(3))


# ---- calls ---------------------------------------------------------------------------------------


@mistake(errors.BadShape, "g.squeeze(-1)")
def gate_with_an_axis_of_one() -> object:
    return call(g=-normal(B, T, H, 1).abs())


@mistake(errors.BadShape, "a gate per channel is declared `g: Key`")
def gate_per_channel() -> object:
    return call(g=-normal(B, T, H, K).abs())


@mistake(errors.BadShape, "is passed as x.transpose(1, 2)")
def head_first() -> object:
    return call(k=normal(B, H, T, K))


@mistake(errors.BadShape, "q[None] has B = 1")
def no_batch() -> object:
    return call(q=normal(T, H, K))


@mistake(errors.BadShape, "with K = 4, as in operand 'q'")
def another_width() -> object:
    return call(k=normal(B, T, H, K + 1))


@mistake(errors.NotATensor, "pass torch.from_numpy(q)")
def numpy_array() -> object:
    return call(q=np.zeros((B, T, H, K), dtype=np.float32))


@mistake(errors.NotATensor, "pass torch.full(size, g) of that size")
def one_number_for_all_tokens() -> object:
    return call(g=-0.1)


@mistake(errors.BadShape, "call the recurrence itself for more tokens")
def sequence_to_a_step() -> object:
    q, k, v = normal(B, 9, H, K), normal(B, 9, H, K), normal(B, 9, H, V)
    return cw.library.linear_attention.step(q, k, v)


@mistake(errors.BadDtype, "expected one of float32, bfloat16, float16, float64")
def integers() -> object:
    return call(q=torch.ones(B, T, H, K, dtype=torch.int64))


@mistake(errors.BadDevice, "move it: k.to('meta')")
def another_device() -> object:
    return call(q=normal(B, T, H, K).to("meta"))


@mistake(errors.UnknownOperand, "did you mean beta?")
def typo_of_an_operand() -> object:
    return call(bta=normal(B, T, H))


@mistake(errors.UnknownOperand, "passed by name: initial_state=…")
def state_by_position() -> object:
    k, g = normal(B, T, H, K), -normal(B, T, H).abs()
    state = normal(B, H, K, V)
    return cw.library.gated_delta_rule(k, k, normal(B, T, H, V), g, g.exp(), state)


@mistake(errors.UnknownOperand, "is `initial_state=`; a step takes `state=`")
def option_of_a_step() -> object:
    return call(state=normal(B, H, K, V))


@mistake(errors.BadOption, 'expected a name: "reference", "eager", "tvm" or "triton"')
def device_for_an_engine() -> object:
    return call(engine=torch.device("cpu"))


@mistake(errors.UnknownOperand, "did you mean output_final_state?")
def typo_of_an_option() -> object:
    return call(output_final_stat=True)


@mistake(errors.MissingOperand, "needs the operand 'beta' (Scalar)")
def operand_left_out() -> object:
    return cw.library.gated_delta_rule(
        normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), -normal(B, T, H).abs()
    )


@mistake(errors.BadShape, "expected [N,HV,K,V] = [2, 3, 4, 6]")
def state_without_sequences() -> object:
    return call(initial_state=normal(H, K, V))


@mistake(errors.BadShape, "a V×K state is passed as x.transpose(-1, -2)")
def state_of_another_library() -> object:
    return call(initial_state=normal(B, H, V, K))


@mistake(errors.BadCuSeqlens, "expected int32 or int64")
def boundaries_in_floats() -> object:
    return call(cu_seqlens=torch.tensor([0.0, 16.0], dtype=torch.float32))


@mistake(errors.BadCuSeqlens, "an int32 or int64 tensor")
def boundaries_in_a_list() -> object:
    return call(cu_seqlens=[0, 8])


@mistake(errors.BadCuSeqlens, "[0, 5, 5, 12] packs lengths 5, 0 and 7")
def lengths_for_boundaries() -> object:
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    q, v, g = normal(1, 8, H, K), normal(1, 8, H, V), -normal(1, 8, H).abs()
    return call(q=q, k=q, v=v, g=g, beta=g.exp(), cu_seqlens=lengths)


@mistake(errors.BadBatch, "reshape the operands to [1, B*T, ...]")
def packed_with_a_batch() -> object:
    return call(cu_seqlens=torch.tensor([0, T], dtype=torch.int32))


@mistake(errors.EngineUnavailable, "did you mean triton")
def typo_of_an_engine() -> object:
    return call(engine="trition")


@mistake(errors.PositiveGate, "is a sign forgotten? pass -softplus(x)")
def gate_of_the_wrong_sign() -> object:
    return call(g=normal(B, T, H).abs(), check=True)


@pytest.mark.parametrize(
    ("error", "said", "code"), MISTAKES, ids=lambda x: getattr(x, "__name__", "")
)
def test_mistake(error: type[errors.ChunkwiseError], said: str, code: Callable[[], object]) -> None:
    with pytest.raises(errors.ChunkwiseError) as caught:
        code()
    assert type(caught.value) is error
    assert said in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on a CPU can be on a GPU too")
def test_a_gpus_engine_on_a_cpu() -> None:
    pytest.importorskip("triton")
    with pytest.raises(errors.EngineUnavailable, match="run on a GPU, and the operands are on cpu"):
        call(engine="triton")


def test_float64_is_told_of_its_engine() -> None:
    pytest.importorskip("tvm")
    q, v, g = normal(1, 8, H, K).double(), normal(1, 8, H, V).double(), -normal(1, 8, H).abs()
    with pytest.raises(errors.NotLowered, match='engine="eager" takes float64'):
        call(q=q, k=q, v=v, g=g.double(), beta=g.exp().double(), engine="tvm")


def test_a_step_without_chunks_is_told_of_its_kernel() -> None:
    """It has no chunk form, and one kernel that takes a token a call."""
    pytest.importorskip("tvm")

    @cw.recurrence
    def fading_mix(A: State, B: State, q: Key, k: Key, v: Value, g: Key, s: Scalar):
        A, B = A + s * B + outer(k, v), B - s * A
        A = exp(g) * A
        A = A - outer(k, k @ A)
        return (A, B), q @ A

    keys, v = [normal(B, T, H, K) for _ in range(2)], normal(B, T, H, V)
    with pytest.raises(errors.NotLowered, match=r"fading_mix.step runs it by a kernel"):
        fading_mix(*keys, v, -normal(B, T, H, K).abs(), normal(B, T, H), engine="tvm")


def test_modules_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"expected a recurrence: chunkwise.library.NAME"):
        cw.nn.RecurrentLayer("gated_delta_rule", 64, 2, 16, 32)
    layer = cw.nn.RecurrentLayer(cw.library.linear_attention, 64, 2, 16, 32)
    with pytest.raises(TypeError, match=r"mixers=\[layer\]"):
        cw.nn.LanguageModel(10, 64, layer)
    with pytest.raises(TypeError, match=r"mixers\[0\] is .*linear_attention.*RecurrentLayer\("):
        cw.nn.LanguageModel(10, 64, [cw.library.linear_attention])
    with pytest.raises(ValueError, match=r"mixers\[1\] takes vectors of 64, and the model has 32"):
        cw.nn.LanguageModel(10, 32, [cw.nn.GlobalAttention(32, 2), layer])
    with pytest.raises(ValueError, match="value_heads must be a multiple of heads"):
        cw.nn.RecurrentLayer(cw.library.linear_attention, 64, 2, 16, 32, value_heads=3)


def test_a_formatted_symbol_is_its_repr() -> None:
    """A print that is left in a step shows symbols."""
    seen = []

    @cw.recurrence
    def rule(S: State, q: Key, k: Key, v: Value):
        seen.append(f"{S:.2f} {k}")
        return S + outer(k, v), q @ S

    assert seen[0] == "<traced State: state> <traced Key: operand>"


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="did you mean gated_delta_rule"):
        _ = cw.library.gated_delta
    with pytest.raises(AttributeError, match="did you mean softplus"):
        _ = cw.sofplus
    with pytest.raises(AttributeError, match="functions of a step are"):
        _ = cw.argsort


def test_a_star_import_hides_no_builtin() -> None:
    names: dict[str, object] = {}
    exec("from chunkwise import *", names)
    assert "sum" not in names
    assert "abs" not in names
    assert names["exp"] is exp
    assert cw.sum is not sum


def test_advice_names_what_an_index_has(tmp_path: Path) -> None:
    """Without TVM the first call on a CPU says once how to install it, by a name of an index."""
    code = """
import sys
sys.modules["tvm"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tvm" else found(name, *rest)
import torch, chunkwise as cw
x = torch.ones(1, 4, 1, 4)
for _ in range(3):
    cw.library.linear_attention(x, x, x)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stderr.count('pip install "apache-tvm') == 1
    assert "chunkwise[" not in done.stderr
