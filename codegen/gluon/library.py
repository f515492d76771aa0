"""Gluon device functions that printed kernels call, as source: each file carries those it uses."""

from __future__ import annotations

from collections.abc import Iterable

_SUMS = '''
@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def sums(x, SCANNED: gl.constexpr, OUT: gl.constexpr, REVERSE: gl.constexpr):
    """Sums up to each row, or from it on; SCANNED: the layout in which threads add."""
    found = gl.associative_scan(gl.convert_layout(x, SCANNED), 0, add, reverse=REVERSE)
    return gl.convert_layout(found, OUT)
'''
_SUMS_BESIDE = '''
@gluon.jit
def shift(before_a, sum_a, before_b, sum_b):
    return sum_a + before_b, sum_a + sum_b


@gluon.jit
def sums_beside(x, SCANNED: gl.constexpr, OUT: gl.constexpr, REVERSE: gl.constexpr):
    """Sums over the rows before (after, if REVERSE) each row; `sums - x` would cancel."""
    y = gl.convert_layout(x, SCANNED)
    found, _ = gl.associative_scan((gl.zeros_like(y), y), 0, shift, reverse=REVERSE)
    return gl.convert_layout(found, OUT)
'''
_DECAY_BETWEEN = '''
@gluon.jit
def decay_between(
    g, C: gl.constexpr, LINE: gl.constexpr, SCORES: gl.constexpr, DIAGONAL: gl.constexpr,
    EXCLUSIVE: gl.constexpr,
):
    """e^(g_j+1 + ... + g_i) for i > j (i >= j if DIAGONAL), else 0; up to g_i-1 if EXCLUSIVE.

    Sums of whole numbers are exact, however large, and so are their differences; of each g no more
    than a half is left beside them.
    """
    I: gl.constexpr = gl.SliceLayout(1, SCORES)
    J: gl.constexpr = gl.SliceLayout(0, SCORES)
    line = gl.convert_layout(g, LINE)
    whole = gl.floor(line + 0.5)
    rest = line - whole
    W, R = gl.associative_scan(whole, 0, add), gl.associative_scan(rest, 0, add)
    to_W, to_R = W, R
    if EXCLUSIVE:
        to_W, to_R = W - whole, R - rest
    of_W = gl.convert_layout(to_W, I)[:, None] - gl.convert_layout(W, J)[None, :]
    of_R = gl.convert_layout(to_R, I)[:, None] - gl.convert_layout(R, J)[None, :]
    i, j = gl.arange(0, C, I)[:, None], gl.arange(0, C, J)[None, :]
    keep = i >= j if DIAGONAL else i > j
    return gl.exp(gl.where(keep, of_W + of_R, float("-inf")))
'''
_INVERSE = '''
@gluon.jit
def unit_lower_inverse(
    L, left, right, C: gl.constexpr, LEVELS: gl.constexpr, OUT: gl.constexpr, GROUPS: gl.constexpr
):
    """(1 + L)^-1 of a strictly lower [C, C] tile, C = 2^LEVELS.

    Doubling: exact inverses X of the diagonal blocks of one size, and B, what of L lies between two
    of them, give those of twice the size, X - X B X. `left`, `right`: room for factors, the right
    one transposed, as tensor cores take float32.
    """
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 8])
    L = gl.convert_layout(L, SUMS)
    i = gl.arange(0, C, gl.SliceLayout(1, SUMS))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, SUMS))[None, :]
    zero = gl.zeros((C, C), gl.float32, SUMS)
    X = gl.where(i == j, 1.0, 0.0) - gl.where(i >> 1 == j >> 1, L, 0.0)
    for level in gl.static_range(1, LEVELS):
        between = (i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level)
        barrier()
        left.store(X)
        right.permute((1, 0)).store(gl.where(between, L, 0.0))
        fence_async_shared()
        barrier()
        B = warpgroup_mma(left, right.permute((1, 0)), zero, use_acc=False, is_async=True)
        B = warpgroup_mma_wait(0, deps=(B,))
        barrier()
        left.store(-B)
        right.permute((1, 0)).store(X)
        fence_async_shared()
        barrier()
        X = warpgroup_mma(left, right.permute((1, 0)), X, is_async=True)
        X = warpgroup_mma_wait(0, deps=(X,))
    return gl.convert_layout(X, OUT)
'''
_POWER = '''
@gluon.jit
def power(x):
    """e^x, or 0 where that is no normal number: `gl.exp` takes more instructions."""
    return gl.exp2(x * 1.4426950408889634)
'''
_TIME_SUMS = '''
@gluon.jit
def time_sums(start, ones, x):
    """`start` and sums over those rows of x, in shared memory, where a row of `ones` has 1."""
    found = warpgroup_mma(ones, x, start, is_async=True)
    return warpgroup_mma_wait(0, deps=(found,))
'''
_TIME_SUMS_OF_PARTS = '''
@gluon.jit
def time_sums_of_parts(start, ones, x, room):
    """`time_sums` of float32 tiles: of two parts of 8 bits, more than their factors had."""
    high = x.to(gl.bfloat16)
    barrier()
    room.index(0).store(high)
    room.index(1).store((x - high.to(gl.float32)).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    found = warpgroup_mma(ones, room.index(1), start, is_async=True)
    found = warpgroup_mma(ones, room.index(0), found, is_async=True)
    return warpgroup_mma_wait(0, deps=(found,))
'''
_HALVES = '''
@gluon.jit
def halves(
    g, ones, level, C: gl.constexpr, BK: gl.constexpr, KEYS: gl.constexpr, SCORES: gl.constexpr
):
    """Of blocks of 2^(level + 1) rows: decays between each row and the border of the halves, and
    the pairs of a row of the later and one of the earlier half. `ones`: room for a factor."""
    i = gl.arange(0, C, gl.SliceLayout(1, SCORES))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, SCORES))[None, :]
    late = (i >> level) & 1 == 1
    between = (i >> level == j >> level) & (late == (i >= j))
    barrier()
    ones.store(gl.where(between, 1.0, 0.0).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    e = power(time_sums(gl.zeros((C, BK), gl.float32, KEYS), ones, g))
    return e, (i >> (level + 1) == j >> (level + 1)) & late & ((j >> level) & 1 == 0)
'''
_DECAYED_DOT = '''
@gluon.jit
def decayed_dot(
    x, y, g, within, ones, room, C: gl.constexpr, BK: gl.constexpr, FIRST: gl.constexpr,
    KEYS: gl.constexpr, SCORES: gl.constexpr,
):
    """A_ij = sum_k x_ik y_jk e^(g_j+1,k + ... + g_ik) for i > j, else 0; C = 2^(FIRST + 1).

    Factors are in shared memory. A product of `within` and g sums g over the rows before each row
    in its block of 2^FIRST. Between blocks the decay is that of each row to the border. Within a
    block it is split, half of e^-120 = 2^-173 each way, as far as float32 and bfloat16 go; a row
    whose block has decayed by more takes halves of the block, their halves, and so on.
    """
    i = gl.arange(0, C, gl.SliceLayout(1, SCORES))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, SCORES))[None, :]
    zero = gl.zeros((C, C), gl.float32, SCORES)
    sums = time_sums(g.load(KEYS).to(gl.float32), within, g) * 1.4426950408889634
    far = gl.convert_layout(gl.max(-sums, 1), gl.SliceLayout(1, SCORES)) >= 174.0
    barrier()
    room.index(0).store((x.load(KEYS).to(gl.float32) * gl.exp2(sums + 87.0)).to(gl.bfloat16))
    back = gl.exp2(gl.minimum(-sums, 174.0) - 87.0)
    room.index(1).store((y.load(KEYS).to(gl.float32) * back).to(gl.bfloat16))
    rest = time_sums(gl.zeros((C, BK), gl.float32, KEYS), within.permute((1, 0)), g)
    room.index(2).store((y.load(KEYS).to(gl.float32) * power(rest)).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    early, across = room.index(1).permute((1, 0)), room.index(2).permute((1, 0))
    A = warpgroup_mma(room.index(0), early, zero, use_acc=False, is_async=True)
    B = warpgroup_mma(room.index(0), across, zero, use_acc=False, is_async=True)
    A, B = warpgroup_mma_wait(0, deps=(A, B))
    if gl.max(far.to(gl.int32), 0) > 0:
        H = zero
        for level in range(FIRST):
            e, pairs = halves(g, ones, level, C, BK, KEYS, SCORES)
            barrier()
            room.index(0).store((x.load(KEYS).to(gl.float32) * e).to(gl.bfloat16))
            room.index(1).store((y.load(KEYS).to(gl.float32) * e).to(gl.bfloat16))
            fence_async_shared()
            barrier()
            D = warpgroup_mma(room.index(0), early, zero, use_acc=False, is_async=True)
            D = warpgroup_mma_wait(0, deps=(D,))
            H += gl.where(pairs, D, 0.0)
        A = gl.where(far[:, None], H, A)
    A = gl.where(i >> FIRST == j >> FIRST, A, B * 2.0**-87)
    return gl.where(i > j, A, 0.0)
'''
_DECAYED_APPLY = '''
@gluon.jit
def decayed_apply(
    A, x, g, within, ones, room, C: gl.constexpr, BK: gl.constexpr, FIRST: gl.constexpr,
    KEYS: gl.constexpr, SCORES: gl.constexpr, TRANSPOSED: gl.constexpr,
):
    """z_ik = sum_j A_ij x_jk e^(g_j+1,k + ... + g_ik) over j < i, as `decayed_dot`.

    TRANSPOSED: z_jk = sum_i A_ij x_ik e^(g_j+1,k + ... + g_ik) over i > j. `ones`: of two factors.
    """
    i = gl.arange(0, C, gl.SliceLayout(1, SCORES))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, SCORES))[None, :]
    zero = gl.zeros((C, BK), gl.float32, KEYS)
    sums = time_sums(g.load(KEYS).to(gl.float32), within, g) * 1.4426950408889634
    far = gl.max(gl.max(-sums, 1), 0) >= 174.0
    A = gl.where(i > j, A, 0.0)
    same = i >> FIRST == j >> FIRST
    barrier()
    ones.index(0).store(gl.where(same & (far == 0), A, 0.0).to(gl.bfloat16))
    ones.index(1).store(gl.where(same, 0.0, A).to(gl.bfloat16))
    if TRANSPOSED:
        room.index(0).store((x.load(KEYS).to(gl.float32) * gl.exp2(sums + 87.0)).to(gl.bfloat16))
        fence_async_shared()
        barrier()
        own, across = ones.index(0).permute((1, 0)), ones.index(1).permute((1, 0))
        z = warpgroup_mma(own, room.index(0), zero, use_acc=False, is_async=True)
        z = warpgroup_mma_wait(0, deps=(z,)) * gl.exp2(gl.minimum(-sums, 174.0) - 87.0)
        rest = time_sums(zero, within.permute((1, 0)), g) * 1.4426950408889634
        w = warpgroup_mma(across, room.index(0), zero, use_acc=False, is_async=True)
        z += warpgroup_mma_wait(0, deps=(w,)) * gl.exp2(rest - 87.0)
    else:
        back = gl.exp2(gl.minimum(-sums, 174.0) - 87.0)
        room.index(0).store((x.load(KEYS).to(gl.float32) * back).to(gl.bfloat16))
        rest = time_sums(zero, within.permute((1, 0)), g) * 1.4426950408889634
        back = gl.exp2(rest - 87.0)
        room.index(1).store((x.load(KEYS).to(gl.float32) * back).to(gl.bfloat16))
        fence_async_shared()
        barrier()
        z = warpgroup_mma(ones.index(0), room.index(0), zero, use_acc=False, is_async=True)
        z = warpgroup_mma(ones.index(1), room.index(1), z, is_async=True)
        z = warpgroup_mma_wait(0, deps=(z,)) * gl.exp2(sums + 87.0)
    if far:
        for level in range(FIRST):
            e, pairs = halves(g, ones.index(0), level, C, BK, KEYS, SCORES)
            barrier()
            ones.index(0).store(gl.where(pairs, A, 0.0).to(gl.bfloat16))
            room.index(0).store((x.load(KEYS).to(gl.float32) * e).to(gl.bfloat16))
            fence_async_shared()
            barrier()
            B = ones.index(0).permute((1, 0)) if TRANSPOSED else ones.index(0)
            part = warpgroup_mma(B, room.index(0), zero, use_acc=False, is_async=True)
            z += e * warpgroup_mma_wait(0, deps=(part,))
    return z
'''
_SIGMOID = """
@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))
"""
_SOFTPLUS = '''
@gluon.jit
def softplus(x):
    """log(1 + e^x), which overflows for no x, and without cancellation near 0 (Kahan)."""
    y = gl.exp(-gl.abs(x))
    u = 1.0 + y
    rest = gl.where(u == 1.0, y, gl.log(u) * y / gl.where(u == 1.0, 1.0, u - 1.0))
    return gl.maximum(x, 0.0) + rest
'''
_LOGSIGMOID = """
@gluon.jit
def logsigmoid(x):
    return -softplus(-x)
"""
_PUT = '''
@gluon.jit
def put(
    pointer, x, stride, rows, TOKENS: gl.constexpr, LAYOUT: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr,
):
    """Stores a tile [M, N], along the axis TOKENS the first `rows`, which lie `stride` apart."""
    i = gl.arange(0, M, gl.SliceLayout(1, LAYOUT))[:, None]
    j = gl.arange(0, N, gl.SliceLayout(0, LAYOUT))[None, :]
    if TOKENS == 0:
        gl.store(pointer + i.to(gl.int64) * stride + j, x, mask=(i < rows) & (j < N))
    else:
        gl.store(pointer + j.to(gl.int64) * stride + i, x, mask=(j < rows) & (i < M))
'''
_LEAVE = '''
@gluon.jit
def leave(
    desc, pointer, row, column, columns, place, rows, EVEN: gl.constexpr, LAYOUT: gl.constexpr,
    C: gl.constexpr, N: gl.constexpr,
):
    """Sends a tile [C, N] by TMA, or the rows of it that its sequence has."""
    if EVEN:
        async_store(desc, [row, column], place)
    else:
        if rows == C:
            async_store(desc, [row, column], place)
        else:
            first = pointer + row.to(gl.int64) * columns + column
            put(first, place.load(LAYOUT), columns, rows, 0, LAYOUT, C, N)
'''
_CUT = '''
@gluon.jit
def cut(place, rows, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Has zeros in the rows of a tile that was loaded beyond the end of its sequence."""
    if rows < C:
        i = gl.arange(0, C, gl.SliceLayout(1, LAYOUT))[:, None]
        place.store(gl.where(i < rows, place.load(LAYOUT), 0.0).to(gl.bfloat16))
        fence_async_shared()
        barrier()
'''
_PRESENT = '''
@gluon.jit
def present(x, i, rows, EVEN: gl.constexpr):
    """x with zeros where i, the row of its entries, is beyond the end of the sequence."""
    if EVEN:
        return x
    else:
        return gl.where(i < rows, x, 0.0)
'''
_FUNCTIONS = {
    "sigmoid": (_SIGMOID, ()),
    "softplus": (_SOFTPLUS, ()),
    "logsigmoid": (_LOGSIGMOID, ("softplus",)),
    "power": (_POWER, ()),
    "time_sums": (_TIME_SUMS, ()),
    "time_sums_of_parts": (_TIME_SUMS_OF_PARTS, ()),
    "halves": (_HALVES, ()),
    "decayed_dot": (_DECAYED_DOT, ("power", "time_sums", "halves")),
    "decayed_apply": (_DECAYED_APPLY, ("power", "time_sums", "halves")),
    "put": (_PUT, ()),
    "leave": (_LEAVE, ("put",)),
    "cut": (_CUT, ()),
    "present": (_PRESENT, ()),
    "unit_lower_inverse": (_INVERSE, ()),
    "sums": (_SUMS, ()),
    "sums_beside": (_SUMS_BESIDE, ()),
    "decay_between": (_DECAY_BETWEEN, ("sums",)),
}


def sources(used: Iterable[str]) -> list[str]:
    """The source of the functions in `used` and of all that they call, callees first."""
    called = set(used)
    called |= {callee for name in called for callee in _FUNCTIONS[name][1]}
    return [text for name, (text, _) in _FUNCTIONS.items() if name in called]
