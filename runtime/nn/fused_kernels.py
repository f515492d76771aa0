"""Triton kernels of the layers' fused parts; `fused` launches them.

Everything is computed in float32 and rounded once. Weights' gradients are sums over programs, each
of which writes its own row, so that two runs agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _convolved(x, weight, t, place, columns, inside, T, stride_t, channels, SIZE: tl.constexpr):
    """The convolution at tokens `t`, which are the `place`-th of their sequences, in float32."""
    z = tl.zeros([t.shape[0], columns.shape[0]], tl.float32)
    for back in tl.static_range(SIZE):
        seen = ((t < T) & (place >= back))[:, None] & inside[None, :]
        at = (t - back).to(tl.int64)[:, None] * stride_t + columns[None, :]
        tap = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
        w = tl.load(weight + back * channels + columns, mask=inside, other=0.0).to(tl.float32)
        z += tap * w[None, :]
    return z


@triton.jit
def _places(position, t, T, PACKED: tl.constexpr):
    return tl.load(position + t, mask=t < T, other=0) if PACKED else t


@triton.jit
def _span(spans, BC: tl.constexpr):
    """This program's channels, which of BC they are, and whether they are scaled to length 1."""
    row = spans + 3 * tl.program_id(1)
    c = tl.arange(0, BC)
    return tl.load(row) + c, c < tl.load(row + 1), tl.load(row + 2) != 0


@triton.jit
def convolve(
    x,
    weight,
    spans,
    position,
    y,
    T,
    stride_b,
    stride_t,
    channels,
    eps,
    SIZE: tl.constexpr,
    ACTIVATE: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One span of channels, BT tokens: the convolution, silu, and the span scaled to length 1."""
    columns, inside, unit = _span(spans, BC)
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    place = _places(position, t, T, PACKED)
    a = _convolved(x + b * stride_b, weight, t, place, columns, inside, T, stride_t, channels, SIZE)
    scale = tl.full([BT], 1.0, tl.float32)
    if ACTIVATE:
        a = a * tl.sigmoid(a)
        scale = tl.where(unit, tl.rsqrt(tl.sum(a * a, 1) + eps), 1.0)
    at = (b * T + t)[:, None] * channels + columns[None, :]
    tl.store(
        y + at,
        (a * scale[:, None]).to(y.dtype.element_ty),
        mask=(t < T)[:, None] & inside[None, :],
    )


@triton.jit
def activation_backward(
    x,
    weight,
    spans,
    position,
    dy,
    dz,
    dweight,
    T,
    stride_b,
    stride_t,
    channels,
    eps,
    SIZE: tl.constexpr,
    ACTIVATE: tl.constexpr,
    PACKED: tl.constexpr,
    TILES: tl.constexpr,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One span, TILES times BT tokens: the convolution's gradient and the weight's.

    TAPS: a power of two, of which SIZE are taps.

    The convolution is computed again. Without an activation its gradient is dy, and not stored.
    """
    columns, inside, unit = _span(spans, BC)
    b = tl.program_id(2).to(tl.int64)
    x += b * stride_b
    row = b * tl.num_programs(0) + tl.program_id(0)
    taps = tl.arange(0, TAPS)
    dw = tl.zeros([TAPS, BC], tl.float32)
    for tile in range(TILES):
        t = (tl.program_id(0) * TILES + tile) * BT + tl.arange(0, BT)
        place = _places(position, t, T, PACKED)
        here = (t < T)[:, None] & inside[None, :]
        at = (b * T + t)[:, None] * channels + columns[None, :]
        d = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
        if ACTIVATE:
            z = _convolved(x, weight, t, place, columns, inside, T, stride_t, channels, SIZE)
            sigmoid = tl.sigmoid(z)
            a = z * sigmoid
            inverse = tl.rsqrt(tl.sum(a * a, 1) + eps)
            along = tl.sum(a * d, 1) * inverse * inverse
            d = tl.where(unit, inverse[:, None] * (d - a * along[:, None]), d)
            d = d * (sigmoid + a * (1.0 - sigmoid))
            tl.store(dz + at, d.to(dz.dtype.element_ty), mask=here)
        for back in tl.static_range(SIZE):
            seen = here & (place >= back)[:, None]
            of = (t - back).to(tl.int64)[:, None] * stride_t + columns[None, :]
            tap = tl.load(x + of, mask=seen, other=0.0).to(tl.float32)
            dw += tl.where((taps == back)[:, None], tl.sum(d * tap, 0)[None, :], 0.0)
    at = (row * SIZE + taps)[:, None] * channels + columns[None, :]
    tl.store(dweight + at, dw, mask=(taps < SIZE)[:, None] & inside[None, :])


@triton.jit
def convolve_transposed(
    dz,
    weight,
    position,
    dx,
    T,
    channels,
    SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """BC channels, BT tokens: the gradients of those outputs of their sequence that saw them."""
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = columns < channels
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BT, BC], tl.float32)
    for ahead in tl.static_range(SIZE):
        r = t + ahead
        seen = ((r < T) & (_places(position, r, T, PACKED) >= ahead))[:, None] & inside[None, :]
        at = (b * T + r)[:, None] * channels + columns[None, :]
        d = tl.load(dz + at, mask=seen, other=0.0).to(tl.float32)
        w = tl.load(weight + ahead * channels + columns, mask=inside, other=0.0).to(tl.float32)
        total += d * w[None, :]
    at = (b * T + t)[:, None] * channels + columns[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(t < T)[:, None] & inside[None, :])


@triton.jit
def normalise(
    x, weight, gate, y, rows, size, eps, GATED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """BM rows: `x / rms(x) * weight`, times silu(gate)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BD)
    inside = (m < rows)[:, None] & (c < size)[None, :]
    at = m.to(tl.int64)[:, None] * size + c[None, :]
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < size, other=0.0).to(tl.float32)
    a = a * tl.rsqrt(tl.sum(a * a, 1) / size + eps)[:, None] * w[None, :]
    if GATED:
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        a = a * g * tl.sigmoid(g)
    tl.store(y + at, a.to(y.dtype.element_ty), mask=inside)


@triton.jit
def normalise_backward(
    x,
    weight,
    gate,
    dy,
    dx,
    dweight,
    dgate,
    rows,
    size,
    eps,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradients of every num_programs-th tile of BM rows."""
    c = tl.arange(0, BD)
    w = tl.load(weight + c, mask=c < size, other=0.0).to(tl.float32)
    dw = tl.zeros([BD], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        m = tile * BM + tl.arange(0, BM)
        inside = (m < rows)[:, None] & (c < size)[None, :]
        at = m.to(tl.int64)[:, None] * size + c[None, :]
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(a * a, 1) / size + eps)[:, None]
        a = a * inverse
        if GATED:
            g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(g)
            dg = d * a * w[None, :] * sigmoid * (1.0 + g * (1.0 - sigmoid))
            tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=inside)
            d = d * g * sigmoid
        dw += tl.sum(d * a, 0)
        d = d * w[None, :]
        d = inverse * (d - a * (tl.sum(d * a, 1) / size)[:, None])
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0) * size + c, dw, mask=c < size)


@triton.jit
def cross_entropy(
    logits,
    labels,
    losses,
    share,
    vocabulary,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BV: tl.constexpr,
):
    """One row: its loss; then its logits are replaced by their gradients."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    counted = label != IGNORED
    # before the sums, whose barriers keep the gradients from overtaking it
    chosen = tl.load(logits + tl.where(counted, label, 0)).to(tl.float32)
    c = tl.arange(0, BV)
    top, total = chosen, chosen * 0.0
    for start in range(0, vocabulary, BV):
        inside = start + c < vocabulary
        x = tl.load(logits + start + c, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    log_sum = top + tl.log(total)
    tl.store(losses + row, tl.where(counted, log_sum - chosen, 0.0))
    if GRADIENT:
        scale = tl.where(counted, tl.load(share), 0.0)
        for start in range(0, vocabulary, BV):
            inside = start + c < vocabulary
            x = tl.load(logits + start + c, mask=inside, other=-float("inf")).to(tl.float32)
            d = tl.exp(x - log_sum) - tl.where(start + c == label, 1.0, 0.0)
            tl.store(logits + start + c, (d * scale).to(logits.dtype.element_ty), mask=inside)
