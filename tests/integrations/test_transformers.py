"""Models of transformers on chunkwise, against themselves by transformers' own torch road."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")  # which needs Python 3.11

from chunkwise import errors  # noqa: E402
from chunkwise.integrations import transformers as integration  # noqa: E402

from benchmarks.families import FAMILIES, MORE, VOCABULARY, model  # noqa: E402

B, T = 2, 37
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    integration.unpatch()


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def patched(run: Callable[[], Any]) -> Any:
    """What `run` gives on chunkwise."""
    assert integration.patch()
    try:
        return run()
    finally:
        integration.unpatch()


def gradients(net: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a training step that predicts the next token."""
    net.zero_grad()
    logits = net(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(f, marks=pytest.mark.long) for f in MORE)]
)
def test_logits_and_gradients(family: str) -> None:
    net, ids = model(family), tokens(B, T)
    net.train()
    try:
        logits, grads = gradients(net, ids)
        ours, by_name = patched(lambda: gradients(net, ids))
    finally:
        net.eval()
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)
    assert by_name.keys() == grads.keys()
    for name, want in grads.items():
        scale = float(want.abs().max())
        torch.testing.assert_close(by_name[name], want, rtol=0, atol=3e-4 * scale, msg=name)


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(f, marks=pytest.mark.long) for f in MORE)]
)
def test_generates_the_same_tokens_behind_padding(family: str) -> None:
    net, ids = model(family), tokens(B, 11)
    mask = torch.ones_like(ids)
    ids[0, :4] = mask[0, :4] = 0

    def run() -> Any:
        return net.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip

    want, got = run(), patched(run)
    assert torch.equal(got.sequences, want.sequences)
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@every_family
@torch.no_grad()
def test_packed_sequences(family: str, training: bool) -> None:
    """transformers' own road takes none of them, so each is compared with itself alone."""
    net, lengths = model(family), (5, 1, 21)
    ids = tokens(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    given = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].int(),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    if family == "kimi_linear":  # hands no other name of boundaries to its recurrence
        given["cu_seqlens"] = bounds

    def run(part: Tensor, **packing: Any) -> Tensor:
        if family == "mamba2":  # its model hands nothing to its layers, and has no positions
            packing.pop("position_ids", None)
            embedded = net.backbone.embeddings(part)
            return net.backbone.layers[0].mixer(embedded, **packing)
        return net(part, use_cache=False, **packing).logits

    net.train(training)
    try:
        alone = torch.cat([run(part) for part in ids.split(lengths, 1)], 1)
        with pytest.raises(ValueError, match="packed sequences"):
            run(ids, **given)
        packed = patched(lambda: run(ids, **given))
    finally:
        net.eval()
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


@every_family
@torch.no_grad()
def test_prefill_in_chunks(family: str) -> None:
    net, ids = model(family), tokens(B, T)
    want = net(ids, use_cache=False).logits

    def run() -> list[Tensor]:
        cache, found = None, []
        for part in ids.split([16, 1, 2, 18], 1):
            made = net(part, cache=cache, use_cache=True)
            cache = made.cache
            found.append(made.logits)
        return found

    torch.testing.assert_close(torch.cat(patched(run), 1), want, rtol=0, atol=1e-4)


# ---- what is replaced, and taken back ------------------------------------------------------------


def _names() -> list[str]:
    return [line.partition(": ")[0].rpartition(".")[2] for line in integration.replaced()]


def test_says_what_it_replaced_and_takes_it_back() -> None:
    net = model("mamba2")
    before = net(tokens(1, 5)).logits
    said = integration.patch()
    assert said == integration.patch() == integration.replaced()
    home = "transformers.models.mamba2.modeling_mamba2"
    assert f"{home}.mamba2_chunk_scan: mamba_ssm.mamba_chunk_scan_combined" in said
    integration.unpatch()
    integration.unpatch()
    assert integration.replaced() == []
    assert torch.equal(net(tokens(1, 5)).logits, before)


@pytest.mark.parametrize("as_module", [False, True])
def test_files_imported_later(monkeypatch: pytest.MonkeyPatch, as_module: bool) -> None:
    """Also where `kernels` makes modules of the functions."""
    hub = sys.modules["transformers.integrations.hub_kernels"]

    class Module(torch.nn.Module):
        def __init__(self, function: Callable[..., Any]) -> None:
            super().__init__()
            self.function = function

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.function(*args, **kwargs)

    if as_module:
        monkeypatch.setattr(hub, "use_kernel_forward_from_hub", lambda name: Module)
    integration.patch()
    from transformers.integrations import use_kernel_func_from_hub_with_fallback as decorator

    def theirs(*args: Any, **kwargs: Any) -> str:
        return "torch"

    conv = decorator("causal_conv1d_fn", "causal_conv1d")(theirs)
    other = decorator("a_function_of_another_kind", "fla")(theirs)
    x, weight = torch.randn(1, 3, 5), torch.randn(3, 2)
    assert conv(x, weight, not_an_argument=1).shape == x.shape
    assert other(x) == "torch"
    integration.unpatch()
    assert conv(x, weight) == "torch"


def test_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = sys.modules["transformers.integrations.hub_kernels"]
    monkeypatch.setattr(hub, "use_kernel_func_from_hub_with_fallback", lambda *names: None)
    with pytest.raises(errors.PackageUnavailable, match="in another way"):
        integration.patch()
    monkeypatch.setitem(sys.modules, hub.__name__, None)
    with pytest.raises(errors.PackageUnavailable, match="not installed") as refused:
        integration.patch()
    assert "the package transformers cannot be used" in refused.value.render()
    assert integration.replaced() == []


def test_decorators_that_files_have_kept() -> None:
    """That of transformers, used while models are patched, and chunkwise's, used afterwards."""
    hub = sys.modules["transformers.integrations.hub_kernels"]

    def theirs(*args: Any) -> str:
        return "torch"

    names, given = ("causal_conv1d_fn", "causal_conv1d"), (torch.randn(1, 3, 5), torch.randn(3, 2))
    before = hub.use_kernel_func_from_hub_with_fallback
    integration.patch()
    during = hub.use_kernel_func_from_hub_with_fallback
    late = before(*names)(theirs)
    integration.patch()
    assert late(*given) != "torch"
    integration.unpatch()
    assert during(*names)(theirs)(*given) == late(*given) == "torch"
    assert integration.replaced() == []


@pytest.mark.long
def test_compiled() -> None:
    """torch.compile sees what is patched, and what is not any more."""
    net, ids = model("qwen3_next"), tokens(B, T)
    compiled = torch.compile(net.model, backend="aot_eager")
    with torch.no_grad():
        want = net.model(ids, use_cache=False)[0]
        for run in (lambda f: f(), patched, lambda f: f()):
            got = run(lambda: compiled(ids, use_cache=False)[0])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
