"""The gradient of one tile of values."""

import triton
import triton.language as tl

from .common import (
    dot,
    exp2_difference,
    load_pair,
    load_state,
    load_tokens,
    operand,
    store_tokens,
    zeros_tuple,
)


@triton.jit
def _add_scores(
    scores, q, k, k0,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    ROW: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BK keys' part of k.q, keys on the rows, against each tile; k's block too."""
    b_k = load_tokens(k, ROW, k0, BT, K, BK, SOURCE)
    queries = ()
    for y in tl.static_range(COUNT):
        queries = queries + (load_tokens(q, (FIRST + y) * BS, k0, BS, K, BK, SOURCE),)
    updated = ()
    for y in tl.static_range(COUNT):
        updated = updated + (dot(b_k, tl.trans(queries[y]), scores[y], PRECISION),)
    return updated, b_k


@triton.jit
def values_backward(
    q, k, dh, p_c, p_c_low, p_a, p_a_low, p_inverse, dstate,
    p_dv, dv_row, length, share,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    L: tl.constexpr,
    BS: tl.constexpr,
    TILE: tl.constexpr,
    SCALE: tl.constexpr,
    PAIRS: tl.constexpr,
    SOURCE: tl.constexpr,
    STATES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of the chunk's tile TILE, against its rows from there on. share: which of as many parts of V as K has tiles.

    Scores are computed transposed, keys on the rows, so that no product's result is ever transposed.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    SHARE: tl.constexpr = (V + BV * NKT - 1) // (BV * NKT) * BV
    FIRST: tl.constexpr = TILE * BT // BS  # tiles of rows before this one lie wholly in the past
    COUNT: tl.constexpr = L // BS - FIRST
    ROW: tl.constexpr = TILE * BT
    t_k = ROW + tl.arange(0, BT)
    c_hi, c_lo = load_pair(p_c, p_c_low, t_k, PAIRS)

    scores = zeros_tuple(COUNT, BT, BS)
    if NKT == 1:
        scores, b_k = _add_scores(scores, q, k, 0, K, BT, BK, BS, ROW, FIRST, COUNT, SOURCE, PRECISION)
    else:
        for k0 in range(0, K, BK):
            scores, _ = _add_scores(scores, q, k, k0, K, BT, BK, BS, ROW, FIRST, COUNT, SOURCE, PRECISION)
    b_alpha = exp2_difference(c_hi, c_lo, 0.0, 0.0, PAIRS)
    weighted = ()
    for y in tl.static_range(COUNT):
        t_q = (FIRST + y) * BS + tl.arange(0, BS)
        a_hi, a_lo = load_pair(p_a, p_a_low, t_q, PAIRS)
        b_d = exp2_difference(c_hi[:, None], c_lo[:, None], a_hi[None, :], a_lo[None, :], PAIRS)
        b_s = scores[y] * b_d * (tl.load(p_inverse + t_q) * SCALE)[None, :]
        if (FIRST + y) * BS < ROW + BT:
            b_s = tl.where(t_q[None, :] >= t_k[:, None], b_s, 0.0)
        weighted = weighted + (operand(b_s, BF16, PRECISION),)

    for v0 in range(share * SHARE, tl.minimum(share * SHARE + SHARE, V), BV):
        b_dv = tl.zeros([BT, BV], tl.float32)
        if NKT == 1:
            b_dc = load_state(dstate, 0, v0, K, V, BK, BV, STATES)
            b_dv = dot(operand(b_k, BF16, PRECISION), operand(b_dc, BF16, PRECISION), b_dv, PRECISION)
        else:
            for k0 in range(0, K, BK):
                b_kk = load_tokens(k, ROW, k0, BT, K, BK, SOURCE)
                b_dc = load_state(dstate, k0, v0, K, V, BK, BV, STATES)
                b_dv = dot(operand(b_kk, BF16, PRECISION), operand(b_dc, BF16, PRECISION), b_dv, PRECISION)
        b_dv *= b_alpha[:, None]
        for y in tl.static_range(COUNT):
            b_dh = load_tokens(dh, (FIRST + y) * BS, v0, BS, V, BV, SOURCE)
            b_dv = dot(weighted[y], operand(b_dh, BF16, PRECISION), b_dv, PRECISION)
        store_tokens(p_dv, b_dv, ROW, dv_row, length, v0, BT, V, BV)
