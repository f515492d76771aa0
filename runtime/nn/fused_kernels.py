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
    span, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first, width = tl.load(spans + 3 * span), tl.load(spans + 3 * span + 1)
    unit = tl.load(spans + 3 * span + 2) != 0
    c = tl.arange(0, BC)
    columns, inside = first + c, c < width
    t = tl.program_id(1) * BT + tl.arange(0, BT)
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
def convolve_backward(
    x,
    weight,
    spans,
    position,
    dy,
    dx,
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
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients for one span and TILES times BT tokens; activations are computed again.

    A token's dx sums over the outputs that saw it: those of the next SIZE - 1 tokens of its
    sequence, and its own.
    """
    span, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first, width = tl.load(spans + 3 * span), tl.load(spans + 3 * span + 1)
    unit = tl.load(spans + 3 * span + 2) != 0
    c = tl.arange(0, BC)
    columns, inside = first + c, c < width
    x += b * stride_b
    row = b * tl.num_programs(1) + tl.program_id(1)
    taps = tl.arange(0, SIZE)
    dw = tl.zeros([SIZE, BC], tl.float32)
    for tile in range(TILES):
        start = (tl.program_id(1) * TILES + tile) * BT
        t = start + tl.arange(0, BT)
        dx_tile = tl.zeros([BT, BC], tl.float32)
        for ahead in range(SIZE):  # unrolled, it would hold SIZE tiles of everything
            r = t + ahead
            place = _places(position, r, T, PACKED)
            seen = ((r < T) & (place >= ahead))[:, None] & inside[None, :]
            at = (b * T + r)[:, None] * channels + columns[None, :]
            d = tl.load(dy + at, mask=seen, other=0.0).to(tl.float32)
            if ACTIVATE:
                z = _convolved(x, weight, r, place, columns, inside, T, stride_t, channels, SIZE)
                sigmoid = tl.sigmoid(z)
                a = z * sigmoid
                inverse = tl.rsqrt(tl.sum(a * a, 1) + eps)
                along = tl.sum(a * d, 1) * inverse * inverse
                d = tl.where(unit, inverse[:, None] * (d - a * along[:, None]), d)
                d = d * (sigmoid + a * (1.0 - sigmoid))
            w = tl.load(weight + ahead * channels + columns, mask=inside, other=0.0)
            dx_tile += d * w.to(tl.float32)[None, :]
            # the tap `ahead` of these outputs read the tokens t
            own = (t < T)[:, None] & inside[None, :]
            tap = tl.load(
                x + t.to(tl.int64)[:, None] * stride_t + columns[None, :], mask=own, other=0.0
            )
            dw += tl.where(
                (taps == ahead)[:, None], tl.sum(d * tap.to(tl.float32), 0)[None, :], 0.0
            )
        at = (b * T + t)[:, None] * channels + columns[None, :]
        tl.store(
            dx + at,
            dx_tile.to(dx.dtype.element_ty),
            mask=(t < T)[:, None] & inside[None, :],
        )
    at = (row * SIZE + taps)[:, None] * channels + columns[None, :]
    tl.store(dweight + at, dw, mask=inside[None, :])


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
