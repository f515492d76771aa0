"""Continuous batching: requests come and go while one stack of layers decodes them together.

    python -m examples.serving --requests 16 --slots 6

Each layer has a pool of states, of which a request holds one slot from its prompt to its last
token. A turn of the server prefills the requests that fit, each by one call on its whole prompt,
and then decodes one token of all that run by one step per layer, which reads and writes the pool
in place. The last turns have fewer requests than the batch has rows: rows that are left over have
slot -1. The tokens are compared with those of the plain loop, one request after another.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import chunkwise as cw
import torch
from torch import Tensor, nn
from torch.nn import functional as F

RULE = cw.library.gated_delta_rule
NONE = -1  # the slot of a row that no request has


@dataclass
class Request:
    """A prompt, how many tokens are wanted, and those that there are."""

    prompt: Tensor
    wanted: int
    tokens: list[int] = field(default_factory=list)


class Layer(nn.Module):
    """A gated delta rule with its projections, and a residual."""

    def __init__(self, width: int, heads: int, K: int, V: int) -> None:
        super().__init__()
        self.shape = heads, K, V
        self.norm = nn.RMSNorm(width)
        self.project = nn.Linear(width, heads * (2 * K + V + 2), bias=False)
        self.out = nn.Linear(heads * V, width, bias=False)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, g, beta of `x` `[B,(T,)width]`."""
        heads, K, V = self.shape
        made = self.project(self.norm(x)).unflatten(-1, (heads, -1))
        q, k, v, g, beta = made.split((K, K, V, 1, 1), -1)
        q, k = (F.normalize(y, dim=-1) for y in (q, k))
        return q, k, v.contiguous(), F.logsigmoid(g[..., 0] + 3), beta[..., 0].sigmoid()

    def whole(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A prompt `[B,T,width]`, and the state that it leaves."""
        o, state = RULE(*self.operands(x), output_final_state=True)
        assert isinstance(state, Tensor)
        return x + self.out(o.flatten(-2)), state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token `[B,width]`, and the state after it."""
        o, after = RULE.step(*self.operands(x), state=state)
        assert isinstance(after, Tensor)
        return x + self.out(o.flatten(-2)), after

    def step_in(self, pool: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        """One token `[B,width]`, whose states are in slots of a pool and stay there."""
        o, _ = RULE.step(*self.operands(x), state=pool, state_indices=slots)
        y: Tensor = self.out(o.flatten(-2))
        return x + y


class Stack(nn.Module):
    """Layers between an embedding and logits of the next token."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, K: int, V: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, K, V) for _ in range(layers))

    def next(self, x: Tensor) -> Tensor:
        """The likeliest next token after `x` `[B,width]`."""
        logits: Tensor = F.linear(x, self.embedding.weight)
        return logits.argmax(-1)


class Server:
    """Serves requests with a pool of states for each layer."""

    def __init__(self, stack: Stack, slots: int, dtype: torch.dtype = torch.float32) -> None:
        self.stack, self.slots = stack, slots
        device = stack.embedding.weight.device
        self.layers = [layer for layer in stack.layers if isinstance(layer, Layer)]
        self.pools = [
            torch.zeros(slots, *layer.shape, dtype=dtype, device=device) for layer in self.layers
        ]
        self.free = deque(range(slots))
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        heads, K, V = self.layers[0].shape
        RULE.warmup({"HV": heads, "K": K, "V": V, "B": slots}, device=device, state_dtypes=dtype)

    def serve(self, requests: Sequence[Request]) -> int:
        """Answer them all; how many turns it took."""
        self.waiting += requests
        turns = 0
        with torch.no_grad():
            while self.waiting or self.running:
                while self.waiting and self.free:
                    self.prefill(self.waiting.popleft(), self.free.popleft())
                self.decode()
                turns += 1
        return turns

    def prefill(self, request: Request, slot: int) -> None:
        """The first token, by the whole prompt at once."""
        x = self.stack.embedding(request.prompt[None])
        for layer, pool in zip(self.layers, self.pools, strict=True):
            x, state = layer.whole(x)
            pool[slot] = state[0]
        request.tokens.append(int(self.stack.next(x[:, -1])))
        self.running[slot] = request
        self.retire()

    def decode(self) -> None:
        """The next token of every running request; the batch has a row for every slot there is."""
        if not self.running:
            return
        rows = list(self.running)
        device = self.pools[0].device
        slots = torch.tensor(rows + [NONE] * (self.slots - len(rows)), device=device)
        last = [self.running[slot].tokens[-1] for slot in rows]
        x = self.stack.embedding(torch.tensor(last + [0] * (self.slots - len(rows)), device=device))
        for layer, pool in zip(self.layers, self.pools, strict=True):
            x = layer.step_in(pool, x, slots)
        for slot, token in zip(rows, self.stack.next(x).tolist(), strict=False):
            self.running[slot].tokens.append(token)
        self.retire()

    def retire(self) -> None:
        """Free the slots of requests that have all their tokens."""
        for slot, request in list(self.running.items()):
            if len(request.tokens) == request.wanted:
                del self.running[slot]
                self.free.append(slot)


@torch.no_grad()
def plain(stack: Stack, request: Request) -> list[int]:
    """The tokens of one request, alone."""
    x, states = stack.embedding(request.prompt[None]), []
    layers = [layer for layer in stack.layers if isinstance(layer, Layer)]
    for layer in layers:
        x, state = layer.whole(x)
        states.append(state)
    tokens = [stack.next(x[:, -1])]
    while len(tokens) < request.wanted:
        x = stack.embedding(tokens[-1])
        for n, layer in enumerate(layers):
            x, states[n] = layer.step(x, states[n])
        tokens.append(stack.next(x))
    return [int(t) for t in tokens]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve random requests in both ways, and compare tokens and times."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--slots", type=int, default=6)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stack = Stack(256, given.width, given.layers, 2, 16, 32).to(device)
    lengths = [(5 + 7 * n % 40, 2 + 11 * n % 30) for n in range(given.requests)]
    requests = [Request(torch.randint(256, (T,), device=device), n) for T, n in lengths]
    server = Server(stack, given.slots)
    begin = time.perf_counter()
    turns = server.serve(requests)
    together = time.perf_counter() - begin
    begin = time.perf_counter()
    alone = [plain(stack, request) for request in requests]
    apart = time.perf_counter() - begin
    tokens = sum(request.wanted for request in requests)
    print(f"{len(requests)} requests, {tokens} tokens, {turns} turns of {given.slots} slots")
    print(f"together {together:.2f} s, one after another {apart:.2f} s")
    same = [request.tokens for request in requests] == alone
    print("the same tokens" if same else "other tokens")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
