"""What the runtime's tests share: the engines, inputs for any recurrence, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import chunkwise as cw
import pytest
import torch
from chunkwise.dsl import oracle
from chunkwise.dsl.ir import Kind, Per
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine on a device, in the widest dtype that it computes in, and how exact that is."""

    name: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10


_INTERPRETED = Engine("triton", "cpu", torch.float32, 1e-5)
_TRITON = Engine("triton", "cuda", torch.float32, 1e-4)  # tf32x3 products

# the one place where an engine joins the tests of this folder
ENGINES = (
    pytest.param(Engine("reference"), id="reference"),
    pytest.param(Engine("eager"), id="eager"),
    pytest.param(_INTERPRETED, id="triton-interpreted", marks=pytest.mark.interpreter),
    pytest.param(Engine("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param(Engine("eager", "cuda"), id="eager-cuda", marks=pytest.mark.gpu),
    pytest.param(_TRITON, id="triton-cuda", marks=pytest.mark.gpu),
)

LOG_DECAYS = frozenset({"g", "w", "log_alpha", "log_mu"})
IN_UNIT_INTERVAL = frozenset({"beta", "eta", "f", "a"})


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a call; `lengths` packs sequences into one row of T = their sum."""

    B: int = 2
    T: int = 19
    H: int = 2
    HV: int = 2
    K: int = 8
    V: int = 8
    micro: int = 2
    lengths: tuple[int, ...] | None = None
    initial: bool = False
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    @property
    def N(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)

    def packed(self, *lengths: int) -> Sizes:
        return replace(self, B=1, T=sum(lengths), lengths=lengths)


@dataclass(slots=True)
class Inputs:
    """The arguments of one call, all leaves that require gradients."""

    operands: dict[str, Tensor]
    initial: tuple[Tensor, ...] | None
    cu_seqlens: Tensor | None
    params: dict[str, float] = field(default_factory=dict)

    @property
    def leaves(self) -> dict[str, Tensor]:
        states = {f"initial {i}": s for i, s in enumerate(self.initial or ())}
        return {**self.operands, **states}

    def copied(self, device: str, dtype: torch.dtype) -> Inputs:
        def copy(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype, copy=True).requires_grad_()

        return Inputs(
            {n: copy(x) for n, x in self.operands.items()},
            None if self.initial is None else tuple(copy(x) for x in self.initial),
            None if self.cu_seqlens is None else self.cu_seqlens.to(device),
            self.params,
        )

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments of a call."""
        initial: object = self.initial
        if self.initial is not None and len(self.initial) == 1:
            initial = self.initial[0]
        return {"initial_state": initial, "cu_seqlens": self.cu_seqlens, **self.params}


def make_inputs(op: cw.Recurrence, sizes: Sizes, seed: int = 0) -> Inputs:
    """Operands in their usual ranges: gates below 0, steps in (0, 1), keys about unit length."""
    random = torch.Generator().manual_seed(seed)
    operands: dict[str, Tensor] = {}
    for x in op.declaration.operands:
        heads = sizes.H if x.kind is Kind.KEY and x.per is Per.TOKEN else sizes.HV
        tail = {Kind.SCALAR: (), Kind.KEY: (sizes.K,), Kind.VALUE: (sizes.V,)}[x.kind]
        micro = (sizes.micro,) if x.micro else ()
        front = () if x.per is Per.HEAD else (sizes.B, sizes.T, *micro)
        value = torch.randn(*front, heads, *tail, generator=random, dtype=torch.float64)
        if x.name in LOG_DECAYS:
            value = -torch.nn.functional.softplus(value)
        elif x.name in IN_UNIT_INTERVAL:
            value = value.sigmoid()
        elif x.name == "slope":
            value = value.abs()
        elif x.kind is Kind.KEY:
            value = torch.nn.functional.normalize(value, dim=-1)
        operands[x.name] = value.to(sizes.device, sizes.dtype).requires_grad_()
    initial = None
    if sizes.initial:
        initial = tuple(
            torch.randn(
                (sizes.N, sizes.HV, sizes.K, sizes.V)
                if s.kind is Kind.STATE
                else (sizes.N, sizes.HV, sizes.K),
                generator=random,
                dtype=torch.float64,
            )
            .to(sizes.device, sizes.dtype if sizes.dtype is torch.float64 else torch.float32)
            .requires_grad_()
            for s in op.declaration.states
        )
    cu_seqlens = None
    if sizes.lengths is not None:
        cu_seqlens = torch.tensor([0, *sizes.lengths]).cumsum(0).to(sizes.device, torch.int32)
    return Inputs(operands, initial, cu_seqlens)


def results(
    o: Tensor, finals: tuple[Tensor, ...], inputs: Inputs, seed: int = 1
) -> dict[str, Tensor]:
    """The output, the final states, and the gradients of a random loss of both."""
    random = torch.Generator().manual_seed(seed)
    outputs = {"o": o, **{f"final {i}": s for i, s in enumerate(finals)}}
    # an output that nothing reaches (T = 0, no initial state) has no gradient to take
    reached = [y for y in outputs.values() if y.requires_grad]
    weights = {
        n: torch.randn(y.shape, generator=random, dtype=torch.float64) for n, y in outputs.items()
    }
    grads = dict.fromkeys(inputs.leaves)
    if reached:
        taken = torch.autograd.grad(
            reached,
            list(inputs.leaves.values()),
            [weights[n].to(y) for n, y in outputs.items() if y.requires_grad],
            allow_unused=True,
        )
        grads = dict(zip(inputs.leaves, taken, strict=True))
    zeros = {n: torch.zeros_like(x) for n, x in inputs.leaves.items()}
    named = {f"d{n}": zeros[n] if g is None else g for n, g in grads.items()}
    return {n: y.detach().cpu() for n, y in {**outputs, **named}.items()}


def oracle_results(op: cw.Recurrence, inputs: Inputs) -> dict[str, Tensor]:
    """The same of the float64 token loop on the CPU, from the same numbers."""
    inputs = inputs.copied("cpu", torch.float64)
    micro = next((inputs.operands[x.name].shape[2] for x in op.declaration.operands if x.micro), 1)
    o, finals = oracle.run(
        op.declaration.step(micro),
        inputs.operands,
        inputs.params,
        inputs.initial,
        inputs.cu_seqlens,
    )
    return results(o, finals, inputs)


def engine_results(op: cw.Recurrence, inputs: Inputs, engine: str) -> dict[str, Tensor]:
    """The same of a call."""
    o, finals = op(**inputs.operands, **inputs.options, engine=engine, output_final_state=True)
    return results(o, finals if isinstance(finals, tuple) else (finals,), inputs)


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative RMS error, ten times that for the largest entry, absolute where all vanish."""
    assert got.keys() == want.keys()
    for name, y in want.items():
        x = got[name].double()
        y = y.double()
        assert x.shape == y.shape, name
        assert bool(torch.isfinite(x).all()), name
        if y.numel() == 0:
            continue
        scale = max(float(y.square().mean().sqrt()), 1e-3)
        rms = float((x - y).square().mean().sqrt()) / scale
        worst = float((x - y).abs().max()) / max(float(y.abs().max()), 1e-3)
        assert rms <= tolerance, f"{name}: relative RMS error {rms:.2e}"
        assert worst <= 10 * tolerance, f"{name}: relative maximum error {worst:.2e}"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of each engine in turn; `kit` then makes inputs for its device and dtype."""
    return str(request.param.name)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNKWISE_CHECK", "CHUNKWISE_ENGINE"):
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True, slots=True)
class Kit:
    """What tests take from here (a test module cannot import another one by name)."""

    engine: Engine
    Sizes: Callable[..., Sizes]
    make_inputs: Callable[..., Inputs] = make_inputs
    oracle_results: Callable[[cw.Recurrence, Inputs], dict[str, Tensor]] = oracle_results
    engine_results: Callable[[cw.Recurrence, Inputs, str], dict[str, Tensor]] = engine_results
    assert_agree: Callable[[dict[str, Tensor], dict[str, Tensor], float], None] = assert_agree

    @property
    def tolerance(self) -> float:
        return self.engine.tolerance


@pytest.fixture
def kit(request: pytest.FixtureRequest) -> Kit:
    spec = getattr(request.node, "callspec", None)
    engine = None if spec is None else spec.params.get("engine")
    if not isinstance(engine, Engine):  # a test that names its engine itself
        engine = Engine("reference")
    return Kit(engine, partial(Sizes, dtype=engine.dtype, device=engine.device))
