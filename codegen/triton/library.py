"""Triton device functions that printed kernels call, as source: each file carries those it uses.

Decayed products split e^(P - Q) between their factors, within blocks of 2^FIRST rows and about a
fixed number: one product, as long as no channel decays by more than e^-MOST within its block. From
these blocks on, and within them where a decay is stronger, blocks are halved (as eager_library
does): at each level, rows in the later half of a block meet columns in its earlier half, both
decayed to the last row of the earlier half; so every exponent is <= 0 whatever the gate, and a sum
of what lies between two rows, not a difference of prefix sums, in which a reset of -100 would leave
its rounding. Which of the two a row of scores takes, the rows after it cannot change.
The inverse doubles blocks: exact inverses of the diagonal blocks of one size give those of twice
the size.
"""

from __future__ import annotations

INVERSE = '''
@triton.jit
def unit_lower_inverse(L, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + L)^-1 of a strictly lower [C, C] tile, C = 2^LEVELS >= 16.

    Doubling: exact inverses of the diagonal blocks of one size give those of twice the size. First
    within all blocks of 16: X, and B, what of L lies between two of them, give X - X B X.
    """
    N: tl.constexpr = C // 16
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
    D = tl.sum(tl.where(same, tl.reshape(L, (N, 16, N, 16)), 0.0), 2)
    X = tl.where(i == j, 1.0, 0.0) - tl.where(i >> 1 == j >> 1, D, 0.0)
    for level in tl.static_range(1, 4):
        between = (i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level)
        B = tl.dot(X, tl.where(between, D, 0.0), input_precision=PRECISION)
        X -= tl.dot(B, X, input_precision=PRECISION)
    for level in tl.static_range(4, LEVELS):
        X = merged_inverses(X, L, C, 1 << level, PRECISION)
    return tl.reshape(X, (C, C))
'''

MERGED_INVERSES = '''
@triton.jit
def merged_inverses(Z, L, C: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr):
    """The inverses of blocks of 2 S rows from those of S rows, Z [C / S, S, S].

    Of two, X before Y, and B, what of L lies between, it is [[X, 0], [-Y B X, Y]]: products of S
    rows, where those of all C rows would be zero in most places.
    """
    N: tl.constexpr = C // (2 * S)
    X, Y = tl.split(tl.permute(tl.reshape(Z, (N, 2, S, S)), (0, 2, 3, 1)))
    B, _ = tl.split(tl.permute(tl.reshape(L, (C, N, 2, S)), (0, 1, 3, 2)))
    _, B = tl.split(tl.permute(tl.reshape(B, (N, 2, S, N, S)), (0, 2, 3, 4, 1)))
    same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
    B = tl.sum(tl.where(same, B, 0.0), 2)
    if N == 1:
        X, Y, B = tl.reshape(X, (S, S)), tl.reshape(Y, (S, S)), tl.reshape(B, (S, S))
    W = tl.dot(tl.dot(Y, B, input_precision=PRECISION), X, input_precision=PRECISION)
    if N == 1:
        X, Y, W = tl.reshape(X, (1, S, S)), tl.reshape(Y, (1, S, S)), tl.reshape(W, (1, S, S))
    above = tl.reshape(tl.permute(tl.join(X, tl.zeros_like(X)), (0, 1, 3, 2)), (N, S, 2 * S))
    below = tl.reshape(tl.permute(tl.join(-W, Y), (0, 1, 3, 2)), (N, S, 2 * S))
    return tl.reshape(tl.permute(tl.join(above, below), (0, 3, 1, 2)), (N, 2 * S, 2 * S))
'''

SUBSTITUTE = '''
@triton.jit
def substitute(L, b, x, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """U = x - b (L U) of a strictly lower [C, C] tile, or U = x - L^T (b U): row after row."""
    i = tl.arange(0, C)
    for n in range(C):
        if TRANSPOSED:
            here = i == C - 1 - n
            row = tl.sum(tl.where(here[:, None], L, 0.0), 0)
            x -= row[:, None] * tl.sum(tl.where(here[:, None], b * x, 0.0), 0)[None, :]
        else:
            here = i == n
            column = tl.sum(tl.where(here[None, :], L, 0.0), 1)
            x -= b * (column[:, None] * tl.sum(tl.where(here[:, None], x, 0.0), 0)[None, :])
    return x
'''

DECAY = '''
@triton.jit
def decay_between(
    g, C: tl.constexpr, DIAGONAL: tl.constexpr, EXCLUSIVE: tl.constexpr
):
    """e^(g_j+1 + ... + g_i) for i > j (i >= j if DIAGONAL), else 0; up to g_i-1 if EXCLUSIVE.

    Sums of whole numbers are exact, however large, and so are their differences; of each g no more
    than a half is left beside them.
    """
    whole = tl.floor(g + 0.5)
    rest = g - whole
    W, R = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
    to_W, to_R = W, R
    if EXCLUSIVE:
        to_W, to_R = W - whole, R - rest
    between = (to_W[:, None] - W[None, :]) + (to_R[:, None] - R[None, :])
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    keep = i >= j if DIAGONAL else i > j
    return tl.exp(tl.where(keep, between, float("-inf")))
'''

FLUSH = '''
@triton.jit
def flush(x, LEAST: tl.constexpr):
    """`x`, but 0 where it is smaller than LEAST; NaN stays."""
    return tl.where(x < LEAST, 0.0, x)
'''

POWER = '''
@triton.jit
def power(x):
    """e^x, or 0 where that is no normal number: `tl.exp` takes three more instructions."""
    return tl.exp2(x * 1.4426950408889634)
'''

DOUBLED = '''
@triton.jit
def doubled(since, after, level, C: tl.constexpr, BK: tl.constexpr):
    """Sums within blocks of 2^level rows, up to each row and after it, for blocks twice as long."""
    i = tl.arange(0, C)
    late = (i >> level) & 1 == 1
    last = tl.where(late, (i >> level << level) - 1, ((i >> level) + 2 << level) - 1)
    other = tl.gather(since, tl.broadcast_to(last[:, None], (C, BK)), axis=0)  # half of the block
    late = late[:, None]
    return since + tl.where(late, other, 0.0), after + tl.where(late, 0.0, other)
'''

HALVES = '''
@triton.jit
def halves(
    g, since, after, level, C: tl.constexpr, LEAST: tl.constexpr, EXCLUSIVE: tl.constexpr
):
    """Of blocks of 2^(level + 1) rows: the rows of later halves, decays of all rows to the last of
    the earlier half, and the pairs of rows that are of one block."""
    i = tl.arange(0, C)
    late = ((i >> level) & 1 == 1)[:, None]
    e = power(tl.where(late, since - g if EXCLUSIVE else since, after))
    if LEAST > 0.0:
        e = tl.where(e < LEAST, 0.0, e)
    return late, e, i[:, None] >> (level + 1) == i[None, :] >> (level + 1)
'''

BLOCK_SUMS = '''
@triton.jit
def block_sums(Q, g, C: tl.constexpr, BK: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr):
    """Sums of g within blocks of 2^FIRST rows, up to each row and after it; Q, of all rows."""
    since, after = Q, tl.zeros_like(g)
    if FIRST < LEVELS:
        blocks = tl.reshape(g, (C >> FIRST, 1 << FIRST, BK))
        since = tl.reshape(tl.cumsum(blocks, 1), (C, BK))
        after = tl.reshape(tl.cumsum(blocks, 1, reverse=True) - blocks, (C, BK))
    return since, after
'''

DECAYED = '''
@triton.jit
def decayed(x, G, ABOUT: tl.constexpr, PRECISION: tl.constexpr):
    """x e^(G + ABOUT). The sum rounds G to 2^-19, unseen by tf32's 10 bits; G / 2 is exact."""
    if PRECISION == "tf32":
        return x * power(G + ABOUT)
    e = power(G / 2)
    return x * e * power(tl.full((), ABOUT, tl.float32)) * e
'''

BLOCK_DECAY = '''
@triton.jit
def block_decay(
    Q, g, C: tl.constexpr, BK: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr,
    MOST: tl.constexpr,
):
    """How far a row's block has decayed, in the channel that has most, as a part of MOST."""
    since, _ = block_sums(Q, g, C, BK, FIRST, LEVELS)
    return tl.max(-since, 1) / MOST
'''

HALVED_DOT = '''
@triton.jit
def halved_dot(
    x, y, g, since, after, FROM: tl.constexpr, TO: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, LEAST: tl.constexpr, EXCLUSIVE: tl.constexpr,
):
    """A of `decayed_dot` between rows of one block of 2^TO, and of two of 2^FROM, else 0."""
    A = tl.zeros((C, C), dtype=tl.float32)
    for level in range(FROM, TO):
        late, e, block = halves(g, since, after, level, C, LEAST, EXCLUSIVE)
        x_late = tl.where(late, x * e, 0.0).to(DT)
        y_early = tl.where(late, 0.0, y * e).to(DT)
        B = tl.dot(x_late, tl.trans(y_early), input_precision=PRECISION)
        A += tl.where(block, B, 0.0)
        since, after = doubled(since, after, level, C, BK)
    return A
'''

DECAYED_DOT = '''
@triton.jit
def decayed_dot(
    x, y, Q, g, C: tl.constexpr, BK: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    EXCLUSIVE: tl.constexpr, HALVED: tl.constexpr,
):
    """A_ij = sum_k x_ik y_jk e^(P_ik - Q_jk) for i > j, else 0.

    Q are prefix sums of g; P is Q, or Q - g if EXCLUSIVE. Without HALVED, no block may have decayed
    by more than e^-MOST.
    """
    i = tl.arange(0, C)
    since, after = block_sums(Q, g, C, BK, FIRST, LEVELS)
    x_late = decayed(x, since - g if EXCLUSIVE else since, MOST / 2, PRECISION).to(DT)
    y_early = decayed(y, tl.minimum(-since, MOST), -MOST / 2, PRECISION).to(DT)
    A = tl.dot(x_late, tl.trans(y_early), input_precision=PRECISION)
    same = i[:, None] >> FIRST == i[None, :] >> FIRST
    A = tl.where(same & (i[:, None] > i[None, :]), A, 0.0)
    if HALVED:
        decay = block_decay(Q, g, C, BK, FIRST, LEVELS, MOST)
        if tl.max(decay, 0) >= 1.0:
            zero = tl.zeros_like(g)
            B = halved_dot(x, y, g, g, zero, 0, FIRST, C, BK, DT, PRECISION, LEAST, EXCLUSIVE)
            A = tl.where((decay < 1.0)[:, None], A, B)
    if FIRST < LEVELS:
        A += halved_dot(
            x, y, g, since, after, FIRST, LEVELS, C, BK, DT, PRECISION, LEAST, EXCLUSIVE
        )
    return A
'''

HALVED_APPLY = '''
@triton.jit
def halved_apply(
    A, x, g, since, after, FROM: tl.constexpr, TO: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, LEAST: tl.constexpr, EXCLUSIVE: tl.constexpr,
):
    """The part of `decayed_apply` of the pairs of rows that `halved_dot` computes."""
    z = tl.zeros((C, BK), dtype=tl.float32)
    for level in range(FROM, TO):
        late, e, block = halves(g, since, after, level, C, LEAST, EXCLUSIVE)
        B = tl.where(block & late, A, 0.0)
        if TRANSPOSED:
            y = tl.dot(tl.trans(B), tl.where(late, x * e, 0.0), input_precision=PRECISION)
            z += tl.where(late, 0.0, e * y)
        else:
            y = tl.dot(B, tl.where(late, 0.0, x * e), input_precision=PRECISION)
            z += tl.where(late, e * y, 0.0)
        since, after = doubled(since, after, level, C, BK)
    return z
'''

DECAYED_APPLY = '''
@triton.jit
def decayed_apply(
    A, x, Q, g, C: tl.constexpr, BK: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    EXCLUSIVE: tl.constexpr, HALVED: tl.constexpr,
):
    """z_ik = sum_j A_ij x_jk e^(P_ik - Q_jk) over j < i; P, Q, HALVED as of `decayed_dot`.

    TRANSPOSED: z_jk = sum_i A_ij x_ik e^(P_ik - Q_jk) over i > j.
    """
    i = tl.arange(0, C)
    since, after = block_sums(Q, g, C, BK, FIRST, LEVELS)
    mild = True
    if HALVED:
        mild = tl.max(block_decay(Q, g, C, BK, FIRST, LEVELS, MOST), 0) < 1.0
    if mild:
        same = i[:, None] >> FIRST == i[None, :] >> FIRST
        B = tl.where(same & (i[:, None] > i[None, :]), A, 0.0)
        before = since - g if EXCLUSIVE else since
        back = tl.minimum(-since, MOST)
        if TRANSPOSED:
            x_late = decayed(x, before, MOST / 2, PRECISION)
            y = tl.dot(tl.trans(B), x_late, input_precision=PRECISION)
            z = decayed(y, back, -MOST / 2, PRECISION)
        else:
            x_early = decayed(x, back, -MOST / 2, PRECISION)
            z = decayed(tl.dot(B, x_early, input_precision=PRECISION), before, MOST / 2, PRECISION)
    else:
        zero = tl.zeros_like(g)
        z = halved_apply(
            A, x, g, g, zero, 0, FIRST, C, BK, TRANSPOSED, PRECISION, LEAST, EXCLUSIVE
        )
    if FIRST < LEVELS:
        z += halved_apply(
            A, x, g, since, after, FIRST, LEVELS, C, BK, TRANSPOSED, PRECISION, LEAST, EXCLUSIVE
        )
    return z
'''

DECAYED_CROSSING = '''
@triton.jit
def decayed_crossing(
    A, x, y, dx, dy, g, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr, EXCLUSIVE: tl.constexpr,
):
    """z_tk = sum of A_ij x_ik y_jk e^(P_ik - Q_jk) over i >= t > j (i > t > j if EXCLUSIVE).

    Where no decay is stronger than e^LIMIT, as a difference of sums. Elsewhere no sum cancels: of
    two halves, a late t is crossed by what rows from t on get from the earlier half, an early t by
    what rows before t give to the later half.
    """
    i = tl.arange(0, C)
    z = tl.zeros((C, BK), dtype=tl.float32)
    if tl.min(tl.min(g, 1), 0) > LIMIT:
        taken = x * dx
        z = tl.cumsum(taken - y * dy, 0, reverse=True)
        if EXCLUSIVE:
            z -= taken
    else:
        since, after = g, tl.zeros_like(g)
        for level in range(LEVELS):
            late, e, block = halves(g, since, after, level, C, 0.0, EXCLUSIVE)
            B = tl.where(block & late, A, 0.0)
            x_late = tl.where(late, x * e, 0.0)
            y_early = tl.where(late, 0.0, y * e)
            taken = x_late * tl.dot(B, y_early, input_precision=PRECISION)
            given = y_early * tl.dot(tl.trans(B), x_late, input_precision=PRECISION)
            later = i[None, :] > i[:, None] if EXCLUSIVE else i[None, :] >= i[:, None]
            crosses = tl.where(late, later, i[None, :] < i[:, None])
            same = i[:, None] >> level == i[None, :] >> level
            summed = tl.where(crosses & same, 1.0, 0.0)
            z += tl.dot(summed, taken + given, input_precision=PRECISION)
            since, after = doubled(since, after, level, C, BK)
    return z
'''

EXCLUSIVE = '''
@triton.jit
def _shift(before_a, sum_a, before_b, sum_b):
    return sum_a + before_b, sum_a + sum_b


@triton.jit
def exclusive_sum(x, REVERSE: tl.constexpr):
    """Sum over the rows before (after, if REVERSE) each row; `cumsum - x` would cancel."""
    before, _ = tl.associative_scan((tl.zeros_like(x), x), 0, _shift, reverse=REVERSE)
    return before
'''

TIME_SUM = '''
@triton.jit
def time_sum(x, C: tl.constexpr, REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr, DT: tl.constexpr):
    """Sums over the rows up to each row, from each on if REVERSE, without its own if EXCLUSIVE.

    Products with ones of three parts of 8 bits, which are all of x: scans of matrices would move
    every number from thread to thread, log2(C) times.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if EXCLUSIVE:
        summed = i < j if REVERSE else i > j
    else:
        summed = i <= j if REVERSE else i >= j
    ones = tl.where(summed, 1.0, 0.0).to(DT)
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = x - high
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    low = rest - middle
    sums = tl.dot(ones, low.to(DT), input_precision="tf32")
    sums = tl.dot(ones, middle.to(DT), sums, input_precision="tf32")
    return tl.dot(ones, high.to(DT), sums, input_precision="tf32")
'''

EXPM1 = '''
@triton.jit
def expm1(x):
    """e^x - 1 without cancellation near 0 (Kahan)."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * x / tl.log(tl.where(u == 1.0, 2.0, u)))
    return tl.where(tl.abs(x) > 1.0, u - 1.0, near)
'''

LOG1P = '''
@triton.jit
def log1p(x):
    """log(1 + x) without cancellation near 0 (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))
'''

SOFTPLUS = '''
@triton.jit
def softplus(x):
    """log(1 + e^x), which overflows for no x."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
'''

LOGSIGMOID = '''
@triton.jit
def logsigmoid(x):
    """log sigmoid(x)."""
    return -softplus(-x)
'''

TANH = '''
@triton.jit
def tanh(x):
    """Hyperbolic tangent, exact near 0 and at large x."""
    u = expm1(-2.0 * tl.abs(x))
    return tl.where(x > 0, -u, u) / (u + 2.0)
'''

_BLOCKS = ("power", "doubled", "halves", "block_sums", "block_decay", "decayed")
# name -> (source, the functions it calls)
FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "merged_inverses": (MERGED_INVERSES, ()),
    "unit_lower_inverse": (INVERSE, ("merged_inverses",)),
    "substitute": (SUBSTITUTE, ()),
    "decay_between": (DECAY, ()),
    "flush": (FLUSH, ()),
    "doubled": (DOUBLED, ()),
    "halves": (HALVES, ()),
    "block_sums": (BLOCK_SUMS, ()),
    "decayed": (DECAYED, ()),
    "power": (POWER, ()),
    "block_decay": (BLOCK_DECAY, ("block_sums",)),
    "halved_dot": (HALVED_DOT, ()),
    "halved_apply": (HALVED_APPLY, ()),
    "decayed_dot": (DECAYED_DOT, (*_BLOCKS, "halved_dot")),
    "decayed_apply": (
        DECAYED_APPLY,
        (*_BLOCKS, "halved_apply"),
    ),
    "decayed_crossing": (DECAYED_CROSSING, ("power", "doubled", "halves")),
    "exclusive_sum": (EXCLUSIVE, ()),
    "time_sum": (TIME_SUM, ()),
    "expm1": (EXPM1, ()),
    "log1p": (LOG1P, ()),
    "softplus": (SOFTPLUS, ("log1p",)),
    "logsigmoid": (LOGSIGMOID, ("softplus", "log1p")),
    "tanh": (TANH, ("expm1",)),
}


def sources(used: set[str]) -> str:
    """The source of the functions in `used` and of all that they call, callees first."""
    needed = used | {callee for name in used for callee in FUNCTIONS[name][1]}
    ordered = ("log1p", "expm1", "softplus", *_BLOCKS, "halved_dot", "halved_apply")
    names = [n for n in ordered if n in needed] + sorted(needed - set(ordered))
    return "\n".join(FUNCTIONS[name][0] for name in names)
