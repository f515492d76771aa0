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
_FUNCTIONS = {
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
